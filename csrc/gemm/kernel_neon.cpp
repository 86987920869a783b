// NEON, armv8.0-a: tile 6 x 8, exact for all codes and weights.
//
// The scratch holds code - 128, so that both factors are signed bytes:
//
//   SMULL v.8h, v.8b, v.8b    8 products to int16. |-128·-128| = 16384 fits, but the sum of two such products is 32768.
//                             So SMLAL2, which would save a quarter of the instructions, cannot add to it.
//   SADALP v.4s, v.8h         adjacent products added to int32 sums, exact
//   LD1R v.2s                 4 codes of a row, twice: for the 2 columns of a register
//
// Each accumulator holds (k0·k1, k2·k3) sums of 2 columns; the last step adds the pairs.
//
// Registers (32 q): 24 accumulators, 4 weights, 1 broadcast, 1 product.

#include "kernel.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#include <string.h>

#pragma GCC push_options
#pragma GCC optimize("no-schedule-insns")  // vec_neon.inc says why

namespace torchq {
namespace neon {

#include "vec_neon.inc"

using Code = uint8_t;
constexpr uint8_t kFlip = 0x80;
constexpr int64_t kRun = 8;
#include "rows_neon.inc"
#include "rows.inc"

constexpr int kMaxRows = 6, kVectors = 2, kSplit = 2, kAhead = 512, kOneRowSums = 0, kUnroll = 1, kNextLines = 0;
constexpr int kOutAhead = 0;

// Both fill the low half of a register.
inline Ints load_weights(const uint8_t* p) { return vreinterpretq_s32_u8(vcombine_u8(vld1_u8(p), vdup_n_u8(0))); }
inline Ints broadcast(const Code* p) {
  int32_t four;
  memcpy(&four, p, 4);
  return splat(four);
}
inline Ints dot(Ints acc, Ints a, Ints w) {
  const int8x8_t codes = vget_low_s8(vreinterpretq_s8_s32(a)), weights = vget_low_s8(vreinterpretq_s8_s32(w));
  int16x8_t products;  // in assembly, and volatile to keep the order: see load_pair() in vec_neon.inc
  __asm__ volatile("smull %0.8h, %1.8b, %2.8b" : "=w"(products) : "w"(codes), "w"(weights));
  __asm__ volatile("sadalp %0.4s, %1.8h" : "+w"(acc) : "w"(products));
  return acc;
}
inline Ints join(Ints lo, Ints hi) { return vpaddq_s32(lo, hi); }

#include "multiply_broadcast.inc"
#include "epilogue.inc"
#include "cell.inc"
#include "depthwise_floats.inc"
#include "depthwise.inc"
#include "gather.inc"
#include "normalize.inc"
#include "finish.inc"
#include "plain_neon.inc"
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

}  // namespace neon

constexpr Kernel kernel_neon = [] {
  Kernel k;
  k.name = "neon";
  k.needs = kAsimd;
  k.tiling.tile = {neon::kMaxRows, 16, 4};
  k.range = neon::range;
  k.quantize = neon::quantize;
  k.run = neon::run;
  k.activate = neon::activate;
  k.cell = neon::cell;
  k.gather = neon::gather;
  k.widen = neon::widen;
  k.depthwise = neon::depthwise;
  k.normalize = neon::normalize;
  k.codes.shift = 128;
  return k;
}();

}  // namespace torchq

#pragma GCC pop_options
#endif
