// Convolutions, the GEMM over patches of an image of codes: their whole public face. Plain C++17: no torch, no Python,
// no allocation, no threads.
//
//   y[n, o, p] = act(dequantize(Σ codes(x)[n, p·stride + tap·dilation - padding, c] · w[o, tap, c]) + bias[o])
//
// summed over the taps of the kernel and the input channels c of o's group. Each value of x is quantized once, into an
// image of u8 codes with the channels last. What the padding adds to it is the code of 0. A patch is then a few runs of
// bytes, which are gathered block by block into rows for the GEMM: no matrix of all patches exists. Products are exact
// in int32. The caller owns every buffer and every thread:
//
//   schedule     how a problem is computed, and in how many parts
//   range_of     of a sample's values, from which a dynamic problem's scales are chosen
//   run          one part; each may run on a thread of its own
#pragma once

#include <cstddef>
#include <cstdint>

#include "../gemm/gemm.h"

namespace torchq {
namespace conv {

// One axis of the images: of the input, the kernel and the output.
struct Axis {
  int64_t size = 1;  // of the input
  int64_t kernel = 1, stride = 1, dilation = 1;
  int64_t before = 0, after = 0;  // zeros that are added to the input

  int64_t padded() const { return before + size + after; }
  int64_t extent() const { return (kernel - 1) * dilation + 1; }  // of the kernel with its gaps
  int64_t outputs() const { return (padded() - extent()) / stride + 1; }
};

// outer, middle, inner: depth, height, width. A convolution over a plane has no middle axis, and one over a line
// neither a middle nor an inner one: such an axis has size and kernel 1.
constexpr int kAxes = 3;

struct Geometry {
  int64_t in_channels, out_channels, groups;  // the channels of all groups
  Axis axes[kAxes];

  int64_t group_inputs() const { return in_channels / groups; }
  int64_t group_outputs() const { return out_channels / groups; }
  int64_t taps() const { return axes[0].kernel * axes[1].kernel * axes[2].kernel; }
  int64_t depth() const { return taps() * group_inputs(); }  // K of the GEMM
  int64_t pixels() const { return axes[0].size * axes[1].size * axes[2].size; }
  int64_t out_pixels() const { return axes[0].outputs() * axes[1].outputs() * axes[2].outputs(); }
};

struct Input {
  const void* data;    // samples, one after the other
  DType dtype;         // f32, bf16 or f16, quantized here; u8, codes already, channels last
  bool channels_last;  // (outer, middle, inner, channels), else (channels, outer, middle, inner)
  bool per_sample;     // each sample gets its own scale and zero point (but see multiplies_floats); else qparams
  QParams qparams;
  const QParams* samples = nullptr;  // [batch], if per_sample and quantized: for run()
};

struct Output {
  void* data;
  DType dtype;
  bool channels_last;
  QParams qparams;  // u8 only
};

struct Problem {
  Geometry geometry;
  int64_t batch;
  Input x;
  // Packed weights (group_outputs, depth) of each group; the depth is (taps, group_inputs). Of a channel scale only the
  // first group_inputs numbers count.
  // Or, if is_depthwise, those of all channels as a matrix (channels, taps), which has no channel scale of its own:
  // then channels do not mix, each has a group of its own and one output, and the kernel's depthwise() computes it, not
  // a GEMM.
  const uint8_t* weights;
  int64_t weights_stride;  // bytes between groups
  bool is_depthwise;
  const float* depthwise_scale = nullptr;  // [in_channels] or null: the channel scale of a depthwise convolution
  Output y;
  Residual residual;   // of y's shape, whatever its dtype; its stride does not count
  bool residual_last;  // whether its channels are last. They are wherever those of y are
  Activation activation;

  const PackedHeader& weights_of(int64_t group) const {
    return *reinterpret_cast<const PackedHeader*>(weights + group * weights_stride);
  }
  // Without a static range a depthwise convolution multiplies x as it is: a value is in as many products as there are
  // taps, and a search for the range and codes of all values would take as long as these.
  bool multiplies_floats() const { return is_depthwise && x.per_sample; }
  bool has_channel_scale() const {
    return is_depthwise ? depthwise_scale != nullptr : weights_of(0).has_channel_scale != 0;
  }
};

// How a problem is computed. schedule() derives it once; every part reads it.
struct Job {
  const Problem* problem;
  const Kernel* kernel;
  int parts;            // 1, or as many as there are threads that pay
  bool by_columns;      // a part is a range of output channels, else of output pixels
  int column_parts;     // into which the output channels of a group are divided
  bool image_in_place;  // x is the image
  bool rows_in_place;   // a patch is one run, and patches follow one another at equal distances: nothing is gathered
  bool y_in_place;      // the GEMM writes to y; else a block of outputs waits in the scratch
  int64_t pixel_bytes, line_bytes, plane_bytes;  // in the image: of all channels, of an inner line, of an outer step
  Runs runs;                                     // of a patch in the image
  int64_t row_stride;                            // bytes between rows of codes
  int64_t band_rows;                             // steps of the outer output axis whose image is in the scratch at once
  int64_t block_rows;                            // output pixels multiplied at once
  torchq::Job product;                           // of such a block for one group; it has no problem yet
  size_t image_bytes, scratch_bytes;

  int64_t image_rows() const {  // of a band: steps of the outer axis
    const Axis& outer = problem->geometry.axes[0];
    return (band_rows - 1) * outer.stride + outer.extent();
  }
  int64_t image_pixels() const {
    return image_rows() * problem->geometry.axes[1].padded() * problem->geometry.axes[2].padded();
  }
};

// The problem must outlive the job.
Job schedule(const Kernel& kernel, const Problem& problem, int most_parts);

// The range of channels [begin, end) of a sample, or with channels last of these pixels, times the channel scale. The
// ranges of all of them together make that of the sample.
RowRange range_of(const Job& job, int64_t sample, int64_t begin, int64_t end, float* scratch);
RowRange join(const RowRange& a, const RowRange& b);

// Computes a part. scratch: job.scratch_bytes, which parts running at the same time must not share.
void run(const Job& job, int index, void* scratch);

}  // namespace conv
}  // namespace torchq
