// AVX-VNNI (Alder Lake and its successors, Zen 5): VPDPBUSD at 256 bits in the VEX encoding, 16 registers.

#include "kernel.h"

#if TORCHQ_HAS_AVX_VNNI
#include <immintrin.h>
#include <string.h>

#pragma GCC push_options
#pragma GCC target("avx2,f16c,avxvnni")

namespace torchq {
namespace avx_vnni {

#include "vec256.inc"
inline Ints dot(Ints acc, Ints a, Ints w) { return _mm256_dpbusd_avx_epi32(acc, a, w); }
#include "vnni256.inc"

}  // namespace avx_vnni

const Kernel kernel_avx_vnni = {"avx_vnni", kAvx2 | kAvxVnni, Layout::p16c4,      {avx_vnni::kMaxRows, 16, 4},
                                1,          avx_vnni::range,  avx_vnni::quantize, avx_vnni::run};

}  // namespace torchq

#pragma GCC pop_options
#endif
