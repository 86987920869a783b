// Rounding weights with feedback: each row makes up for the errors of those behind it, which are rounded before it.
// GPTQ's inner loop (torchq/planning/gptq.py). Plain C++17: no torch, no Python, no allocation, no threads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace torchq {

// Rows of a weight, of which the last is rounded first:
//
//   target[j, c] = targets[j, c] + Σ_{i > j} factor[j, i] · errors[i, c]     i ascending, each step rounded once (fma)
//   codes[j, c]  = rne(clamp(target[j, c] · (1 / scale[c]), -127, 127))
//   errors[j, c] = weight[j, c] - codes[j, c] · scale[c]                     rounded once
struct FeedbackBlock {
  int64_t rows, columns;
  const float *targets, *weight;  // (rows, columns)
  const float* factor;            // (rows, rows): what is above its diagonal
  const float* scale;             // [columns], positive
  int8_t* codes;                  // (rows, columns)
  float* errors;                  // (rows, columns)
};

// So many columns go together: their errors of 128 rows stay in L1.
constexpr int64_t kFeedbackColumns = 32;

// Rounds columns [begin, end). scratch: feedback_scratch_bytes(), which calls at the same time must not share.
void round_with_feedback(const FeedbackBlock& block, int64_t begin, int64_t end, void* scratch);
// The same bits on any CPU, one column at a time.
void round_with_feedback_by_one(const FeedbackBlock& block, int64_t begin, int64_t end, void* scratch);
size_t feedback_scratch_bytes(const FeedbackBlock& block);

}  // namespace torchq
