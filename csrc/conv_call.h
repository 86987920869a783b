// The call of a convolution as a conv::Problem: what its op (convolution_op.cpp) and its direct call (direct_conv.cpp)
// share. They may differ in what they accept, but not in what they compute.
#pragma once

#include <algorithm>

#include "conv/conv.h"

namespace torchq {
namespace conv {

// The numbers of a geometry: dimensions, channels in and out, groups, and for each dimension the kernel, the stride,
// the zeros before and after, and the dilation.
constexpr int kHead = 4, kEach = 5;
constexpr int kMostNumbers = kHead + kEach * kAxes;

// The axes of 1, 2 or 3 dimensions among the three.
constexpr int kPlace[3][3] = {{0}, {0, 2}, {0, 1, 2}};

inline Geometry geometry_from(const int64_t* numbers, const int64_t* sizes) {
  Geometry g{numbers[1], numbers[2], numbers[3], {}};
  for (int64_t d = 0; d < numbers[0]; ++d) {
    const int64_t* of = numbers + kHead + kEach * d;
    g.axes[kPlace[numbers[0] - 1][d]] = {sizes[d], of[0], of[1], of[4], of[2], of[3]};
  }
  return g;
}

// Upper limits: of a kernel, a stride, a dilation and a padding, and of the values of a padded sample.
constexpr int64_t kMostOfAxis = int64_t{1} << 31;
constexpr double kMostValues = 0x1p46;

inline double padded_values(const Geometry& g) {
  double values = static_cast<double>(g.in_channels);
  for (const Axis& axis : g.axes) values *= static_cast<double>(axis.padded());
  return values;
}

// The strides of samples that lie one after the other, each (channels, size...) or (size..., channels).
inline void dense_strides(const int64_t* sizes, int64_t dims, bool channels_last, int64_t* strides) {
  const auto size = [&](int64_t i) { return std::max<int64_t>(sizes[i], 1); };  // as torch counts
  int64_t stride = channels_last ? size(1) : 1;
  for (int64_t i = dims; i-- > 2; stride *= size(i)) strides[i] = stride;
  strides[1] = channels_last ? 1 : stride;
  strides[0] = channels_last ? stride : stride * size(1);
}

// Whether a tensor of up to kAxes + 2 dimensions is laid out so. Strides of dimensions of size 1 say nothing.
inline bool is_dense(const int64_t* sizes, const int64_t* strides, int64_t dims, bool channels_last) {
  int64_t dense[kAxes + 2];
  dense_strides(sizes, dims, channels_last, dense);
  for (int64_t i = 0; i < dims; ++i)
    if (sizes[i] != 1 && strides[i] != dense[i]) return false;
  return true;
}

}  // namespace conv
}  // namespace torchq
