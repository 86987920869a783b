// CPU detection. Arm's is in cpu_arm.inc.

#include "cpu.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(__aarch64__) && defined(_WIN32)
#include <windows.h>
#endif

namespace torchq {
namespace {

#if defined(__x86_64__)
// Extended control register 0: which registers the operating system saves at a context switch.
uint64_t xcr0() {
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t{high} << 32) | low;
}

// Since version 5.16 Linux saves the 8 KiB of tile data only for a process that has asked for permission. The
// permission covers all threads of the process and its children. Without it the first tile instruction raises SIGILL.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;  // we know of no other system that saves tiles
#endif
}

// A feature needs two things: CPUID says that the CPU has it, and XCR0 that the operating system saves its registers.
uint32_t detect() {
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return 0;
  const bool f16c = c & bit_F16C, fma = c & bit_FMA;
  const uint64_t saved = xcr0();
  const bool ymm = (saved & 0x6) == 0x6, zmm = (saved & 0xE6) == 0xE6, tiles = (saved & 0x60000) == 0x60000;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
  const uint32_t subleaves = a;
  uint32_t have = 0;
  if (ymm && f16c && fma && (b & bit_AVX2)) have |= kAvx2;
  constexpr uint32_t avx512 = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
  if (zmm && (b & avx512) == avx512 && (c & bit_AVX512VNNI)) have |= kAvx512Vnni;
  constexpr uint32_t amx_bf16 = 1u << 22, amx_tile = 1u << 24, amx_int8 = 1u << 25;
  if (tiles && (d & amx_tile) && may_use_tiles())
    have |= (d & amx_int8 ? kAmxInt8 : 0u) | (d & amx_bf16 ? kAmxBf16 : 0u);
#ifdef TORCHQ_TILES  // see kernel_amx_int8.cpp
  have |= kAmxInt8 | kAmxBf16;
#endif
  if (subleaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) {
    if (ymm && (a & (1u << 4))) have |= kAvxVnni;
    if ((have & kAvx512Vnni) && (a & (1u << 5))) have |= kAvx512Bf16;
  }
  return have;
}

bool detect_apple() { return false; }
#elif defined(__aarch64__)
#include "cpu_arm.inc"
#else
uint32_t detect() { return 0; }
bool detect_apple() { return false; }
#endif

}  // namespace

uint32_t cpu_features() {
  static const uint32_t have = detect();
  return have;
}

bool is_apple() {
  static const bool apple = detect_apple();
  return apple;
}

}  // namespace torchq
