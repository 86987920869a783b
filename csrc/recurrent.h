// A recurrent layer over a sequence, step by step: products with h by the GEMM core, then Kernel::cell().
#pragma once

#include "linear.h"

namespace torchq {

// A packed weight, and how its input is quantized.
struct PackedLayer {
  const Kernel* kernel;  // that multiplies by it
  const PackedHeader* weights;
  LayerNumbers numbers;
};

// The steps of a layer. Of step t the rows [0, batch_sizes[t]) of the batch take part, whose x and y lie one after the
// other, step after step. batch_sizes does not increase; null means that all rows take part in all steps.
struct Sequence {
  Cell cell;
  int64_t batch, steps, rows;  // rows: of all steps together
  const int64_t* batch_sizes;
};

// One direction of a layer, with H hidden values that are P once they are projected, or else P = H.
struct Direction {
  bool backwards;       // from the last step to the first
  const float* gates;   // (rows, gates x H): the products with x
  PackedLayer hh;       // (gates x H, P)
  PackedLayer project;  // (P, H), or weights = null
  float* h;             // (batch, P): the state before the first step, which becomes that after the last
  float* c;             // (batch, H), likewise; null for cells without
  float* y;             // row r starts y_stride * r further: h after each step
  int64_t y_stride;     // floats
};

// Computes a direction. A product takes up to most_threads of torch's threads. Throws std::bad_alloc where there is no
// memory for its scratch.
void run_direction(const Sequence& sequence, const Direction& direction, int most_threads);

// The threads that a product of one step pays for.
int threads_that_pay(const Sequence& sequence, const Direction& direction);

}  // namespace torchq
