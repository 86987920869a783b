// torch.ops.torchq.*: schemas and argument checks. Like run.cpp it sees torch only through the stable ABI (torch >=
// 2.10), so that one build serves every later torch. The fakes are in torchq/ops.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "linear.h"
#include "run.h"
#include "torch_checks.h"

namespace {

using namespace torchq::ops;
using torchq::DType;
using torchq::LayerNumbers;
using torchq::Rows;

// x as rows of K elements. `held` keeps the memory alive: x itself, or a contiguous copy of it.
struct HeldRows {
  Tensor held;
  Rows rows;
};

// Any leading dimensions; a 2-D view keeps its row stride and is not copied.
HeldRows rows_of(const char* op, const char* argument, const Tensor& x, DType dtype, int64_t k) {
  check_cpu(op, argument, x);
  CHECK(x.dim() >= 1, op, ": ", argument, " must have at least one dimension, got a scalar.");
  CHECK(x.dim() <= kMaxDims, op, ": ", argument, " may have up to ", kMaxDims, " dimensions, got ", x.dim(),
        ". Flatten some: ", argument, ".flatten(0, -2).");
  const int64_t last = x.size(x.dim() - 1);
  CHECK(last == k, op, ": the weight was packed for ", k, " input features, but ", argument, " has ", last, " (",
        argument, ": ", shape_of(x), ").");
  int64_t count = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) count *= x.size(i);
  if (x.is_contiguous()) return {x, {x.const_data_ptr(), count, k, dtype}};
  if (x.dim() == 2 && x.stride(1) == 1 && x.stride(0) >= 0) return {x, {x.const_data_ptr(), count, x.stride(0), dtype}};
  Tensor copy = contiguous(op, x);
  return {copy, {copy.const_data_ptr(), count, k, dtype}};
}

// What all ops that multiply have in common: checks x, allocates y (leading dimensions of x, N), runs.
Tensor multiply(const char* op, const char* argument, const Tensor& x, DType x_dtype, const Tensor& packed,
                ScalarType y_type, DType y_dtype, const LayerNumbers& layer) {
  const torchq::PackedHeader& weights = header_of(op, "packed", packed);
  CHECK(!weights.has_channel_scale || element_bytes(x_dtype) > 1, op,
        ": the weight was packed with a channel_scale, which multiplies floats before they are quantized, but ",
        argument, " holds codes (", name_of(x.scalar_type()),
        "). Pass floats, or pack the weight without channel_scale.");
  const HeldRows input = rows_of(op, argument, x, x_dtype, weights.k);
  int64_t sizes[kMaxDims];
  *(std::copy(x.sizes().begin(), x.sizes().end(), sizes) - 1) = weights.n;
  Tensor y = empty(op, sizes, x.dim(), y_type);
  if (input.rows.count == 0 || weights.n == 0) return y;
  const auto problem = torchq::linear_problem(layer, input.rows, weights, y.mutable_data_ptr(), y_dtype);
  with_scratch(op, [&] { torchq::run(kernel_for(op, weights.layout), problem); });
  return y;
}

torchq::QParams qparams_of(const char* op, const char* what, double scale, int64_t zero_point) {
  CHECK(torchq::is_scale(scale), op, ": ", what, "_scale must be a positive normal float32, got ", scale, '.');
  CHECK(torchq::is_zero_point(zero_point), op, ": ", what, "_zero_point must be in [0, 255], got ", zero_point, '.');
  return {static_cast<float>(scale), static_cast<int32_t>(zero_point)};
}

// ---- The ops ----------------------------------------------------------------------------------------------------

// The data of a float32 tensor, null without one.
const float* floats(const std::optional<Tensor>& t) {
  return t ? static_cast<const float*>(t->const_data_ptr()) : nullptr;
}

void check_channel_scale(const char* op, const Tensor& t, int64_t k) {
  check_cpu(op, "channel_scale", t);
  CHECK(t.dim() == 1 && t.size(0) == k && t.scalar_type() == ScalarType::Float, op, ": channel_scale must be float32 (",
        k, ",), one per input feature, got ", name_of(t.scalar_type()), ' ', shape_of(t), '.');
  const Tensor dense = contiguous(op, t);
  const auto* values = static_cast<const float*>(dense.const_data_ptr());
  for (int64_t i = 0; i < k; ++i)
    CHECK(torchq::is_scale(values[i]), op, ": channel_scale must hold positive normal float32 numbers, got ", values[i],
          " at ", i, '.');
}

Tensor pack(const Tensor& weight, const Tensor& scale, const std::optional<Tensor>& bias,
            const std::optional<Tensor>& channel_scale) {
  const char* op = "torchq::pack";
  check_cpu(op, "weight", weight);
  CHECK(weight.dim() == 2 && weight.scalar_type() == ScalarType::Char, op, ": weight must be int8 (N, K), got ",
        name_of(weight.scalar_type()), ' ', shape_of(weight), '.');
  const int64_t n = weight.size(0), k = weight.size(1);
  CHECK(k <= torchq::kMaxDepth, op, ": K = ", k,
        " is too deep: int32 sums of u8 x int8 products are exact up to K = ", torchq::kMaxDepth,
        ". Leave this layer in float.");
  const auto check_column = [&](const char* name, const Tensor& t) {
    check_cpu(op, name, t);
    CHECK(t.dim() == 1 && t.size(0) == n && t.scalar_type() == ScalarType::Float, op, ": ", name, " must be float32 (",
          n, ",), one per output feature, got ", name_of(t.scalar_type()), ' ', shape_of(t), '.');
  };
  check_column("scale", scale);
  if (bias) check_column("bias", *bias);
  if (channel_scale) check_channel_scale(op, *channel_scale, k);
  const auto dense = [&](const std::optional<Tensor>& t) { return t ? std::optional(contiguous(op, *t)) : t; };
  const Tensor w = contiguous(op, weight), s = contiguous(op, scale);
  const std::optional<Tensor> b = dense(bias), c = k > 0 ? dense(channel_scale) : std::nullopt;
  Tensor packed = empty(op, {torchq::packed_bytes(n, k, c.has_value())}, ScalarType::Byte);
  const torchq::Weights weights{
      n, k, static_cast<const int8_t*>(w.const_data_ptr()), floats(s), floats(b), floats(c), b.has_value()};
  torchq::pack(torchq::active_kernel().layout, weights, packed.mutable_data_ptr());
  return packed;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> unpack(const Tensor& packed, int64_t in_features) {
  const char* op = "torchq::unpack";
  const torchq::PackedHeader& header = header_of(op, "packed", packed);
  CHECK(header.k == in_features, op, ": the weight was packed for ", header.k,
        " input features, got in_features = ", in_features, '.');
  const auto float_vector = [&](int64_t size) { return empty(op, {size}, ScalarType::Float); };
  Tensor weight = empty(op, {header.n, header.k}, ScalarType::Char), scale = float_vector(header.n),
         bias = float_vector(header.n), channel_scale = float_vector(header.has_channel_scale ? header.k : 0);
  torchq::unpack(packed.const_data_ptr(), static_cast<int8_t*>(weight.mutable_data_ptr()),
                 static_cast<float*>(scale.mutable_data_ptr()), static_cast<float*>(bias.mutable_data_ptr()),
                 static_cast<float*>(channel_scale.mutable_data_ptr()));
  return {weight, scale, bias, channel_scale};
}

Tensor gemm(const Tensor& a, const Tensor& packed) {
  const char* op = "torchq::gemm";
  CHECK(a.scalar_type() == ScalarType::Char, op, ": a must be int8, got ", name_of(a.scalar_type()),
        ". Quantize it first with torchq.quantize().");
  return multiply(op, "a", a, DType::i8, packed, ScalarType::Int, DType::i32, LayerNumbers());
}

Tensor linear_dynamic(const Tensor& x, const Tensor& packed, int64_t activation) {
  const char* op = "torchq::linear_dynamic";
  const ScalarType type = x.scalar_type();
  const std::optional<DType> dtype = float_dtype(type);
  CHECK(dtype.has_value(), op, ": x must be float32, bfloat16 or float16, got ", name_of(type), '.');
  LayerNumbers layer;
  layer.per_token = true;
  layer.activation = activation_of(op, activation);
  return multiply(op, "x", x, *dtype, packed, type, *dtype, layer);
}

Tensor linear_static(const Tensor& x, const Tensor& packed, double x_scale, int64_t x_zero_point, ScalarType out_dtype,
                     double y_scale, int64_t y_zero_point, int64_t activation) {
  const char* op = "torchq::linear_static";
  const auto [x_dtype, y_dtype] = dtypes_of(op, x, out_dtype);
  const bool codes_in = x_dtype == DType::u8, codes_out = y_dtype == DType::u8;
  LayerNumbers layer;
  layer.x = qparams_of(op, "x", x_scale, x_zero_point);
  if (codes_out) layer.y = qparams_of(op, "y", y_scale, y_zero_point);
  layer.activation = activation_of(op, activation);
  return multiply(op, "x", x, x_dtype, packed, out_dtype, y_dtype, layer);
}

// Whether the values of a tensor lie side by side, in whatever order of its dimensions.
bool has_no_gaps(const Tensor& t) {
  int64_t together = 1;
  for (int64_t found = 0, i = 0; found < t.dim(); ++found) {
    for (i = 0; i < t.dim() && (t.size(i) == 1 || t.stride(i) != together); ++i) {
    }
    if (i < t.dim()) together *= t.size(i);
  }
  return together == t.numel() && together > 0;
}

Tensor activate(const Tensor& x, int64_t activation) {
  const char* op = "torchq::activate";
  const std::optional<DType> dtype = float_dtype(x.scalar_type());
  CHECK(dtype.has_value(), op, ": x must be float32, bfloat16 or float16, got ", name_of(x.scalar_type()), '.');
  check_cpu(op, "x", x);
  CHECK(x.dim() <= kMaxDims, op, ": x may have up to ", kMaxDims, " dimensions, got ", x.dim(),
        ". Flatten some: x.flatten().");
  const torchq::Activation kind = activation_of(op, activation);
  const bool as_it_lies = has_no_gaps(x);
  const Tensor input = as_it_lies ? x : contiguous(op, x);
  const Tensor& like = as_it_lies ? x : input;
  Tensor y = empty_strided(op, x.sizes().data(), like.strides().data(), x.dim(), x.scalar_type());
  torchq::activate(torchq::active_kernel(), kind, {*dtype, input.const_data_ptr(), y.mutable_data_ptr(), x.numel()});
  return y;
}

std::tuple<Tensor, Tensor, Tensor> quantize_per_token(const Tensor& x) {
  const char* op = "torchq::quantize_per_token";
  const std::optional<DType> dtype = float_dtype(x.scalar_type());
  CHECK(dtype.has_value(), op, ": x must be float32, bfloat16 or float16, got ", name_of(x.scalar_type()), '.');
  CHECK(x.dim() >= 1, op, ": x must have at least one dimension, got a scalar.");
  const int64_t k = x.size(x.dim() - 1);
  const HeldRows input = rows_of(op, "x", x, *dtype, k);
  int64_t sizes[kMaxDims];
  int64_t* last = std::copy(x.sizes().begin(), x.sizes().end(), sizes) - 1;
  Tensor codes = empty(op, sizes, x.dim(), ScalarType::Byte);
  *last = 1;
  Tensor scale = empty(op, sizes, x.dim(), ScalarType::Float), zero_point = empty(op, sizes, x.dim(), ScalarType::Int);
  const torchq::Kernel& kernel = torchq::active_kernel();
  auto scratch = with_scratch(op, [&] { return std::vector<uint8_t>(torchq::row_scratch_bytes(k)); });
  const auto* from = static_cast<const uint8_t*>(input.rows.data);
  const int64_t stride = input.rows.stride * torchq::element_bytes(*dtype);
  for (int64_t r = 0; r < input.rows.count; ++r) {
    auto* to = static_cast<uint8_t*>(codes.mutable_data_ptr()) + r * k;
    const torchq::QParams q = torchq::quantize_row(kernel, from + r * stride, *dtype, k, to, scratch.data());
    static_cast<float*>(scale.mutable_data_ptr())[r] = q.scale;
    static_cast<int32_t*>(zero_point.mutable_data_ptr())[r] = q.zero_point;
  }
  return {codes, scale, zero_point};
}

}  // namespace

STABLE_TORCH_LIBRARY(torchq, m) {
  m.def("pack(Tensor weight, Tensor scale, Tensor? bias=None, Tensor? channel_scale=None) -> Tensor");
  m.def("unpack(Tensor packed, int in_features) -> (Tensor weight, Tensor scale, Tensor bias, Tensor channel_scale)");
  m.def("gemm(Tensor a, Tensor packed) -> Tensor");
  m.def("linear_dynamic(Tensor x, Tensor packed, int activation=0) -> Tensor");
  m.def(
      "linear_static(Tensor x, Tensor packed, float x_scale, int x_zero_point, ScalarType out_dtype, "
      "float y_scale=1.0, int y_zero_point=0, int activation=0) -> Tensor");
  m.def("activate(Tensor x, int activation) -> Tensor");
  m.def("quantize_per_token(Tensor x) -> (Tensor codes, Tensor scale, Tensor zero_point)");
}

STABLE_TORCH_LIBRARY_IMPL(torchq, CPU, m) {
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("unpack", TORCH_BOX(&unpack));
  m.impl("gemm", TORCH_BOX(&gemm));
  m.impl("linear_dynamic", TORCH_BOX(&linear_dynamic));
  m.impl("linear_static", TORCH_BOX(&linear_static));
  m.impl("activate", TORCH_BOX(&activate));
  m.impl("quantize_per_token", TORCH_BOX(&quantize_per_token));
}
