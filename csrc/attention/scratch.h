// The buffers of one part, carved from the caller's scratch.
#pragma once

#include <algorithm>

#include "../gemm/codes.h"
#include "../gemm/carver.h"
#include "attention.h"

namespace torchq {
namespace attention {

// Panels as the GEMM's packed weights have them, `stride` bytes apart.
struct CodePanels {
  uint8_t* data;
  int64_t stride;
};

// Rows of codes in the format of the GEMM's kernel, `stride` bytes apart.
struct CodeMatrix {
  CodeRows rows;
  int64_t stride;
};

struct Scratch {
  float* queries;                                     // (block_rows, depth)
  float* scores;                                      // (block_rows, keys), then, of floats, the weights
  float* out;                                         // (block_rows, columns)
  float* largest;                                     // [block_rows], score
  float* sums;                                        // [block_rows], of the weights
  float* rows;                                        // (16, depth or columns): rows on their way into panels
  float* mask;                                        // [keys]: what is added to the scores of a row
  uint8_t* gathered;                                  // a row whose elements are not adjacent in memory
  const void** mask_in_cache;                         // the row of the caller's mask that `mask` holds
  int64_t depth_stride, score_stride, column_stride;  // floats between rows

  // Products of floats and halves
  float* keys;    // panels of 16 keys: (depth, 16), key_panel floats apart
  float* values;  // panels of 16 columns: (keys, 16), value_panel floats apart
  float* halves;  // (16, depth): keys in bfloat16 on their way into a panel
  int64_t key_panel, value_panel;

  // Products of codes
  CodePanels code_keys, code_values;
  CodeMatrix query_codes, weight_codes;
  uint8_t* weights;                   // (block_rows, keys): u8 codes
  int64_t weight_stride;              // bytes between rows
  float *middle, *scale, *inv_scale;  // [depth or columns]
  float *lo, *hi, *zero;              // [columns]
  int32_t *colsum, *code_sums;        // [columns]; Block::sums
};

// Whether a kernel of the GEMM takes plain u8 codes.
inline bool reads_plain_codes(const torchq::Kernel& gemm) {
  return gemm.codes.bytes == 1 && gemm.codes.shift == 0 && gemm.codes.interleaved_rows == 1;
}

// Panels and rows of scores lie an odd number of cache lines apart, so that those read together are in different sets.
inline int64_t odd_lines(int64_t floats) { return (ceil_div(floats, 16) | 1) * 16; }

inline CodePanels take_panels(Carver& from, int64_t columns, int64_t depth) {
  const int64_t stride = odd_lines((kPanelMeta + round_up(depth, 64) * kPanel) / 4) * 4;
  return {from.take<uint8_t>(ceil_div(columns, kPanel) * stride), stride};
}

inline CodeMatrix take_rows(Carver& from, const torchq::Kernel& gemm, int64_t rows, int64_t depth) {
  const int64_t stride = odd_lines(round_up(depth, 64) * gemm.codes.bytes / 4) * 4;
  rows = round_up(rows, gemm.codes.interleaved_rows);
  auto* codes = from.take<uint8_t>(rows * stride);
  return {{codes, from.take<float>(rows), from.take<int32_t>(rows)}, stride};
}

// Room for floats, which is enough for halves, whose depth is a multiple of 32.
inline void carve_floats(const Job& job, Carver& from, Scratch& s) {
  const Problem& p = *job.problem;
  const int64_t keys = round_up(p.keys, kPanel), depth = round_up(p.depth, kPanel);
  s.key_panel = odd_lines(depth * kPanel), s.value_panel = odd_lines(keys * kPanel);
  s.keys = from.take<float>(keys / kPanel * s.key_panel);
  s.values = from.take<float>(ceil_div(p.columns, kPanel) * s.value_panel);
  s.halves = from.take<float>(kPanel * depth);
}

inline void carve_codes(const Job& job, Carver& from, Scratch& s) {
  const Problem& p = *job.problem;
  const int64_t widest = round_up(std::max(p.depth, p.columns), kPanel);
  s.code_keys = take_panels(from, p.keys, p.depth);
  s.code_values = take_panels(from, p.columns, p.keys);
  s.query_codes = take_rows(from, *job.gemm, job.block_rows, p.depth);
  s.weight_codes = take_rows(from, *job.gemm, job.block_rows, reads_plain_codes(*job.gemm) ? 0 : p.keys);
  s.weight_stride = odd_lines(round_up(p.keys, 64) / 4) * 4;
  s.weights = from.take<uint8_t>(job.block_rows * s.weight_stride);
  for (float** one : {&s.middle, &s.scale, &s.inv_scale, &s.lo, &s.hi, &s.zero}) *one = from.take<float>(widest);
  s.colsum = from.take<int32_t>(widest);
  const Tiling& tiling = job.gemm->tiling;
  s.code_sums = from.take<int32_t>(tiling.own_loops ? round_up(job.block_rows, tiling.tile.m) * kSumColumns : 0);
}

inline Scratch carve(const Job& job, Carver& from) {
  const Problem& p = *job.problem;
  const int64_t keys = round_up(p.keys, kPanel), depth = round_up(p.depth, kPanel),
                columns = round_up(p.columns, kPanel);
  Scratch s{};
  s.depth_stride = odd_lines(depth), s.score_stride = odd_lines(keys), s.column_stride = odd_lines(columns);
  s.queries = from.take<float>(job.block_rows * s.depth_stride);
  s.scores = from.take<float>(job.block_rows * s.score_stride);
  s.out = from.take<float>(job.block_rows * s.column_stride);
  s.largest = from.take<float>(job.block_rows);
  s.sums = from.take<float>(job.block_rows);
  s.rows = from.take<float>(kPanel * std::max(s.depth_stride, s.column_stride));
  s.mask = from.take<float>(keys);
  s.gathered = from.take<uint8_t>(4 * std::max({keys, depth, columns}));
  s.mask_in_cache = from.take<const void*>(1);
  if (p.scheme != Scheme::codes) carve_floats(job, from, s);
  if (p.scheme == Scheme::codes || p.scheme == Scheme::codes_bf16) carve_codes(job, from, s);
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
  return from.bytes();
}

}  // namespace attention
}  // namespace torchq
