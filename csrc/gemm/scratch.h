// The buffers of one part, carved from the caller's scratch.
#pragma once

#include "codes.h"
#include "divide.h"
#include "gemm.h"

namespace torchq {

struct Scratch {
  CodeRows rows;    // of a block; none where rows are ready
  uint8_t* ragged;  // outputs of panels that y only partly fills: of one tile, or with own_loops one panel of all rows;
                    // and as much for a residual
  int32_t* sums;    // Block::sums
};

inline int64_t ragged_bytes(const Job& job) {
  const int64_t values = job.kernel->tiling.own_loops ? job.block_rows * kPanelColumns : job.tile.m * job.tile.n;
  bool adds = false;
  for (int i = 0; i < job.problems; ++i) adds |= job.problem[i].y.residual.data != nullptr;
  return values * 4 * (adds ? 2 : 1);
}

inline int64_t sums_bytes(const Job& job) {
  return job.kernel->tiling.own_loops ? job.block_rows * kSumColumns * 4 : 0;
}

inline int64_t rows_of_codes(const Job& job) { return job.problem->x.ready ? 0 : job.block_rows; }

// Room to start at a cache line, and everything that carve() hands out.
inline size_t scratch_bytes(const Job& job) {
  const int64_t row_bytes = job.codes_stride + sizeof(float) + sizeof(int32_t);
  return 64 + rows_of_codes(job) * row_bytes + ragged_bytes(job) + sums_bytes(job);
}

inline Scratch carve(const Job& job, void* memory) {
  auto* codes = reinterpret_cast<uint8_t*>(round_up(reinterpret_cast<intptr_t>(memory), 64));
  Scratch s;
  s.ragged = codes + rows_of_codes(job) * job.codes_stride;
  s.sums = reinterpret_cast<int32_t*>(s.ragged + ragged_bytes(job));
  auto* scale = reinterpret_cast<float*>(s.sums + sums_bytes(job) / 4);
  s.rows = {codes, scale, reinterpret_cast<int32_t*>(scale + rows_of_codes(job))};
  return s;
}

}  // namespace torchq
