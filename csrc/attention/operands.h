// From the caller's tensors, of any strides and float dtype, to floats in the scratch.
#pragma once

#include "attention.h"
#include "scratch.h"

namespace torchq {
namespace attention {

// A row of a view: row r of a head.
struct Row {
  const View& view;
  int64_t batch, head, row;
};

// out[i] = factor · (element i of the row) for i < n, then zeros up to the next multiple of 16. Each 16 start `stride`
// floats after the last.
void load_row(const Job& job, const Row& row, int64_t n, float factor, const Scratch& s, float* out,
              int64_t stride = kPanel);

// Rows of floats: n of each, rounded up to a multiple of 16 by zeros; `stride` floats apart.
struct FloatRows {
  const float* x;
  int64_t stride;
};

// 16 rows of a head from `first` on, of which count exist; the others are 0. In place if they lie so, else in s.rows.
FloatRows load_rows(const Job& job, const Row& first, int64_t count, int64_t n, const Scratch& s);

// Asks for a row that is needed soon, into L2: rows that lie a power of 2 apart share few sets of L1, and would drive
// each other out. It may be none: a prefetch faults nowhere. Inlined, or g++ takes the function for one without effects
// and drops the calls (tests/test_disassembly.py watches).
TORCHQ_INLINE void prefetch_row(const Row& row, int64_t n) {
  const int64_t bytes = n * element_bytes(row.view.dtype);
  if (row.view.column != element_bytes(row.view.dtype)) return;
  const uint8_t* x = row.view.at(row.batch, row.head, row.row);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(x + i, 0, 2);
}

// What the mask adds to the scores of a row, key by key. It holds until the next call.
const float* mask_row(const Job& job, int64_t batch, int64_t head, int64_t row, const Scratch& s);

}  // namespace attention
}  // namespace torchq
