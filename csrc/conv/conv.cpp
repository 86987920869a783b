// Computes a part of a problem, band by band:
//
//   for each band of a sample's output pixels
//     load_image(): the codes that its patches need, once
//     for each block of pixels
//       for each group
//         load_patches(): rows of codes
//         the GEMM
//         write_outputs(), where the GEMM can't write to y itself
//
// or run_depthwise() on the whole band, whose floats it takes as they are where there is no static range.

#include "conv.h"

#include <algorithm>

#include "depthwise.h"
#include "image.h"
#include "outputs.h"
#include "patches.h"
#include "scratch.h"

namespace torchq {
namespace conv {
namespace {

// The product of a block of pixels for one group, whose rows of codes are ready.
torchq::Problem product_of(const Job& job, int64_t count, int64_t group, const CodeRows& rows) {
  const Problem& p = *job.problem;
  torchq::Problem product{};
  product.m = count;
  product.x.ready = &rows;
  product.weights = &p.weights_of(group);
  product.y.dtype = p.y.dtype;
  product.y.qparams = p.y.qparams;
  product.activation = p.activation;
  return product;
}

// Computes it for some parts of the columns.
void multiply(const Job& job, int64_t sample, int64_t pixel, int64_t group, int first_part, int end_part,
              torchq::Problem& product, const Scratch& s) {
  const Problem& p = *job.problem;
  const Geometry& g = p.geometry;
  torchq::Job parts = job.product;
  parts.problem = &product;
  const int64_t bytes = element_bytes(product.y.dtype), first_channel = group * g.group_outputs();
  const int64_t at = (sample * g.out_pixels() + pixel) * g.out_channels + first_channel;  // with the channels last
  if (job.y_in_place) {
    product.y.stride = g.out_channels * bytes;
    product.y.data = static_cast<uint8_t*>(p.y.data) + at * bytes;
    product.y.residual = p.residual.from(at, g.out_channels);
    for (int part = first_part; part < end_part; ++part) torchq::run(parts, part, s.gemm);
    return;
  }
  product.y.data = s.y;
  for (int part = first_part; part < end_part; ++part) {
    const Part columns = part_of(parts, part);
    const int64_t channel = columns.panel_begin * kPanelColumns;
    const int64_t channels = std::min(columns.panel_end * kPanelColumns, g.group_outputs()) - channel;
    const Outputs outputs{sample, pixel, product.m, first_channel + channel, channels, channels};
    product.y.first_panel = columns.panel_begin;
    product.y.stride = channels * bytes;
    product.y.residual =
        p.residual_last ? p.residual.from(at + channel, g.out_channels) : residual_of(p, outputs, s.residual);
    torchq::run(parts, part, s.gemm);
    write_outputs(p, outputs, s.y);
  }
}

// Pixels [begin, end) of a sample.
void run_band(const Job& job, int64_t sample, int64_t begin, int64_t end, int part, const Scratch& s) {
  const Problem& p = *job.problem;
  const Geometry& g = p.geometry;
  const int64_t row = g.axes[1].outputs() * g.axes[2].outputs(), stride = g.axes[0].stride;
  const Band band{sample, begin / row * stride, (end - 1) / row * stride + g.axes[0].extent()};
  if (p.multiplies_floats()) return run_depthwise_floats(job, band, begin, end, s);
  const QParams qparams = p.x.per_sample ? p.x.samples[sample] : p.x.qparams;
  const uint8_t* image = load_image(job, band, qparams, s);
  if (p.is_depthwise) return run_depthwise(job, band, image, qparams, begin, end, s);
  const int64_t blocks = ceil_div(end - begin, job.block_rows);
  std::fill_n(s.rows.scale, job.block_rows + 64, qparams.scale);
  std::fill_n(s.rows.zero_point, job.block_rows + 64, qparams.zero_point - job.kernel->codes.shift);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t pixel = begin + piece(end - begin, b, blocks);
    const int64_t count = begin + piece(end - begin, b + 1, blocks) - pixel;
    for (int64_t group = 0; group < g.groups; ++group) {
      CodeRows rows = s.rows;
      if (job.rows_in_place)
        rows.codes = const_cast<uint8_t*>(image) + patch_at(job, pixel, band.begin, group);  // the GEMM only reads it
      else
        load_patches(job, image, band.begin, group, pixel, count, s);
      torchq::Problem product = product_of(job, count, group, rows);
      const int first_part = job.by_columns ? part : 0, end_part = job.by_columns ? part + 1 : job.column_parts;
      multiply(job, sample, pixel, group, first_part, end_part, product, s);
    }
  }
}

}  // namespace

void run(const Job& job, int index, void* memory) {
  const Problem& p = *job.problem;
  const Geometry& g = p.geometry;
  const Scratch s = carve(job, memory);
  const int64_t pixels = g.out_pixels(), all = p.batch * pixels;
  const int64_t row = g.axes[1].outputs() * g.axes[2].outputs();
  int64_t begin = job.by_columns ? 0 : piece(all, index, job.parts);
  const int64_t end = job.by_columns ? all : piece(all, index + 1, job.parts);
  while (begin < end) {
    const int64_t sample = begin / pixels, first = begin % pixels;
    const int64_t last = std::min({pixels, first + end - begin, (first / row + job.band_rows) * row});
    run_band(job, sample, first, last, index, s);
    begin += last - first;
  }
}

}  // namespace conv
}  // namespace torchq
