// NEON: tile 6 x 16, 4 columns to a register. Registers (32 q): 24 sums, 4 of a panel, 1 broadcast.

#include "kernel.h"

#if defined(__aarch64__)
#include <float.h>
#include <arm_neon.h>
#include <string.h>

#include "../gemm/kernel.h"

#pragma GCC push_options
#pragma GCC optimize("no-schedule-insns")  // gemm/vec_neon.inc says why

namespace torchq {
namespace attention {
namespace neon {

#include "vec_neon.inc"

#include "floats.inc"
#include "softmax.inc"
#include "codes.inc"
#include "in_place.inc"

constexpr int kMaxRows = 6, kMaxPanels = 1, kAhead = 64;

#include "multiply.inc"

}  // namespace neon

constexpr Kernel kernel_neon = [] {
  Kernel k;
  k.name = "neon";
  k.needs = kAsimd;
  k.beside = kAsimd;
  k.to_floats = neon::to_floats;
  k.from_floats = neon::from_floats;
  k.transpose = neon::transpose;
  k.multiply = neon::multiply;
  k.largest = neon::largest;
  k.largest_masked = neon::largest_masked;
  k.weigh = neon::weigh;
  k.dot_rows = neon::dot_rows;
  k.add_weighted = neon::add_weighted;
  k.weigh_codes = neon::weigh_codes;
  k.quantize_keys = neon::quantize_keys;
  k.quantize_values = neon::quantize_values;
  k.add_rows = neon::add_rows;
  k.extend_ranges = neon::extend_ranges;
  return k;
}();

}  // namespace attention
}  // namespace torchq

#pragma GCC pop_options
#endif
