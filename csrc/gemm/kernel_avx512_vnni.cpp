// AVX512-VNNI: tile 6 x 64, 16 columns to a register; 8 x 48 for 7 or 8 rows.
//
//   VPDPBUSD zmm, zmm, zmm   acc += Σ of 4 u8 x s8, 64 products   latency 4-5; 2 a cycle on Zen 5 and Intel servers,
//                                                                 1 a cycle on Zen 4
//   VPBROADCASTD zmm, m32    4 codes of a row to every column     load port only, no shuffle
//
// Never saturates and wraps only past int32, which kMaxDepth excludes. Codes are the unsigned operand, weights the
// signed one, so the broadcast cannot be folded into VPDPBUSD; 10 loads feed 24 products.
//
// Registers (32 zmm): 24 accumulators, 4 weights, 1 broadcast.

#include "kernel.h"

#if defined(__x86_64__)
#include <float.h>
#include <immintrin.h>
#include <string.h>

#pragma GCC push_options
#pragma GCC target("avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")

namespace torchq {
namespace avx512_vnni {

using Code = uint8_t;
#include "vec512.inc"

#include "rows_x86.inc"
#include "rows.inc"
#include "rows_together.inc"

constexpr int kMaxRows = 6, kVectors = 4, kSplit = 1, kAhead = 256, kOneRowSums = 4, kUnroll = 1, kNextLines = 2;
constexpr int kOutAhead = 24;

inline Ints load_weights(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline Ints broadcast(const Code* p) {
  int32_t four;
  memcpy(&four, p, 4);
  return _mm512_set1_epi32(four);
}
inline Ints dot(Ints acc, Ints a, Ints w) { return _mm512_dpbusd_epi32(acc, a, w); }
inline Ints join(Ints whole, Ints) { return whole; }

#include "multiply_broadcast.inc"
#include "epilogue.inc"
#include "cell.inc"
#include "depthwise_codes.inc"
#include "depthwise.inc"
#include "gather.inc"
#include "normalize.inc"
#include "finish.inc"
#include "plain.inc"
#include "relu_codes.inc"
#include "tile.inc"

template <int kRows, int kCols>
void run_tall_tile(const Block& b) {
  PlainOutputs::fit(b) ? tile<kRows, kCols, PlainOutputs>(b) : tile<kRows, kCols, AnyOutputs>(b);
}

template <int kRows>
void run_tall(const Block& b) {
  switch (b.panels) {
    case 1: return run_tall_tile<kRows, 1>(b);
    case 2: return run_tall_tile<kRows, 2>(b);
    default: return run_tall_tile<kRows, 3>(b);
  }
}

void run(const Block& b) {
  if (b.m > kMaxRows) return b.m == 7 ? run_tall<7>(b) : run_tall<8>(b);
  switch (b.panels) {
    case 1: return pick_tile<1>(b)(b);
    case 2: return pick_tile<2>(b)(b);
    case 3: return pick_tile<3>(b)(b);
    default: return pick_tile<4>(b)(b);
  }
}

}  // namespace avx512_vnni

constexpr Kernel kernel_avx512_vnni = [] {
  Kernel k;
  k.name = "avx512_vnni";
  k.needs = kAvx512Vnni;
  k.tiling.tile = {avx512_vnni::kMaxRows, avx512_vnni::kVectors * avx512_vnni::kLanes, 4};
  k.range = avx512_vnni::range;
  k.quantize = avx512_vnni::quantize;
  k.quantize_own = avx512_vnni::quantize_own;
  k.run = avx512_vnni::run;
  k.activate = avx512_vnni::activate;
  k.cell = avx512_vnni::cell;
  k.gather = avx512_vnni::gather;
  k.interleave = avx512_vnni::interleave;
  k.depthwise = avx512_vnni::depthwise;
  k.normalize = avx512_vnni::normalize;
  k.tiling.next_lines = avx512_vnni::kNextLines;
  k.tiling.tall = {8, 48, 4};
  return k;
}();

}  // namespace torchq

#pragma GCC pop_options
#endif
