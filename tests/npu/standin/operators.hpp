// What a file of operators needs: the descriptors that op-plugin fills, and the OP macro.
//
//     OP(aclnnAdd, (In a, In b, Number alpha, Out out), put(out, at::add(*a, *b, *alpha)))
//
// The parameters are an ABI: their types must be those that op-plugin passes (float is not double, bool and int8_t are
// not int64_t). In is read, Out is written; the check of the streams' order relies on it.
#pragma once
#include "standin.hpp"
#include <ATen/core/Tensor.h>
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <atomic>
#include <optional>
#include <tuple>

// Descriptors. op-plugin destroys its reference right after the launch; a captured launch keeps its own.
struct Descriptor {
  std::atomic<int> references = 1;
};
struct aclTensor : Descriptor {
  at::Tensor view;               // of device memory, which is the host's here
  int32_t format = 2;            // ACL_FORMAT_ND
  std::vector<int64_t> storage;  // sizes in that format
  void* data = nullptr;
};
struct aclScalar : Descriptor {
  at::Scalar value;
};
template <class T>
struct Array : Descriptor {
  std::vector<T> values;
};
struct aclTensorList : Descriptor {
  std::vector<aclTensor*> tensors;
};

namespace standin {

// Parameters: pointers by the ABI (trivially copyable), with access to what they point to. All may be null (absent).
template <class D>
struct TensorParameter {
  D* descriptor;
  const at::Tensor& operator*() const { return descriptor->view; }
  const at::Tensor* operator->() const { return &descriptor->view; }
  explicit operator bool() const { return descriptor != nullptr; }
  std::optional<at::Tensor> optional() const { return descriptor ? std::optional<at::Tensor>(descriptor->view) : std::nullopt; }
};
struct In : TensorParameter<aclTensor> {};
struct Out : TensorParameter<aclTensor> {
  at::Tensor tensor() const { return descriptor->view; }  // to call operators in place
};
struct Number {
  aclScalar* descriptor;
  const at::Scalar& operator*() const { return descriptor->value; }
  explicit operator bool() const { return descriptor != nullptr; }
  std::optional<at::Scalar> optional() const { return descriptor ? std::optional<at::Scalar>(descriptor->value) : std::nullopt; }
};
template <class T>
struct ArrayParameter {
  Array<T>* descriptor;
  const std::vector<T>& operator*() const { return descriptor->values; }
  const std::vector<T>* operator->() const { return &descriptor->values; }
  explicit operator bool() const { return descriptor != nullptr; }
};
using Ints = ArrayParameter<int64_t>;
struct Tensors {
  aclTensorList* descriptor;
  const std::vector<aclTensor*>& operator*() const { return descriptor->tensors; }
  explicit operator bool() const { return descriptor != nullptr; }
  std::vector<at::Tensor> list() const;
};
using Text = const char*;  // lies on op-plugin's stack: a launch keeps a copy
using Dtype = int32_t;     // aclDataType

at::ScalarType torch_dtype(Dtype dtype);

// A workspace is allocated by op-plugin; none is needed here.
struct Executor {
  Task task;
};

// Keeps an argument for as long as its launch may run.
template <class T>
struct Held {
  T value;
  Held(T given, Task&) : value(given) {}
  T get() const { return value; }
};
template <>
struct Held<Text> {
  std::string value;
  Held(Text given, Task&) : value(given ? given : "") {}
  Text get() const { return value.c_str(); }
};
void hold(Descriptor* descriptor);
void drop(aclTensor*);
void drop(aclScalar*);
void drop(Array<int64_t>*);
void drop(Array<bool>*);
void drop(Array<float>*);
void drop(aclTensorList*);
void note_read(Task& task, const aclTensor* tensor);
void note_write(Task& task, const aclTensor* tensor);
inline void note(Task& task, In parameter) { note_read(task, parameter.descriptor); }
inline void note(Task& task, Out parameter) { note_write(task, parameter.descriptor); }
void note_numbers(Task& task, const std::vector<int64_t>& numbers);
inline void note(Task& task, Ints parameter) {
  if (parameter.descriptor) note_numbers(task, *parameter);
}
inline void note(Task& task, Tensors parameter) {
  if (parameter.descriptor)
    for (auto* tensor : parameter.descriptor->tensors) note_read(task, tensor);
}
template <class T>
void note(Task&, T) {}
template <class P>
struct HeldDescriptor {
  P parameter;
  HeldDescriptor(P given, Task& task) : parameter(given) {
    hold(given.descriptor);
    note(task, given);
  }
  HeldDescriptor(const HeldDescriptor& other) : parameter(other.parameter) { hold(parameter.descriptor); }
  HeldDescriptor& operator=(const HeldDescriptor&) = delete;
  ~HeldDescriptor() { drop(parameter.descriptor); }
  P get() const { return parameter; }
};
template <>
struct Held<In> : HeldDescriptor<In> {
  using HeldDescriptor::HeldDescriptor;
};
template <>
struct Held<Out> : HeldDescriptor<Out> {
  using HeldDescriptor::HeldDescriptor;
};
template <>
struct Held<Number> : HeldDescriptor<Number> {
  using HeldDescriptor::HeldDescriptor;
};
template <>
struct Held<Ints> : HeldDescriptor<Ints> {
  using HeldDescriptor::HeldDescriptor;
};
template <>
struct Held<ArrayParameter<bool>> : HeldDescriptor<ArrayParameter<bool>> {
  using HeldDescriptor::HeldDescriptor;
};
template <>
struct Held<Tensors> : HeldDescriptor<Tensors> {
  using HeldDescriptor::HeldDescriptor;
};

// Runs a body below autograd, autocast and Python modes; an exception ends the process with the operator's name.
void compute(const char* name, const std::function<void()>& body);
std::string operands_of(const Task& task);
int launch(Executor* executor, void* stream);

// The first of an operator's two functions: takes the arguments, makes the launch.
template <class F>
struct Entry;
template <class... A>
struct Entry<void (*)(A...)> {
  template <void (*Body)(A...), const char* NAME>
  static int prepare(A... arguments, uint64_t* workspace, Executor** executor) {
    *workspace = 0;
    *executor = new Executor;
    Task& task = (*executor)->task;
    task.name = NAME;
    // In braces, which evaluate from left to right: the log has the operands in their order.
    std::shared_ptr<std::tuple<Held<A>...>> held(new std::tuple<Held<A>...>{Held<A>(arguments, task)...});
    task.run = [held] { compute(NAME, [&] { std::apply([](auto&... each) { Body(each.get()...); }, *held); }); };
    return 0;
  }
};

#define STANDIN_UNPACK(...) __VA_ARGS__
// An indirect function (STT_GNU_IFUNC) gives the template's instance its C name.
#define OP(NAME, PARAMETERS, ...)                                                                       \
  static void NAME##_body PARAMETERS { __VA_ARGS__; }                                                   \
  static constexpr char NAME##_name[] = #NAME;                                                          \
  extern "C" {                                                                                          \
  static void* NAME##_entry() {                                                                         \
    return reinterpret_cast<void*>(&Entry<decltype(&NAME##_body)>::prepare<&NAME##_body, NAME##_name>); \
  }                                                                                                     \
  int NAME##GetWorkspaceSize() __attribute__((ifunc(#NAME "_entry")));                                  \
  int NAME(void*, uint64_t, Executor* executor, void* stream) { return launch(executor, stream); }      \
  }

// Results go through here: an output of another shape than its value is a fault, never a broadcast.
void put(Out out, const at::Tensor& value);
inline void put_optional(Out out, const at::Tensor& value) {
  if (out && out->numel()) put(out, value);
}
// bf16 and fp16 products and sums are accumulated in fp32, as the cube unit does.
inline at::Tensor wide(const at::Tensor& tensor) {
  return at::isReducedFloatingType(tensor.scalar_type()) ? tensor.to(at::kFloat) : tensor;
}
inline at::Tensor wide(In tensor) { return wide(*tensor); }
inline std::optional<at::Tensor> wide_optional(In tensor) {
  return tensor ? std::optional<at::Tensor>(wide(*tensor)) : std::nullopt;
}
// A matrix whose storage may be in blocks (NZ).
at::Tensor matrix(In tensor);

}  // namespace standin

using namespace standin;
