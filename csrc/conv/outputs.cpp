#include "outputs.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "../gemm/scalar.h"
#include "transpose.h"

namespace torchq {
namespace conv {
namespace {

// Where y of a pixel and a channel lies, in elements. `pixel_step` and `channel_step` from one to the next.
struct Layout {
  int64_t first, pixel_step, channel_step;

  Layout(const Problem& p, const Outputs& o) {
    const Geometry& g = p.geometry;
    const int64_t pixels = g.out_pixels();
    pixel_step = p.y.channels_last ? g.out_channels : 1;
    channel_step = p.y.channels_last ? 1 : pixels;
    first = o.sample * pixels * g.out_channels + o.pixel * pixel_step + o.channel * channel_step;
  }
};

void convert(float x, float& y) { y = x; }
void convert(float x, Bf16& y) { y = to_bf16(x); }
void convert(float x, F16& y) { y = to_f16(x); }

template <class T>
void copy(const Layout& to, const Outputs& o, const T* waiting, T* y) {
  for (int64_t i = 0; i < o.count; ++i)
    std::memcpy(y + to.first + i * to.pixel_step, waiting + i * o.stride, o.channels * sizeof(T));
}

// Rows of pixels to rows of channels.
constexpr int64_t kTilePixels = 32, kTileBytes = 64;  // read from kTileBytes of each pixel

template <class T>
void transpose(const Layout& to, const Outputs& o, const T* waiting, T* y) {
  constexpr int64_t kSide = kBlock<T>, kTileChannels = kTileBytes / sizeof(T);
  const int64_t whole_channels = o.channels / kSide * kSide;
  const auto one_by_one = [&](int64_t p, int64_t end, int64_t c, int64_t end_channel) {
    for (int64_t j = c; j < end_channel; ++j)
      for (int64_t i = p; i < end; ++i) y[to.first + i + j * to.channel_step] = waiting[i * o.stride + j];
  };
  for (int64_t p = 0; p < o.count; p += kTilePixels) {
    const int64_t end = std::min(p + kTilePixels, o.count), whole = p + (end - p) / kSide * kSide;
    for (int64_t tile = 0; tile < whole_channels; tile += kTileChannels)
      for (int64_t c = tile; c < std::min(tile + kTileChannels, whole_channels); c += kSide) {
        for (int64_t i = p; i < whole; i += kSide) {
          Vec<T> v[kSide];
          TORCHQ_UNROLL
          for (int k = 0; k < kSide; ++k) std::memcpy(&v[k], waiting + (i + k) * o.stride + c, sizeof(v[k]));
          transpose_block<T>(v);
          TORCHQ_UNROLL
          for (int k = 0; k < kSide; ++k)
            std::memcpy(y + to.first + i + (c + k) * to.channel_step, &v[k], sizeof(v[k]));
        }
        one_by_one(whole, end, c, c + kSide);
      }
    one_by_one(p, end, whole_channels, o.channels);
  }
}

template <class T>
void write(const Layout& to, const Outputs& o, const float* waiting, T* y) {
  for (int64_t i = 0; i < o.count; ++i)
    for (int64_t j = 0; j < o.channels; ++j)
      convert(waiting[i * o.stride + j], y[to.first + i * to.pixel_step + j * to.channel_step]);
}

// float32 with the channels last, the commonest: rows as they lie, which are summed and activated while they are in L1.
void add_rows(const Kernel& kernel, const Problem& p, const Layout& at, const Outputs& o, const float* waiting) {
  const auto* residual = static_cast<const float*>(p.residual) + at.first;
  auto* y = static_cast<float*>(p.y.data) + at.first;
  for (int64_t i = 0; i < o.count; ++i) {
    const float *a = waiting + i * o.stride, *b = residual + i * at.pixel_step;
    float* sum = y + i * at.pixel_step;
    for (int64_t j = 0; j < o.channels; ++j) sum[j] = a[j] + b[j];
    if (p.activation != Activation::none) kernel.activate(p.activation, DType::f32, sum, sum, o.channels);
  }
}

template <class T>
void add(const Layout& from, const Outputs& o, const T* residual, float* waiting) {
  for (int64_t i = 0; i < o.count; ++i)
    for (int64_t j = 0; j < o.channels; ++j)
      waiting[i * o.stride + j] += to_float(residual[from.first + i * from.pixel_step + j * from.channel_step]);
}

template <class T>
void write_with_residual(const Kernel& kernel, const Problem& p, const Outputs& o, float* waiting) {
  const Layout layout(p, o);
  if (std::is_same_v<T, float> && p.y.channels_last) return add_rows(kernel, p, layout, o, waiting);
  add(layout, o, static_cast<const T*>(p.residual), waiting);
  if (p.activation != Activation::none) kernel.activate(p.activation, DType::f32, waiting, waiting, o.count * o.stride);
  write(layout, o, waiting, static_cast<T*>(p.y.data));
}

}  // namespace

DType waiting_dtype(const Problem& p) { return p.residual ? DType::f32 : p.y.dtype; }

void write_outputs(const Kernel& kernel, const Problem& p, const Outputs& o, void* waiting) {
  if (p.residual) {
    auto* floats = static_cast<float*>(waiting);
    if (p.y.dtype == DType::bf16) return write_with_residual<Bf16>(kernel, p, o, floats);
    if (p.y.dtype == DType::f16) return write_with_residual<F16>(kernel, p, o, floats);
    return write_with_residual<float>(kernel, p, o, floats);
  }
  const auto write_as = [&](auto element) {
    using T = decltype(element);
    const auto* from = static_cast<const T*>(waiting);
    (p.y.channels_last ? copy<T> : transpose<T>)(Layout(p, o), o, from, static_cast<T*>(p.y.data));
  };
  switch (element_bytes(p.y.dtype)) {
    case 4: return write_as(uint32_t{});
    case 2: return write_as(uint16_t{});
    default: return write_as(uint8_t{});
  }
}

}  // namespace conv
}  // namespace torchq
