// torch.ops.torchq.count_bins: its schema, its checks, and its loop, which is the same on every CPU.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <tuple>

#include "torch_checks.h"

namespace {

using namespace torchq::ops;

constexpr const char* kOp = "torchq::count_bins";

constexpr int64_t kBlock = 1024;  // values of a channel at a time

// Adds `n` values of one channel, `stride` apart: a float has per_value bins for each unit.
void count(const float* x, int64_t n, int64_t stride, float per_value, int64_t bins, int64_t* counts, int64_t* zeros) {
  const auto half = static_cast<int32_t>(bins / 2);
  const auto last = static_cast<float>(half - 1);
  float values[kBlock];
  int32_t bin[kBlock], zero_count = 0;
  for (int64_t i = 0; i < n; ++i) values[i] = x[i * stride];
  for (int64_t i = 0; i < n; ++i) {  // this loop has no branches, so that compilers use vectors
    const int32_t nonzero = -static_cast<int32_t>(std::fabs(values[i]) > FLT_MIN);  // all bits, or none
    const float place = std::max(std::min(last, values[i] * per_value), -last);     // `last` for NaN
    bin[i] = half + ((static_cast<int32_t>(place) - (values[i] < 0)) & nonzero);
    zero_count += 1 + nonzero;
  }
  for (int64_t i = 0; i < n; ++i) ++counts[bin[i]];
  *zeros += zero_count;
}

std::tuple<Tensor, Tensor> count_bins(const Tensor& x, const Tensor& per_value, int64_t bins) {
  check_cpu(kOp, "x", x);
  check_cpu(kOp, "per_value", per_value);
  CHECK(x.dim() == 2 && x.scalar_type() == ScalarType::Float, kOp, ": x must be float32 (values, channels), got ",
        name_of(x.scalar_type()), ' ', shape_of(x), '.');
  const int64_t rows = x.size(0), channels = x.size(1);
  CHECK(per_value.dim() == 1 && per_value.size(0) == channels && per_value.scalar_type() == ScalarType::Float, kOp,
        ": per_value must be float32 (", channels, ",), one per channel, got ", name_of(per_value.scalar_type()), ' ',
        shape_of(per_value), '.');
  CHECK(bins >= 2 && bins <= (1 << 24) && bins % 2 == 0, kOp, ": bins must be even and in [2, 2^24], got ", bins, '.');
  const Tensor from = contiguous(kOp, x), factors = contiguous(kOp, per_value);
  Tensor counts = empty(kOp, {channels, bins}, ScalarType::Long), zeros = empty(kOp, {channels}, ScalarType::Long);
  auto* to = static_cast<int64_t*>(counts.mutable_data_ptr());
  auto* zeros_to = static_cast<int64_t*>(zeros.mutable_data_ptr());
  std::fill_n(to, channels * bins, 0);
  std::fill_n(zeros_to, channels, 0);
  const auto* values = static_cast<const float*>(from.const_data_ptr());
  const auto* factor = static_cast<const float*>(factors.const_data_ptr());
  for (int64_t r = 0; r < rows; r += kBlock)
    for (int64_t c = 0; c < channels; ++c)
      count(values + r * channels + c, std::min(kBlock, rows - r), channels, factor[c], bins, to + c * bins,
            zeros_to + c);
  return {counts, zeros};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torchq, m) {
  m.def("count_bins(Tensor x, Tensor per_value, int bins) -> (Tensor counts, Tensor zeros)");
}

STABLE_TORCH_LIBRARY_IMPL(torchq, CPU, m) { m.impl("count_bins", TORCH_BOX(&count_bins)); }
