// AVX512: tile 6 x 64, 16 columns to a register. Registers (32 zmm): 24 sums, 4 of a panel, 1 broadcast.

#include "kernel.h"

#if defined(__x86_64__)
#include <float.h>
#include <immintrin.h>
#include <string.h>

#include "../gemm/kernel.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")

namespace torchq {
namespace attention {
namespace avx512 {

#include "vec512.inc"

#include "floats.inc"
#include "softmax.inc"
#include "codes.inc"
#include "in_place.inc"

constexpr int kMaxRows = 6, kMaxPanels = 4, kAhead = 64;

#include "multiply.inc"

}  // namespace avx512

constexpr Kernel kernel_avx512 = [] {
  Kernel k;
  k.name = "avx512";
  k.needs = kAvx512Vnni;
  k.beside = kAvx512Vnni;
  k.to_floats = avx512::to_floats;
  k.from_floats = avx512::from_floats;
  k.transpose = avx512::transpose;
  k.multiply = avx512::multiply;
  k.largest = avx512::largest;
  k.largest_masked = avx512::largest_masked;
  k.weigh = avx512::weigh;
  k.dot_rows = avx512::dot_rows;
  k.add_weighted = avx512::add_weighted;
  k.weigh_codes = avx512::weigh_codes;
  k.quantize_keys = avx512::quantize_keys;
  k.quantize_values = avx512::quantize_values;
  k.add_rows = avx512::add_rows;
  k.extend_ranges = avx512::extend_ranges;
  return k;
}();

}  // namespace attention
}  // namespace torchq

#pragma GCC pop_options
#endif
