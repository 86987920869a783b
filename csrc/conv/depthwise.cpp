// Depthwise convolutions, 16 channels at a time: the codes of a band and the weights as floats, then the kernel.

#include "depthwise.h"

#include <algorithm>

#include "outputs.h"
#include "patches.h"

namespace torchq {
namespace conv {
namespace {

// weights[t * 16 + c] of a panel whose layout is depth taps x 16 channels.
void widen_weights(const uint8_t* panel, int64_t depth, int64_t taps, float* weights) {
  const auto* codes = reinterpret_cast<const int8_t*>(panel + kPanelMeta);
  for (int64_t t = 0; t < taps; ++t)
    for (int64_t c = 0; c < kPanelColumns; ++c)
      weights[t * kPanelColumns + c] = codes[t / depth * depth * kPanelColumns + c * depth + t % depth];
}

// From the first tap of a patch to each, in floats of 16 channels a pixel.
void find_offsets(const Job& job, int64_t* offsets) {
  const Geometry& g = job.problem->geometry;
  const int64_t line = g.axes[2].padded(), plane = g.axes[1].padded() * line;
  for (int64_t o = 0; o < g.axes[0].kernel; ++o)
    for (int64_t m = 0; m < g.axes[1].kernel; ++m)
      for (int64_t i = 0; i < g.axes[2].kernel; ++i)
        *offsets++ =
            kPanelColumns * (o * g.axes[0].dilation * plane + m * g.axes[1].dilation * line + i * g.axes[2].dilation);
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
        s.floats + kPanelColumns * ((line.outer - band.begin) * plane_pixels + line.middle * line_pixels + line.inner);
    job.kernel->depthwise(d);
    d.out = static_cast<uint8_t*>(d.out) + d.pixels * d.out_stride;
  }
}

}  // namespace

void run_depthwise(const Job& job, const Band& band, const uint8_t* image, const QParams& qparams, int64_t begin,
                   int64_t end, const Scratch& s) {
  const Problem& p = *job.problem;
  const Geometry& g = p.geometry;
  const PackedHeader& weights = p.weights_of(0);
  const CodeFormat& format = job.kernel->codes;
  const int64_t pixels = (band.end - band.begin) * g.axes[1].padded() * g.axes[2].padded();
  Depthwise d{};
  d.taps = g.taps(), d.offsets = s.offsets, d.weights = s.weights, d.scale = qparams.scale;
  d.out_dtype = p.y.dtype, d.activation = p.activation;
  d.out_inv_scale = 1.0f / p.y.qparams.scale, d.out_zero_point = p.y.qparams.zero_point;
  find_offsets(job, s.offsets);
  const int64_t bytes = element_bytes(d.out_dtype);
  for (int64_t channel = 0; channel < g.out_channels; channel += kPanelColumns) {
    const int64_t channels = std::min(kPanelColumns, g.out_channels - channel);
    d.panel = reinterpret_cast<const uint8_t*>(&weights + 1) + channel / kPanelColumns * panel_bytes(weights.k);
    widen_weights(d.panel, layout_depth(weights.layout), d.taps, s.weights);
    job.kernel->widen(image + channel * format.bytes, pixels, job.pixel_bytes, format.shift == 128 ? 0x80 : 0,
                      qparams.zero_point, s.floats);
    const Outputs outputs{band.sample, begin, end - begin, channel, channels, kPanelColumns};
    const bool direct = job.y_in_place && channels == kPanelColumns;
    d.out_stride = (direct ? g.out_channels : kPanelColumns) * bytes;
    const int64_t at = (band.sample * g.out_pixels() + begin) * d.out_stride + channel * bytes;
    d.out = direct ? static_cast<uint8_t*>(p.y.data) + at : s.y;
    if (p.residual && !direct) read_residual(p, outputs, s.residual);
    if (p.residual) {
      const auto* residual = direct ? static_cast<const uint8_t*>(p.residual) + at : s.residual;
      d.residual = residual - static_cast<uint8_t*>(d.out);
    }
    compute(job, band, begin, end, d, s);
    if (!direct) write_outputs(p, outputs, s.y);
  }
}

}  // namespace conv
}  // namespace torchq
