// USMMLA (Neoverse V1, N2 and later, Cortex-X2, A510, A710 and later, Apple M2 and later): tile 6 x 16.
//
//   USMMLA v.4s, v.16b, v.16b   a 2 x 2 block += u8 (2 rows x 8 k) · s8 (2 columns x 8 k), 32 multiply-adds
//                               latency 3, and 1 from accumulator to accumulator; 2 a cycle on Neoverse N2, 4 on V2
//   LDR q                       2 rows, or 2 columns, x 8 k
//
// Codes stay unsigned. Sums wrap only past int32, which kMaxDepth excludes. Weights are in P16c8, and the scratch holds
// the codes of two rows together. ZIP1 and ZIP2 take the 2 x 2 blocks apart once, at the end.
//
// Registers (32 q): 24 accumulators, 6 codes (two groups'), 2 weights. 11 registers loaded feed 24 products.

#include "kernel.h"

#if TORCHQ_HAS_I8MM
#include <arm_neon.h>
#include <string.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("i8mm"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC optimize("no-schedule-insns")  // vec_neon.inc says why
#pragma GCC target("arch=armv8.2-a+i8mm")
#endif

namespace torchq {
namespace neon_i8mm {

#include "vec_neon.inc"

using Code = uint8_t;
constexpr uint8_t kFlip = 0;
constexpr int64_t kRun = 16;
#include "rows_neon.inc"
#include "rows.inc"

constexpr int kMaxRows = 6, kVectors = 4, kSplit = 1;

// In assembly, which keeps the accumulator in its register. Around the intrinsic g++ 12 copies some back and forth.
// volatile keeps the order: clang 16 would load all weights first and run out of registers.
inline Ints dot_block(Ints acc, Ints codes, Ints weights) {
  __asm__ volatile("usmmla %0.4s, %1.16b, %2.16b" : "+w"(acc) : "w"(codes), "w"(weights));
  return acc;
}
inline Ints first_halves(Ints a, Ints b) {
  return vreinterpretq_s32_s64(vzip1q_s64(vreinterpretq_s64_s32(a), vreinterpretq_s64_s32(b)));
}
inline Ints second_halves(Ints a, Ints b) {
  return vreinterpretq_s32_s64(vzip2q_s64(vreinterpretq_s64_s32(a), vreinterpretq_s64_s32(b)));
}
inline Ints join(Ints whole, Ints) { return whole; }

#include "multiply_pairs.inc"
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

}  // namespace neon_i8mm

constexpr Kernel kernel_neon_i8mm = [] {
  Kernel k;
  k.name = "neon_i8mm";
  k.needs = kAsimd | kI8mm;
  k.layout = Layout::p16c8;
  k.tiling.tile = {neon_i8mm::kMaxRows, 16, 8};
  k.range = neon_i8mm::range;
  k.quantize = neon_i8mm::quantize;
  k.run = neon_i8mm::run;
  k.activate = neon_i8mm::activate;
  k.cell = neon_i8mm::cell;
  k.gather = neon_i8mm::gather;
  k.widen = neon_i8mm::widen;
  k.depthwise = neon_i8mm::depthwise;
  k.normalize = neon_i8mm::normalize;
  k.codes.interleaved_rows = 2;
  return k;
}();

}  // namespace torchq

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
