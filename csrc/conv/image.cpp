// Floats, or codes, of a band -> its image. Codes are as the kernel wants them (CodeFormat), but never interleaved.

#include "image.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "transpose.h"

namespace torchq {
namespace conv {
namespace {

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
  const int64_t channels = places.geometry.in_channels, bytes = channels * element_bytes(q.dtype);
  const int64_t together = places.together();
  for (int64_t pixel = begin, next; pixel < end; pixel = next) {
    next = std::min(end, (pixel / together + 1) * together);
    uint8_t* to = places.of(pixel);
    if (!q.channel_scale) {
      quantize_run(q, x + pixel * bytes, (next - pixel) * channels, nullptr, to);
      continue;
    }
    for (int64_t i = pixel; i < next; ++i, to += places.pixel_bytes)
      quantize_run(q, x + i * bytes, channels, q.channel_scale, to);
  }
}

// ---- Channels first: quantized in tiles, which are then transposed ------------------------------------------------

// A tile of codes, channels x pixels, as quantize() wrote it.
struct Tile {
  const CodeFormat& format;
  const uint8_t* codes;
  int64_t stride, channels, pixels;
};

// Codes [pixel, pixel + kBlock) of a row of the tile.
template <class Code>
Vec<Code> load_block(const CodeFormat& format, const uint8_t* row, int64_t pixel) {
  Vec<Code> v;
  for (int64_t i = 0; i < kBlock<Code>; i += 8)
    std::memcpy(reinterpret_cast<Code*>(&v) + i, eight(format, row, (pixel + i) / 8), 8 * sizeof(Code));
  return v;
}

// Writes a tile, which has room for whole blocks, to its pixels' places. beyond: a block may be written that is wider
// than there are channels, for the pixels that follow overwrite it.
template <class Code>
void scatter(const Tile& tile, uint8_t* const* places, int64_t first_channel, bool beyond) {
  constexpr int64_t kSide = kBlock<Code>;
  for (int64_t c = 0; c < tile.channels; c += kSide) {
    const int64_t rows = std::min(kSide, tile.channels - c);
    const int64_t bytes = (beyond ? kSide : rows) * sizeof(Code), at = (first_channel + c) * sizeof(Code);
    for (int64_t p = 0; p < tile.pixels; p += kSide) {
      Vec<Code> v[kSide];
      TORCHQ_UNROLL
      for (int i = 0; i < kSide; ++i) v[i] = load_block<Code>(tile.format, tile.codes + (c + i) * tile.stride, p);
      transpose_block<Code>(v);
      const int64_t count = std::min(kSide, tile.pixels - p);
      if (bytes == sizeof(v[0]) && count == kSide) {
        TORCHQ_UNROLL
        for (int i = 0; i < kSide; ++i) std::memcpy(places[p + i] + at, &v[i], sizeof(v[0]));
      } else {
        Vec<Code> columns[kSide];
        std::memcpy(columns, v, sizeof(v));
        for (int64_t i = 0; i < count; ++i) std::memcpy(places[p + i] + at, &columns[i], bytes);
      }
    }
  }
}

// The places of pixels [begin, begin + count).
void find_places(const Places& places, int64_t begin, int64_t count, uint8_t** found) {
  const int64_t together = places.together();
  uint8_t* place = places.of(begin);
  for (int64_t i = 0, left = together - begin % together; i < count; ++i, place += places.pixel_bytes) {
    if (left-- == 0) place = places.of(begin + i), left = together - 1;
    found[i] = place;
  }
}

constexpr int64_t kAhead = 4;

void load_channels_first(const Quantizer& q, const Places& places, const uint8_t* x, int64_t begin, int64_t end) {
  const Geometry& g = places.geometry;
  const CodeFormat& format = q.kernel.codes;
  const int64_t bytes = element_bytes(q.dtype), stride = kPlanePixels * format.bytes * format.interleaved_rows;
  const bool beyond = g.in_channels <= (format.bytes == 1 ? kBlock<uint8_t> : kBlock<uint16_t>);
  float* one_scale = q.s.channel_scale + g.in_channels;
  uint8_t* found[kPlanePixels];
  for (int64_t p = begin; p < end; p += kPlanePixels) {
    const int64_t pixels = std::min(kPlanePixels, end - p);
    find_places(places, p, pixels, found);
    for (int64_t c = 0; c < g.in_channels; c += kPlaneChannels) {
      const Tile tile{format, q.s.quantized, stride, std::min(kPlaneChannels, g.in_channels - c), pixels};
      for (int64_t i = 0; i < tile.channels; ++i) {
        const uint8_t* values = x + ((c + i) * g.pixels() + p) * bytes;
        for (int64_t j = 0; j < pixels * bytes; j += 64) __builtin_prefetch(values + kAhead * g.pixels() * bytes + j);
        if (q.channel_scale) std::fill_n(one_scale, pixels, q.channel_scale[c + i]);
        q.quantize(values, pixels, q.channel_scale ? one_scale : nullptr, q.s.quantized + i * stride);
      }
      format.bytes == 1 ? scatter<uint8_t>(tile, found, c, beyond) : scatter<uint16_t>(tile, found, c, beyond);
    }
  }
}

// ---- Codes, and padding ------------------------------------------------------------------------------------------

void load_codes(const CodeFormat& format, const Places& places, const uint8_t* x, int64_t begin, int64_t end) {
  const int64_t channels = places.geometry.in_channels, together = places.together();
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

void pad(const CodeFormat& format, const Places& places, int32_t zero_point) {
  places.for_each_padding([&](uint8_t* to, int64_t pixels) {
    const int64_t bytes = pixels * places.pixel_bytes;
    if (format.bytes == 2)
      std::fill_n(reinterpret_cast<int16_t*>(to), bytes / 2, static_cast<int16_t>(zero_point));
    else
      std::memset(to, static_cast<uint8_t>(zero_point - format.shift), bytes);
  });
}

}  // namespace

const float* channel_scale_of(const Problem& problem, float* room) {
  const Geometry& g = problem.geometry;
  if (!problem.has_channel_scale()) return nullptr;
  if (problem.is_depthwise) return problem.depthwise_scale;
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
  const Places places{g, band, s.image, job.pixel_bytes};
  const int64_t begin = places.first(band.begin), end = places.first(band.end);
  if (p.x.dtype == DType::u8) {
    load_codes(job.kernel->codes, places, x, begin, end);
  } else {
    const Quantizer q{*job.kernel, p.x.dtype, qparams, p.x.per_sample, channel_scale_of(p, s.channel_scale), s};
    (p.x.channels_last ? load_channels_last : load_channels_first)(q, places, x, begin, end);
  }
  pad(job.kernel->codes, places, qparams.zero_point);
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
