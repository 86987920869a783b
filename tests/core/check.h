// What the test files of the core share: counting and failing, randomness, guarded memory.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "../../csrc/gemm/gemm.h"

namespace torchq::test {

// ---- Counting ---------------------------------------------------------------------------------------------------

struct Tally {
  int64_t passed = 0, failed = 0;
};

// By kernel name; "core" counts what belongs to no kernel.
inline std::map<std::string, Tally> tallies;

// What is being computed right now: the crash handler prints it, and every failure message starts with it.
inline char doing[256] = "starting";

__attribute__((format(printf, 1, 2))) inline void now(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(doing, sizeof(doing), format, arguments);
  va_end(arguments);
}

// One check of `who`. The message says position, expected and got; now() has said the rest.
__attribute__((format(printf, 3, 4))) inline bool check(const char* who, bool ok, const char* format, ...) {
  constexpr int64_t kShown = 10;
  Tally& tally = tallies[who];
  if (ok) return ++tally.passed;
  if (++tally.failed > kShown) return false;
  std::printf("FAIL %s: %s: ", who, doing);
  va_list arguments;
  va_start(arguments, format);
  std::vprintf(format, arguments);
  va_end(arguments);
  std::printf(tally.failed == kShown ? "\n%s: further failures are only counted\n" : "\n", who);
  return false;
}

// ---- Kernels ----------------------------------------------------------------------------------------------------

// The kernels this CPU can run, the reference first, with which the others are compared. A kernel that leaves small
// problems to another one is here a second time, as a copy that leaves it only problems without depth. Otherwise most
// problems of these tests would never reach it.
inline const std::vector<const Kernel*>& runnable() {
  static std::vector<Kernel> alone;
  static const std::vector<const Kernel*> kernels = [] {
    std::vector<const Kernel*> found{&kernel_reference};
    alone.reserve(kernel_count());
    for (int i = 0; i < kernel_count(); ++i) {
      const Kernel& kernel = kernel_at(i);
      if (!can_run(kernel) || &kernel == &kernel_reference) continue;
      found.push_back(&kernel);
      if (!kernel.small.kernel) continue;
      alone.push_back(kernel);
      alone.back().small = {kernel.small.kernel, 0, 0, 0};
      found.push_back(&alone.back());
    }
    return found;
  }();
  return kernels;
}

inline const char* name_of(DType d) {
  static const char* const names[] = {"f32", "bf16", "f16", "u8", "i8", "i32"};
  return names[static_cast<int>(d)];
}

inline const char* name_of(Activation a) {
  static const char* const names[] = {"none",      "relu",  "gelu", "gelu_tanh", "silu", "quick_gelu",
                                      "hardswish", "relu2", "tanh", "sigmoid",   "relu6"};
  static_assert(sizeof(names) / sizeof(*names) == kActivations, "one name for each");
  return names[static_cast<int>(a)];
}

// ---- Randomness -------------------------------------------------------------------------------------------------

// SplitMix64: the same numbers from the same seed everywhere, which std distributions do not promise.
struct Random {
  uint64_t state;

  uint64_t bits() {
    uint64_t z = state += 0x9E3779B97F4A7C15;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(bits() % static_cast<uint64_t>(n)); }
  int64_t between(int64_t lo, int64_t hi) { return lo + below(hi - lo + 1); }
  float unit() { return static_cast<float>(bits() >> 40) * 0x1p-24f; }
  float uniform(float lo, float hi) { return lo + (hi - lo) * unit(); }
  template <class T, size_t n>
  T pick(const T (&from)[n]) {
    return from[below(n)];
  }
};

inline Random random_source{0};

// ---- Guarded memory ---------------------------------------------------------------------------------------------

enum class Side { end, start };

// Memory between two pages that nobody may touch. place() lays a buffer against one of them, so that the first byte
// read or written beyond that end of the buffer kills the program; the handler in core_test.cpp says where.
class Guarded {
 public:
  Guarded() = default;
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() { release(); }

  uint8_t* place(size_t bytes, Side side) {
    if (bytes > capacity_ || !base_) reserve(bytes);
    return side == Side::start ? base_ : base_ + capacity_ - bytes;
  }

 private:
  void reserve(size_t bytes) {
    release();
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    capacity_ = (2 * bytes + page) / page * page;  // doubled, so that growing shapes map seldom
    void* mapped = mmap(nullptr, capacity_ + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    base_ = static_cast<uint8_t*>(mapped) + page;
    if (mapped == MAP_FAILED || mprotect(base_, capacity_, PROT_READ | PROT_WRITE) != 0) {
      std::perror("cannot map guarded memory");
      std::exit(1);
    }
  }

  void release() {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    if (base_) munmap(base_ - page, capacity_ + 2 * page);
    base_ = nullptr;
  }

  uint8_t* base_ = nullptr;
  size_t capacity_ = 0;
};

// What untouched memory holds.
constexpr uint8_t kCanary = 0xA5;

// ---- The suites, one per file -----------------------------------------------------------------------------------

void test_numbers(bool quick);  // numbers_test.cpp: scalar.h and choose_qparams against the oracle
void test_rows(bool quick);     // rows_test.cpp
void test_gemm(bool quick);     // gemm_test.cpp
void test_curves(bool quick);   // curves_test.cpp: the activations against the C library's functions in double
void test_cells();              // cells_test.cpp: a step of a recurrent cell, likewise
void test_norm();               // norm_test.cpp: LayerNorm, likewise
void test_feedback();           // feedback_test.cpp: rounding with feedback, vectors against one column at a time
void test_parts();              // parts_test.cpp
void test_schedule();           // schedule_test.cpp: what schedule() decides, shown by spy kernels
void test_pack();               // pack_test.cpp: pack, unpack, packed_header
void test_attention();
void test_convolutions();        // conv_test.cpp
void test_inverted_residuals();  // inverted_test.cpp
void test_dispatch();            // core_test.cpp

}  // namespace torchq::test
