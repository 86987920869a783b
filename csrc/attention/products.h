// The two products of attention, q · k and weights · v, each in several ways. A job has one of either (schedule.cpp).
#pragma once

#include "attention.h"
#include "scratch.h"

namespace torchq {
namespace attention {

class Ahead;  // ahead.h

// Rows [begin, end) of one head of q, with the head of k and v that they see.
struct Block {
  int64_t batch, head, kv_head, begin, end;
  Ahead* ahead = nullptr;

  int64_t rows() const { return end - begin; }
};

// The keys that any row of a block sees: [begin, end), widened to whole panels.
struct Keys {
  int64_t begin, end;

  int64_t count() const { return end - begin; }
};

struct KeyProduct {
  // All keys of a head into the scratch.
  void (*pack)(const Job& job, int64_t batch, int64_t head, const Scratch& s);
  // s.scores (rows, keys) = scale · q · k.
  void (*multiply)(const Job& job, const Block& block, const Keys& keys, const Scratch& s);
};

struct ValueProduct {
  void (*pack)(const Job& job, int64_t batch, int64_t head, const Scratch& s);
  // From the scores of up to kPanel rows from `row` on, whose largest are known, to their weights and the sums of
  // these.
  void (*weigh)(const Job& job, int64_t row, int64_t count, const Keys& keys, const Scratch& s);
  // y (rows, columns) = weights · v, divided by the sums of the weights. Rows without keys get anything.
  void (*multiply)(const Job& job, const Block& block, const Keys& keys, const Scratch& s);
};

// In float32, in place: for few rows, for which packing would not pay.
extern const KeyProduct keys_in_place;
extern const ValueProduct values_in_place;
// In float32, packed.
extern const KeyProduct keys_in_floats;
extern const ValueProduct values_in_floats;
// Rounded to bfloat16, sums in float32.
extern const KeyProduct keys_in_halves;
extern const ValueProduct values_in_halves;
// In int8 codes, by the kernels of the GEMM.
extern const KeyProduct keys_in_codes;
extern const ValueProduct values_in_codes;

// Where a row of y begins.
inline uint8_t* output_row(const Problem& p, const Block& block, int64_t row) {
  return static_cast<uint8_t*>(p.y) + block.batch * p.y_batch + block.head * p.y_head + row * p.y_row;
}

// The scores of `keys` in some rows of a block.
inline Scores scores_of(int64_t row, int64_t count, const Keys& keys, const Scratch& s) {
  return {s.scores + row * s.score_stride, count, s.score_stride, keys.count()};
}

// From s.out to y: times 1 / s.sums of each row, or as it is.
void write_rows(const Job& job, const Block& block, bool divide, const Scratch& s);

}  // namespace attention
}  // namespace torchq
