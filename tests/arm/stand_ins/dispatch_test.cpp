// cpu.cpp and dispatch.cpp with an operating system's answers given on the command line: SDOT, USMMLA, and A for
// Apple's silicon. Prints the kernels that can run, in the order of preference. The kernels are no more than their
// needs.

#include <stdint.h>
#include <stdio.h>
#include <string.h>

namespace {
bool sdot, usmmla, apple;
}

#if defined(__linux__)
#define TORCHQ_STAND_IN
#define getauxval answer_of_linux
#include <asm/hwcap.h>
#include <sys/auxv.h>
namespace torchq {
namespace {
uint64_t main_id_register() { return apple ? 0x611F0221 : 0x410FD4F0; }  // an M1's, a Neoverse V2's
}  // namespace
}  // namespace torchq
extern "C" unsigned long answer_of_linux(unsigned long what) noexcept {
  if (what == AT_HWCAP) return HWCAP_ASIMD | HWCAP_CPUID | (sdot ? HWCAP_ASIMDDP : 0);
  return what == AT_HWCAP2 && usmmla ? HWCAP2_I8MM : 0;
}
#endif

#include "../../../csrc/gemm/cpu.cpp"
#include "../../../csrc/gemm/dispatch.cpp"

#if defined(__APPLE__)
extern "C" int sysctlbyname(const char* name, void* old, size_t* size, void*, size_t) {
  const bool asks_sdot = strcmp(name, "hw.optional.arm.FEAT_DotProd") == 0;
  if (!asks_sdot && strcmp(name, "hw.optional.arm.FEAT_I8MM") != 0) return -1;
  if (*size != sizeof(int)) return -1;
  *static_cast<int*>(old) = asks_sdot ? sdot : usmmla;
  return 0;
}
#elif defined(_WIN32)
extern "C" int IsProcessorFeaturePresent(unsigned feature) { return feature == 43 ? sdot : feature == 66 && usmmla; }
#endif

namespace torchq {
const Kernel kernel_neon = {"neon", kAsimd};
const Kernel kernel_neon_dotprod = {"neon_dotprod", kAsimd | kAsimdDp};
const Kernel kernel_neon_i8mm = {"neon_i8mm", kAsimd | kI8mm};
const Kernel kernel_reference = {"reference", 0};
}  // namespace torchq

int main(int, char** arguments) {
  sdot = arguments[1][0] == '1';
  usmmla = arguments[1][1] == '1';
  apple = arguments[1][2] == 'A';
  for (int i = 0; i < torchq::kernel_count(); ++i)
    if (torchq::can_run(torchq::kernel_at(i))) printf("%s\n", torchq::kernel_at(i).name);
  return 0;
}
