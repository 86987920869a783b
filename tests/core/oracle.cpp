#include "oracle.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>

namespace torchq::test {
namespace {

struct Format {
  int mantissa_bits, bias;
  int infinity;                // the bits of +infinity
  std::vector<double> values;  // by bits, 0 .. infinity; infinity counts as one step beyond the largest

  Format(int mantissa_bits, int bias)
      : mantissa_bits(mantissa_bits), bias(bias), infinity((2 * bias + 1) << mantissa_bits) {
    for (int bits = 0; bits <= infinity; ++bits) {
      const int exponent = bits >> mantissa_bits, mantissa = bits & ((1 << mantissa_bits) - 1);
      values.push_back(exponent == 0 ? std::ldexp(mantissa, 1 - bias - mantissa_bits)
                                     : std::ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits));
    }
  }
};

const Format& format_of(DType dtype) {
  static const Format f16(10, 15), bf16(7, 127);
  return dtype == DType::f16 ? f16 : bf16;
}

int64_t half_to_even(float x) {
  const float below = std::floor(x), rest = x - below;  // exact for the |x| < 2^22 asked for here
  const auto whole = static_cast<int64_t>(below);
  if (rest != 0.5f) return whole + (rest > 0.5f);
  return whole % 2 == 0 ? whole : whole + 1;
}

uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

}  // namespace

float widen(DType dtype, uint16_t bits) {
  const Format& f = format_of(dtype);
  const int magnitude = bits & 0x7FFF;
  const float sign = bits >> 15 ? -1.0f : 1.0f;
  if (magnitude > f.infinity) return std::numeric_limits<float>::quiet_NaN();
  if (magnitude == f.infinity) return sign * std::numeric_limits<float>::infinity();
  return sign * static_cast<float>(f.values[magnitude]);
}

uint16_t narrow(DType dtype, float x) {
  const Format& f = format_of(dtype);
  const int sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) {
    if (dtype == DType::bf16) return 0x7FC0;
    return static_cast<uint16_t>(sign | 0x7E00 | (bits_of(x) >> 13 & 0x3FF));
  }
  const double magnitude = std::fabs(x);
  const auto above = std::upper_bound(f.values.begin(), f.values.end(), magnitude);
  if (above == f.values.end()) return static_cast<uint16_t>(sign | f.infinity);
  const int lower = static_cast<int>(above - f.values.begin()) - 1;
  const double down = magnitude - f.values[lower], up = *above - magnitude;
  const bool take_upper = up < down || (up == down && lower % 2 == 1);
  return static_cast<uint16_t>(sign | (lower + take_upper));
}

std::vector<float> rounding_boundaries(DType dtype, int step) {
  const Format& f = format_of(dtype);
  std::vector<float> out;
  for (int bits = 0; bits < f.infinity; bits += step) {
    const auto middle = static_cast<float>((f.values[bits] + f.values[bits + 1]) / 2);
    for (float x : {static_cast<float>(f.values[bits]), std::nextafter(middle, 0.0f), middle,
                    std::nextafter(middle, std::numeric_limits<float>::infinity())}) {
      out.push_back(x);
      out.push_back(-x);
    }
  }
  return out;
}

float element(const uint8_t* row, DType dtype, int64_t i) {
  if (dtype == DType::f32) {
    float x;
    std::memcpy(&x, row + 4 * i, 4);
    return x;
  }
  uint16_t bits;
  std::memcpy(&bits, row + 2 * i, 2);
  return widen(dtype, bits);
}

std::vector<uint8_t> encode(const std::vector<float>& values, DType dtype) {
  const int64_t size = element_bytes(dtype);
  std::vector<uint8_t> out(values.size() * size);
  for (size_t i = 0; i < values.size(); ++i) {
    const uint16_t bits = dtype == DType::f32 ? 0 : narrow(dtype, values[i]);
    std::memcpy(out.data() + i * size, dtype == DType::f32 ? static_cast<const void*>(&values[i]) : &bits, size);
  }
  return out;
}

float rounded(float x) {
  volatile float once = x;
  return once;
}

uint8_t oracle_code(float scaled, int32_t zero_point) {
  if (std::isnan(scaled) || scaled < -1000.0f) return 0;
  if (scaled > 1000.0f) return 255;
  return static_cast<uint8_t>(std::clamp<int64_t>(half_to_even(scaled) + zero_point, 0, 255));
}

float scaled_element(const uint8_t* row, DType dtype, int64_t i, const float* channel_scale) {
  const float x = element(row, dtype, i);
  return channel_scale ? rounded(x * channel_scale[i]) : x;
}

RowRange oracle_range(const uint8_t* row, DType dtype, int64_t k, const float* channel_scale) {
  RowRange range{0.0f, 0.0f, true};
  for (int64_t i = 0; i < k; ++i) {
    const float x = scaled_element(row, dtype, i, channel_scale);
    if (!std::isfinite(x)) range.finite = false;
    if (x < range.lo) range.lo = x;
    if (x > range.hi) range.hi = x;
  }
  return range;
}

QParams oracle_qparams(const RowRange& range) {
  if (!range.finite) return {std::numeric_limits<float>::quiet_NaN(), 0};
  float scale = rounded(rounded(range.hi / 255) - rounded(range.lo / 255));
  if (scale < FLT_MIN) scale = 1;
  const float inverse = rounded(1 / scale);
  return {scale, oracle_code(rounded(-range.lo * inverse), 0)};
}

Sums oracle_sums(const Rows& rows, const Weights& weights) {
  const int64_t m = rows.m, n = weights.n, k = rows.k;
  Sums sums{std::vector<int64_t>(m * n), std::vector<float>(m)};
  std::vector<int64_t> centred(k);
  for (int64_t r = 0; r < m; ++r) {
    const uint8_t* row = rows.bytes.data() + r * k * element_bytes(rows.dtype);
    QParams q = rows.q;
    if (rows.dtype == DType::u8 || rows.dtype == DType::i8) {
      for (int64_t i = 0; i < k; ++i)
        centred[i] = (rows.dtype == DType::u8 ? int64_t{row[i]} : int64_t{static_cast<int8_t>(row[i])}) - q.zero_point;
    } else {
      const float* channel_scale = weights.channel_scale.empty() ? nullptr : weights.channel_scale.data();
      if (rows.per_token) q = oracle_qparams(oracle_range(row, rows.dtype, k, channel_scale));
      const float inverse = rounded(1 / q.scale);
      for (int64_t i = 0; i < k; ++i)
        centred[i] = oracle_code(rounded(scaled_element(row, rows.dtype, i, channel_scale) * inverse), q.zero_point) -
                     q.zero_point;
    }
    sums.row_scale[r] = q.scale;
    for (int64_t c = 0; c < n; ++c) {
      int64_t acc = 0;
      for (int64_t i = 0; i < k; ++i) acc += centred[i] * weights.codes[c * k + i];
      sums.acc[r * n + c] = acc;
    }
  }
  return sums;
}

float oracle_value(const Sums& sums, const Weights& weights, Activation activation, int64_t row, int64_t column) {
  const float scale = rounded(sums.row_scale[row] * weights.scale[column]);
  const float product = rounded(static_cast<float>(sums.acc[row * weights.n + column]) * scale);
  const float y = rounded(product + (weights.bias.empty() ? 0.0f : weights.bias[column]));
  return activation == Activation::relu && y < 0 ? 0.0f : y;
}

void oracle_store(const Sums& sums, const Weights& weights, const Out& out, int64_t row, int64_t column, uint8_t* y) {
  if (out.dtype == DType::i32) {
    const auto acc = static_cast<int32_t>(sums.acc[row * weights.n + column]);
    std::memcpy(y, &acc, 4);
    return;
  }
  const float value = oracle_value(sums, weights, out.activation, row, column);
  if (out.dtype == DType::f32) {
    std::memcpy(y, &value, 4);
  } else if (out.dtype == DType::u8) {
    *y = oracle_code(rounded(value * rounded(1 / out.q.scale)), out.q.zero_point);
  } else {
    const uint16_t bits = narrow(out.dtype, value);
    std::memcpy(y, &bits, 2);
  }
}

}  // namespace torchq::test
