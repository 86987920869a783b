// The image of codes: each value of a sample once, channels last, with its padding.
#pragma once

#include <algorithm>

#include "conv.h"
#include "scratch.h"

namespace torchq {
namespace conv {

// Steps [begin, end) of the outer axis of a sample, padding included.
struct Band {
  int64_t sample, begin, end;
};

// Where pixels of the input go in the image of a band, of so many bytes for each pixel.
struct Places {
  const Geometry& geometry;
  const Band& band;
  uint8_t* image;
  int64_t pixel_bytes;

  const Axis& axis(int i) const { return geometry.axes[i]; }
  // Along each axis in steps of the padded input.
  uint8_t* at(int64_t outer, int64_t middle, int64_t inner) const {
    return image + (((outer - band.begin) * axis(1).padded() + middle) * axis(2).padded() + inner) * pixel_bytes;
  }
  // Of a pixel of the input, counted from the start of the sample.
  uint8_t* of(int64_t pixel) const {
    const int64_t inner = axis(2).size, middle = axis(1).size;
    return at(pixel / (inner * middle) + axis(0).before, pixel / inner % middle + axis(1).before,
              pixel % inner + axis(2).before);
  }
  // The first pixel of the input in this step of the padded outer axis, or in the next one that has any.
  int64_t first(int64_t outer) const {
    return std::clamp<int64_t>(outer - axis(0).before, 0, axis(0).size) * axis(1).size * axis(2).size;
  }
  // Calls f(place, pixels) for the pixels that padding adds.
  template <class F>
  void for_each_padding(const F& f) const {
    const auto outside = [](const Axis& of, int64_t i) { return i < of.before || i >= of.before + of.size; };
    const Axis& inner = axis(2);
    for (int64_t o = band.begin; o < band.end; ++o) {
      if (outside(axis(0), o)) {
        f(at(o, 0, 0), axis(1).padded() * inner.padded());
        continue;
      }
      for (int64_t m = 0; m < axis(1).padded(); ++m) {
        if (outside(axis(1), m)) {
          f(at(o, m, 0), inner.padded());
          continue;
        }
        if (inner.before) f(at(o, m, 0), inner.before);
        if (inner.after) f(at(o, m, inner.before + inner.size), inner.after);
      }
    }
  }
  // Pixels of the input that lie side by side in the image, too: up to the next padding.
  int64_t together() const {
    int64_t pixels = axis(2).size;
    if (axis(2).padded() > axis(2).size) return pixels;
    pixels *= axis(1).size;
    return axis(1).padded() > axis(1).size ? pixels : pixels * axis(0).size;
  }
};

// The image of a band: x itself, or the scratch, filled.
const uint8_t* load_image(const Job& job, const Band& band, const QParams& qparams, const Scratch& s);

// The channel scales of all groups, or null if there are none. room: [in_channels].
const float* channel_scale_of(const Problem& problem, float* room);

}  // namespace conv
}  // namespace torchq
