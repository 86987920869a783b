// Outputs of a block that wait in the scratch -> y, with what the GEMM can't do: channels first, a residual.
#pragma once

#include "conv.h"

namespace torchq {
namespace conv {

// A block of outputs: pixels of a sample by channels, counted over all groups.
struct Outputs {
  int64_t sample, pixel, count, channel, channels;
  int64_t stride;  // from pixel to pixel where they wait, in elements
};

// The dtype of what waits: float32 where there is a residual, else that of y.
DType waiting_dtype(const Problem& problem);

// waiting (count, channels). With a residual it is overwritten.
void write_outputs(const Kernel& kernel, const Problem& problem, const Outputs& outputs, void* waiting);

}  // namespace conv
}  // namespace torchq
