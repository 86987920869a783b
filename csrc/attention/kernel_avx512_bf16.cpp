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
#include "halves.inc"

constexpr int kMaxRows = 6, kMaxPanels = 4, kAhead = 64;

#include "multiply.inc"

struct MultiplyHalves {
  static Floats add(Floats x, Floats w, Floats sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(w));
  }
};

void multiply_halves(const Product& p) { multiply_by<MultiplyHalves>(p); }

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
  k.weigh_halves = avx512_bf16::weigh_halves;
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
