// SDOT (Cortex-A55, A75, A76 and later, Neoverse, Apple): tile 6 x 16.
//
//   SDOT v.4s, v.16b, v.4b[i]   acc += Σ of 4 s8 x s8, 16 products
//                               latency 3 to 4, and 1 from accumulator to accumulator on Neoverse; 2 a cycle on
//                               Neoverse N1, 4 on V1, V2 and Apple's
//   LDR q                       16 codes of a row, for 4 groups; SDOT names the lane, so nothing is broadcast
//
// Both operands are signed, so the scratch holds code - 128. Sums wrap only past int32, which kMaxDepth excludes.
//
// Registers (32 q): 24 accumulators, 6 codes, 2 weights. 22 registers loaded feed 96 products.

#include "kernel.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#include <string.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC optimize("no-schedule-insns")  // vec_neon.inc says why
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif

namespace torchq {
namespace neon_dotprod {

#include "vec_neon.inc"

using Code = uint8_t;
constexpr uint8_t kFlip = 0x80;
constexpr int64_t kRun = 8;
#include "rows_neon.inc"
#include "rows.inc"

constexpr int kMaxRows = 6, kVectors = 4, kSplit = 1;

// In assembly, which keeps the accumulator in its register. Around the intrinsic g++ 12 copies some back and forth.
template <int kLane>
inline Ints dot_lane(Ints acc, Ints codes, Ints weights) {
  __asm__("sdot %0.4s, %1.16b, %2.4b[%3]" : "+w"(acc) : "w"(weights), "w"(codes), "i"(kLane));
  return acc;
}
inline Ints join(Ints whole, Ints) { return whole; }

#include "multiply_lanes.inc"
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

void run(const Block& b) {
  if (b.m == kMaxRows && PlainOutputs::fit(b))  // the commonest, and faster than a jump table
    return tile<kMaxRows, kVectors, PlainOutputs>(b);
  pick_tile<kVectors>(b)(b);
}

}  // namespace neon_dotprod

constexpr Kernel kernel_neon_dotprod = [] {
  Kernel k;
  k.name = "neon_dotprod";
  k.needs = kAsimd | kAsimdDp;
  k.tiling.tile = {neon_dotprod::kMaxRows, 16, 4};
  k.range = neon_dotprod::range;
  k.quantize = neon_dotprod::quantize;
  k.run = neon_dotprod::run;
  k.activate = neon_dotprod::activate;
  k.cell = neon_dotprod::cell;
  k.gather = neon_dotprod::gather;
  k.widen = neon_dotprod::widen;
  k.depthwise = neon_dotprod::depthwise;
  k.normalize = neon_dotprod::normalize;
  k.codes.shift = 128;
  return k;
}();

}  // namespace torchq

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
