// Convolutions whose channels do not mix: one group, and one output, for each input channel.
#pragma once

#include "image.h"

namespace torchq {
namespace conv {

// Whether a convolution may be computed so.
inline bool can_be_depthwise(const Geometry& g) {
  return g.groups > 1 && g.groups == g.in_channels && g.groups == g.out_channels && g.taps() <= kMaxTaps;
}

// Output pixels [begin, end) of the band whose image this is.
void run_depthwise(const Job& job, const Band& band, const uint8_t* image, const QParams& qparams, int64_t begin,
                   int64_t end, const Scratch& s);

}  // namespace conv
}  // namespace torchq
