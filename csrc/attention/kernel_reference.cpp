// The definition of the arithmetic, one float at a time.

#include <cfloat>
#include <cmath>

#include "../gemm/scalar.h"
#include "kernel.h"

namespace torchq {
namespace attention {
namespace reference {

#include "vec1.inc"

#include "softmax.inc"
#include "codes.inc"
#include "in_place.inc"

template <class T>
void to_floats(const T* x, int64_t n, float factor, float* out, int64_t stride) {
  for (int64_t i = 0; i < n || i % kPanel; ++i)
    out[i / kPanel * stride + i % kPanel] = i < n ? to_float(x[i]) * factor : 0.0f;
}

void to_floats(const void* x, DType dtype, int64_t n, float factor, float* out, int64_t stride) {
  if (dtype == DType::bf16) return to_floats(static_cast<const Bf16*>(x), n, factor, out, stride);
  if (dtype == DType::f16) return to_floats(static_cast<const F16*>(x), n, factor, out, stride);
  to_floats(static_cast<const float*>(x), n, factor, out, stride);
}

void from_floats(const float* x, float factor, int64_t n, DType dtype, void* y) {
  for (int64_t i = 0; i < n; ++i) {
    const float value = x[i] * factor;
    if (dtype == DType::bf16)
      static_cast<Bf16*>(y)[i] = to_bf16(value);
    else if (dtype == DType::f16)
      static_cast<F16*>(y)[i] = to_f16(value);
    else
      static_cast<float*>(y)[i] = value;
  }
}

void transpose(const float* x, int64_t stride, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t r = 0; r < kPanel; ++r) out[i * kPanel + r] = x[r * stride + i];
}

void multiply(const Product& p) {
  for (int64_t r = 0; r < p.m; ++r)
    for (int64_t c = 0; c < p.panels * kPanel; ++c) {
      const float* column = p.b + c / kPanel * p.panel_stride + c % kPanel;
      float sum = 0.0f;
      for (int64_t i = 0; i < p.depth; ++i) sum = fma(p.a[r * p.a_stride + i], column[i * kPanel], sum);
      p.out[r * p.out_stride + c] = sum;
    }
}

}  // namespace reference

constexpr Kernel kernel_reference = [] {
  Kernel k;
  k.name = "reference";
  k.to_floats = reference::to_floats;
  k.from_floats = reference::from_floats;
  k.transpose = reference::transpose;
  k.multiply = reference::multiply;
  k.largest = reference::largest;
  k.largest_masked = reference::largest_masked;
  k.weigh = reference::weigh;
  k.dot_rows = reference::dot_rows;
  k.add_weighted = reference::add_weighted;
  k.weigh_codes = reference::weigh_codes;
  k.quantize_keys = reference::quantize_keys;
  k.quantize_values = reference::quantize_values;
  k.add_rows = reference::add_rows;
  k.extend_ranges = reference::extend_ranges;
  return k;
}();

}  // namespace attention
}  // namespace torchq
