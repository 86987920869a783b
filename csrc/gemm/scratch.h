// The buffers of one part, carved from the caller's scratch; and integer arithmetic for dividing work.
#pragma once

#include "codes.h"
#include "gemm.h"

namespace torchq {

constexpr int64_t kMaxParts = 1 << 16;  // more than there are threads

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Where the index-th of count nearly equal pieces of [0, n) starts.
constexpr int64_t piece(int64_t n, int64_t index, int64_t count) { return n * index / count; }

struct Scratch {
  CodeRows rows;    // of a block
  uint8_t* ragged;  // output for panels that y only partly fills: of one tile, or with own_loops one panel of all rows
  int32_t* sums;    // Block::sums
};

inline int64_t ragged_bytes(const Job& job) {
  return job.kernel->tiling.own_loops ? job.block_rows * kPanelColumns * 4 : int64_t{job.tile.m} * job.tile.n * 4;
}

inline int64_t sums_bytes(const Job& job) {
  return job.kernel->tiling.own_loops ? job.block_rows * kSumColumns * 4 : 0;
}

// Room to start at a cache line, and everything that carve() hands out.
inline size_t scratch_bytes(const Job& job) {
  const int64_t row_bytes = job.codes_stride + sizeof(float) + sizeof(int32_t);
  return 64 + job.block_rows * row_bytes + ragged_bytes(job) + sums_bytes(job);
}

inline Scratch carve(const Job& job, void* memory) {
  auto* codes = reinterpret_cast<uint8_t*>(round_up(reinterpret_cast<intptr_t>(memory), 64));
  Scratch s;
  s.ragged = codes + job.block_rows * job.codes_stride;
  s.sums = reinterpret_cast<int32_t*>(s.ragged + ragged_bytes(job));
  auto* scale = reinterpret_cast<float*>(s.sums + sums_bytes(job) / 4);
  s.rows = {codes, scale, reinterpret_cast<int32_t*>(scale + job.block_rows)};
  return s;
}

}  // namespace torchq
