// The kernel table, and which kernel runs.

#include "attention.h"

namespace torchq {
namespace attention {
namespace {

// Best first.
const Kernel* const kKernels[] = {
#if defined(__x86_64__)
#if TORCHQ_HAS_AMX
    &kernel_amx_bf16,
#endif
    &kernel_avx512_bf16, &kernel_avx512, &kernel_avx2,
#elif defined(__aarch64__)
    &kernel_neon,
#endif
    &kernel_reference,
};
constexpr int kKernelCount = sizeof(kKernels) / sizeof(kKernels[0]);

}  // namespace

int kernel_count() { return kKernelCount; }

const Kernel& kernel_at(int index) { return *kKernels[index]; }

bool can_run(const Kernel& kernel) { return (kernel.needs & cpu_features()) == kernel.needs; }

const Kernel& kernel_beside(const torchq::Kernel& gemm) {
  for (const Kernel* kernel : kKernels)
    if (can_run(*kernel) && (kernel->beside & gemm.needs || !kernel->beside)) return *kernel;
  return kernel_reference;
}

}  // namespace attention
}  // namespace torchq
