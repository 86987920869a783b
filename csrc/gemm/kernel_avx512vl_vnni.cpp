// AVX512-VNNI at 256 bits: the source of avx_vnni in the EVEX encoding. It serves CPUs that lower their clock for
// 512-bit work. It also lets the many CPUs with AVX512-VNNI but without AVX-VNNI (Ice Lake, Zen 4) run avx_vnni's code,
// and so test it.

#include "kernel.h"

#if defined(__x86_64__)
#include <float.h>
#include <immintrin.h>
#include <string.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")

namespace torchq {
namespace avx512vl_vnni {

#include "vec256.inc"
inline Ints dot(Ints acc, Ints a, Ints w) { return _mm256_dpbusd_epi32(acc, a, w); }
#include "vnni256.inc"

}  // namespace avx512vl_vnni

constexpr Kernel kernel_avx512vl_vnni = [] {
  Kernel k;
  k.name = "avx512vl_vnni";
  k.needs = kAvx2 | kAvx512Vnni;
  k.tiling.tile = {avx512vl_vnni::kMaxRows, 16, 4};
  k.range = avx512vl_vnni::range;
  k.quantize = avx512vl_vnni::quantize;
  k.quantize_own = avx512vl_vnni::quantize_own;
  k.run = avx512vl_vnni::run;
  k.activate = avx512vl_vnni::activate;
  k.cell = avx512vl_vnni::cell;
  k.gather = avx512vl_vnni::gather;
  k.interleave = avx512vl_vnni::interleave;
  k.depthwise = avx512vl_vnni::depthwise;
  k.normalize = avx512vl_vnni::normalize;
  k.tiling.full_tiles = true;  // as in avx_vnni
  return k;
}();

}  // namespace torchq

#pragma GCC pop_options
#endif
