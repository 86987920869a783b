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

// Fills the lanes of a band, floats as depthwise() takes them.
class Lanes {
 public:
  // Those of 16 channels from this one on, of which so many exist; the others are 0.
  virtual void load(int64_t channel, int64_t channels) const = 0;

 protected:
  ~Lanes() = default;
};

// Output pixels [begin, end) of the band, whose floats are multiplied as they are.
void run_depthwise_floats(const Job& job, const Band& band, int64_t begin, int64_t end, const Scratch& s);

// Fills the lanes with floats of x.
void load_lanes_of_x(const Job& job, const Band& band, int64_t channel, int64_t channels, const Scratch& s);

// The same of floats that these lanes have, to y (end - begin, channels).
void run_depthwise_lanes(const Job& job, const Band& band, int64_t begin, int64_t end, const Lanes& lanes, float* y,
                         const Scratch& s);

// Output pixels [begin, end) of the band whose image this is.
void run_depthwise(const Job& job, const Band& band, const uint8_t* image, const QParams& qparams, int64_t begin,
                   int64_t end, const Scratch& s);

}  // namespace conv
}  // namespace torchq
