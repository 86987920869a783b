// AVX2 and FMA: tile 6 x 16, 8 columns to a register. Registers (16 ymm): 12 sums, 2 of a panel, 1 broadcast.

#include "kernel.h"

#if defined(__x86_64__)
#include <float.h>
#include <immintrin.h>
#include <string.h>

#include "../gemm/kernel.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

namespace torchq {
namespace attention {
namespace avx2 {

#include "vec256.inc"

#include "floats.inc"
#include "softmax.inc"
#include "codes.inc"
#include "in_place.inc"

constexpr int kMaxRows = 6, kMaxPanels = 1, kAhead = 64;

#include "multiply.inc"

}  // namespace avx2

constexpr Kernel kernel_avx2 = [] {
  Kernel k;
  k.name = "avx2";
  k.needs = kAvx2;
  k.beside = kAvx2;
  k.to_floats = avx2::to_floats;
  k.from_floats = avx2::from_floats;
  k.transpose = avx2::transpose;
  k.multiply = avx2::multiply;
  k.largest = avx2::largest;
  k.largest_masked = avx2::largest_masked;
  k.weigh = avx2::weigh;
  k.dot_rows = avx2::dot_rows;
  k.add_weighted = avx2::add_weighted;
  k.weigh_codes = avx2::weigh_codes;
  k.quantize_keys = avx2::quantize_keys;
  k.quantize_values = avx2::quantize_values;
  k.add_rows = avx2::add_rows;
  k.extend_ranges = avx2::extend_ranges;
  return k;
}();

}  // namespace attention
}  // namespace torchq

#pragma GCC pop_options
#endif
