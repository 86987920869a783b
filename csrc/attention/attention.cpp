// Computes a part of a problem: heads -> blocks of rows -> y.
//
// The keys and values of a head are packed once into scratch that stays in L2, and all its rows pass over them, also
// those of other heads that share them. A block of rows has all its scores before softmax: no running maximum, and
// the weights of a row depend on nothing but the row.
//
//   for each head of k and v
//     pack keys and values
//     for each head of q that shares them, for each block of its rows
//       scores = q · k; hidden keys get -inf; weights = exp(scores - largest); y = weights · v / sum of weights

#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "../gemm/divide.h"
#include "ahead.h"
#include "operands.h"
#include "products.h"
#include "scratch.h"

namespace torchq {
namespace attention {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// What one row sees by its position: keys [begin, end).
Keys seen_by(const Problem& p, int64_t row) {
  const auto within = [&](int64_t key) { return std::min(std::max<int64_t>(key, 0), p.keys); };
  const int64_t begin = within(row + p.band.first);
  return {begin, std::max(begin, within(row + p.band.last + 1))};
}

Keys seen_by(const Problem& p, const Block& block) {
  const int64_t begin = seen_by(p, block.begin).begin / kPanel * kPanel;
  const int64_t end = round_up(seen_by(p, block.end - 1).end, kPanel);
  return {begin, std::max(begin, end)};
}

// Hides keys from a row by its position: x, the scores of `keys`, are -inf there. Returns those that it sees.
Keys hide_far(const Problem& p, int64_t row, const Keys& keys, float* x) {
  const Keys seen = seen_by(p, row);
  const int64_t begin = std::max(seen.begin, keys.begin), end = std::max(begin, std::min(seen.end, keys.end));
  std::fill(x, x + (begin - keys.begin), -kInfinity);
  std::fill(x + (end - keys.begin), x + keys.count(), -kInfinity);
  return {begin, end};
}

// The same by its mask, too. Returns the largest of the scores.
float hide_masked(const Job& job, const Block& block, int64_t row, const Keys& keys, const Scratch& s, float* x) {
  const Problem& p = *job.problem;
  const Keys seen = hide_far(p, row, keys, x);
  const float* mask = mask_row(job, block.batch, block.head, row, s);
  // Beyond the last key the mask is 0.
  const bool whole = seen.begin == keys.begin && seen.end == std::min(keys.end, p.keys);
  if (whole) return job.kernel->largest_masked(x, mask + keys.begin, keys.count());
  for (int64_t j = seen.begin; j < seen.end; ++j) x[j - keys.begin] += mask[j];
  float largest;
  job.kernel->largest({x, 1, 0, keys.count()}, &largest);
  return largest;
}

// Hides keys, and finds the largest score of each row.
void find_largest(const Job& job, const Block& block, const Keys& keys, const Scratch& s) {
  const Problem& p = *job.problem;
  for (int64_t r = 0; r < block.rows() && p.mask.data; ++r)
    s.largest[r] = hide_masked(job, block, block.begin + r, keys, s, s.scores + r * s.score_stride);
  if (p.mask.data) return;
  const Keys of_first = seen_by(p, block.begin), of_last = seen_by(p, block.end - 1);
  const bool all =
      std::max(of_first.begin, of_last.begin) <= keys.begin && std::min(of_first.end, of_last.end) >= keys.end;
  for (int64_t r = 0; r < block.rows() && !all; ++r) hide_far(p, block.begin + r, keys, s.scores + r * s.score_stride);
  for (int64_t r = 0; r < block.rows(); r += kPanel)
    job.kernel->largest(scores_of(r, std::min(kPanel, block.rows() - r), keys, s), s.largest + r);
}

// From the scores of rows to their weights, and the sums of these.
void weigh(const Job& job, const Block& block, const Keys& keys, const Scratch& s) {
  find_largest(job, block, keys, s);
  block.ahead->begin(Ahead::weights, ceil_div(block.rows(), kPanel));
  for (int64_t r = 0; r < block.rows(); r += kPanel) {
    const int64_t count = std::min(kPanel, block.rows() - r);
    job.value_product->weigh(job, r, count, keys, s);
    block.ahead->step();
  }
}

void run_block(const Job& job, Block block, const Scratch& s) {
  const Problem& p = *job.problem;
  Ahead ahead(job, block);
  block.ahead = &ahead;
  const Keys keys = seen_by(p, block);
  job.key_product->multiply(job, block, keys, s);
  weigh(job, block, keys, s);
  job.value_product->multiply(job, block, keys, s);
  ahead.begin(Ahead::values, 1), ahead.step();
  bool keyless = false;  // whether a row sees no key
  for (int64_t r = 0; r < block.rows(); ++r) keyless |= s.sums[r] == 0.0f;
  for (int64_t r = 0; keyless && r < block.rows(); ++r)
    if (s.sums[r] == 0.0f) std::memset(output_row(p, block, block.begin + r), 0, p.columns * element_bytes(p.y_dtype));
}

// Where a block begins. Blocks are whole tiles, and all tiles of a head are of nearly equal heights.
int64_t first_row(const Job& job, int64_t block) {
  return piece(job.problem->rows, piece(job.tiles, block, job.blocks), job.tiles);
}

}  // namespace

void write_rows(const Job& job, const Block& block, bool divide, const Scratch& s) {
  const Problem& p = *job.problem;
  for (int64_t r = 0; r < block.rows(); ++r)
    job.kernel->from_floats(s.out + r * s.column_stride, divide ? 1.0f / s.sums[r] : 1.0f, p.columns, p.y_dtype,
                            output_row(p, block, block.begin + r));
}

void run(const Job& job, int index, void* memory) {
  const Problem& p = *job.problem;
  const Scratch s = carve(job, memory);
  if (job.key_product == &keys_in_codes) remember(*job.gemm);
  // Units of work: blocks of rows, those of a shared head together. Where there are many heads a part has whole ones.
  const int64_t group = p.heads / p.kv_heads, of_head = group * job.blocks, heads = p.batch * p.kv_heads;
  const int64_t grain = heads >= 4 * int64_t{job.parts} ? of_head : 1, grains = heads * of_head / grain;
  const int64_t begin = piece(grains, index, job.parts) * grain, end = piece(grains, index + 1, job.parts) * grain;
  int64_t packed = -1;
  *s.mask_in_cache = nullptr;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t head = unit / of_head, batch = head / p.kv_heads, kv_head = head % p.kv_heads;
    if (head != packed) {
      job.key_product->pack(job, batch, kv_head, s);
      job.value_product->pack(job, batch, kv_head, s);
      packed = head;
    }
    const int64_t block = unit % job.blocks;
    run_block(job,
              {batch, kv_head * group + unit % of_head / job.blocks, kv_head, first_row(job, block),
               first_row(job, block + 1)},
              s);
  }
}

}  // namespace attention
}  // namespace torchq
