// Blocks of outputs that wait in the scratch with the channels last, where y has them first, and back.
#pragma once

#include "conv.h"

namespace torchq {
namespace conv {

// A block of outputs: pixels of a sample by channels, counted over all groups.
struct Outputs {
  int64_t sample, pixel, count, channel, channels;
  int64_t stride;  // from pixel to pixel where they wait, in elements
};

// waiting (count, channels) -> y.
void write_outputs(const Problem& problem, const Outputs& outputs, const void* waiting);

// The problem's residual for them, if any, which is copied to `waiting`.
Residual residual_of(const Problem& problem, const Outputs& outputs, void* waiting);

}  // namespace conv
}  // namespace torchq
