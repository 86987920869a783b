// torch.ops.torchq.squared_error: its schema, its checks, and its loop, which is the same on every CPU.

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "torch_checks.h"

namespace {

using namespace torchq::ops;

constexpr const char* kOp = "torchq::squared_error";

// Half to even, below 2^51 by the addition itself. What is larger stays larger than any code.
double rounded(double x) {
  constexpr double kRounding = 6755399441055744.0;  // 1.5 · 2^52
  return (x + kRounding) - kRounding;
}

struct Range {
  double lo, hi;
};

// Of bins whose edges are edges [bins + 1], for u8 codes of this range.
double squared_error(const double* counts, const double* edges, int64_t bins, Range range) {
  double scale = (range.hi - range.lo) / 255;
  if (!(scale > 0)) scale = 1;
  const double zero_point = rounded(-range.lo / scale), cube = scale * scale * scale / 12;
  double sum = 0, last_code = 0, last_error = 0;
  for (int64_t i = 0; i <= bins; ++i) {
    const double code = std::min(std::max(rounded(edges[i] / scale), -zero_point), 255 - zero_point);
    const double error = edges[i] - code * scale;
    if (i > 0 && counts[i - 1] != 0) {
      const double mean = code == last_code ? (last_error * (last_error + error) + error * error) / 3
                                            : ((code * cube + error * error * error / 3) -
                                               (last_code * cube + last_error * last_error * last_error / 3)) /
                                                  (edges[i] - edges[i - 1]);
      sum += counts[i - 1] * mean;
    }
    last_code = code;
    last_error = error;
  }
  return sum;
}

void check_doubles(const char* name, const Tensor& t, int64_t channels, const char* expected, int64_t columns) {
  check_cpu(kOp, name, t);
  CHECK(t.dim() == 2 && t.size(0) == channels && (columns < 0 || t.size(1) == columns) &&
            t.scalar_type() == ScalarType::Double,
        kOp, ": ", name, " must be float64 ", expected, ", got ", name_of(t.scalar_type()), ' ', shape_of(t), '.');
}

Tensor squared_errors(const Tensor& counts, const Tensor& edges, const Tensor& lo, const Tensor& hi) {
  check_cpu(kOp, "counts", counts);
  const int64_t channels = counts.dim() > 0 ? counts.size(0) : 0, bins = counts.dim() > 1 ? counts.size(1) : 0;
  check_doubles("counts", counts, channels, "(channels, bins)", -1);
  check_doubles("edges", edges, channels, "(channels, bins + 1)", bins + 1);
  check_doubles("lo", lo, channels, "(channels, ranges)", -1);
  check_doubles("hi", hi, channels, "(channels, ranges)", -1);
  const int64_t los = lo.size(1), his = hi.size(1), ranges = std::max(los, his);
  CHECK(los == his || std::min(los, his) == 1, kOp, ": lo has ", los, " ranges for each channel, hi has ", his,
        ". They must have as many, or one.");
  const Tensor c = contiguous(kOp, counts), e = contiguous(kOp, edges), l = contiguous(kOp, lo),
               h = contiguous(kOp, hi);
  const auto row = [](const Tensor& t, int64_t i) {
    return static_cast<const double*>(t.const_data_ptr()) + i * t.size(1);
  };
  Tensor result = empty(kOp, {channels, ranges}, ScalarType::Double);
  auto* to = static_cast<double*>(result.mutable_data_ptr());
  for (int64_t i = 0; i < channels; ++i)
    for (int64_t j = 0; j < ranges; ++j)
      to[i * ranges + j] =
          squared_error(row(c, i), row(e, i), bins, {row(l, i)[los == 1 ? 0 : j], row(h, i)[his == 1 ? 0 : j]});
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torchq, m) {
  m.def("squared_error(Tensor counts, Tensor edges, Tensor lo, Tensor hi) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(torchq, CPU, m) { m.impl("squared_error", TORCH_BOX(&squared_errors)); }
