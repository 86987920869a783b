// The image of codes: each value of a sample once, channels last, with its padding.
#pragma once

#include "conv.h"
#include "scratch.h"

namespace torchq {
namespace conv {

// Steps [begin, end) of the outer axis of a sample, padding included.
struct Band {
  int64_t sample, begin, end;
};

// The image of a band: x itself, or the scratch, filled.
const uint8_t* load_image(const Job& job, const Band& band, const QParams& qparams, const Scratch& s);

// The channel scales of all groups, or null if there are none. room: [in_channels].
const float* channel_scale_of(const Problem& problem, float* room);

}  // namespace conv
}  // namespace torchq
