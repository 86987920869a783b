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

  Ahead(const Job& job, const Block& block) : p_(*job.problem), block_(block) {
    const int64_t head = block.batch * p_.heads + block.head + 1, group = p_.heads / p_.kv_heads;
    batch_ = head / p_.heads, head_ = head % p_.heads;
    const bool shares = head_ % group != 0;  // k and v
    key_ = shares ? 0 : piece(p_.keys, block.begin, p_.rows);
    end_ = shares ? 0 : piece(p_.keys, block.end, p_.rows);
    keys_of_row_ = ceil_div(end_ - key_, block.rows());
    if (job.value_product == &values_in_place) row_ = block.rows();  // its loops see to that
  }

  // Without keys there may be no step.
  void begin(Stage stage, int64_t steps) {
    rows_of_step_ = ceil_div(block_.rows() - row_, std::max<int64_t>(steps, 1) * (values + 1 - stage));
  }
  void step() {
    for (const int64_t stop = std::min(row_ + rows_of_step_, block_.rows()); row_ < stop; ++row_) ask_for_row();
  }

 private:
  void ask_for_row() {
    prefetch_row({p_.q, batch_, head_, block_.begin + row_}, p_.depth);
    const int64_t bytes = p_.columns * element_bytes(p_.y_dtype), kv_head = head_ / (p_.heads / p_.kv_heads);
    const uint8_t* y = output_row(p_, block_, block_.begin + row_);
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(y + i, 1);
    for (const int64_t stop = std::min(key_ + keys_of_row_, end_); key_ < stop; ++key_) {
      prefetch_row({p_.k, batch_, kv_head, key_}, p_.depth);
      prefetch_row({p_.v, batch_, kv_head, key_}, p_.columns);
    }
  }

  const Problem& p_;
  const Block& block_;
  int64_t batch_, head_, key_, end_, keys_of_row_;
  int64_t row_ = 0, rows_of_step_ = 0;
};

}  // namespace attention
}  // namespace torchq
