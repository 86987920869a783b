// The definition of the arithmetic. Every other kernel gives these integers and these floats, bit for bit.

#include <cmath>
#include <string.h>

#include "kernel.h"
#include "scalar.h"

namespace torchq {
namespace reference {

#include "vec1.inc"

#include "activations.inc"

constexpr int kLanes = 1;
float load(const float* p) { return *p; }
void store(float* p, float x) { *p = x; }
#include "cell.inc"
#include "gather.inc"
#include "normalize.inc"

template <class T>
float value(const FloatRow& row, int64_t i) {
  const float x = to_float(static_cast<const T*>(row.x)[i]);
  return row.channel_scale ? x * row.channel_scale[i] : x;
}

template <class T>
RowRange range_of(const FloatRow& row) {
  RowRange r{0.0f, 0.0f, true};
  for (int64_t i = 0; i < row.k; ++i) {
    const float v = value<T>(row, i);
    r.lo = v < r.lo ? v : r.lo;
    r.hi = v > r.hi ? v : r.hi;
    r.finite &= std::isfinite(v);
  }
  return r;
}

// clamp(rne(v) + zero_point, 0, 255), clamped before rounding so that no conversion overflows; NaN gives 0.
uint8_t to_code(float v, int32_t zero_point) {
  const float lo = static_cast<float>(-zero_point), hi = static_cast<float>(255 - zero_point);
  v = v > lo ? v : lo;
  v = v < hi ? v : hi;
  return static_cast<uint8_t>(static_cast<int32_t>(std::nearbyint(v)) + zero_point);
}

template <class T>
void quantize_values(const FloatRow& row, float inv_scale, int32_t zero_point, uint8_t* codes) {
  for (int64_t i = 0; i < row.k; ++i) codes[i] = to_code(value<T>(row, i) * inv_scale, zero_point);
}

RowRange range(const FloatRow& row) {
  if (row.dtype == DType::bf16) return range_of<Bf16>(row);
  if (row.dtype == DType::f16) return range_of<F16>(row);
  return range_of<float>(row);
}

void quantize(const FloatRow& row, float inv_scale, int32_t zero_point, void* codes, bool) {
  auto* out = static_cast<uint8_t*>(codes);
  if (row.dtype == DType::bf16) return quantize_values<Bf16>(row, inv_scale, zero_point, out);
  if (row.dtype == DType::f16) return quantize_values<F16>(row, inv_scale, zero_point, out);
  return quantize_values<float>(row, inv_scale, zero_point, out);
}

template <Activation kActivation>
struct Activated {
  static float run(float x) { return activate<kActivation>(x); }
};

void store(DType dtype, void* out, int64_t i, float y) {
  switch (dtype) {
    case DType::f32: static_cast<float*>(out)[i] = y; break;
    case DType::bf16: static_cast<Bf16*>(out)[i] = to_bf16(y); break;
    default: static_cast<F16*>(out)[i] = to_f16(y);
  }
}

template <class T>
void activate(Activation activation, DType dtype, const T* x, void* y, int64_t count) {
  const auto activated = pick<Activated>(activation);
  for (int64_t i = 0; i < count; ++i) store(dtype, y, i, activated(to_float(x[i])));
}

void activate(Activation activation, DType dtype, const void* x, void* y, int64_t count) {
  if (dtype == DType::bf16) return activate(activation, dtype, static_cast<const Bf16*>(x), y, count);
  if (dtype == DType::f16) return activate(activation, dtype, static_cast<const F16*>(x), y, count);
  return activate(activation, dtype, static_cast<const float*>(x), y, count);
}

// What is added to the output at column c of row r.
float summand_at(const Residual& residual, int64_t r, int c) {
  const uint8_t* row = static_cast<const uint8_t*>(residual.data) + r * residual.stride;
  switch (residual.dtype) {
    case DType::u8: return static_cast<float>(row[c] - residual.zero_point) * residual.scale;
    case DType::f32: return reinterpret_cast<const float*>(row)[c];
    case DType::bf16: return to_float(reinterpret_cast<const Bf16*>(row)[c]);
    default: return to_float(reinterpret_cast<const F16*>(row)[c]);
  }
}

// y[c] of a Block or a Depthwise, in a row of its output.
template <class Work>
void write(const Work& work, void* row, int c, float y) {
  y = pick<Activated>(work.activation)(y);
  if (work.out_dtype == DType::u8)
    static_cast<uint8_t*>(row)[c] = to_code(y * work.out_inv_scale, work.out_zero_point);
  else
    store(work.out_dtype, row, c, y);
}

void store(const Block& b, int r, int c, int32_t acc, float scale, float bias) {
  void* row = static_cast<uint8_t*>(b.out) + r * b.out_stride;
  if (b.out_dtype == DType::i32) return void(static_cast<int32_t*>(row)[c] = acc);
  float y = static_cast<float>(acc) * (b.scale[r] * scale) + bias;
  if (b.residual.data) y += summand_at(b.residual, r, c);
  write(b, row, c, y);
}

void widen(const void* codes, int64_t pixels, int64_t stride, uint8_t flip, int32_t zero_point, float* out) {
  for (int64_t p = 0; p < pixels; ++p)
    for (int c = 0; c < kPanelColumns; ++c)
      out[p * kPanelColumns + c] =
          static_cast<float>((static_cast<const uint8_t*>(codes)[p * stride + c] ^ flip) - zero_point);
}

void depthwise(const Depthwise& d) {
  const auto *image = reinterpret_cast<const float*>(d.image), *weights = reinterpret_cast<const float*>(d.weights);
  const auto* meta = reinterpret_cast<const float*>(d.panel);
  for (int64_t p = 0; p < d.pixels; ++p)
    for (int c = 0; c < kPanelColumns; ++c) {
      float sum = 0.0f;
      for (int64_t t = 0; t < d.taps; ++t)
        sum = std::fma(image[p * d.step + d.offsets[t] + c], weights[t * kPanelColumns + c], sum);
      uint8_t* row = static_cast<uint8_t*>(d.out) + p * d.out_stride;
      float y = sum * (d.scale * meta[16 + c]) + meta[32 + c];
      if (d.residual.data) y += summand_at(d.residual, p, c);
      write(d, row, c, y);
    }
}

void run(const Block& b) {
  for (int r = 0; r < b.m; ++r) {
    const uint8_t* x = static_cast<const uint8_t*>(b.codes) + r * b.codes_stride;
    for (int c = 0; c < kPanelColumns; ++c) {
      const int64_t depth = layout_depth(b.layout), group = depth * kPanelColumns;
      const auto* weights = reinterpret_cast<const int8_t*>(b.panel + kPanelMeta) + depth * c;
      int32_t acc = 0;
      for (int64_t k = 0; k < depth * b.k_groups; ++k)
        acc += (x[k] - b.zero_point[r]) * weights[k / depth * group + k % depth];
      const auto* meta = reinterpret_cast<const float*>(b.panel);
      store(b, r, c, acc, meta[16 + c], meta[32 + c]);
    }
  }
}

}  // namespace reference

constexpr Kernel kernel_reference = [] {
  Kernel k;
  k.name = "reference";
  k.tiling.tile = {1, 16, 4};
  k.range = reference::range;
  k.quantize = reference::quantize;
  k.run = reference::run;
  k.activate = reference::activate;
  k.cell = reference::cell;
  k.gather = reference::gather;
  k.widen = reference::widen;
  k.depthwise = reference::depthwise;
  k.normalize = reference::normalize;
  return k;
}();

}  // namespace torchq
