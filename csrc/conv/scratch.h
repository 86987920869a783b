// The buffers of one part, carved from the caller's scratch.
#pragma once

#include <algorithm>

#include "../gemm/carver.h"
#include "conv.h"

namespace torchq {
namespace conv {

// Bytes behind the end of the image and of the rows that whole vectors may read and write.
constexpr int64_t kSlack = 256;

constexpr int64_t kPlanePixels = 128, kPlaneChannels = 64;  // of a tile of channels-first values, quantized at once

// Bytes for the codes of such a tile, or for a piece of a row, as a kernel's quantize() writes them.
constexpr int64_t kQuantizedBytes = kPlanePixels * kPlaneChannels * 2 + kSlack;

struct Scratch {
  uint8_t* image;         // of a band
  CodeRows rows;          // of a block
  uint8_t* patch;         // one row before it is interleaved
  uint8_t* quantized;     // kQuantizedBytes
  float* channel_scale;   // [in_channels], then kPlanePixels times the one of a channel
  uint8_t *y, *residual;  // outputs of a block, where they wait, and what is added to them
  void* gemm;
  // Of depthwise convolutions: 16 channels of the image, those of the weights, and from the first tap to each.
  int32_t *lanes, *weights;
  int64_t* offsets;
};

// Output channels of a block, where it waits.
inline int64_t most_channels(const Job& job) {
  const int64_t n = job.problem->geometry.group_outputs(), groups = ceil_div(n, job.product.tile.n);
  return std::min(ceil_div(groups, job.column_parts) * job.product.tile.n, n);
}

inline Scratch carve(const Job& job, Carver& from) {
  const Geometry& g = job.problem->geometry;
  Scratch s{};
  s.image = from.take<uint8_t>(job.image_bytes);
  s.quantized = from.take<uint8_t>(kQuantizedBytes);
  s.channel_scale = from.take<float>(g.in_channels + kPlanePixels);
  if (job.problem->is_depthwise) {
    const int64_t outputs = job.band_rows * g.axes[1].outputs() * g.axes[2].outputs();
    s.y = from.take<uint8_t>(outputs * kPanelColumns * 4);
    s.residual = from.take<uint8_t>(outputs * kPanelColumns * 4);
    s.lanes = from.take<int32_t>(job.image_pixels() * kPanelColumns);
    s.weights = from.take<int32_t>(g.taps() * kPanelColumns);
    s.offsets = from.take<int64_t>(g.taps());
    return s;
  }
  const int64_t rows = job.block_rows + 64;  // a kernel may read whole tiles, and so rows that do not exist
  s.rows.codes = from.take<uint8_t>(job.rows_in_place ? 0 : rows * job.row_stride + kSlack);
  s.rows.scale = from.take<float>(rows);
  s.rows.zero_point = from.take<int32_t>(rows);
  s.patch = from.take<uint8_t>(job.row_stride + kSlack);
  const int64_t waiting_bytes = job.y_in_place ? 0 : job.block_rows * most_channels(job) * 4;
  s.y = from.take<uint8_t>(waiting_bytes);
  s.residual = from.take<uint8_t>(waiting_bytes);
  s.gemm = from.take<uint8_t>(job.product.scratch_bytes);
  return s;
}

inline Scratch carve(const Job& job, void* memory) {
  Carver from(memory);
  return carve(job, from);
}

inline size_t scratch_bytes(const Job& job) {
  Carver from(nullptr);
  carve(job, from);
  return from.bytes();
}

}  // namespace conv
}  // namespace torchq
