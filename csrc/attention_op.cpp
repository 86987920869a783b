// torch.ops.torchq.attention: its schema and argument checks. torch_ops.cpp says how torch is reached.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>

#include "attention_band.h"
#include "run.h"
#include "torch_checks.h"

namespace {

using namespace torchq::ops;
using torchq::DType;
using namespace torchq::attention;

constexpr const char* op = "torchq::attention";

// Strides of dimensions of size 1 say nothing, and dimensions that the mask lacks or repeats have stride 0.
View view_of(const Tensor& t, DType dtype) {
  const int64_t bytes = t.element_size();
  int64_t strides[4] = {};
  for (int64_t i = 0; i < t.dim(); ++i)
    if (t.size(i) > 1) strides[4 - t.dim() + i] = t.stride(i) * bytes;
  if (t.dim() && t.size(t.dim() - 1) == 1 && !strides[3]) strides[3] = bytes;
  return {t.const_data_ptr(), dtype, strides[0], strides[1], strides[2], strides[3]};
}

void check_operand(const char* name, const Tensor& t, ScalarType type) {
  check_cpu(op, name, t);
  CHECK(t.dim() == 4, op, ": ", name, " must have four dimensions (batch, heads, length, head size), got ", shape_of(t),
        ". Add those that are missing with unsqueeze().");
  CHECK(t.scalar_type() == type, op, ": q, k and v must have one dtype, but q is ", name_of(type), " and ", name,
        " is ", name_of(t.scalar_type()), '.');
}

void check_shapes(const Tensor& q, const Tensor& k, const Tensor& v) {
  const auto shapes = [&] { return " (q: " + shape_of(q) + ", k: " + shape_of(k) + ", v: " + shape_of(v) + ")."; };
  CHECK(k.size(0) == q.size(0) && v.size(0) == q.size(0), op, ": q, k and v must have the same batch size", shapes());
  CHECK(k.size(1) == v.size(1), op, ": k and v must have the same number of heads", shapes());
  CHECK(k.size(1) > 0 ? q.size(1) % k.size(1) == 0 : q.size(1) == 0, op,
        ": the heads of q must be a multiple of those of k and v", shapes());
  CHECK(k.size(2) == v.size(2), op, ": k and v must have the same length", shapes());
  CHECK(k.size(3) == q.size(3), op, ": q and k must have the same head size", shapes());
}

// The mask as (batch, heads, rows, keys).
View mask_view(const Tensor& mask, const Problem& p) {
  check_cpu(op, "mask", mask);
  const ScalarType type = mask.scalar_type();
  const auto dtype = type == ScalarType::Bool ? std::optional(DType::u8) : float_dtype(type);
  CHECK(dtype.has_value(), op, ": mask must be bool (True: may be seen) or float32, bfloat16 or float16 (added), got ",
        name_of(type), '.');
  const int64_t sizes[] = {p.batch, p.heads, p.rows, p.keys};
  bool fits = mask.dim() <= 4;
  for (int64_t i = 0; fits && i < mask.dim(); ++i)
    fits = mask.size(i) == 1 || mask.size(i) == sizes[4 - mask.dim() + i];
  CHECK(fits, op, ": mask must broadcast to (batch, heads, rows, keys) = (", p.batch, ", ", p.heads, ", ", p.rows, ", ",
        p.keys, "), got ", shape_of(mask), '.');
  View view = view_of(mask, *dtype);
  if (mask.dim() == 0 || mask.size(mask.dim() - 1) == 1) view.column = p.keys == 1 ? mask.element_size() : 0;
  return view;
}

Band checked_band(bool is_causal, int64_t offset, std::optional<int64_t> window) {
  CHECK(!window || *window > 0, op, ": window must be positive: the keys that a row sees to each side, its own among ",
        "them. Got ", window.value_or(0), '.');
  CHECK(-kFar / 2 < offset && offset < kFar / 2, op,
        ": offset must be the position of the first row among the keys, got ", offset, '.');
  return band_of(is_causal, offset, window ? std::min(*window, kFar / 2) - 1 : kFar / 2);
}

// In the order of q's dimensions in memory, as torch's own: where heads lie within a row of q, they do in y.
Tensor output_like(const Tensor& q, int64_t columns, Problem& p) {
  const int64_t sizes[] = {p.batch, p.heads, p.rows, columns};
  const bool heads_inside = q.stride(1) < q.stride(2);
  const int64_t head = heads_inside ? columns : p.rows * columns, row = heads_inside ? p.heads * columns : columns;
  const int64_t strides[] = {p.heads * p.rows * columns, head, row, 1};
  const int64_t bytes = torchq::element_bytes(p.y_dtype);
  p.y_batch = strides[0] * bytes, p.y_head = head * bytes, p.y_row = row * bytes;
  Tensor y = empty_strided(op, sizes, strides, 4, q.scalar_type());
  p.y = y.mutable_data_ptr();
  return y;
}

Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask, bool is_causal,
                 std::optional<double> scale, int64_t offset, std::optional<int64_t> window, int64_t scheme) {
  const auto dtype = float_dtype(q.scalar_type());
  CHECK(dtype.has_value(), op, ": q must be float32, bfloat16 or float16, got ", name_of(q.scalar_type()), '.');
  check_operand("q", q, q.scalar_type());
  check_operand("k", k, q.scalar_type());
  check_operand("v", v, q.scalar_type());
  check_shapes(q, k, v);
  CHECK(scheme >= 0 && scheme < kSchemes, op, ": scheme must be in [0, ", kSchemes, "), got ", scheme, '.');
  CHECK(scheme != static_cast<int>(Scheme::codes) || k.size(2) <= kMostKeys, op,
        ": the sums of int8 codes are exact for up to ", kMostKeys, " keys, got ", k.size(2),
        ". Use scheme 2 (int8_bfloat16).");
  Problem p{};
  p.scheme = static_cast<Scheme>(scheme);
  p.batch = q.size(0), p.heads = q.size(1), p.kv_heads = k.size(1);
  p.rows = q.size(2), p.keys = k.size(2), p.depth = q.size(3), p.columns = v.size(3);
  p.q = view_of(q, *dtype), p.k = view_of(k, *dtype), p.v = view_of(v, *dtype);
  if (mask) p.mask = mask_view(*mask, p);
  p.band = checked_band(is_causal, offset, window);
  p.scale = scale ? static_cast<float>(*scale) : default_scale(p.depth);
  p.y_dtype = *dtype;
  Tensor y = output_like(q, p.columns, p);
  if (y.numel() > 0) with_scratch(op, [&] { torchq::run(torchq::active_kernel(), p); });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torchq, m) {
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor? mask=None, bool is_causal=False, float? scale=None, "
      "int offset=0, int? window=None, int scheme=0) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(torchq, CPU, m) { m.impl("attention", TORCH_BOX(&attention)); }
