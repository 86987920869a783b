// Rotary position embedding: the two halves of each head's columns, turned by angles.
//   y = x · cos + (-x₂, x₁) · sin        x = (x₁, x₂)
#pragma once

#include <cstdint>

#include "gemm/types.h"

namespace torchq {

// The rows of a batch, and their angles.
struct Rotary {
  DType dtype;  // of all: f32 or bf16
  int64_t batch, rows, heads, depth;
  const void* x;                                   // (batch, rows, heads, depth)
  const void *cos, *sin;                           // (batch, rows, depth)
  int64_t cos_batch, cos_row, sin_batch, sin_row;  // strides, in elements; those of a batch may be 0
  void* y;                                         // as x
};

// Rows [begin, end) of all batch · rows. Each product and each sum is rounded to the dtype, as torch's are.
void rotate(const Rotary& rotary, int64_t begin, int64_t end);

}  // namespace torchq
