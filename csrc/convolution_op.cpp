// torch.ops.torchq.convolution: its schema and argument checks. torch_ops.cpp says how torch is reached.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "conv/depthwise.h"
#include "conv_call.h"
#include "linear.h"
#include "run.h"
#include "torch_checks.h"

namespace {

using namespace torchq::ops;
using torchq::DType;
using torchq::QParams;
using torchq::conv::Axis;
using torchq::conv::dense_strides;
using torchq::conv::Geometry;
using torchq::conv::geometry_from;
using torchq::conv::kAxes;
using torchq::conv::kEach;
using torchq::conv::kHead;
using torchq::conv::kMostOfAxis;
using torchq::conv::kMostValues;
using torchq::conv::kPlace;
using torchq::conv::padded_values;
using torchq::conv::Problem;

constexpr const char* op = "torchq::convolution";

Geometry geometry_of(const std::vector<int64_t>& numbers, const Tensor& x, bool codes_in) {
  const int64_t count = static_cast<int64_t>(numbers.size()), dims = count ? numbers[0] : 0;
  CHECK(dims >= 1 && dims <= kAxes && count == kHead + kEach * dims, op,
        ": geometry must hold the numbers of torchq.ops.convolution.Geometry for 1 to 3 dimensions, got ", count,
        " numbers.");
  CHECK(x.dim() == dims + 2, op, ": x must have ", dims + 2, " dimensions (batch, ",
        codes_in ? "size..., channels" : "channels, size...", "), got ", shape_of(x), '.');
  const Geometry g = geometry_from(numbers.data(), x.sizes().data() + (codes_in ? 1 : 2));
  CHECK(g.in_channels > 0 && g.out_channels >= 0 && g.groups > 0 && g.in_channels % g.groups == 0 &&
            g.out_channels % g.groups == 0,
        op, ": the channels in and out must be multiples of groups, got ", g.in_channels, ", ", g.out_channels, " and ",
        g.groups, " groups.");
  const int64_t channels = x.size(codes_in ? dims + 1 : 1);
  CHECK(channels == g.in_channels, op, ": the weight was packed for ", g.in_channels, " input channels, but x has ",
        channels, " (x: ", shape_of(x), ").");
  for (int64_t d = 0; d < dims; ++d) {
    const Axis& axis = g.axes[kPlace[dims - 1][d]];
    CHECK(axis.kernel > 0 && axis.stride > 0 && axis.dilation > 0 && axis.before >= 0 && axis.after >= 0, op,
          ": kernel, stride and dilation must be positive, and padding not negative, got ", axis.kernel, ", ",
          axis.stride, ", ", axis.dilation, ", ", axis.before, " and ", axis.after, '.');
    CHECK(std::max({axis.kernel, axis.stride, axis.dilation, axis.before, axis.after}) < kMostOfAxis, op,
          ": kernel, stride, dilation and padding must be below 2^31.");
    CHECK(axis.extent() <= axis.padded(), op, ": the kernel, ", axis.kernel, " with dilation ", axis.dilation,
          ", is larger than the padded input, ", axis.padded(), " (x: ", shape_of(x), ").");
  }
  const double values = padded_values(g);
  CHECK(values < kMostValues, op, ": the padded input would have ", values, " values for each sample.");
  return g;
}

// The packed weights: a vector, or for several groups a matrix with a row for each, padded to whole cache lines.
void set_weights(Problem& p, const Tensor& packed) {
  const Geometry& g = p.geometry;
  check_cpu(op, "packed", packed);
  p.is_depthwise = packed.dim() == 1 && g.groups > 1 && torchq::conv::can_be_depthwise(g);
  const int64_t groups = p.is_depthwise ? 1 : g.groups, rows = packed.dim() == 2 ? packed.size(0) : 1;
  CHECK(packed.scalar_type() == ScalarType::Byte && (packed.dim() == 1 || packed.dim() == 2) &&
            packed.is_contiguous() && rows == groups,
        op, ": packed must be what torchq.ops.convolution.pack() returned for ", groups, " groups, got ",
        name_of(packed.scalar_type()), ' ', shape_of(packed), '.');
  p.weights = static_cast<const uint8_t*>(packed.const_data_ptr());
  p.weights_stride = packed.numel() / rows;
  const int64_t n = g.out_channels / groups, k = g.depth(), plain = torchq::packed_bytes(n, k, false);
  const int64_t bytes = p.is_depthwise || p.weights_stride < plain + 64 ? plain : torchq::packed_bytes(n, k, true);
  const auto* first = p.weights_stride >= bytes ? torchq::packed_header(p.weights, bytes) : nullptr;
  for (int64_t group = 0; group < rows; ++group) {
    const auto* header = first ? torchq::packed_header(p.weights + group * p.weights_stride, bytes) : nullptr;
    CHECK(header && header->k == k && header->n == n && header->layout == first->layout &&
              header->has_channel_scale == first->has_channel_scale,
          op, ": packed holds no packed weights of ", n, " x ", k, " (output channels of a group, taps x its input ",
          "channels). Make it with torchq.ops.convolution.pack().");
  }
  if (!p.is_depthwise || packed.numel() == plain) return;
  const int64_t at = torchq::conv::depthwise_scale_at(g), scale_bytes = g.in_channels * sizeof(float);
  CHECK(packed.numel() == at + scale_bytes, op, ": packed weights of ", n, " x ", k, " channels x taps have ", plain,
        " bytes, or ", at + scale_bytes, " with a channel_scale, got ", packed.numel(),
        ". Make them with torchq.ops.convolution.pack().");
  p.depthwise_scale = reinterpret_cast<const float*>(p.weights + at);
}

bool is_dense(const Tensor& t, bool channels_last) {
  return torchq::conv::is_dense(t.sizes().data(), t.strides().data(), t.dim(), channels_last);
}

Tensor empty_dense(const int64_t* sizes, int64_t dims, bool channels_last, ScalarType type) {
  int64_t strides[kMaxDims];
  dense_strides(sizes, dims, channels_last, strides);
  return empty_strided(op, sizes, strides, dims, type);
}

// qparams: empty for dynamic; scale and zero point of x; then those of y, for codes; then those of a residual in codes.
void set_qparams(Problem& p, const std::vector<double>& qparams, bool codes_out) {
  const size_t count = qparams.size();
  CHECK(count == 0 || count == 2 || count == 4 || count == 6, op,
        ": qparams must be empty (dynamic), or hold scale and zero point of x, or of x and y, or of x, y and the ",
        "residual, got ", count, " numbers.");
  CHECK(count > 0 || p.x.dtype != DType::u8, op, ": x holds codes (uint8), whose scale and zero point must be given.");
  CHECK(count >= 4 || !codes_out, op, ": out_dtype is uint8, so qparams must hold scale and zero point of x and of y.");
  const auto pair = [&](const char* name, size_t at) {
    const double scale = qparams[at], zero_point = qparams[at + 1];
    CHECK(torchq::is_scale(scale), op, ": the scale of ", name, " must be a positive normal float32, got ", scale, '.');
    CHECK(zero_point >= 0 && zero_point <= 255 && zero_point == static_cast<int>(zero_point), op,
          ": the zero point of ", name, " must be an integer in [0, 255], got ", zero_point, '.');
    return QParams{static_cast<float>(scale), static_cast<int32_t>(zero_point)};
  };
  p.x.per_sample = count == 0;
  p.x.qparams = count ? pair("x", 0) : QParams{1.0f, 0};
  p.y.qparams = count >= 4 ? pair("y", 2) : QParams{1.0f, 0};
  const QParams residual = count == 6 ? pair("the residual", 4) : QParams{1.0f, 0};
  p.residual.scale = residual.scale, p.residual.zero_point = residual.zero_point;
}

// Sets the residual: floats of the shape of `sizes` (batch, channels, size...), or codes (batch, size..., channels).
// `held` keeps a copy alive.
void set_residual(Problem& p, const Tensor& residual, const int64_t* sizes, int64_t dims, size_t qparams,
                  ScalarType out_dtype, std::optional<Tensor>& held) {
  check_cpu(op, "residual", residual);
  const bool codes = residual.scalar_type() == ScalarType::Byte;
  const auto floats = float_dtype(residual.scalar_type());
  const bool codes_out = p.y.dtype == DType::u8;
  bool same = residual.dim() == dims && (codes || (floats && (codes_out || *floats == p.y.dtype)));
  for (int64_t i = 0; same && i < dims; ++i)
    same = residual.size(i) == sizes[!codes || !i ? i : i + 1 < dims ? i + 1 : 1];
  std::ostringstream shape;
  for (int64_t i = 0; i < dims; ++i) shape << (i ? ", " : "") << sizes[i];
  CHECK(same, op, ": residual must be ", codes_out ? "floats" : name_of(out_dtype), " (", shape.str(),
        ") as y, or uint8 codes with the channels last, got ", name_of(residual.scalar_type()), ' ', shape_of(residual),
        '.');
  CHECK(!codes || qparams == 6, op, ": the residual holds codes (uint8), so qparams must hold those of x, y and it.");
  CHECK(!codes || p.y.channels_last, op, ": a residual of codes has the channels last, so y must have them last, too.");
  p.residual.dtype = codes ? DType::u8 : *floats;
  p.residual_last = codes || p.y.channels_last || is_dense(residual, true);
  if (codes ? residual.is_contiguous() : is_dense(residual, p.residual_last)) {
    p.residual.data = residual.const_data_ptr();
    return;
  }
  if (codes) {
    held = contiguous(op, residual);
  } else {
    held = empty_dense(sizes, dims, p.residual_last, residual.scalar_type());
    torch::stable::copy_(*held, residual);
  }
  p.residual.data = held->const_data_ptr();
}

Tensor convolution(const Tensor& x, const Tensor& packed, const std::vector<int64_t>& geometry,
                   const std::vector<double>& qparams, ScalarType out_dtype, bool channels_last, int64_t activation,
                   const std::optional<Tensor>& residual) {
  const auto [x_dtype, y_dtype] = dtypes_of(op, x, out_dtype);
  const bool codes_in = x_dtype == DType::u8, codes_out = y_dtype == DType::u8;
  check_cpu(op, "x", x);
  Problem p{};
  p.geometry = geometry_of(geometry, x, codes_in);
  const Geometry& g = p.geometry;
  p.batch = x.size(0);
  p.x.dtype = x_dtype, p.y.dtype = y_dtype;
  p.activation = activation_of(op, activation);
  set_qparams(p, qparams, codes_out);
  set_weights(p, packed);
  CHECK(!codes_in || !p.has_channel_scale(), op,
        ": the weight was packed with a channel_scale, which multiplies floats before they are quantized, but x holds ",
        "codes (uint8). Pass floats, or pack the weight without channel_scale.");

  p.x.channels_last = codes_in || is_dense(x, true);
  const bool as_it_is = codes_in ? x.is_contiguous() : p.x.channels_last || is_dense(x, false);
  const Tensor held = as_it_is ? x : contiguous(op, x);
  p.x.data = held.const_data_ptr();

  int64_t sizes[kAxes + 2] = {p.batch, g.out_channels};  // of y, with the channels first
  const int64_t dims = x.dim() - 2;
  for (int64_t d = 0; d < dims; ++d) sizes[d + 2] = g.axes[kPlace[dims - 1][d]].outputs();
  p.y.channels_last = channels_last || codes_out;
  std::optional<Tensor> held_residual;
  if (residual) set_residual(p, *residual, sizes, dims + 2, qparams.size(), out_dtype, held_residual);
  if (codes_out) std::rotate(sizes + 1, sizes + 2, sizes + 2 + dims);
  Tensor y = codes_out ? empty(op, sizes, dims + 2, out_dtype) : empty_dense(sizes, dims + 2, channels_last, out_dtype);
  if (y.numel() == 0) return y;
  p.y.data = y.mutable_data_ptr();
  const torchq::Kernel& kernel = kernel_for(op, p.weights_of(0).layout);
  with_scratch(op, [&] { torchq::run(kernel, p); });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torchq, m) {
  m.def(
      "convolution(Tensor x, Tensor packed, int[] geometry, float[] qparams, ScalarType out_dtype, "
      "bool channels_last=False, int activation=0, Tensor? residual=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(torchq, CPU, m) { m.impl("convolution", TORCH_BOX(&convolution)); }
