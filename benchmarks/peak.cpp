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
// What other engines do where there is no VNNI: pairs are added in int16, which is exact for 8 bits and 7 bits.
#define STEP_PAIRS(P, R, D)                                                               \
  "vpmaddubsw %%ymm13, %%ymm12, %%ymm14\n\tvpmaddwd %%ymm13, %%ymm14, %%ymm14\n\tvpaddd " \
  "%%ymm14, %%ymm" #D ", %%ymm" #D "\n\t"
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
PEAK(peak_pairs, TWELVE(STEP_PAIRS, "", "ymm"), 64)

// Four accumulators of 16 x 16, as many as the kernel has; to be called only where the kernel can run, which is after
// it asked the operating system for the tiles.
double peak_tiles() {
  struct {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16};
  } config;
  __asm__ volatile("ldtilecfg %0" ::"m"(config) : "memory");
  const double start = seconds();
  for (int i = 0; i < kPeakRounds; ++i)
    __asm__ volatile(
        "tdpbusd %tmm5, %tmm4, %tmm0\n\ttdpbusd %tmm5, %tmm4, %tmm1\n\t"
        "tdpbusd %tmm5, %tmm4, %tmm2\n\ttdpbusd %tmm5, %tmm4, %tmm3");
  const double spent = seconds() - start;
  __asm__ volatile("tilerelease");
  return 4.0 * kPeakRounds * 2 * 16 * 16 * 64 / spent;
}
#elif defined(__aarch64__)
// Twenty accumulators: four pipes with a latency of 4 want 16. The smull of the step for neon is what feeds its sadalp.
#define SDOT(D) "sdot v" #D ".4s, v30.16b, v31.4b[1]\n\t"
#define USMMLA(D) "usmmla v" #D ".4s, v30.16b, v31.16b\n\t"
#define SMULL(D) "smull v29.8h, v30.8b, v31.8b\n\tsadalp v" #D ".4s, v29.8h\n\t"
#define TWENTY(S) \
  S(0) S(1) S(2) S(3) S(4) S(5) S(6) S(7) S(8) S(9) S(10) S(11) S(12) S(13) S(14) S(15) S(16) S(17) S(18) S(19)
#define PEAK(function, extension, step, ops_per_step)                                                                \
  double function() {                                                                                                \
    const double start = seconds();                                                                                  \
    for (int i = 0; i < kPeakRounds; ++i)                                                                            \
      __asm__ volatile(extension TWENTY(step)::                                                                      \
                           : "v0", "v1", "v2", "v3", "v4", "v5", "v6", "v7", "v8", "v9", "v10", "v11", "v12", "v13", \
                             "v14", "v15", "v16", "v17", "v18", "v19", "v29");                                       \
    return 20.0 * kPeakRounds * ops_per_step / (seconds() - start);                                                  \
  }

PEAK(peak_sdot, ".arch armv8.2-a+dotprod\n\t", SDOT, 32)
PEAK(peak_usmmla, ".arch armv8.2-a+i8mm\n\t", USMMLA, 64)
PEAK(peak_smull, "", SMULL, 16)
#endif

}  // namespace

// Operations a second (a multiply-add is 2) of this kernel's multiply step; 0 for a kernel without one here. Of
// "pairs", which is no kernel, where avx2 can run.
extern "C" double peak_of(const char* kernel) {
#if defined(__x86_64__)
  if (!std::strcmp(kernel, "amx_int8")) return peak_tiles();
  if (!std::strcmp(kernel, "avx512_vnni")) return peak_zmm();
  if (!std::strcmp(kernel, "avx512vl_vnni")) return peak_evex_ymm();
  if (!std::strcmp(kernel, "avx_vnni")) return peak_vex_ymm();
  if (!std::strcmp(kernel, "avx2")) return peak_avx2();
  if (!std::strcmp(kernel, "pairs")) return peak_pairs();
#elif defined(__aarch64__)
  if (!std::strcmp(kernel, "neon_i8mm")) return peak_usmmla();
  if (!std::strcmp(kernel, "neon_dotprod")) return peak_sdot();
  if (!std::strcmp(kernel, "neon")) return peak_smull();
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
#elif defined(__aarch64__)
  const int passes = static_cast<int>((int64_t{1} << 28) / bytes) + 1;
  const double start = seconds();
  for (int p = 0; p < passes; ++p)
    for (const char *x = static_cast<const char*>(data), *end = x + bytes; x < end; x += 256)
      __asm__ volatile(
          "ldp q0, q1, [%0]\n\tldp q2, q3, [%0, #32]\n\tldp q4, q5, [%0, #64]\n\tldp q6, q7, [%0, #96]\n\t"
          "ldp q0, q1, [%0, #128]\n\tldp q2, q3, [%0, #160]\n\tldp q4, q5, [%0, #192]\n\tldp q6, q7, [%0, #224]" ::"r"(
              x)
          : "v0", "v1", "v2", "v3", "v4", "v5", "v6", "v7");
  return static_cast<double>(bytes) * passes / (seconds() - start);
#else
  return 0;
#endif
}
