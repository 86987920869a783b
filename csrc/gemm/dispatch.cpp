// The kernel table, and which kernel is active.

#include <atomic>
#include <cstring>

#include "gemm.h"

namespace torchq {
namespace {

// Best first. The first row that this CPU can run is active, unless another one is forced. Tests, benchmarks and
// torchq.kernels all walk this table.
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

// Every name that exists. It distinguishes a kernel that is not compiled in from one that nobody has heard of.
const char* const kNames[] = {"amx_int8",  "avx512_vnni",  "avx_vnni", "avx512vl_vnni", "avx2",
                              "neon_i8mm", "neon_dotprod", "neon",     "reference"};

#if defined(__aarch64__) && TORCHQ_HAS_I8MM
// On Apple's silicon SDOT comes first: USMMLA is no faster there, by some measurements 10-25 % slower (docs/arm.md).
const Kernel& at(int index) {
  const int first = is_apple();
  return *kKernels[index < 2 ? index ^ first : index];
}
#else
const Kernel& at(int index) { return *kKernels[index]; }
#endif

std::atomic<const Kernel*> forced{nullptr};
std::atomic<KernelOfContext> of_context{nullptr};

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

const char* kernel_name_at(int index) {
  constexpr int count = sizeof(kNames) / sizeof(kNames[0]);
  return index < count ? kNames[index] : nullptr;
}

bool can_run(const Kernel& kernel) { return (kernel.needs & cpu_features()) == kernel.needs; }

bool reads(const Kernel& kernel, Layout layout) { return kernel.layout == layout || &kernel == &kernel_reference; }

const Kernel& active_kernel() {
  static const Kernel& automatic = best();
  const Kernel* kernel = forced_kernel();
  return kernel ? *kernel : automatic;
}

const Kernel* kernel_for(Layout layout) {
  const Kernel* kernel = forced_kernel();
  if (kernel) return reads(*kernel, layout) ? kernel : nullptr;
  if (reads(active_kernel(), layout)) return &active_kernel();
  for (int i = 0; i < kKernelCount; ++i)
    if (can_run(at(i)) && at(i).layout == layout && &at(i) != &kernel_reference) return &at(i);
  return nullptr;
}

void force_kernel(const Kernel* kernel) { forced.store(kernel, std::memory_order_relaxed); }

void force_kernel_of(KernelOfContext function) { of_context.store(function, std::memory_order_relaxed); }

const Kernel* forced_kernel() {
  const KernelOfContext function = of_context.load(std::memory_order_relaxed);
  const Kernel* kernel = function ? function() : nullptr;
  return kernel ? kernel : forced.load(std::memory_order_relaxed);
}

}  // namespace torchq
