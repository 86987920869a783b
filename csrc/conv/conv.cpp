// Computes a part of a problem, band by band:
//
//   for each band of a sample's output pixels
//     load_image(): the codes that its patches need, once
//     for each block of pixels
//       for each group
//         load_patches(): rows of codes
//         the GEMM
//         write_outputs(), where the GEMM can't write to y itself

#include "conv.h"

#include <algorithm>

#include "image.h"
#include "outputs.h"
#include "patches.h"
#include "scratch.h"

namespace torchq {
namespace conv {
namespace {

// A block's product for one group. `rows` are its codes.
void multiply(const Job& job, const Outputs& o, const CodeRows& rows, int column_part, const Scratch& s) {
  const Problem& p = *job.problem;
  const Geometry& g = p.geometry;
  torchq::Problem block{};
  block.m = o.count;
  block.x.dtype = DType::u8;
  block.x.ready = &rows;
  block.weights = &p.weights_of(o.group);
  const DType dtype = job.y_in_place ? p.y.dtype : waiting_dtype(p);
  const int64_t bytes = element_bytes(dtype);
  const int64_t row = o.sample * g.out_pixels() + o.pixel;
  block.y.dtype = dtype;
  block.y.qparams = p.y.qparams;
  block.y.stride = (job.y_in_place ? g.out_channels : g.group_outputs()) * bytes;
  block.y.data = job.y_in_place
                     ? static_cast<uint8_t*>(p.y.data) + row * block.y.stride + o.group * g.group_outputs() * bytes
                     : s.y;
  block.activation = p.residual ? Activation::none : p.activation;
  torchq::Job product = job.product;
  product.problem = &block;
  product.parts = job.by_columns ? job.parts : 1;
  torchq::run(product, column_part, s.gemm);
  if (!job.y_in_place) write_outputs(*product.kernel, p, o, s.y);
}

// Pixels [begin, end) of a sample.
void run_band(const Job& job, int64_t sample, int64_t begin, int64_t end, int column_part, const Scratch& s) {
  const Problem& p = *job.problem;
  const Geometry& g = p.geometry;
  const int64_t row = g.axes[1].outputs() * g.axes[2].outputs(), stride = g.axes[0].stride;
  const Band band{sample, begin / row * stride, (end - 1) / row * stride + g.axes[0].extent()};
  const QParams qparams = p.x.per_sample ? p.x.samples[sample] : p.x.qparams;
  const uint8_t* image = load_image(job, band, qparams, s);
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
      multiply(job, {sample, pixel, count, group}, rows, column_part, s);
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
    run_band(job, sample, first, last, job.by_columns ? index : 0, s);
    begin += last - first;
  }
}

}  // namespace conv
}  // namespace torchq
