// Descriptors of op-plugin's arguments, and how a launch runs.
#include "operators.hpp"
#include <ATen/core/grad_mode.h>
#include <ATen/Parallel.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <mutex>

namespace standin {

constexpr int32_t ND = 2, NZ = 29;

at::ScalarType torch_dtype(Dtype dtype) {
  switch (dtype) {
    case 0: return at::kFloat;
    case 1: return at::kHalf;
    case 2: return at::kChar;
    case 3: return at::kInt;
    case 4: return at::kByte;
    case 6: return at::kShort;
    case 9: return at::kLong;
    case 11: return at::kDouble;
    case 12: return at::kBool;
    case 16: return at::kComplexFloat;
    case 17: return at::kComplexDouble;
    case 27: return at::kBFloat16;
  }
  die("aclDataType " + std::to_string(dtype) + " has no implementation");
}

void hold(Descriptor* descriptor) {
  if (descriptor) ++descriptor->references;
}
template <class D>
static bool released(D* descriptor) {
  return descriptor && --descriptor->references == 0;
}
void drop(aclTensor* tensor) {
  if (released(tensor)) delete tensor;
}
void drop(aclScalar* scalar) {
  if (released(scalar)) delete scalar;
}
void drop(Array<int64_t>* array) {
  if (released(array)) delete array;
}
void drop(Array<bool>* array) {
  if (released(array)) delete array;
}
void drop(Array<float>* array) {
  if (released(array)) delete array;
}
void drop(aclTensorList* list) {
  if (!released(list)) return;
  for (auto* tensor : list->tensors) drop(tensor);
  delete list;
}

std::vector<at::Tensor> Tensors::list() const {
  std::vector<at::Tensor> tensors;
  for (auto* tensor : descriptor->tensors) tensors.push_back(tensor ? tensor->view : at::Tensor());
  return tensors;
}

static Range range_of(const aclTensor& tensor) {
  const auto& view = tensor.view;
  const auto begin = uintptr_t(view.data_ptr());
  if (view.numel() == 0) return {begin, begin};
  size_t last = 0;
  if (tensor.format == NZ) {
    last = 1;
    for (auto size : tensor.storage) last *= size;
    return {uintptr_t(tensor.data), uintptr_t(tensor.data) + last * view.element_size()};
  }
  for (int64_t i = 0; i < view.dim(); ++i) last += (view.size(i) - 1) * view.stride(i);
  return {begin, begin + (last + 1) * view.element_size()};
}

static void describe(Task& task, char how, const char* type, at::IntArrayRef numbers) {
  if (!logging()) return;
  std::string list;
  for (auto number : numbers) list += (list.empty() ? "" : ", ") + std::to_string(number);
  task.operands += std::string(task.operands.empty() ? "" : ", ") + "[\"" + how + "\", \"" + type + "\", [" + list + "]]";
}
static void describe(Task& task, const aclTensor& tensor, char how) {
  describe(task, how, c10::toString(tensor.view.scalar_type()), tensor.view.sizes());
}
void note_numbers(Task& task, const std::vector<int64_t>& numbers) { describe(task, 'n', "numbers", numbers); }

void note_read(Task& task, const aclTensor* tensor) {
  if (!tensor) return;
  task.reads.push_back(range_of(*tensor));
  describe(task, *tensor, 'r');
}
void note_write(Task& task, const aclTensor* tensor) {
  if (!tensor) return;
  task.writes.push_back(range_of(*tensor));
  describe(task, *tensor, 'w');
}

void compute(const char* name, const std::function<void()>& body) {
  // One thread: each calling thread would have an OpenMP pool of its own, and more pools than cores are slower.
  static thread_local const bool single = (at::set_num_threads(1), true);
  (void)single;
  at::NoGradGuard no_grad;
  c10::impl::ExcludeDispatchKeyGuard guard(
      c10::autograd_dispatch_keyset | c10::autocast_dispatch_keyset |
      c10::DispatchKeySet({c10::DispatchKey::Python, c10::DispatchKey::PythonTLSSnapshot, c10::DispatchKey::ADInplaceOrView}));
  try {
    body();
  } catch (const std::exception& error) {
    die(std::string(name) + ": " + error.what());
  }
}

int launch(Executor* executor, void* stream) {
  Task task = std::move(executor->task);
  delete executor;
  if (!task.operands.empty()) task.operands = "[" + task.operands + "]";
  return submit(std::move(task), stream);
}

void put(Out out, const at::Tensor& value) {
  if (out.descriptor->format == NZ) die("a result is written in the format NZ, which has no implementation");
  if (out->sizes() != value.sizes()) TORCH_CHECK(false, "a result of sizes ", value.sizes(), " for an output of sizes ", out->sizes());
  out->copy_(value);
}

// NZ holds a matrix [rows, columns] as [columns / c, rows / 16, 16, c] with c * itemsize = 32 bytes, zero-padded.
static at::Tensor from_blocks(const aclTensor& tensor) {
  auto storage = tensor.storage;
  TORCH_CHECK(storage.size() >= 4, "NZ with a storage of ", storage.size(), " dimensions");
  const auto blocks = at::from_blob(tensor.data, storage, tensor.view.options());
  const int64_t n = storage.size();
  auto rows = blocks.movedim(n - 4, n - 2).flatten(n - 4, n - 3).flatten(n - 3, n - 2);
  return rows;
}

at::Tensor matrix(In tensor) {
  if (tensor.descriptor->format != NZ) return *tensor;
  // The view is that of the matrix before the cast: transposed if its strides say so.
  auto rows = from_blocks(*tensor.descriptor);
  const auto& view = *tensor;
  const bool transposed = view.dim() >= 2 && view.stride(-2) == 1 && view.size(-1) > 1;
  const auto height = transposed ? view.size(-1) : view.size(-2), width = transposed ? view.size(-2) : view.size(-1);
  auto whole = rows.narrow(-2, 0, height).narrow(-1, 0, width);
  return transposed ? whole.transpose(-1, -2) : whole;
}

}  // namespace standin

extern "C" {

aclTensor* aclCreateTensor(const int64_t* sizes, uint64_t dims, int32_t dtype, const int64_t* strides, int64_t offset, int32_t format, const int64_t* storage, uint64_t storage_dims, void* data) {
  static char nothing[64];
  auto* tensor = new aclTensor;
  const auto type = torch_dtype(dtype);
  tensor->format = format;
  tensor->storage.assign(storage, storage + storage_dims);
  tensor->data = data;
  auto* begin = (data ? static_cast<char*>(data) : nothing) + offset * c10::elementSize(type);
  tensor->view = at::from_blob(begin, at::IntArrayRef(sizes, dims), at::IntArrayRef(strides, dims), at::TensorOptions().dtype(type));
  return tensor;
}
aclScalar* aclCreateScalar(void* value, int32_t dtype) {
  auto* scalar = new aclScalar;
  scalar->value = at::from_blob(value, {}, at::TensorOptions().dtype(torch_dtype(dtype))).item();
  return scalar;
}
Array<int64_t>* aclCreateIntArray(const int64_t* values, uint64_t count) {
  auto* made = new Array<int64_t>;
  made->values.assign(values, values + count);
  return made;
}
Array<bool>* aclCreateBoolArray(const bool* values, uint64_t count) {
  auto* made = new Array<bool>;
  made->values.assign(values, values + count);
  return made;
}
Array<float>* aclCreateFloatArray(const float* values, uint64_t count) {
  auto* made = new Array<float>;
  made->values.assign(values, values + count);
  return made;
}
aclTensorList* aclCreateTensorList(aclTensor* const* tensors, uint64_t count) {
  auto* list = new aclTensorList;
  list->tensors.assign(tensors, tensors + count);
  return list;
}
int aclDestroyTensor(aclTensor* tensor) { return drop(tensor), 0; }
int aclDestroyScalar(aclScalar* scalar) { return drop(scalar), 0; }
int aclDestroyIntArray(Array<int64_t>* array) { return drop(array), 0; }
int aclDestroyBoolArray(Array<bool>* array) { return drop(array), 0; }
int aclDestroyFloatArray(Array<float>* array) { return drop(array), 0; }
int aclDestroyTensorList(aclTensorList* list) { return drop(list), 0; }

int aclGetViewShape(const aclTensor* tensor, int64_t** sizes, uint64_t* dims) {
  *dims = tensor->view.dim();
  *sizes = new int64_t[*dims];  // the caller deletes it
  std::copy(tensor->view.sizes().begin(), tensor->view.sizes().end(), *sizes);
  return 0;
}
}
