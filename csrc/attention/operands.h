// From the caller's tensors, of any strides and float dtype, to floats in the scratch.
#pragma once

#include "attention.h"
#include "scratch.h"

namespace torchq {
namespace attention {

// out[i] = factor · (element i of the row at x) for i < n; zeros up to the next multiple of 16.
void load_row(const Kernel& kernel, const View& view, const void* x, int64_t n, float factor, const Scratch& s,
              float* out);

// All keys, or values, of a head into panels.
void pack_keys(const Job& job, int64_t batch, int64_t head, const Scratch& s);
void pack_values(const Job& job, int64_t batch, int64_t head, const Scratch& s);

// What the mask adds to the scores of a row, key by key. It holds until the next call.
const float* mask_row(const Job& job, int64_t batch, int64_t head, int64_t row, const Scratch& s);

}  // namespace attention
}  // namespace torchq
