// The arithmetic of gemm.h and kernel.h written a second time, plainly: from raw rows and raw weights, sums in int64,
// 16-bit floats by search among all their values. It shares nothing with the core but the declarations.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "check.h"

namespace torchq::test {

// ---- 16-bit floats ----------------------------------------------------------------------------------------------

// The value of these bits; every NaN is the same NaN.
float widen(DType dtype, uint16_t bits);
// The nearest value's bits, half to even. NaN: bf16 0x7FC0; f16 sign, quiet bit and top of the payload.
uint16_t narrow(DType dtype, float x);
// The boundaries of rounding to this dtype, in float32: each value, each midpoint, and the midpoint's two neighbours.
std::vector<float> rounding_boundaries(DType dtype, int step);

// Element i of a row of f32, bf16 or f16, and its inverse, rounding.
float element(const uint8_t* row, DType dtype, int64_t i);
std::vector<uint8_t> encode(const std::vector<float>& values, DType dtype);

// ---- Rows -------------------------------------------------------------------------------------------------------

uint8_t oracle_code(float scaled, int32_t zero_point);
// Element i of a row as it is quantized: times the scale of its channel, [k] or null for none.
float scaled_element(const uint8_t* row, DType dtype, int64_t i, const float* channel_scale);
RowRange oracle_range(const uint8_t* row, DType dtype, int64_t k, const float* channel_scale = nullptr);
QParams oracle_qparams(const RowRange& range);

// One rounding to float32, whatever the compiler is told about contraction.
float rounded(float x);

// ---- GEMM -------------------------------------------------------------------------------------------------------

struct Weights {
  int64_t n, k;
  std::vector<int8_t> codes;              // (n, k)
  std::vector<float> scale;               // [n]
  std::vector<float> bias;                // [n], or empty
  std::vector<float> channel_scale = {};  // [k], or empty
};

struct Rows {
  int64_t m, k;
  DType dtype;
  bool per_token;
  QParams q;                   // codes and static
  std::vector<uint8_t> bytes;  // (m, k) of dtype, contiguous
};

struct Out {
  DType dtype;
  Activation activation;
  QParams q;  // u8
};

struct Sums {
  std::vector<int64_t> acc;      // (m, n)
  std::vector<float> row_scale;  // [m]
};

Sums oracle_sums(const Rows& rows, const Weights& weights);
// act(float(acc) · (row scale · column scale) + bias)
float oracle_value(const Sums& sums, const Weights& weights, Activation activation, int64_t row, int64_t column);
// One element of y, element_bytes(out.dtype) bytes.
void oracle_store(const Sums& sums, const Weights& weights, const Out& out, int64_t row, int64_t column, uint8_t* y);

}  // namespace torchq::test
