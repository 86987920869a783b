// What this CPU can do.
#pragma once

#include <cstdint>

namespace torchq {

// The CPU features that kernels need.
enum Feature : uint32_t {
  kAvx2 = 1u << 0,        // AVX2, FMA and F16C
  kAvxVnni = 1u << 1,     // VEX-encoded VPDPBUSD
  kAvx512Vnni = 1u << 2,  // AVX512 F, BW, DQ, VL and VNNI
  kAsimd = 1u << 3,       // Advanced SIMD, part of every armv8.0-a
  kAsimdDp = 1u << 4,     // SDOT
  kI8mm = 1u << 5,        // USMMLA
  kAvx512Bf16 = 1u << 7,  // VDPBF16PS, beside kAvx512Vnni
  kAmxInt8 = 1u << 6,     // AMX tiles and TDPBUSD, and the operating system's permission to use them
  kAmxBf16 = 1u << 8,     // the same with TDPBF16PS
};

// The Feature bits of this CPU. Detected at the first call.
uint32_t cpu_features();

// Whether this is Apple's silicon, on any operating system. False where the CPU is not an Arm one.
bool is_apple();

}  // namespace torchq
