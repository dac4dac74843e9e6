// Operators that reduce, sort or index. Parameters as in op-plugin's calls.
#include "operators.hpp"

// -- reductions
OP(aclnnMean, (In a, Ints dims, bool keep, Dtype dtype, Out out), put(out, at::mean(*a, *dims, keep, torch_dtype(dtype))))
OP(aclnnReduceSum, (In a, Ints dims, bool keep, Dtype dtype, Out out), put(out, at::sum(*a, *dims, keep, torch_dtype(dtype))))
OP(aclnnAmax, (In a, Ints dims, bool keep, Out out), put(out, at::amax(*a, *dims, keep)))
OP(aclnnAmin, (In a, Ints dims, bool keep, Out out), put(out, at::amin(*a, *dims, keep)))
OP(aclnnMax, (In a, Out out), put(out, at::max(*a)))
OP(aclnnMin, (In a, Out out), put(out, at::min(*a)))
OP(aclnnMaxDim, (In a, int64_t dim, bool keep, Out out, Out index), auto [value, at] = at::max(*a, dim, keep); put(out, value); put(index, at))
OP(aclnnMinDim, (In a, int64_t dim, bool keep, Out out, Out index), auto [value, at] = at::min(*a, dim, keep); put(out, value); put(index, at))
OP(aclnnArgMax, (In a, int64_t dim, bool keep, Out out), put(out, at::argmax(*a, dim, keep)))
OP(aclnnArgMin, (In a, int64_t dim, bool keep, Out out), put(out, at::argmin(*a, dim, keep)))
OP(aclnnAny, (In a, Ints dims, bool keep, Out out), put(out, at::any(*a, at::IntArrayRef(*dims), keep)))
OP(aclnnAll, (In a, Ints dims, bool keep, Out out), put(out, at::all(*a, at::IntArrayRef(*dims), keep)))
OP(aclnnLinalgVectorNorm, (In a, Number order, Ints dims, bool keep, Dtype dtype, Out out),
   put(out, at::linalg_vector_norm(*a, *order, dims ? at::OptionalIntArrayRef(*dims) : std::nullopt, keep, torch_dtype(dtype))))

// -- along a dimension
OP(aclnnCumsum, (In a, int64_t dim, Dtype dtype, Out out), put(out, at::cumsum(*a, dim, torch_dtype(dtype))))
OP(aclnnSoftmax, (In a, int64_t dim, Out out), put(out, at::softmax(*a, dim, out->scalar_type())))
OP(aclnnLogSoftmax, (In a, int64_t dim, Out out), put(out, at::log_softmax(*a, dim, out->scalar_type())))
OP(aclnnSort, (In a, bool stable, int64_t dim, bool descending, Out out, Out index),
   auto [values, order] = at::sort(*a, stable, dim, descending); put(out, values); put(index, order))
OP(aclnnTopk, (In a, int64_t k, int64_t dim, bool largest, bool sorted, Out out, Out index),
   auto [values, order] = at::topk(*a, k, dim, largest, sorted); put(out, values); put(index, order))

// -- indexing
// An index that is absent from a list comes as null or as an empty tensor of one dimension.
static c10::List<std::optional<at::Tensor>> indices(Tensors list) {
  c10::List<std::optional<at::Tensor>> result;
  for (auto& index : list.list()) {
    const bool absent = !index.defined() || (index.dim() == 1 && index.numel() == 0);
    result.push_back(absent ? std::optional<at::Tensor>() : index.scalar_type() == at::kInt ? index.to(at::kLong) : index);
  }
  return result;
}
OP(aclnnIndex, (In a, Tensors at, Out out), put(out, at::index(*a, indices(at))))
OP(aclnnIndexPutImpl, (Out a, Tensors at, In values, bool accumulate, bool), a.tensor().index_put_(indices(at), *values, accumulate))
OP(aclnnIndexSelect, (In a, int64_t dim, In index, Out out), put(out, at::index_select(*a, dim, *index)))
OP(aclnnEmbedding, (In weight, In index, Out out), put(out, at::embedding(*weight, *index)))
OP(aclnnGather, (In a, int64_t dim, In index, Out out), put(out, at::gather(*a, dim, *index)))
static void replace_only(int64_t reduction) { TORCH_CHECK(reduction == 0, "a reduction (", reduction, ") has no implementation"); }
OP(aclnnScatter, (In a, int64_t dim, In index, In values, int64_t reduction, Out out),
   replace_only(reduction); put(out, at::scatter(*a, dim, *index, *values)))
OP(aclnnScatterValue, (In a, int64_t dim, In index, Number value, int64_t reduction, Out out),
   replace_only(reduction); put(out, at::scatter(*a, dim, *index, *value)))
OP(aclnnInplaceScatter, (Out a, int64_t dim, In index, In values, int64_t reduction),
   replace_only(reduction); a.tensor().scatter_(dim, *index, *values))
OP(aclnnInplaceScatterValue, (Out a, int64_t dim, In index, Number value, int64_t reduction),
   replace_only(reduction); a.tensor().scatter_(dim, *index, *value))
OP(aclnnInplaceIndexCopy, (Out a, int64_t dim, In index, In values), a.tensor().index_copy_(dim, *index, *values))
OP(aclnnScatterNdUpdate, (Out a, In index, In values),
   c10::List<std::optional<at::Tensor>> parts;
   for (auto& part : index->to(at::kLong).unbind(-1)) parts.push_back(std::optional<at::Tensor>(part));
   a.tensor().index_put_(parts, *values))
// Writes values[b] at position index[b] of ``axis`` in a[b]; one index for each of the first dimension.
OP(aclnnInplaceScatterUpdate, (Out a, In index, In values, int64_t axis),
   at::Tensor target = a.tensor();
   if (axis < 0) axis += target.dim();
   TORCH_CHECK(axis > 0 && index->dim() == 1 && index->size(0) == target.size(0), "scatter_update of axis ", axis, " with an index of sizes ", index->sizes());
   const auto starts = index->to(at::kLong);
   for (int64_t row = 0; row < target.size(0); ++row)
     target[row].narrow(axis - 1, starts[row].item<int64_t>(), values->size(axis)).copy_((*values)[row]))
OP(aclnnRepeatInterleave, (In a, In times, int64_t, Out out), put(out, at::repeat_interleave(a->flatten(), *times)))
OP(aclnnRepeatInterleaveWithDim, (In a, In times, int64_t dim, int64_t, Out out), put(out, at::repeat_interleave(*a, *times, dim)))
OP(aclnnRepeatInterleaveInt, (In a, int64_t times, int64_t, Out out), put(out, at::repeat_interleave(a->flatten(), times)))
OP(aclnnRepeatInterleaveIntWithDim, (In a, int64_t times, int64_t dim, int64_t, Out out), put(out, at::repeat_interleave(*a, times, dim)))
static void put_shrunk(Out out, const at::Tensor& value) {
  at::Tensor& view = out.descriptor->view;
  view = at::from_blob(view.data_ptr(), value.sizes(), view.options());
  view.copy_(value);
}
// The result's size is known only when it is computed: op-plugin waits, then asks for it (aclGetViewShape).
OP(aclnnNonzero, (In a, Out out), put_shrunk(out, at::nonzero(*a)))
// As columns, [dimensions, found].
OP(aclnnNonzeroV2, (In a, Out out),
   auto found = at::nonzero(*a);
   const at::Tensor& view = *out;
   if (view.dim() == 2 && view.size(0) == a->dim() && view.size(1) == a->numel()) found = found.t();
   put_shrunk(out, found))
