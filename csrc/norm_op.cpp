// torch.ops.torchq.layer_norm and rms_norm: their schemas and their checks.

#include <torch/csrc/stable/library.h>

#include <optional>

#include "run.h"
#include "torch_checks.h"

namespace {

using namespace torchq::ops;

void check_parameter(const char* op, const char* name, const Tensor& t, int64_t n) {
  check_cpu(op, name, t);
  CHECK(t.scalar_type() == ScalarType::Float && t.dim() == 1 && t.size(0) == n, op, ": ", name, " must be float32 (", n,
        ",), one per value of a row of x, got ", name_of(t.scalar_type()), ' ', shape_of(t), '.');
}

const float* floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }

// The rows of x, normalized by these numbers and parameters.
Tensor normalized(const char* op, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                  torchq::NormRows rows) {
  check_cpu(op, "x", x);
  CHECK(x.scalar_type() == ScalarType::Float, op, ": x must be float32, got ", name_of(x.scalar_type()), '.');
  CHECK(x.dim() >= 1 && x.dim() <= kMaxDims, op, ": x must have 1 to ", kMaxDims, " dimensions, got ", x.dim(), '.');
  rows.n = x.size(x.dim() - 1);
  check_parameter(op, "weight", weight, rows.n);
  if (bias) check_parameter(op, "bias", *bias, rows.n);
  const Tensor from = contiguous(op, x), w = contiguous(op, weight);
  const std::optional<Tensor> b = bias ? std::optional(contiguous(op, *bias)) : bias;
  Tensor y = empty(op, x.sizes().data(), x.dim(), x.scalar_type());
  if (x.numel() == 0) return y;
  rows.count = x.numel() / rows.n;
  rows.x = floats(from), rows.weight = floats(w), rows.bias = b ? floats(*b) : nullptr;
  rows.y = static_cast<float*>(y.mutable_data_ptr());
  torchq::normalize_on_threads(torchq::active_kernel(), rows);
  return y;
}

Tensor layer_norm(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, double eps) {
  torchq::NormRows rows{};
  rows.eps = static_cast<float>(eps);
  return normalized("torchq::layer_norm", x, weight, bias, rows);
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double gain, double eps) {
  torchq::NormRows rows{};
  rows.eps = static_cast<float>(eps), rows.centered = false, rows.gain = static_cast<float>(gain);
  return normalized("torchq::rms_norm", x, weight, std::nullopt, rows);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torchq, m) {
  m.def("layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps) -> Tensor");
  m.def("rms_norm(Tensor x, Tensor weight, float gain, float eps) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(torchq, CPU, m) {
  m.impl("layer_norm", TORCH_BOX(&layer_norm));
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
}
