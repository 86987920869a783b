#include "outputs.h"

#include <algorithm>
#include <cstring>

#include "../gemm/scalar.h"

namespace torchq {
namespace conv {
namespace {

// Where y of a pixel and a channel lies, in elements. `pixel_step` and `channel_step` from one to the next.
struct Layout {
  int64_t first, pixel_step, channel_step;

  Layout(const Problem& p, const Outputs& o) {
    const Geometry& g = p.geometry;
    const int64_t pixels = g.out_pixels(), channel = o.group * g.group_outputs();
    pixel_step = p.y.channels_last ? g.out_channels : 1;
    channel_step = p.y.channels_last ? 1 : pixels;
    first = o.sample * pixels * g.out_channels + o.pixel * pixel_step + channel * channel_step;
  }
};

void convert(float x, float& y) { y = x; }
void convert(float x, Bf16& y) { y = to_bf16(x); }
void convert(float x, F16& y) { y = to_f16(x); }
template <class T>
void convert(T x, T& y) {
  y = x;
}

// y in tiles that are read and written in runs of a cache line or so.
template <class From, class To>
void write(const Layout& to, const Outputs& o, int64_t channels, const From* waiting, To* y) {
  constexpr int64_t kTile = 16;
  for (int64_t p = 0; p < o.count; p += kTile)
    for (int64_t c = 0; c < channels; c += kTile)
      for (int64_t j = c; j < std::min(c + kTile, channels); ++j)
        for (int64_t i = p; i < std::min(p + kTile, o.count); ++i)
          convert(waiting[i * channels + j], y[to.first + i * to.pixel_step + j * to.channel_step]);
}

template <class T>
void add(const Layout& from, const Outputs& o, int64_t channels, const T* residual, float* waiting) {
  for (int64_t i = 0; i < o.count; ++i)
    for (int64_t j = 0; j < channels; ++j)
      waiting[i * channels + j] += to_float(residual[from.first + i * from.pixel_step + j * from.channel_step]);
}

template <class T>
void write_with_residual(const Kernel& kernel, const Problem& p, const Outputs& o, float* waiting) {
  const Layout layout(p, o);
  const int64_t channels = p.geometry.group_outputs();
  add(layout, o, channels, static_cast<const T*>(p.residual), waiting);
  if (p.activation != Activation::none) kernel.activate(p.activation, DType::f32, waiting, waiting, o.count * channels);
  write(layout, o, channels, waiting, static_cast<T*>(p.y.data));
}

template <class T>
void write_as_it_is(const Problem& p, const Outputs& o, const void* waiting) {
  write(Layout(p, o), o, p.geometry.group_outputs(), static_cast<const T*>(waiting), static_cast<T*>(p.y.data));
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
  if (p.y.dtype == DType::f32) return write_as_it_is<float>(p, o, waiting);
  if (p.y.dtype == DType::u8) return write_as_it_is<uint8_t>(p, o, waiting);
  write_as_it_is<uint16_t>(p, o, waiting);
}

}  // namespace conv
}  // namespace torchq
