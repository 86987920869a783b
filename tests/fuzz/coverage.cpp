// What lets libFuzzer guide a program that g++ has instrumented, with -fsanitize-coverage=trace-pc,trace-cmp: the core
// is fuzzed as its own compiler builds it. g++ calls trace_pc at each edge; libFuzzer wants counters, one for each, and
// finds comparisons by itself. The linker's --wrap puts this function in the place of libFuzzer's, which does nothing.

#include <cstdint>

extern "C" {
void __sanitizer_cov_8bit_counters_init(uint8_t* begin, uint8_t* end);
void __wrap___sanitizer_cov_trace_pc();
// Comparisons of floats, which libFuzzer has no use for, and clang does not report.
void __sanitizer_cov_trace_cmpf(float, float) {}
void __sanitizer_cov_trace_cmpd(double, double) {}
}

namespace {

constexpr uintptr_t kCounters = 1 << 16;
uint8_t counters[kCounters];

__attribute__((constructor)) void announce() { __sanitizer_cov_8bit_counters_init(counters, counters + kCounters); }

}  // namespace

void __wrap___sanitizer_cov_trace_pc() {
  const auto pc = reinterpret_cast<uintptr_t>(__builtin_return_address(0));
  ++counters[(pc ^ pc >> 16) % kCounters];
}
