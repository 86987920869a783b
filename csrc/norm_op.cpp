// torch.ops.torchq.layer_norm: its schema and its checks.

#include <torch/csrc/stable/library.h>

#include <optional>

#include "run.h"
#include "torch_checks.h"

namespace {

using namespace torchq::ops;

constexpr const char* kOp = "torchq::layer_norm";

void check_parameter(const char* name, const Tensor& t, int64_t n) {
  check_cpu(kOp, name, t);
  CHECK(t.scalar_type() == ScalarType::Float && t.dim() == 1 && t.size(0) == n, kOp, ": ", name, " must be float32 (",
        n, ",), one per value of a row of x, got ", name_of(t.scalar_type()), ' ', shape_of(t), '.');
}

Tensor layer_norm(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, double eps) {
  check_cpu(kOp, "x", x);
  CHECK(x.scalar_type() == ScalarType::Float, kOp, ": x must be float32, got ", name_of(x.scalar_type()), '.');
  CHECK(x.dim() >= 1 && x.dim() <= kMaxDims, kOp, ": x must have 1 to ", kMaxDims, " dimensions, got ", x.dim(), '.');
  const int64_t n = x.size(x.dim() - 1);
  check_parameter("weight", weight, n);
  if (bias) check_parameter("bias", *bias, n);
  const Tensor from = contiguous(kOp, x), w = contiguous(kOp, weight);
  const std::optional<Tensor> b = bias ? std::optional(contiguous(kOp, *bias)) : bias;
  Tensor y = empty(kOp, x.sizes().data(), x.dim(), x.scalar_type());
  if (x.numel() == 0) return y;
  const auto floats = [](const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); };
  const torchq::NormRows rows{x.numel() / n,
                              n,
                              floats(from),
                              floats(w),
                              b ? floats(*b) : nullptr,
                              static_cast<float>(eps),
                              static_cast<float*>(y.mutable_data_ptr())};
  torchq::normalize_on_threads(torchq::active_kernel(), rows);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torchq, m) {
  m.def("layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(torchq, CPU, m) { m.impl("layer_norm", TORCH_BOX(&layer_norm)); }
