// What the silicon can do, measured: the multiply instruction of each kernel on registers only, and reading memory.
// Linked into benchmarks/core.cpp, and loaded by benchmarks/roofline.py as a shared library.

#include <chrono>
#include <cstdint>
#include <cstring>

namespace {

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

constexpr int kPeakRounds = 400000;

#if defined(__x86_64__)
// Twelve independent accumulators outlast the latency of every CPU this runs on. R is zmm or ymm.
#define STEP(P, R, D) P "vpdpbusd %%" R "13, %%" R "12, %%" R #D "\n\t"
#define STEP_AVX2(P, R, D) "vpmaddwd %%ymm13, %%ymm12, %%ymm14\n\tvpaddd %%ymm14, %%ymm" #D ", %%ymm" #D "\n\t"
#define TWELVE(S, P, R) \
  S(P, R, 0)            \
  S(P, R, 1)            \
  S(P, R, 2) S(P, R, 3) S(P, R, 4) S(P, R, 5) S(P, R, 6) S(P, R, 7) S(P, R, 8) S(P, R, 9) S(P, R, 10) S(P, R, 11)
#define PEAK(function, steps, ops_per_step)                                                                           \
  double function() {                                                                                                 \
    const double start = seconds();                                                                                   \
    for (int i = 0; i < kPeakRounds; ++i)                                                                             \
      __asm__ volatile(steps::                                                                                        \
                           : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", \
                             "xmm11", "xmm12", "xmm13", "xmm14");                                                     \
    const double spent = seconds() - start;                                                                           \
    __asm__ volatile("vzeroupper");                                                                                   \
    return 12.0 * kPeakRounds * ops_per_step / spent;                                                                 \
  }

PEAK(peak_zmm, TWELVE(STEP, "", "zmm"), 128)
PEAK(peak_evex_ymm, TWELVE(STEP, "%{evex%} ", "ymm"), 64)
PEAK(peak_vex_ymm, TWELVE(STEP, "%{vex%} ", "ymm"), 64)
PEAK(peak_avx2, TWELVE(STEP_AVX2, "", "ymm"), 32)
#endif

}  // namespace

// Operations a second (a multiply-add is 2) of this kernel's multiply step; 0 for a kernel without one here.
extern "C" double peak_of(const char* kernel) {
#if defined(__x86_64__)
  if (!std::strcmp(kernel, "avx512_vnni")) return peak_zmm();
  if (!std::strcmp(kernel, "avx512vl_vnni")) return peak_evex_ymm();
  if (!std::strcmp(kernel, "avx_vnni")) return peak_vex_ymm();
  if (!std::strcmp(kernel, "avx2")) return peak_avx2();
#endif
  return 0;
}

// Bytes a second of reading `bytes` (a multiple of 256, at least once through) with one thread.
extern "C" double read_bandwidth(const void* data, int64_t bytes) {
#if defined(__x86_64__)
  const int passes = static_cast<int>((int64_t{1} << 28) / bytes) + 1;
  const double start = seconds();
  for (int p = 0; p < passes; ++p)
    for (const char *x = static_cast<const char*>(data), *end = x + bytes; x < end; x += 256)
      __asm__ volatile(
          "vmovdqu (%0), %%ymm0\n\tvmovdqu 32(%0), %%ymm1\n\tvmovdqu 64(%0), %%ymm2\n\tvmovdqu 96(%0), %%ymm3\n\t"
          "vmovdqu 128(%0), %%ymm4\n\tvmovdqu 160(%0), %%ymm5\n\tvmovdqu 192(%0), %%ymm6\n\tvmovdqu 224(%0), %%ymm7" ::
              "r"(x)
          : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7");
  return static_cast<double>(bytes) * passes / (seconds() - start);
#else
  return 0;
#endif
}
