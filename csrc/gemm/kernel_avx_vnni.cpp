// AVX-VNNI (Alder Lake and its successors, Zen 5): VPDPBUSD at 256 bits in the VEX encoding, 16 registers.

#include "kernel.h"

#if TORCHQ_HAS_AVX_VNNI
#include <float.h>
#include <immintrin.h>
#include <string.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avxvnni")

namespace torchq {
namespace avx_vnni {

#include "vec256.inc"
inline Ints dot(Ints acc, Ints a, Ints w) { return _mm256_dpbusd_avx_epi32(acc, a, w); }
#include "vnni256.inc"

}  // namespace avx_vnni

constexpr Kernel kernel_avx_vnni = [] {
  Kernel k;
  k.name = "avx_vnni";
  k.needs = kAvx2 | kAvxVnni;
  k.tiling.tile = {avx_vnni::kMaxRows, 16, 4};
  k.range = avx_vnni::range;
  k.quantize = avx_vnni::quantize;
  k.quantize_own = avx_vnni::quantize_own;
  k.run = avx_vnni::run;
  k.activate = avx_vnni::activate;
  k.cell = avx_vnni::cell;
  k.gather = avx_vnni::gather;
  k.interleave = avx_vnni::interleave;
  k.depthwise = avx_vnni::depthwise;
  k.normalize = avx_vnni::normalize;
  k.tiling.full_tiles = true;  // the 10 accumulators of 5 rows barely cover the latency: any delay stalls them
  k.tiling.codes_budget = 768 * 1024;
  return k;
}();

}  // namespace torchq

#pragma GCC pop_options
#endif
