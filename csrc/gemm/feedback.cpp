// round_with_feedback(). It is no part of the kernels' table: planning calls it, and the widest vectors that it needs
// are AVX2's, which every CPU with AVX-512 has.

#include "feedback.h"

#include <cmath>
#include <string.h>

#include "kernel.h"
#include "scalar.h"

namespace torchq {
namespace feedback_by_one {

#include "vec1.inc"
constexpr int kLanes = 1;
inline Floats load(const float* p) { return *p; }
inline void store(float* p, Floats x) { *p = x; }
inline void store(int32_t* p, Ints x) { *p = x; }
inline Floats to_floats(Ints x) { return static_cast<float>(x); }
#include "feedback.inc"

}  // namespace feedback_by_one
}  // namespace torchq

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace torchq {
namespace feedback_by_vectors {

#include "vec256.inc"

#include "feedback.inc"

}  // namespace feedback_by_vectors
}  // namespace torchq
#pragma GCC pop_options
#elif defined(__aarch64__)
#include <arm_neon.h>

namespace torchq {
namespace feedback_by_vectors {

#include "vec_neon.inc"

#include "feedback.inc"

}  // namespace feedback_by_vectors
}  // namespace torchq
#endif

namespace torchq {

void round_with_feedback_by_one(const FeedbackBlock& block, int64_t begin, int64_t end, void* scratch) {
  feedback_by_one::round_columns(block, begin, end, scratch);
}

void round_with_feedback(const FeedbackBlock& block, int64_t begin, int64_t end, void* scratch) {
#if defined(__x86_64__) || defined(__aarch64__)
  if (cpu_features() & (kAvx2 | kAsimd)) return feedback_by_vectors::round_columns(block, begin, end, scratch);
#endif
  round_with_feedback_by_one(block, begin, end, scratch);
}

size_t feedback_scratch_bytes(const FeedbackBlock& block) {
  return static_cast<size_t>(block.rows) * kFeedbackColumns * 4 * sizeof(float);
}

}  // namespace torchq
