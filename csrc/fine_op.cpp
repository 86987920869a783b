// torch.ops.torchq.linear_fine: its schema and argument checks. torch_ops.cpp says how torch is reached.

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "run.h"
#include "torch_checks.h"

namespace {

using namespace torchq::ops;

constexpr const char* kOp = "torchq::linear_fine";

Tensor linear_fine(const Tensor& x, const Tensor& packed, int64_t activation) {
  const torchq::PackedHeader& weights = header_of(kOp, "packed", packed);
  CHECK(x.scalar_type() == ScalarType::Float, kOp, ": x must be float32, got ", name_of(x.scalar_type()), '.');
  check_cpu(kOp, "x", x);
  CHECK(x.dim() >= 1 && x.dim() <= kMaxDims, kOp, ": x must have 1 to ", kMaxDims, " dimensions, got ", x.dim(), '.');
  const int64_t k = x.size(x.dim() - 1);
  CHECK(k == weights.k, kOp, ": the weight was packed for ", weights.k, " input features, but x has ", k,
        " (x: ", shape_of(x), ").");
  const torchq::Activation kind = activation_of(kOp, activation);
  const Tensor rows = contiguous(kOp, x);
  int64_t sizes[kMaxDims], count = 1;
  *(std::copy(x.sizes().begin(), x.sizes().end(), sizes) - 1) = weights.n;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) count *= sizes[i];
  Tensor y = empty(kOp, sizes, x.dim(), ScalarType::Float);
  if (count == 0 || weights.n == 0) return y;
  const auto* from = static_cast<const float*>(rows.const_data_ptr());
  with_scratch(kOp, [&] {
    torchq::run_fine(kernel_for(kOp, weights.layout), {count, from, static_cast<float*>(y.mutable_data_ptr())}, weights,
                     kind);
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torchq, m) { m.def("linear_fine(Tensor x, Tensor packed, int activation=0) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(torchq, CPU, m) { m.impl("linear_fine", TORCH_BOX(&linear_fine)); }
