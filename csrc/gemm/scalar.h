// 16-bit floats in plain C++, for the reference kernel. They round as the instructions of the other kernels do.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernel.h"

namespace torchq {

inline float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float to_float(float x) { return x; }
inline float to_float(Bf16 x) { return bits_to_float(uint32_t{x.bits} << 16); }
inline float to_float(F16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, exponent = (x.bits >> 10) & 31, mantissa = x.bits & 1023;
  if (exponent == 31) return bits_to_float(sign | 0x7F800000u | (mantissa ? 0x400000u : 0) | mantissa << 13);
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * static_cast<float>(mantissa) * 0x1p-24f;
  return bits_to_float(sign | (exponent + 112) << 23 | mantissa << 13);
}

// Half to even; every NaN becomes 0x7FC0, as in torch.
inline Bf16 to_bf16(float x) {
  const uint32_t bits = float_to_bits(x);
  if (x != x) return {0x7FC0};
  return {static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)};
}

// Half to even, with subnormals; NaN keeps its sign and the top of its payload, as VCVTPS2PH does.
inline F16 to_f16(float x) {
  const uint32_t bits = float_to_bits(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return {static_cast<uint16_t>(sign | 0x7E00 | (magnitude >> 13 & 0x3FF))};
  if (magnitude >= 0x477FF000) return {static_cast<uint16_t>(sign | 0x7C00)};  // 65520 and above round to infinity
  if (magnitude < 0x38800000) {  // below 2^-14: adding 0.5 leaves units of 2^-24 in the mantissa, rounded by the FPU
    const uint32_t rounded = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3F000000;
    return {static_cast<uint16_t>(sign | rounded)};
  }
  const uint32_t rounded = magnitude - 0x38000000 + 0xFFF + (magnitude >> 13 & 1);
  return {static_cast<uint16_t>(sign | rounded >> 13)};
}

}  // namespace torchq
