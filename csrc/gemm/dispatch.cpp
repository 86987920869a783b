// The kernel table, CPU detection, and which kernel is active.

#include <atomic>
#include <cstring>

#include "gemm.h"

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

// Best first. The first row this CPU can run is active unless one is forced. Tests, benchmarks and torchq.kernels
// all walk this table.
const Kernel* const kKernels[] = {
#if defined(__x86_64__)
#if TORCHQ_HAS_AMX
    &kernel_amx_int8,
#endif
    &kernel_avx512_vnni,
#if TORCHQ_HAS_AVX_VNNI
    &kernel_avx_vnni,
#endif
    &kernel_avx512vl_vnni, &kernel_avx2,
#elif defined(__aarch64__)
#if TORCHQ_HAS_I8MM
    &kernel_neon_i8mm,
#endif
    &kernel_neon_dotprod,
    &kernel_neon,
#endif
    &kernel_reference,
};
constexpr int kKernelCount = sizeof(kKernels) / sizeof(kKernels[0]);

// Every name that exists, for the error of one that is not compiled in.
const char* const kNames[] = {"amx_int8",  "avx512_vnni",  "avx_vnni", "avx512vl_vnni", "avx2",
                              "neon_i8mm", "neon_dotprod", "neon",     "reference"};

#if defined(__x86_64__)
uint64_t xcr0() {
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t{high} << 32) | low;
}

// Linux saves the 8 KiB of tiles only for processes that asked (since 5.16). The leave holds for every thread, and for
// children; without it the first tile instruction is a SIGILL.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;  // no other system here has been seen to save tiles
#endif
}

// CPUID says what the silicon has, XCR0 which registers the operating system saves: a feature needs both.
uint32_t detect() {
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return 0;
  const bool f16c = c & bit_F16C;
  const uint64_t saved = xcr0();
  const bool ymm = (saved & 0x6) == 0x6, zmm = (saved & 0xE6) == 0xE6, tiles = (saved & 0x60000) == 0x60000;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
  const uint32_t subleaves = a;
  uint32_t have = 0;
  if (ymm && f16c && (b & bit_AVX2)) have |= kAvx2;
  constexpr uint32_t avx512 = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
  if (zmm && (b & avx512) == avx512 && (c & bit_AVX512VNNI)) have |= kAvx512Vnni;
  constexpr uint32_t amx = (1u << 24) | (1u << 25);  // AMX-TILE and AMX-INT8
  if (tiles && (d & amx) == amx && may_use_tiles()) have |= kAmxInt8;
  if (subleaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && ymm && (a & (1u << 4))) have |= kAvxVnni;
  return have;
}
#elif defined(__aarch64__)
#include "cpu_arm.inc"
#else
uint32_t detect() { return 0; }
#endif

#if defined(__aarch64__) && TORCHQ_HAS_I8MM
// On Apple's silicon USMMLA is no faster than SDOT, and by some measurements 10-25 % slower (docs/arm.md): SDOT first.
const Kernel& at(int index) {
  static const int first = is_apple();
  return *kKernels[index < 2 ? index ^ first : index];
}
#else
const Kernel& at(int index) { return *kKernels[index]; }
#endif

std::atomic<const Kernel*> forced{nullptr};

const Kernel& best() {
  for (int i = 0; i < kKernelCount; ++i)
    if (can_run(at(i))) return at(i);
  return kernel_reference;
}

}  // namespace

int kernel_count() { return kKernelCount; }

const Kernel& kernel_at(int index) { return at(index); }

const Kernel* find_kernel(const char* name) {
  for (const Kernel* kernel : kKernels)
    if (std::strcmp(kernel->name, name) == 0) return kernel;
  return nullptr;
}

bool is_kernel_name(const char* name) {
  for (const char* known : kNames)
    if (std::strcmp(known, name) == 0) return true;
  return false;
}

uint32_t cpu_features() {
  static const uint32_t have = detect();
  return have;
}

bool can_run(const Kernel& kernel) { return (kernel.needs & cpu_features()) == kernel.needs; }

bool reads(const Kernel& kernel, Layout layout) { return kernel.layout == layout || &kernel == &kernel_reference; }

const Kernel& active_kernel() {
  static const Kernel& automatic = best();
  const Kernel* kernel = forced.load(std::memory_order_relaxed);
  return kernel ? *kernel : automatic;
}

const Kernel* kernel_for(Layout layout) {
  if (reads(active_kernel(), layout)) return &active_kernel();
  for (int i = 0; i < kKernelCount && !forced_kernel(); ++i)
    if (can_run(at(i)) && at(i).layout == layout && &at(i) != &kernel_reference) return &at(i);
  return nullptr;
}

void force_kernel(const Kernel* kernel) { forced.store(kernel, std::memory_order_relaxed); }

const Kernel* forced_kernel() { return forced.load(std::memory_order_relaxed); }

}  // namespace torchq
