// Convolutions whose channels do not mix: one group, and one output, for each input channel.
#pragma once

#include "image.h"

namespace torchq {
namespace conv {

// Whether a convolution may be computed so.
inline bool can_be_depthwise(const Geometry& g) {
  return g.groups > 1 && g.groups == g.in_channels && g.groups == g.out_channels && g.taps() <= kMaxTaps;
}

// Where a channel scale lies behind the packed weights of these channels: a number for each.
inline int64_t depthwise_scale_at(const Geometry& g) {
  return round_up(packed_bytes(g.out_channels, g.taps(), false), 64);
}

// Output pixels [begin, end) of the band, whose floats are multiplied as they are.
void run_depthwise_floats(const Job& job, const Band& band, int64_t begin, int64_t end, const Scratch& s);

// Output pixels [begin, end) of the band whose image this is.
void run_depthwise(const Job& job, const Band& band, const uint8_t* image, const QParams& qparams, int64_t begin,
                   int64_t end, const Scratch& s);

}  // namespace conv
}  // namespace torchq
