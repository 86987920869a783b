// torch.ops.torchq.quantize_weight: its schema, its checks, and its loop, which is the same on every CPU.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cfloat>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>

#include "run.h"
#include "torch_checks.h"

namespace {

using namespace torchq::ops;

constexpr const char* kOp = "torchq::quantize_weight";

constexpr int64_t kValuesPerThread = 1 << 15;  // at least

// A value whose magnitude is below 2^22, plus this, is rounded to an integer, half to even, by the addition itself. The
// integer is the low bits of the sum.
constexpr float kRounding = 12582912.0f;  // 1.5 · 2^23

uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

// Magnitudes as integers, which are in their order. NaN is the largest. (Signed ones, as SSE2 compares.)
int32_t magnitude_of(float x) { return static_cast<int32_t>(bits_of(x) & 0x7FFFFFFF); }

// The scale of values of at most this magnitude: NaN where it is not finite.
float scale_of(int32_t magnitude) {
  if (magnitude > magnitude_of(FLT_MAX)) return std::numeric_limits<float>::quiet_NaN();
  float peak;
  memcpy(&peak, &magnitude, sizeof peak);
  const float scale = peak / 127.0f;
  return scale < FLT_MIN ? 1.0f : scale;
}

// These loops have no branches and use nothing by reference, so that compilers use vectors.
int32_t greater(int32_t peak, const float* values, int64_t n) {
  for (int64_t i = 0; i < n; ++i) peak = std::max(peak, magnitude_of(values[i]));
  return peak;
}

void divide(const float* values, const float* divisors, int64_t n, float* quotients) {
  for (int64_t i = 0; i < n; ++i) quotients[i] = values[i] / divisors[i];
}

void write(const float* values, int64_t n, float inverse, int8_t* codes) {
  for (int64_t i = 0; i < n; ++i) codes[i] = static_cast<int8_t>(bits_of(values[i] * inverse + kRounding));
}

// The rows of a weight, or of its quotient by `divisors` [columns], which may be null.
class Rows {
 public:
  Rows(const float* weight, int64_t stride, const float* divisors, int64_t columns)
      : weight_(weight), stride_(stride), divisors_(divisors), columns_(columns) {}

  int32_t peak(int64_t row) const {
    int32_t peak = 0;
    in_blocks(row, [&](const float* values, int64_t n, int64_t) { peak = greater(peak, values, n); });
    return peak;
  }

  // Of a scale that covers them: their quotients by it are at most 127.
  void write_codes(int64_t row, float scale, int8_t* codes) const {
    in_blocks(row, [&](const float* values, int64_t n, int64_t begin) {
      write(values, n, 1.0f / scale, codes + row * columns_ + begin);
    });
  }

 private:
  // Dividing twice takes less than memory for a row would.
  template <class F>
  void in_blocks(int64_t row, const F& use) const {
    constexpr int64_t kBlock = 1024;
    float quotients[kBlock];
    for (int64_t begin = 0; begin < columns_; begin += kBlock) {
      const int64_t n = std::min(kBlock, columns_ - begin);
      const float* values = weight_ + row * stride_ + begin;
      if (divisors_) divide(values, divisors_ + begin, n, quotients);
      use(divisors_ ? quotients : values, n, begin);
    }
  }

  const float* weight_;
  int64_t stride_;
  const float* divisors_;
  int64_t columns_;
};

std::tuple<Tensor, Tensor> quantize_weight(const Tensor& weight, const std::optional<Tensor>& channel_scale,
                                           bool per_channel) {
  check_cpu(kOp, "weight", weight);
  CHECK(weight.dim() == 2 && weight.scalar_type() == ScalarType::Float, kOp,
        ": weight must be float32 (rows, columns), got ", name_of(weight.scalar_type()), ' ', shape_of(weight), '.');
  const int64_t count = weight.size(0), columns = weight.size(1);
  if (channel_scale) {
    check_cpu(kOp, "channel_scale", *channel_scale);
    CHECK(channel_scale->dim() == 1 && channel_scale->size(0) == columns &&
              channel_scale->scalar_type() == ScalarType::Float,
          kOp, ": channel_scale must be float32 (", columns, ",), one for each column of weight, got ",
          name_of(channel_scale->scalar_type()), ' ', shape_of(*channel_scale), '.');
  }
  const bool dense = weight.stride(1) == 1;  // within a row: every n-th row of a weight needs no copy
  const Tensor from = dense ? weight : contiguous(kOp, weight);
  const auto divisors = channel_scale ? std::optional(contiguous(kOp, *channel_scale)) : std::nullopt;
  const auto floats = [](const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); };
  const Rows rows(floats(from), from.stride(0), divisors ? floats(*divisors) : nullptr, columns);
  Tensor codes = empty(kOp, {count, columns}, ScalarType::Char), scale = empty(kOp, {count}, ScalarType::Float);
  auto* codes_to = static_cast<int8_t*>(codes.mutable_data_ptr());
  auto* scale_to = static_cast<float*>(scale.mutable_data_ptr());
  if (!per_channel) {
    int32_t peak = 0;
    for (int64_t r = 0; r < count; ++r) peak = std::max(peak, rows.peak(r));
    std::fill_n(scale_to, count, scale_of(peak));
  }
  const int64_t rows_per_thread = kValuesPerThread / std::max<int64_t>(1, columns) + 1;
  torchq::in_ranges(count, rows_per_thread, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      if (per_channel) scale_to[r] = scale_of(rows.peak(r));
      rows.write_codes(r, scale_to[r], codes_to);
    }
  });
  return {codes, scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torchq, m) {
  m.def("quantize_weight(Tensor weight, Tensor? channel_scale, bool per_channel) -> (Tensor codes, Tensor scale)");
}

STABLE_TORCH_LIBRARY_IMPL(torchq, CPU, m) { m.impl("quantize_weight", TORCH_BOX(&quantize_weight)); }
