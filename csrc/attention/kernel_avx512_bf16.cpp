// AVX512 with BF16: as AVX512, and for products of bfloat16
//
//   VDPBF16PS zmm, zmm, zmm   acc += 2 products, 32 in all; takes denormal numbers for 0

#include "kernel.h"

#if defined(__x86_64__)
#include <float.h>
#include <immintrin.h>
#include <string.h>

#include "../gemm/kernel.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")

namespace torchq {
namespace attention {
namespace avx512_bf16 {

#include "vec512.inc"

#include "floats.inc"
#include "softmax.inc"
#include "codes.inc"
#include "in_place.inc"

constexpr int kMaxRows = 6, kMaxPanels = 4, kAhead = 64;

#include "multiply.inc"

struct MultiplyHalves {
  static Floats add(Floats x, Floats w, Floats sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(w));
  }
};

void multiply_halves(const Product& p) { multiply_by<MultiplyHalves>(p); }

inline __m256i halves_of(Floats x) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)); }

void to_halves(const float* x, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += kLanes)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i / 2), halves_of(load(x + i)));
}

void join_halves(const float* x, int64_t stride, int64_t n, float* out, int64_t panel_stride) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const Ints first = _mm512_cvtepu16_epi32(halves_of(load(x + i)));
    const Ints second = _mm512_cvtepu16_epi32(halves_of(load(x + stride + i)));
    const Ints both = _mm512_or_si512(first, _mm512_slli_epi32(second, 16));
    store(reinterpret_cast<int32_t*>(out + i / kPanel * panel_stride), both);
  }
}

}  // namespace avx512_bf16

constexpr Kernel kernel_avx512_bf16 = [] {
  Kernel k;
  k.name = "avx512_bf16";
  k.needs = kAvx512Vnni | kAvx512Bf16;
  k.beside = kAvx512Vnni;
  k.to_floats = avx512_bf16::to_floats;
  k.from_floats = avx512_bf16::from_floats;
  k.transpose = avx512_bf16::transpose;
  k.multiply = avx512_bf16::multiply;
  k.multiply_halves = avx512_bf16::multiply_halves;
  k.to_halves = avx512_bf16::to_halves;
  k.join_halves = avx512_bf16::join_halves;
  k.largest = avx512_bf16::largest;
  k.largest_masked = avx512_bf16::largest_masked;
  k.weigh = avx512_bf16::weigh;
  k.dot_rows = avx512_bf16::dot_rows;
  k.add_weighted = avx512_bf16::add_weighted;
  k.weigh_codes = avx512_bf16::weigh_codes;
  k.quantize_keys = avx512_bf16::quantize_keys;
  k.quantize_values = avx512_bf16::quantize_values;
  k.add_rows = avx512_bf16::add_rows;
  k.extend_ranges = avx512_bf16::extend_ranges;
  return k;
}();

}  // namespace attention
}  // namespace torchq

#pragma GCC pop_options
#endif
