// Floats, or codes, of a band -> its image. Codes are as the kernel wants them (CodeFormat), but never interleaved.

#include "image.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace torchq {
namespace conv {
namespace {

// Where pixels of the input go in the image of a band.
struct Places {
  const Job& job;
  const Band& band;
  uint8_t* image;

  const Axis& axis(int i) const { return job.problem->geometry.axes[i]; }
  // Along each axis in steps of the padded input.
  uint8_t* at(int64_t outer, int64_t middle, int64_t inner) const {
    return image + (outer - band.begin) * job.plane_bytes + middle * job.line_bytes + inner * job.pixel_bytes;
  }
  // Of a pixel of the input, counted from the start of the sample.
  uint8_t* of(int64_t pixel) const {
    const int64_t inner = axis(2).size, middle = axis(1).size;
    return at(pixel / (inner * middle) + axis(0).before, pixel / inner % middle + axis(1).before,
              pixel % inner + axis(2).before);
  }
  // Pixels of the input that lie side by side in the image, too: up to the next padding.
  int64_t together() const {
    int64_t pixels = axis(2).size;
    if (axis(2).padded() > axis(2).size) return pixels;
    pixels *= axis(1).size;
    return axis(1).padded() > axis(1).size ? pixels : pixels * axis(0).size;
  }
};

// How values become codes.
struct Quantizer {
  const Kernel& kernel;
  DType dtype;
  QParams qparams;
  bool own;
  const float* channel_scale;  // [in_channels] or null
  const Scratch& s;

  void quantize(const void* x, int64_t count, const float* scale, void* codes) const {
    kernel.quantize({x, dtype, count, scale}, 1.0f / qparams.scale, qparams.zero_point, codes, own);
  }
};

// Codes 8i to 8i + 7 of a row as quantize() wrote it.
const uint8_t* eight(const CodeFormat& format, const uint8_t* codes, int64_t i) {
  return codes + i * 8 * format.bytes * format.interleaved_rows;
}

// Values that lie side by side, into codes that do.
void quantize_run(const Quantizer& q, const uint8_t* x, int64_t count, const float* scale, uint8_t* to) {
  const CodeFormat& format = q.kernel.codes;
  if (format.interleaved_rows == 1) return q.quantize(x, count, scale, to);
  constexpr int64_t kPiece = kPlanePixels * kPlaneChannels;
  for (int64_t i = 0; i < count; i += kPiece) {
    const int64_t piece = std::min(kPiece, count - i);
    q.quantize(x + i * element_bytes(q.dtype), piece, scale ? scale + i : nullptr, q.s.quantized);
    for (int64_t j = 0; j < piece; j += 8)
      std::memcpy(to + i + j, eight(format, q.s.quantized, j / 8), std::min<int64_t>(8, piece - j));
  }
}

// Pixels [begin, end) of a sample whose channels are last. quantize() writes whole vectors, beyond the end of a run: so
// runs go in order, and padding comes after them.
void load_channels_last(const Quantizer& q, const Places& places, const uint8_t* x, int64_t begin, int64_t end) {
  const int64_t channels = places.job.problem->geometry.in_channels, bytes = channels * element_bytes(q.dtype);
  const int64_t together = places.together();
  for (int64_t pixel = begin, next; pixel < end; pixel = next) {
    next = std::min(end, (pixel / together + 1) * together);
    uint8_t* to = places.of(pixel);
    if (!q.channel_scale) {
      quantize_run(q, x + pixel * bytes, (next - pixel) * channels, nullptr, to);
      continue;
    }
    for (int64_t i = pixel; i < next; ++i, to += places.job.pixel_bytes)
      quantize_run(q, x + i * bytes, channels, q.channel_scale, to);
  }
}

// ---- Channels first: quantized in tiles, which are then transposed ------------------------------------------------

// 8 x 8 bytes, in three steps that swap blocks of 4, 2 and 1.
void transpose_eight(uint64_t (&v)[8]) {
  const auto swap = [&](int i, int j, int shift, uint64_t mask) {
    const uint64_t moved = ((v[i] >> shift) ^ v[j]) & mask;
    v[j] ^= moved, v[i] ^= moved << shift;
  };
  for (int i = 0; i < 4; ++i) swap(i, i + 4, 32, 0x00000000FFFFFFFF);
  for (int i = 0; i < 8; i += i % 4 == 1 ? 3 : 1) swap(i, i + 2, 16, 0x0000FFFF0000FFFF);
  for (int i = 0; i < 8; i += 2) swap(i, i + 1, 8, 0x00FF00FF00FF00FF);
}

// A tile of channels x pixels codes, rows of 8-code groups, to pixels whose places `place` tells.
template <class Place>
void transpose_bytes(const CodeFormat& format, const uint8_t* tile, int64_t tile_stride, int64_t channels,
                     int64_t pixels, const Place& place) {
  for (int64_t p = 0; p < pixels; p += 8) {
    uint8_t* to[8];
    const int64_t count = std::min<int64_t>(8, pixels - p);
    for (int64_t i = 0; i < count; ++i) to[i] = place(p + i);
    for (int64_t c = 0; c < channels; c += 8) {
      uint64_t v[8] = {};
      const int64_t rows = std::min<int64_t>(8, channels - c);
      for (int64_t i = 0; i < rows; ++i) std::memcpy(&v[i], eight(format, tile + (c + i) * tile_stride, p / 8), 8);
      transpose_eight(v);
      for (int64_t i = 0; i < count; ++i) std::memcpy(to[i] + c, &v[i], rows);
    }
  }
}

template <class Place>
void transpose_words(const int16_t* tile, int64_t tile_stride, int64_t channels, int64_t pixels, const Place& place) {
  for (int64_t p = 0; p < pixels; ++p) {
    auto* to = reinterpret_cast<int16_t*>(place(p));
    for (int64_t c = 0; c < channels; ++c) to[c] = tile[c * tile_stride + p];
  }
}

void load_channels_first(const Quantizer& q, const Places& places, const uint8_t* x, int64_t begin, int64_t end) {
  const Geometry& g = places.job.problem->geometry;
  const CodeFormat& format = q.kernel.codes;
  const int64_t bytes = element_bytes(q.dtype), tile_stride = kPlanePixels * format.bytes * format.interleaved_rows;
  float* one_scale = q.s.channel_scale + g.in_channels;
  for (int64_t p = begin; p < end; p += kPlanePixels) {
    const int64_t pixels = std::min(kPlanePixels, end - p);
    for (int64_t c = 0; c < g.in_channels; c += kPlaneChannels) {
      const int64_t channels = std::min(kPlaneChannels, g.in_channels - c);
      for (int64_t i = 0; i < channels; ++i) {
        if (q.channel_scale) std::fill_n(one_scale, pixels, q.channel_scale[c + i]);
        q.quantize(x + ((c + i) * g.pixels() + p) * bytes, pixels, q.channel_scale ? one_scale : nullptr,
                   q.s.quantized + i * tile_stride);
      }
      const auto place = [&](int64_t i) { return places.of(p + i) + c * format.bytes; };
      if (format.bytes == 1)
        transpose_bytes(format, q.s.quantized, tile_stride, channels, pixels, place);
      else
        transpose_words(reinterpret_cast<const int16_t*>(q.s.quantized), tile_stride / 2, channels, pixels, place);
    }
  }
}

// ---- Codes, and padding ------------------------------------------------------------------------------------------

void load_codes(const CodeFormat& format, const Places& places, const uint8_t* x, int64_t begin, int64_t end) {
  const int64_t channels = places.job.problem->geometry.in_channels, together = places.together();
  const uint8_t flip = format.shift == 128 ? 0x80 : 0;
  for (int64_t pixel = begin, next; pixel < end; pixel = next) {
    next = std::min(end, (pixel / together + 1) * together);
    const uint8_t* from = x + pixel * channels;
    uint8_t* to = places.of(pixel);
    const int64_t count = (next - pixel) * channels;
    if (format.bytes == 2)
      std::copy(from, from + count, reinterpret_cast<int16_t*>(to));
    else if (flip)
      std::transform(from, from + count, to, [&](uint8_t code) { return static_cast<uint8_t>(code ^ flip); });
    else
      std::memcpy(to, from, count);
  }
}

void pad(const Places& places, int32_t zero_point) {
  const Job& job = places.job;
  const CodeFormat& format = job.kernel->codes;
  const Axis &outer = places.axis(0), &middle = places.axis(1), &inner = places.axis(2);
  const auto fill = [&](uint8_t* to, int64_t bytes) {
    if (format.bytes == 2)
      std::fill_n(reinterpret_cast<int16_t*>(to), bytes / 2, static_cast<int16_t>(zero_point));
    else if (bytes > 0)
      std::memset(to, static_cast<uint8_t>(zero_point - format.shift), bytes);
  };
  const auto outside = [](const Axis& axis, int64_t i) { return i < axis.before || i >= axis.before + axis.size; };
  for (int64_t o = places.band.begin; o < places.band.end; ++o) {
    if (outside(outer, o)) {
      fill(places.at(o, 0, 0), job.plane_bytes);
      continue;
    }
    for (int64_t m = 0; m < middle.padded(); ++m) {
      if (outside(middle, m)) {
        fill(places.at(o, m, 0), job.line_bytes);
        continue;
      }
      fill(places.at(o, m, 0), inner.before * job.pixel_bytes);
      fill(places.at(o, m, inner.before + inner.size), inner.after * job.pixel_bytes);
    }
  }
}

}  // namespace

const float* channel_scale_of(const Problem& problem, float* room) {
  const Geometry& g = problem.geometry;
  if (!problem.weights_of(0).has_channel_scale) return nullptr;
  for (int64_t group = 0; group < g.groups; ++group)
    std::copy_n(torchq::channel_scale_of(problem.weights_of(group)), g.group_inputs(), room + group * g.group_inputs());
  return room;
}

const uint8_t* load_image(const Job& job, const Band& band, const QParams& qparams, const Scratch& s) {
  const Problem& p = *job.problem;
  const Geometry& g = p.geometry;
  const auto* x =
      static_cast<const uint8_t*>(p.x.data) + band.sample * g.in_channels * g.pixels() * element_bytes(p.x.dtype);
  if (job.image_in_place) return x + band.begin * job.plane_bytes;
  const Places places{job, band, s.image};
  const int64_t plane = g.axes[1].size * g.axes[2].size;
  const auto in_sample = [&](int64_t outer) {
    return std::clamp<int64_t>(outer - g.axes[0].before, 0, g.axes[0].size) * plane;
  };
  const int64_t begin = in_sample(band.begin), end = in_sample(band.end);
  if (p.x.dtype == DType::u8) {
    load_codes(job.kernel->codes, places, x, begin, end);
  } else {
    const Quantizer q{*job.kernel, p.x.dtype, qparams, p.x.per_sample, channel_scale_of(p, s.channel_scale), s};
    (p.x.channels_last ? load_channels_last : load_channels_first)(q, places, x, begin, end);
  }
  pad(places, qparams.zero_point);
  return s.image;
}

RowRange join(const RowRange& a, const RowRange& b) {
  return {std::min(a.lo, b.lo), std::max(a.hi, b.hi), a.finite && b.finite};
}

RowRange range_of(const Job& job, int64_t sample, int64_t begin, int64_t end, float* scratch) {
  const Problem& p = *job.problem;
  const Geometry& g = p.geometry;
  const float* scale = channel_scale_of(p, scratch);
  const int64_t bytes = element_bytes(p.x.dtype), line = p.x.channels_last ? g.in_channels : g.pixels();
  const auto* x = static_cast<const uint8_t*>(p.x.data) + (sample * g.in_channels * g.pixels() + begin * line) * bytes;
  if (!scale) return job.kernel->range({x, p.x.dtype, (end - begin) * line, nullptr});
  RowRange all{0.0f, 0.0f, true};
  for (int64_t i = begin; i < end; ++i, x += line * bytes) {
    RowRange one = job.kernel->range({x, p.x.dtype, line, p.x.channels_last ? scale : nullptr});
    if (!p.x.channels_last) {
      // Rounding keeps order, so these are the smallest and the largest product.
      one.lo *= scale[i], one.hi *= scale[i];
      one.finite &= std::isfinite(one.lo) && std::isfinite(one.hi);
    }
    all = join(all, one);
  }
  return all;
}

}  // namespace conv
}  // namespace torchq
