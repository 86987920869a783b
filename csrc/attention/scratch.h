// The buffers of one part, carved from the caller's scratch.
#pragma once

#include <algorithm>

#include "../gemm/divide.h"
#include "attention.h"

namespace torchq {
namespace attention {

struct Scratch {
  float* keys;                 // panels of 16 keys: (depth, 16), key_panel floats apart
  float* values;               // panels of 16 columns: (keys, 16), value_panel floats apart
  float* queries;              // (block_rows, depth)
  float* scores;               // (block_rows, keys), then the weights
  float* out;                  // (block_rows, columns)
  float* sums;                 // [block_rows], of the weights
  float* rows;                 // (16, depth or columns): rows on their way into panels
  float* mask;                 // [keys]: what is added to the scores of a row
  uint8_t* gathered;           // a row whose elements are not adjacent in memory
  const void** mask_in_cache;  // the row of the caller's mask that `mask` holds
  int64_t key_panel, value_panel;
  int64_t depth_stride, score_stride, column_stride;  // floats between rows
};

// Hands out aligned pieces of memory, or, from null, counts their bytes.
class Carver {
 public:
  explicit Carver(void* memory) : next(round_up(reinterpret_cast<intptr_t>(memory), 64)) {}
  template <class T>
  T* take(int64_t count) {
    const intptr_t at = next;
    next = round_up(next + count * static_cast<int64_t>(sizeof(T)), 64);
    return reinterpret_cast<T*>(at);
  }
  intptr_t next;
};

// Panels and rows of scores lie an odd number of cache lines apart, so that those read together are in different sets.
inline int64_t odd_lines(int64_t floats) { return (ceil_div(floats, 16) | 1) * 16; }

inline Scratch carve(const Job& job, Carver& from) {
  const Problem& p = *job.problem;
  const int64_t keys = round_up(p.keys, kPanel), depth = round_up(p.depth, kPanel),
                columns = round_up(p.columns, kPanel);
  Scratch s;
  s.depth_stride = odd_lines(depth), s.score_stride = odd_lines(keys), s.column_stride = odd_lines(columns);
  s.key_panel = odd_lines(depth * kPanel), s.value_panel = odd_lines(keys * kPanel);
  s.keys = from.take<float>(keys / kPanel * s.key_panel);
  s.values = from.take<float>(columns / kPanel * s.value_panel);
  s.queries = from.take<float>(job.block_rows * s.depth_stride);
  s.scores = from.take<float>(job.block_rows * s.score_stride);
  s.out = from.take<float>(job.block_rows * s.column_stride);
  s.sums = from.take<float>(job.block_rows);
  s.rows = from.take<float>(kPanel * std::max(s.depth_stride, s.column_stride));
  s.mask = from.take<float>(keys);
  s.gathered = from.take<uint8_t>(4 * std::max({keys, depth, columns}));
  s.mask_in_cache = from.take<const void*>(1);
  return s;
}

inline Scratch carve(const Job& job, void* memory) {
  Carver from(memory);
  return carve(job, from);
}

// Room to start at a cache line, too.
inline size_t scratch_bytes(const Job& job) {
  Carver from(nullptr);
  carve(job, from);
  return from.next + 64;
}

}  // namespace attention
}  // namespace torchq
