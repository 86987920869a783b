// The core's work on torch's threads: what the torch ops and the direct calls share.
#pragma once

#include <climits>
#include <functional>
#include <memory>

#include "attention/attention.h"
#include "conv/conv.h"
#include "conv/inverted.h"
#include "gemm/feedback.h"
#include "gemm/gemm.h"
#include "recurrent.h"
#include "rotary.h"

namespace torchq {

// Computes the problem's y with this kernel, on as many of torch's threads as the problem pays for, up to most_threads.
// Throws std::bad_alloc where a thread has no memory for its scratch.
void run(const Kernel& kernel, Problem problem, int most_threads = INT_MAX);
// The same of several. Those side by side that read_the_same() are one job: rows are quantized once, and threads, which
// are woken once, share all of their columns. It sets Problem::ahead.
void run(const Kernel& kernel, Problem* problems, int count);
void run(const Kernel& kernel, const attention::Problem& problem);

// problem.x.samples is chosen here, if each sample has its own.
void run(const Kernel& kernel, conv::Problem problem);

// Whether run() of such a block takes less time than its convolutions one after the other, on torch's threads.
bool pays(const Kernel& kernel, const conv::Inverted& inverted);
void run(const Kernel& kernel, const conv::Inverted& inverted);

// The codes of a problem's rows, to multiply later or more than once by the weights of that problem.
class QuantizedRows {
 public:
  QuantizedRows(const Kernel& kernel, const Problem& problem);
  // `run` of a problem with the same rows and weights, whatever happened to the rows since.
  void multiply(Problem problem) const;

 private:
  const Kernel& kernel_;
  std::unique_ptr<uint8_t[]> memory_;
  CodeRows rows_;
};

// Rows whose values have two codes each: what a row's codes leave of it is quantized as a row of its own.
//   y = act(product(x) + (product(rest) - bias))      rest = x - what codes(x) stand for; product(x) = x̂ · wᵀ + bias
// x (count, k) and y (count, n), float32, without gaps.
struct FineRows {
  int64_t count;
  const float* x;
  float* y;
};

// Computes rows.y with this kernel, on as many of torch's threads as the products pay for. Weights are read once for a
// few rows, as for one: where memory decides, the second code is free.
void run_fine(const Kernel& kernel, const FineRows& rows, const PackedHeader& weights, Activation activation);

// Computes the one direction of a recurrent layer, or the two: each on a thread of its own where that is faster.
void run(const Sequence& sequence, const Direction* directions, int count);

// An activation on its own: y[i] = act(x[i]), of dtype f32, bf16 or f16.
struct Values {
  DType dtype;
  const void* x;
  void* y;
  int64_t count;
};

// Computes values.y with this kernel, on as many of torch's threads as the values pay for.
void activate(const Kernel& kernel, Activation activation, const Values& values);

// Computes rows.y with this kernel, on as many of torch's threads as the values pay for.
void normalize_on_threads(const Kernel& kernel, const NormRows& rows);

// Computes rotary.y, on as many of torch's threads as the values pay for.
void run(const Rotary& rotary);

// Calls f(begin, end), which must not throw, for ranges that make up [0, count) and have `least` elements or more each,
// on torch's threads.
void in_ranges(int64_t count, int64_t least, const std::function<void(int64_t, int64_t)>& f);

// Rounds all columns of the block, on as many of torch's threads as they pay for.
void round_on_threads(const FeedbackBlock& block);

// y (count, table.width) of dtype f32, bf16 or f16: these rows of the table, on as many of torch's threads as pay.
void look_up(const Table& table, const int64_t* rows, int64_t count, DType dtype, void* y);

// sum.y (count, width), on as many of torch's threads as pay.
void look_up(const Kernel& kernel, const TableSum& sum, int64_t count);

// Weights in memory: weight (n, k), scale [n], bias [n], channel_scale [k] or null. has_bias: a bias of no elements may
// be a null pointer, too.
struct Weights {
  int64_t n, k;
  const int8_t* weight;
  const float *scale, *bias, *channel_scale;
  bool has_bias;
};

// Packs weights into a fresh buffer of packed_bytes().
void pack(Layout layout, const Weights& weights, void* packed);

// Gathers what lies around packed weights that a layer keeps into huge pages, whole ones, so that layers of less than a
// huge page share them: packed one after the other, they lie side by side. A forward reads every layer once, and with
// small pages it waits for the TLB at each: 16x3072x768 from memory takes 192 us, and 174 with huge pages. It copies up
// to 2 MB around them: what is packed to be tried once is not worth that.
void gather_into_huge_pages(const void* data, int64_t bytes);

}  // namespace torchq
