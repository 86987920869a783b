// Asks for memory that is needed soon, while a block is computed: what the next head reads of q, k and v, and where
// this block writes. In a model the rows of a head lie far apart, and no hardware prefetcher finds them.
#pragma once

#include <algorithm>

#include "../gemm/divide.h"
#include "operands.h"
#include "products.h"

namespace torchq {
namespace attention {

// Little by little: the CPU waits for as many lines at once as it has buffers for, and all else waits behind them. Each
// stage of a block asks for a third, in steps. Products with values write no row of y before it was asked for.
class Ahead {
 public:
  enum Stage : int64_t { keys, weights, values };

  Ahead(const Job& job, const Block& block) : left_(block.rows()) {
    const Problem& p = *job.problem;
    if (job.value_product == &values_in_place) left_ = 0;  // its loops see to that
    const bool last = block.head + 1 == p.heads;
    const int64_t batch = block.batch + last, head = last ? 0 : block.head + 1, group = p.heads / p.kv_heads;
    const bool shares = head % group != 0;  // k and v
    const int64_t key = piece(p.keys, block.begin, p.rows), end = shares ? key : piece(p.keys, block.end, p.rows);
    q_ = rows_of({p.q, batch, head, block.begin}, p.depth);
    k_ = rows_of({p.k, batch, head / group, key}, p.depth);
    v_ = rows_of({p.v, batch, head / group, key}, p.columns);
    y_ = {output_row(p, block, block.begin), p.y_row, p.columns * element_bytes(p.y_dtype)};
    keys_left_ = end - key, keys_of_row_ = ceil_div(keys_left_, block.rows());
  }

  // Without keys there may be no step.
  void begin(Stage stage, int64_t steps) {
    rows_of_step_ = ceil_div(left_, std::max<int64_t>(steps, 1) * (values + 1 - stage));
  }
  TORCHQ_INLINE void step() {
    const int64_t rows = std::min(rows_of_step_, left_), keys = std::min(rows * keys_of_row_, keys_left_);
    left_ -= rows, keys_left_ -= keys;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < y_.bytes; i += 64) __builtin_prefetch(y_.at + i, 1);
      y_.at += y_.stride;
    }
    ask_for(q_, rows), ask_for(k_, keys), ask_for(v_, keys);
  }

 private:
  // The next row to ask for, and how far apart rows lie.
  struct Rows {
    const uint8_t* at;
    int64_t stride, bytes;  // of a row: 0 if its elements are not adjacent
  };

  static Rows rows_of(const Row& first, int64_t n) {
    const View& view = first.view;
    const int64_t bytes = element_bytes(view.dtype);
    return {view.at(first.batch, first.head, first.row), view.row, view.column == bytes ? n * bytes : 0};
  }

  // Into L2, as prefetch_row() says.
  TORCHQ_INLINE static void ask_for(Rows& rows, int64_t count) {
    for (int64_t r = 0; r < count; ++r, rows.at += rows.stride)
      for (int64_t i = 0; i < rows.bytes; i += 64) __builtin_prefetch(rows.at + i, 0, 2);
  }

  Rows q_, k_, v_, y_;
  int64_t left_, rows_of_step_ = 0, keys_left_, keys_of_row_;  // rows of q and y; keys
};

}  // namespace attention
}  // namespace torchq
