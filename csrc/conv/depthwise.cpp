// Depthwise convolutions, 16 channels at a time: the codes or floats of a band and the weights in lanes, then the
// kernel.

#include "depthwise.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "../gemm/scalar.h"
#include "outputs.h"
#include "patches.h"

namespace torchq {
namespace conv {
namespace {

// The taps that a kernel takes at once: as many along the outer axis.
int64_t taps_at_once(const Kernel& kernel) { return kernel.interleave ? 4 : 1; }

// Weights are divided by this, a power of two, before they multiply floats, and sums multiplied: so products are no
// larger than the floats, and no bit of theirs changes.
constexpr float kMostWeight = 128.0f;

constexpr int64_t kAtOnce = 128;  // pixels whose lanes stay in L1 while 16 channels are read, one after the other

// Calls f(outer, middle, inner) for the first of the taps of each step of depthwise().
template <class F>
void for_each_step(const Geometry& g, int64_t at_once, const F& f) {
  for (int64_t o = 0; o < g.axes[0].kernel; o += at_once)
    for (int64_t m = 0; m < g.axes[1].kernel; ++m)
      for (int64_t i = 0; i < g.axes[2].kernel; ++i) f(o, m, i);
}

// The weights of a panel, whose layout is depth taps x 16 channels, as depthwise() takes them.
void load_weights(const Job& job, const uint8_t* panel, int64_t depth, float divided_by, int32_t* weights) {
  const Geometry& g = job.problem->geometry;
  const auto* codes = reinterpret_cast<const int8_t*>(panel + kPanelMeta);
  const int64_t at_once = taps_at_once(*job.kernel);
  // Every 16 codes of a tap lie depth bytes apart; depth is a power of two.
  const auto tap = [&](int64_t o, int64_t m, int64_t i) {
    const int64_t t = (o * g.axes[1].kernel + m) * g.axes[2].kernel + i, within = t & (depth - 1);
    return codes + (t - within) * kPanelColumns + within;
  };
  for_each_step(g, at_once, [&](int64_t o, int64_t m, int64_t i) {
    if (at_once == 1) {
      auto* floats = reinterpret_cast<float*>(weights);
      for (int64_t c = 0; c < kPanelColumns; ++c) floats[c] = tap(o, m, i)[c * depth] * (1.0f / divided_by);
    } else {
      std::memset(weights, 0, kPanelColumns * 4);
      for (int64_t k = 0; k < std::min(at_once, g.axes[0].kernel - o); ++k)
        for (int64_t c = 0; c < kPanelColumns; ++c)
          reinterpret_cast<int8_t*>(weights)[4 * c + k] = tap(o + k, m, i)[c * depth];
    }
    weights += kPanelColumns;
  });
}

// From the first tap of a patch to those of each step, in lanes. Returns how many steps there are.
int64_t find_offsets(const Job& job, int64_t* offsets) {
  const Geometry& g = job.problem->geometry;
  const int64_t line = g.axes[2].padded(), plane = g.axes[1].padded() * line, *begin = offsets;
  for_each_step(g, taps_at_once(*job.kernel), [&](int64_t o, int64_t m, int64_t i) {
    *offsets++ =
        kPanelColumns * (o * g.axes[0].dilation * plane + m * g.axes[1].dilation * line + i * g.axes[2].dilation);
  });
  return offsets - begin;
}

// The image of a band's 16 channels, as depthwise() takes it.
void load_lanes(const Job& job, const Band& band, const uint8_t* image, int32_t zero_point, int32_t* lanes) {
  const Axis& outer = job.problem->geometry.axes[0];
  const int64_t rows = band.end - band.begin, plane = job.plane_bytes / job.pixel_bytes;
  const Kernel& kernel = *job.kernel;
  if (!kernel.interleave)
    return kernel.widen(image, rows * plane, job.pixel_bytes, kernel.codes.shift == 128 ? 0x80 : 0, zero_point,
                        reinterpret_cast<float*>(lanes));
  const int64_t step = outer.kernel <= 4 ? outer.stride : 1;  // rows between those that a patch begins with
  for (int64_t r = 0; r < rows; r += step) {
    const uint8_t* lines[4];
    for (int64_t i = 0; i < 4; ++i) lines[i] = image + std::min(r + i * outer.dilation, rows - 1) * job.plane_bytes;
    kernel.interleave(lines, plane, job.pixel_bytes, lanes + r * plane * kPanelColumns);
  }
}

// Values of 16 channels from pixel to pixel, in lanes: those that exist, times their scale.
template <class T>
void widen_pixels(const T* from, int64_t step, int64_t count, int64_t channels, const float* scale, float* to) {
  if (std::is_same_v<T, float> && !scale && channels == kPanelColumns) {
    for (int64_t i = 0; i < count; ++i) std::memcpy(to + i * kPanelColumns, from + i * step, kPanelColumns * 4);
    return;
  }
  for (int64_t i = 0; i < count; ++i, to += kPanelColumns, from += step)
    for (int64_t c = 0; c < channels; ++c) to[c] = scale ? to_float(from[c]) * scale[c] : to_float(from[c]);
}

// The same of floats, times the channel scale: these channels, of at most 16, and zeros in the lanes of the others.
template <class T>
void load_floats(const Job& job, const Band& band, int64_t channel, int64_t channels, int32_t* lanes) {
  const Problem& p = *job.problem;
  const Geometry& g = p.geometry;
  const Places places{g, band, reinterpret_cast<uint8_t*>(lanes), kPanelColumns * 4};
  const int64_t pixel_step = p.x.channels_last ? g.in_channels : 1, channel_step = p.x.channels_last ? 1 : g.pixels();
  const T* x = static_cast<const T*>(p.x.data) + band.sample * g.in_channels * g.pixels() + channel * channel_step;
  const float* scale = p.depthwise_scale ? p.depthwise_scale + channel : nullptr;
  const auto clear = [](uint8_t* to, int64_t pixels) { std::memset(to, 0, pixels * kPanelColumns * 4); };
  channels == kPanelColumns ? places.for_each_padding(clear) : clear(places.image, job.image_pixels());
  const int64_t end = places.first(band.end), together = places.together();
  for (int64_t pixel = places.first(band.begin), next; pixel < end; pixel = next) {
    next = std::min({end, pixel + kAtOnce, (pixel / together + 1) * together});
    auto* to = reinterpret_cast<float*>(places.of(pixel));
    const T* from = x + pixel * pixel_step;
    if (p.x.channels_last) {
      widen_pixels(from, pixel_step, next - pixel, channels, scale, to);
      continue;
    }
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t i = 0; i < next - pixel; ++i) {
        const float value = to_float(from[c * channel_step + i]);
        to[i * kPanelColumns + c] = scale ? value * scale[c] : value;
      }
  }
}

// Pixels [begin, end), line by line.
void compute(const Job& job, const Band& band, int64_t begin, int64_t end, Depthwise d, const Scratch& s) {
  const Geometry& g = job.problem->geometry;
  const int64_t line_pixels = g.axes[2].padded(), plane_pixels = g.axes[1].padded() * line_pixels;
  for (int64_t pixel = begin; pixel < end; pixel += d.pixels) {
    const Line line = line_of(g, pixel, end);
    d.pixels = line.count;
    d.step = kPanelColumns * g.axes[line.axis].stride * (line.axis == 0 ? plane_pixels : 1);
    d.image =
        s.lanes + kPanelColumns * ((line.outer - band.begin) * plane_pixels + line.middle * line_pixels + line.inner);
    job.kernel->depthwise(d);
    d.out = static_cast<uint8_t*>(d.out) + d.pixels * d.out_stride;
    if (d.residual.data) d.residual.data = static_cast<const uint8_t*>(d.residual.data) + d.pixels * d.residual.stride;
  }
}

// Where the first of some output pixels goes.
struct Place {
  int64_t sample, pixel;
};

// Output pixels [begin, end) of the band. qparams: of its image; load(channel, channels) puts 16 of them into lanes.
template <class F>
void run_channels(const Job& job, const Band& band, const QParams& qparams, float divided_by, int64_t begin,
                  int64_t end, const Place& y, const Scratch& s, const F& load) {
  const Problem& p = *job.problem;
  const Geometry& g = p.geometry;
  const PackedHeader& weights = p.weights_of(0);
  Depthwise d{};
  d.taps = find_offsets(job, s.offsets), d.offsets = s.offsets, d.weights = s.weights;
  d.scale = qparams.scale * divided_by, d.zero_point = qparams.zero_point;
  d.out_dtype = p.y.dtype, d.activation = p.activation;
  d.out_inv_scale = 1.0f / p.y.qparams.scale, d.out_zero_point = p.y.qparams.zero_point;
  const int64_t bytes = element_bytes(d.out_dtype);
  for (int64_t channel = 0; channel < g.out_channels; channel += kPanelColumns) {
    const int64_t channels = std::min(kPanelColumns, g.out_channels - channel);
    d.panel = reinterpret_cast<const uint8_t*>(&weights + 1) + channel / kPanelColumns * panel_bytes(weights.k);
    load_weights(job, d.panel, layout_depth(weights.layout), divided_by, s.weights);
    load(channel, channels);
    const Outputs outputs{y.sample, y.pixel, end - begin, channel, channels, kPanelColumns};
    const bool direct = job.y_in_place && channels == kPanelColumns;
    d.out_stride = (direct ? g.out_channels : kPanelColumns) * bytes;
    const int64_t at = (y.sample * g.out_pixels() + y.pixel) * g.out_channels + channel;
    d.out = direct ? static_cast<uint8_t*>(p.y.data) + at * bytes : s.y;
    d.residual = direct ? p.residual.from(at, g.out_channels) : residual_of(p, outputs, s.residual);
    compute(job, band, begin, end, d, s);
    if (!direct) write_outputs(p, outputs, s.y);
  }
}

}  // namespace

void run_depthwise(const Job& job, const Band& band, const uint8_t* image, const QParams& qparams, int64_t begin,
                   int64_t end, const Scratch& s) {
  run_channels(job, band, qparams, 1.0f, begin, end, {band.sample, begin}, s, [&](int64_t channel, int64_t) {
    load_lanes(job, band, image + channel * job.kernel->codes.bytes, qparams.zero_point, s.lanes);
  });
}

void load_lanes_of_x(const Job& job, const Band& band, int64_t channel, int64_t channels, const Scratch& s) {
  switch (job.problem->x.dtype) {
    case DType::bf16: return load_floats<Bf16>(job, band, channel, channels, s.lanes);
    case DType::f16: return load_floats<F16>(job, band, channel, channels, s.lanes);
    default: load_floats<float>(job, band, channel, channels, s.lanes);
  }
}

void run_depthwise_floats(const Job& job, const Band& band, int64_t begin, int64_t end, const Scratch& s) {
  run_channels(job, band, {1.0f, 0}, kMostWeight, begin, end, {band.sample, begin}, s,
               [&](int64_t channel, int64_t channels) { load_lanes_of_x(job, band, channel, channels, s); });
}

void run_depthwise_lanes(const Job& of, const Band& band, int64_t begin, int64_t end, const Lanes& lanes, float* y,
                         const Scratch& s) {
  Problem problem = *of.problem;
  problem.y = {y, DType::f32, true, {1.0f, 0}};
  problem.residual = {};
  Job job = of;
  job.problem = &problem;
  run_channels(job, band, {1.0f, 0}, kMostWeight, begin, end, {0, 0}, s,
               [&](int64_t channel, int64_t channels) { lanes.load(channel, channels); });
}

}  // namespace conv
}  // namespace torchq
