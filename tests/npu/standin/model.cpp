// Operators of models: products, norms, attention, rotary embeddings, random numbers, quantization.
// Parameters as in op-plugin's calls.
#include "operators.hpp"
#include <ATen/CPUGeneratorImpl.h>

// -- products
OP(aclnnMatmul, (In a, In b, Out out, int8_t), put(out, at::matmul(wide(matrix(a)), wide(matrix(b)))))
OP(aclnnMm, (In a, In b, Out out, int8_t), put(out, at::mm(wide(matrix(a)), wide(matrix(b)))))
OP(aclnnBatchMatMul, (In a, In b, Out out, int8_t), put(out, at::bmm(wide(*a), wide(*b))))
OP(aclnnAddmm, (In c, In a, In b, Number beta, Number alpha, Out out, int8_t),
   put(out, at::addmm(wide(c), wide(matrix(a)), wide(matrix(b)), *beta, *alpha)))
OP(aclnnBaddbmm, (In c, In a, In b, Number beta, Number alpha, Out out, int8_t),
   put(out, at::baddbmm(wide(c), wide(a), wide(b), *beta, *alpha)))
OP(aclnnConvolution, (In a, In weight, In bias, Ints stride, Ints padding, Ints dilation, bool transposed, Ints output_padding, int64_t groups, Out out, int8_t),
   put(out, at::convolution(wide(a), wide(weight), wide_optional(bias), *stride, *padding, *dilation, transposed, *output_padding, groups)))

// -- norms and activations
static at::Tensor rms_scale(const at::Tensor& x, double eps) { return (x.square().mean(-1, true) + eps).rsqrt(); }
static void put_statistic(Out out, const at::Tensor& value) {
  if (out && out->numel()) out.tensor().copy_(value.view(out->sizes()));
}
OP(aclnnRmsNorm, (In a, In gamma, double eps, Out out, Out rstd),
   const auto x = a->to(at::kFloat);
   const auto scale = rms_scale(x, eps);
   put(out, x * scale * gamma->to(at::kFloat));
   put_statistic(rstd, scale))
OP(aclnnAddRmsNorm, (In a, In b, In gamma, double eps, Out out, Out rstd, Out sum),
   const auto x = wide(a) + wide(b);  // the norm reads the sum before it is rounded
   const auto scale = rms_scale(x, eps);
   put(sum, x);
   put(out, x * scale * wide(gamma));
   put_statistic(rstd, scale))
static void layer_norm(In a, Ints shape, In weight, In bias, double eps, Out out, Out mean, Out rstd) {
  auto [y, m, r] = at::native_layer_norm(wide(a), *shape, wide_optional(weight), wide_optional(bias), eps);
  put(out, y);
  put_statistic(mean, m);
  put_statistic(rstd, r);
}
OP(aclnnLayerNorm, (In a, Ints shape, In weight, In bias, double eps, Out out, Out mean, Out rstd), layer_norm(a, shape, weight, bias, eps, out, mean, rstd))
OP(aclnnAddLayerNorm, (In a, In b, In weight, In bias, In extra, double eps, bool with_sum, Out out, Out mean, Out rstd, Out sum),
   auto x = wide(a) + wide(b);
   if (extra) x = x + wide(extra);
   auto [y, m, r] = at::native_layer_norm(x, weight->sizes(), wide_optional(weight), wide_optional(bias), eps);
   put(out, y);
   put_statistic(mean, m);
   put_statistic(rstd, r);
   if (with_sum) put(sum, x))
OP(aclnnGroupNorm, (In a, In weight, In bias, int64_t batch, int64_t channels, int64_t area, int64_t groups, double eps, Out out, Out mean, Out rstd),
   auto [y, m, r] = at::native_group_norm(wide(a).contiguous(), wide_optional(weight), wide_optional(bias), batch, channels, area, groups, eps);
   put(out, y);
   put_statistic(mean, m);
   put_statistic(rstd, r))
OP(aclnnGroupNormSilu, (In a, In weight, In bias, int64_t groups, double eps, Out out, Out mean, Out rstd),
   auto [y, m, r] = at::native_group_norm(wide(a).contiguous(), wide_optional(weight), wide_optional(bias), a->size(0), a->size(1), a->numel() / a->size(0) / a->size(1), groups, eps);
   put(out, at::silu(y));
   put_statistic(mean, m);
   put_statistic(rstd, r))
OP(aclnnSwiGlu, (In a, int64_t dim, Out out), const auto halves = wide(a).chunk(2, dim); put(out, at::silu(halves[0]) * halves[1]))
OP(aclnnGridSampler2D, (In a, In grid, int64_t interpolation, int64_t padding, bool align, Out out),
   put(out, at::grid_sampler_2d(wide(a), wide(grid), interpolation, padding, align)))
OP(aclnnUpsampleNearest2dV2, (In a, Ints size, float, float, Out out), put(out, at::upsample_nearest2d(*a, *size)))

// -- attention. Inside, everything is [batch, heads, tokens, head_dim].
static at::Tensor heads_first(const at::Tensor& t, const std::string& layout, int64_t heads) {
  if (layout == "BNSD") return t;
  if (layout == "BSND") return t.transpose(1, 2);
  if (layout == "BSH") return t.unflatten(2, {heads, -1}).transpose(1, 2);
  if (layout == "SBH") return t.unflatten(2, {heads, -1}).permute({1, 2, 0, 3});
  TORCH_CHECK(false, "layout ", layout, " has no implementation");
}
static at::Tensor in_layout(const at::Tensor& t, const std::string& layout) {
  if (layout == "BNSD") return t;
  if (layout == "BSND") return t.transpose(1, 2);
  if (layout == "BSH") return t.transpose(1, 2).flatten(2);
  return t.permute({2, 0, 1, 3}).flatten(2);
}
static at::Tensor per_query_head(const at::Tensor& t, int64_t heads) {
  return t.size(1) == heads ? t : t.repeat_interleave(heads / t.size(1), 1);
}
// ``hidden`` is true where a key is hidden; null where all are visible.
struct Attended {
  at::Tensor result, maximum, sum;
};
// Keys behind the last visible one of the whole batch are not read: a static cache is mostly empty.
static Attended attend(const at::Tensor& query, at::Tensor keys, at::Tensor values, std::optional<at::Tensor> hidden, double scale) {
  if (hidden) {
    auto visible = hidden->logical_not().flatten(0, -2).any(0);
    const int64_t last = visible.nonzero().max().item<int64_t>() + 1;
    keys = keys.narrow(2, 0, last);
    values = values.narrow(2, 0, last);
    hidden = hidden->narrow(-1, 0, last);
  }
  keys = per_query_head(wide(keys), query.size(1));
  values = per_query_head(wide(values), query.size(1));
  auto scores = at::matmul(query, keys.transpose(2, 3)) * scale;
  if (hidden) scores = scores.masked_fill(*hidden, -std::numeric_limits<float>::infinity());
  const auto maximum = at::amax(scores, {-1}, true);
  const auto weights = (scores - maximum).exp();
  const auto sum = weights.sum(-1, true);
  return {at::matmul(weights / sum, values), maximum, sum};
}
static at::Tensor causal(int64_t queries, int64_t keys, bool from_end) {
  return at::ones({queries, keys}, at::kBool).triu(1 + (from_end ? keys - queries : 0));
}
// Sparse modes: 0 and 1 take the mask as it is; 2 and 3 are causal from the upper left and the lower right corner, and
// the mask is then a fixed triangle of 2048 x 2048.
static std::optional<at::Tensor> hidden_keys(In mask, int64_t sparse, int64_t queries, int64_t keys) {
  TORCH_CHECK(sparse >= 0 && sparse <= 3, "sparse mode ", sparse, " has no implementation");
  if (sparse >= 2) {
    TORCH_CHECK(mask && mask->size(-1) == 2048 && mask->size(-2) == 2048, "sparse mode ", sparse, " needs a mask of 2048 x 2048");
    return causal(queries, keys, sparse == 3);
  }
  return mask ? std::optional<at::Tensor>(mask->to(at::kBool)) : std::nullopt;
}
OP(aclnnFlashAttentionScore, (In query, In keys, In values, In shift, In dropped, In padding, In mask, Ints prefix, double scale, double keep, int64_t before, int64_t after, int64_t heads, Text layout, int64_t, int64_t sparse, Out maximum, Out sum, Out, Out out),
   TORCH_CHECK(!shift && !dropped && !padding, "position shift, dropout and padding masks have no implementation");
   const std::string form = layout;
   const auto q = wide(heads_first(*query, form, heads));
   const auto kv_heads = form == "BNSD" ? keys->size(1) : form == "BSND" ? keys->size(2) : keys->size(2) / q.size(3);
   const auto k = heads_first(*keys, form, kv_heads);
   const auto v = heads_first(*values, form, kv_heads);
   const auto r = attend(q, k, v, hidden_keys(mask, sparse, q.size(2), k.size(2)), scale);
   put_optional(maximum, r.maximum.expand(maximum->sizes()));
   put_optional(sum, r.sum.expand(sum->sizes()));
   put(out, in_layout(r.result, form)))
// Sequences of any lengths one after the other, [tokens, heads, head_dim]; the arrays have where each ends.
OP(aclnnFlashAttentionVarLenScore, (In query, In keys, In values, In shift, In dropped, In padding, In mask, Ints prefix, Ints query_ends, Ints key_ends, double scale, double keep, int64_t before, int64_t after, int64_t heads, Text layout, int64_t, int64_t sparse, Out maximum, Out sum, Out, Out out),
   TORCH_CHECK(!shift && !dropped && !padding && !mask && sparse == 0, "position shift, dropout and masks have no implementation");
   TORCH_CHECK(std::string(layout) == "TND" && query_ends->size() == key_ends->size(), "layout ", layout, " with ", query_ends->size(), " and ", key_ends->size(), " lengths");
   TORCH_CHECK(query_ends->back() == query->size(0) && key_ends->back() == keys->size(0), "the lengths end at ", query_ends->back(), " and ", key_ends->back());
   int64_t first = 0, first_key = 0;
   for (size_t i = 0; i < query_ends->size(); ++i) {
     const int64_t end = (*query_ends)[i], end_key = (*key_ends)[i];
     auto own = [](In t, int64_t from, int64_t to) { return wide(t->slice(0, from, to)).transpose(0, 1).unsqueeze(0); };
     const auto r = attend(own(query, first, end), own(keys, first_key, end_key), own(values, first_key, end_key), std::nullopt, scale);
     out->slice(0, first, end).copy_(r.result[0].transpose(0, 1));
     for (auto [statistic, value] : {std::pair(maximum, r.maximum), std::pair(sum, r.sum)})
       if (statistic && statistic->numel()) statistic->slice(0, first, end).copy_(value[0].transpose(0, 1).expand({end - first, heads, 8}));
     first = end;
     first_key = end_key;
   })
// Keys and values come as lists; lengths as numbers of the host.
OP(aclnnFusedInferAttentionScoreV3, (In query, Tensors keys, Tensors values, In shift, In mask, Ints lengths, Ints kv_lengths,
   In, In, In, In, In, In, In, In block_table, In query_padding, In kv_padding, In, In, In, In, In prefix_keys, In prefix_values, Ints, In query_rope, In key_rope, In,
   int64_t heads, double scale, int64_t before, int64_t after, Text layout, int64_t kv_heads, int64_t sparse, int64_t precision, int64_t, int64_t, bool with_lse, int64_t, int64_t, Out out, Out lse),
   TORCH_CHECK(!shift && !block_table && !query_padding && !kv_padding && !prefix_keys && !query_rope && !key_rope, "an optional argument has no implementation");
   TORCH_CHECK(keys.list().size() == 1, "several key tensors have no implementation");
   const std::string form = layout;
   const auto q = wide(heads_first(*query, form, heads));
   const auto own_heads = kv_heads ? kv_heads : heads;
   const auto k = heads_first(keys.list()[0], form, own_heads);
   const auto v = heads_first(values.list()[0], form, own_heads);
   auto hidden = hidden_keys(mask, sparse, q.size(2), k.size(2));
   if (kv_lengths && !kv_lengths->empty()) {
     TORCH_CHECK(int64_t(kv_lengths->size()) == q.size(0), kv_lengths->size(), " lengths for a batch of ", q.size(0));
     const auto beyond = at::arange(k.size(2)).ge(at::tensor(*kv_lengths, at::kLong).unsqueeze(1)).view({q.size(0), 1, 1, k.size(2)});
     hidden = hidden ? *hidden | beyond : beyond;
   }
   const auto r = attend(q, k, v, hidden, scale);
   if (with_lse) put(lse, r.maximum + r.sum.log());
   put(out, in_layout(r.result, form)))
// -- rotary embeddings
static at::Tensor turned(const at::Tensor& x, bool interleaved) {
  if (!interleaved) {
    const auto halves = x.chunk(2, -1);
    return at::cat({-halves[1], halves[0]}, -1);
  }
  const auto pairs = x.unflatten(-1, {-1, 2});
  return at::stack({-pairs.select(-1, 1), pairs.select(-1, 0)}, -1).flatten(-2);
}
static at::Tensor rotated(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, bool interleaved) {
  return wide(x) * wide(cos) + turned(wide(x), interleaved) * wide(sin);
}
static bool interleaved_mode(int64_t mode) {
  TORCH_CHECK(mode == 0 || mode == 1, "rotary mode ", mode, " has no implementation");
  return mode == 1;
}
OP(aclnnRotaryPositionEmbeddingV2, (In a, In cos, In sin, int64_t mode, In matrix, Out out),
   TORCH_CHECK(!matrix, "a rotation matrix has no implementation"); put(out, rotated(*a, *cos, *sin, interleaved_mode(mode))))
// In place on queries and keys. Layouts: 1 BSND, 2 SBND, 3 BNSD, 4 TND; the tables have one head.
OP(aclnnApplyRotaryPosEmbV2, (Out query, Out keys, In cos, In sin, int64_t layout, Text mode),
   const std::string form = mode;
   TORCH_CHECK(form == "half" || form == "interleave", "rotary mode ", form, " has no implementation");
   for (Out x : {query, keys}) x.tensor().copy_(rotated(*x, *cos, *sin, form == "interleave")))

// -- random numbers: a function of seed and offset, as on the device, but not the device's numbers
static at::Generator generator(uint64_t seed, uint64_t offset) {
  return at::make_generator<at::CPUGeneratorImpl>(seed * 0x9E3779B97F4A7C15ull + offset);
}
OP(aclnnInplaceNormal, (Out a, float mean, float std, int64_t seed, int64_t offset), a.tensor().normal_(mean, std, generator(seed, offset)))
OP(aclnnInplaceUniform, (Out a, double from, double to, uint64_t seed, uint64_t offset), a.tensor().uniform_(from, to, generator(seed, offset)))
OP(aclnnMultinomial, (In a, int64_t count, bool replacement, uint64_t seed, uint64_t offset, Out out), put(out, at::multinomial(*a, count, replacement, generator(seed, offset))))
// In a capture: every replay reads seed and offset from memory.
OP(aclnnInplaceNormalTensor, (Out a, float mean, float std, In seed, In offset, uint64_t more),
   a.tensor().normal_(mean, std, generator(seed->item<int64_t>(), offset->item<int64_t>() + more)))
OP(aclnnInplaceUniformTensor, (Out a, double from, double to, In seed, In offset, uint64_t more),
   a.tensor().uniform_(from, to, generator(seed->item<int64_t>(), offset->item<int64_t>() + more)))

// -- sampling: keeps the k best and then the fewest whose probabilities add up to p; the rest becomes -inf
OP(aclnnApplyTopKTopP, (In logits, In p, In k, Out out),
   const auto x = wide(logits);
   auto [ascending, order] = at::sort(x, true, -1, false);
   if (k) {
     const auto kth = ascending.gather(1, (x.size(1) - k->to(at::kLong)).unsqueeze(1));
     ascending = ascending.masked_fill(ascending < kth, -std::numeric_limits<float>::infinity());
   }
   if (p) {
     auto dropped = ascending.softmax(-1).cumsum(-1) <= 1 - wide(p).unsqueeze(1);
     dropped.select(1, -1).fill_(false);
     ascending = ascending.masked_fill(dropped, -std::numeric_limits<float>::infinity());
   }
   put(out, at::empty_like(x).scatter_(1, order, ascending)))

// -- quantization by row
static void dynamic_quant(In a, In smooth, Out out, Out scale) {
  const auto x = smooth ? wide(a) * wide(smooth) : wide(a);
  const auto s = x.abs().amax(-1, true) / 127;
  put(out, (x / s.clamp_min(1e-30)).round());
  put_statistic(scale, s);
}
OP(aclnnDynamicQuantV2, (In a, In smooth, In groups, int64_t dtype, Out out, Out scale, Out offset),
   TORCH_CHECK(!groups && !offset && dtype == 2, "groups, offsets and types other than int8 have no implementation");
   dynamic_quant(a, smooth, out, scale))
static at::Tensor quantized_product(In a, In b, In row_scale, In column_scale, In bias, bool turn_a, bool turn_b) {
  auto x = a->to(at::kInt), w = matrix(b).to(at::kInt);
  if (turn_a) x = x.transpose(-1, -2);
  if (turn_b) w = w.transpose(-1, -2);
  auto sums = at::matmul(x.to(at::kDouble), w.to(at::kDouble));  // exact
  if (bias && bias->scalar_type() == at::kInt) sums = sums + *bias;
  auto product = sums.to(at::kFloat) * wide(column_scale);
  if (row_scale) product = product * wide(row_scale).unsqueeze(-1);
  if (bias && bias->scalar_type() != at::kInt) product = product + wide(bias);
  return product;
}
OP(aclnnQuantMatmulV5, (In a, In b, In row_scale, In column_scale, In out_scale, In, In, In, In bias, bool turn_a, bool turn_b, int64_t group, Out out),
   TORCH_CHECK(!out_scale && group == 0, "scales of the result and groups have no implementation");
   put(out, quantized_product(a, b, row_scale, column_scale, bias, turn_a, turn_b)))
OP(aclnnWeightQuantBatchMatmulV2, (In a, In weight, In scale, In offset, In out_scale, In, In bias, int32_t group, Out out),
   TORCH_CHECK(!offset && !out_scale && group == 0, "offsets, scales of the result and groups have no implementation");
   auto product = at::matmul(wide(a), matrix(weight).to(at::kFloat) * wide(scale));
   if (bias) product = product + wide(bias);
   put(out, product))
