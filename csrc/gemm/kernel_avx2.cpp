// AVX2: tile 6 x 8, exact.
//
//   VPMADDUBSW would add two u8 x s8 products in int16 and saturate (2·255·127 > 32767), so it is not used. Instead
//   VPMOVSXBW ymm, m128     16 weights to int16                       once per group and 4 columns, shared by 6 rows
//   VPBROADCASTQ ymm, m64   4 codes, already int16 in the scratch     load port only
//   VPMADDWD, VPADDD        4 products to 2 int32 sums per column, exact: 2·255·128 < 2^31
//
// Each accumulator holds (k0·k1, k2·k3) sums of 4 columns; the last step adds the pairs.
//
// Registers (16 ymm): 12 accumulators, 2 weights, 1 broadcast, 1 product.

#include "kernel.h"

#if defined(__x86_64__)
#include <float.h>
#include <immintrin.h>
#include <string.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

namespace torchq {
namespace avx2 {

using Code = int16_t;
#include "vec256.inc"

#include "rows_x86.inc"
#include "rows.inc"
#include "rows_together.inc"

constexpr int kMaxRows = 6, kVectors = 1, kSplit = 2, kAhead = 1024, kOneRowSums = 0, kUnroll = 1, kNextLines = 0;
constexpr int kOutAhead = 0;

inline Ints load_weights(const uint8_t* p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Ints broadcast(const Code* p) {
  int64_t four;
  memcpy(&four, p, 8);
  return _mm256_set1_epi64x(four);
}
inline Ints dot(Ints acc, Ints a, Ints w) { return add(acc, _mm256_madd_epi16(a, w)); }
// Columns 0-3 and 4-7 as pairs -> columns 0-7: the horizontal add works within 128-bit halves, the permute mends that.
inline Ints join(Ints lo, Ints hi) { return _mm256_permute4x64_epi64(_mm256_hadd_epi32(lo, hi), 0b11011000); }

#include "multiply_broadcast.inc"
#include "epilogue.inc"
#include "cell.inc"
#include "depthwise_floats.inc"
#include "depthwise.inc"
#include "gather.inc"
#include "normalize.inc"
#include "finish.inc"
#include "plain.inc"
#include "relu_codes.inc"
#include "tile.inc"

// Half a panel at a time. The second 8 columns are the same tile with its pointers moved.
void run(const Block& b) {
  const TileFn compute = pick_tile<kVectors>(b);
  compute(b);
  Block right = b;
  right.panel += 32;
  right.out = static_cast<uint8_t*>(b.out) + 8 * element_bytes(b.out_dtype);
  right.residual.data = b.residual.at(8);
  compute(right);
}

}  // namespace avx2

constexpr Kernel kernel_avx2 = [] {
  Kernel k;
  k.name = "avx2";
  k.needs = kAvx2;
  k.tiling.tile = {avx2::kMaxRows, 16, 4};
  k.codes.bytes = 2;
  k.range = avx2::range;
  k.quantize = avx2::quantize;
  k.quantize_own = avx2::quantize_own;
  k.run = avx2::run;
  k.activate = avx2::activate;
  k.cell = avx2::cell;
  k.gather = avx2::gather;
  k.widen = avx2::widen;
  k.depthwise = avx2::depthwise;
  k.normalize = avx2::normalize;
  return k;
}();

}  // namespace torchq

#pragma GCC pop_options
#endif
