// The products in float32, packed or in place, and in bfloat16.

#include <algorithm>

#include "operands.h"
#include "products.h"

namespace torchq {
namespace attention {
namespace {

void pack_nothing(const Job&, int64_t, int64_t, const Scratch&) {}

int64_t keys_from(const Job& job, int64_t key) { return std::min(kPanel, job.problem->keys - key); }

void load_queries(const Job& job, const Block& block, const Scratch& s) {
  const Problem& p = *job.problem;
  for (int64_t r = 0; r < block.rows(); ++r)
    load_row(job, {p.q, block.batch, block.head, block.begin + r}, p.depth, p.scale, s, s.queries + r * s.depth_stride);
}

void weigh(const Job& job, int64_t row, int64_t count, const Keys& keys, const Scratch& s) {
  for (int64_t r = row; r < row + count; ++r)
    s.sums[r] = job.kernel->weigh(s.scores + r * s.score_stride, keys.count(), s.largest[r]);
}

// ---- In place ---------------------------------------------------------------------------------------------------

constexpr int64_t kAhead = 2 * kPanel;  // keys

// 16 keys or values, while those that come soon are on their way. Where rows lie side by side, the hardware sees to
// that.
FloatRows load_and_prefetch(const Job& job, const View& view, const Block& block, int64_t key, int64_t n,
                            const Scratch& s) {
  const bool adjacent = view.row == n * element_bytes(view.dtype);
  for (int64_t r = 0; !adjacent && r < kPanel; ++r)
    prefetch_row({view, block.batch, block.kv_head, key + kAhead + r}, n);
  return load_rows(job, {view, block.batch, block.kv_head, key}, keys_from(job, key), n, s);
}

void multiply_keys_in_place(const Job& job, const Block& block, const Keys& keys, const Scratch& s) {
  const Problem& p = *job.problem;
  load_queries(job, block, s);
  for (int64_t key = keys.begin; key < keys.end; key += kPanel) {
    const FloatRows rows = load_and_prefetch(job, p.k, block, key, p.depth, s);
    for (int64_t r = 0; r < block.rows(); ++r)
      job.kernel->dot_rows(s.queries + r * s.depth_stride, rows.x, rows.stride, round_up(p.depth, kPanel),
                           s.scores + r * s.score_stride + key - keys.begin);
  }
}

void multiply_values_in_place(const Job& job, const Block& block, const Keys& keys, const Scratch& s) {
  const Problem& p = *job.problem;
  const int64_t n = round_up(p.columns, kPanel);
  for (int64_t r = 0; r < block.rows(); ++r) std::fill_n(s.out + r * s.column_stride, n, 0.0f);
  for (int64_t key = keys.begin; key < keys.end; key += kPanel) {
    const FloatRows rows = load_and_prefetch(job, p.v, block, key, p.columns, s);
    for (int64_t r = 0; r < block.rows(); ++r)
      job.kernel->add_weighted(s.scores + r * s.score_stride + key - keys.begin, rows.x, rows.stride,
                               keys_from(job, key), n, s.out + r * s.column_stride);
  }
  write_rows(job, block, true, s);
}

// ---- Packed -----------------------------------------------------------------------------------------------------

void pack_keys(const Job& job, int64_t batch, int64_t head, const Scratch& s) {
  const Problem& p = *job.problem;
  for (int64_t key = 0; key < p.keys; key += kPanel) {
    const FloatRows rows = load_rows(job, {p.k, batch, head, key}, keys_from(job, key), p.depth, s);
    job.kernel->transpose(rows.x, rows.stride, round_up(p.depth, kPanel), s.keys + key / kPanel * s.key_panel);
  }
}

void pack_values(const Job& job, int64_t batch, int64_t head, const Scratch& s) {
  const Problem& p = *job.problem;
  for (int64_t key = 0; key < p.keys; ++key)
    load_row(job, {p.v, batch, head, key}, p.columns, 1.0f, s, s.values + key * kPanel, s.value_panel);
}

void multiply_keys(const Job& job, const Block& block, const Keys& keys, const Scratch& s) {
  load_queries(job, block, s);
  job.kernel->multiply({block.rows(), keys.count() / kPanel, job.problem->depth, s.queries, s.depth_stride,
                        s.keys + keys.begin / kPanel * s.key_panel, s.key_panel, s.scores, s.score_stride});
}

void multiply_values(const Job& job, const Block& block, const Keys& keys, const Scratch& s) {
  const Problem& p = *job.problem;
  job.kernel->multiply({block.rows(), ceil_div(p.columns, kPanel), std::min(keys.end, p.keys) - keys.begin, s.scores,
                        s.score_stride, s.values + keys.begin * kPanel, s.value_panel, s.out, s.column_stride});
  write_rows(job, block, true, s);
}

// ---- In bfloat16 ------------------------------------------------------------------------------------------------
//
// A kernel that multiplies halves takes two of a row as one float: half the depth. Without one, floats are rounded to
// bfloat16 in place, and multiplied as floats. The sums may differ by rounding.

bool has_halves(const Job& job) { return job.kernel->multiply_halves != nullptr; }

// n floats, a multiple of 16, to the values of bfloat16.
void round_to_halves(const Job& job, float* x, int64_t n) {
  Bf16 halves[kPanel];
  for (int64_t i = 0; i < n; i += kPanel) {
    job.kernel->from_floats(x + i, 1.0f, kPanel, DType::bf16, halves);
    job.kernel->to_floats(halves, DType::bf16, kPanel, 1.0f, x + i, kPanel);
  }
}

void pack_keys_in_halves(const Job& job, int64_t batch, int64_t head, const Scratch& s) {
  const Problem& p = *job.problem;
  const int64_t n = round_up(p.depth, 2 * kPanel);
  if (has_halves(job)) std::fill_n(s.halves, kPanel * n / 2, 0.0f);
  for (int64_t key = 0; key < p.keys; key += kPanel) {
    const FloatRows rows = load_rows(job, {p.k, batch, head, key}, keys_from(job, key), p.depth, s);
    float* panel = s.keys + key / kPanel * s.key_panel;
    if (has_halves(job)) {
      for (int64_t r = 0; r < kPanel; ++r)
        job.kernel->to_halves(rows.x + r * rows.stride, round_up(p.depth, kPanel), s.halves + r * n / 2);
      job.kernel->transpose(s.halves, n / 2, n / 2, panel);
    } else {
      job.kernel->transpose(rows.x, rows.stride, round_up(p.depth, kPanel), panel);
      round_to_halves(job, panel, p.depth * kPanel);
    }
  }
}

void pack_values_in_halves(const Job& job, int64_t batch, int64_t head, const Scratch& s) {
  const Problem& p = *job.problem;
  const int64_t n = round_up(p.columns, kPanel);
  for (int64_t key = 0; has_halves(job) && key < p.keys; key += kPanel) {
    const FloatRows rows = load_rows(job, {p.v, batch, head, key}, keys_from(job, key), p.columns, s);
    for (int64_t r = 0; r < kPanel; r += 2)
      job.kernel->join_halves(rows.x + r * rows.stride, rows.stride, n, s.values + (key + r) / 2 * kPanel,
                              s.value_panel);
  }
  if (has_halves(job)) return;
  pack_values(job, batch, head, s);
  for (int64_t panel = 0; panel < n / kPanel; ++panel)
    round_to_halves(job, s.values + panel * s.value_panel, p.keys * kPanel);
}

void multiply_keys_in_halves(const Job& job, const Block& block, const Keys& keys, const Scratch& s) {
  const Problem& p = *job.problem;
  load_queries(job, block, s);
  const int64_t n = round_up(p.depth, kPanel);
  Product product{block.rows(),   keys.count() / kPanel,
                  p.depth,        s.queries,
                  s.depth_stride, s.keys + keys.begin / kPanel * s.key_panel,
                  s.key_panel,    s.scores,
                  s.score_stride};
  for (int64_t r = 0; r < block.rows(); ++r) {
    float* row = s.queries + r * s.depth_stride;
    has_halves(job) ? job.kernel->to_halves(row, n, row) : round_to_halves(job, row, n);
  }
  product.depth = has_halves(job) ? ceil_div(p.depth, 2) : p.depth;
  (has_halves(job) ? job.kernel->multiply_halves : job.kernel->multiply)(product);
}

void weigh_in_halves(const Job& job, int64_t row, int64_t count, const Keys& keys, const Scratch& s) {
  if (!has_halves(job)) weigh(job, row, count, keys, s);
  for (int64_t r = row; r < row + count; ++r) {
    float* x = s.scores + r * s.score_stride;
    if (has_halves(job))
      s.sums[r] = job.kernel->weigh_halves(x, keys.count(), s.largest[r]);
    else
      round_to_halves(job, x, keys.count());
  }
}

void multiply_values_in_halves(const Job& job, const Block& block, const Keys& keys, const Scratch& s) {
  if (!has_halves(job)) return multiply_values(job, block, keys, s);
  const Problem& p = *job.problem;
  job.kernel->multiply_halves({block.rows(), ceil_div(p.columns, kPanel),
                               ceil_div(std::min(keys.end, p.keys) - keys.begin, 2), s.scores, s.score_stride,
                               s.values + keys.begin / 2 * kPanel, s.value_panel, s.out, s.column_stride});
  write_rows(job, block, true, s);
}

}  // namespace

const KeyProduct keys_in_place = {pack_nothing, multiply_keys_in_place};
const ValueProduct values_in_place = {pack_nothing, weigh, multiply_values_in_place};
const KeyProduct keys_in_floats = {pack_keys, multiply_keys};
const ValueProduct values_in_floats = {pack_values, weigh, multiply_values};
const KeyProduct keys_in_halves = {pack_keys_in_halves, multiply_keys_in_halves};
const ValueProduct values_in_halves = {pack_values_in_halves, weigh_in_halves, multiply_values_in_halves};

}  // namespace attention
}  // namespace torchq
