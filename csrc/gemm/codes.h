// Where rows of codes come from: the one step between a problem's input and the kernels. It quantizes floats, and
// copies codes that arrive ready made.
#pragma once

#include "gemm.h"

namespace torchq {

// Room in the scratch for a block of rows.
struct CodeRows {
  uint8_t* codes;       // rows job.codes_stride bytes apart, in the kernel's CodeFormat
  float* scale;         // [rows]
  int32_t* zero_point;  // [rows], less CodeFormat::shift
};

// Fills `to` with rows [row, row + count) of the job's input.
void load_rows(const Job& job, int64_t row, int64_t count, const CodeRows& to);

// Says which kernel runs now, for last_kernel().
void remember(const Kernel& kernel);

}  // namespace torchq
