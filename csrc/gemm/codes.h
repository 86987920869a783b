// Where rows of codes come from: the one step between a problem's input and the kernels. It quantizes floats, and
// copies codes that arrive ready made.
#pragma once

#include "gemm.h"

namespace torchq {

// Fills `to` with rows [row, row + count) of the job's input.
void load_rows(const Job& job, int64_t row, int64_t count, const CodeRows& to);

// Those from `row` on, a multiple of CodeFormat::interleaved_rows.
CodeRows rows_from(const Job& job, const CodeRows& rows, int64_t row);

// Says which kernel runs now, for last_kernel().
void remember(const Kernel& kernel);

}  // namespace torchq
