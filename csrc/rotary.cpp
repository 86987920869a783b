#include "rotary.h"

#include "gemm/scalar.h"

namespace torchq {
namespace {

float rounded(float x, float) { return x; }
Bf16 rounded(float x, Bf16) { return to_bf16(x); }

// x · cos + other · sin.
template <class T>
T turned(T x, T other, float sign, T cos, T sin) {
  const T one = rounded(to_float(x) * to_float(cos), T{}), two = rounded(sign * to_float(other) * to_float(sin), T{});
  return rounded(to_float(one) + to_float(two), T{});
}

template <class T>
void rotate_rows(const Rotary& r, int64_t begin, int64_t end) {
  const int64_t half = r.depth / 2, width = r.heads * r.depth;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t batch = i / r.rows, row = i % r.rows;
    const T* cos = static_cast<const T*>(r.cos) + batch * r.cos_batch + row * r.cos_row;
    const T* sin = static_cast<const T*>(r.sin) + batch * r.sin_batch + row * r.sin_row;
    for (int64_t head = 0; head < r.heads; ++head) {
      const T* __restrict x = static_cast<const T*>(r.x) + i * width + head * r.depth;
      T* __restrict y = static_cast<T*>(r.y) + i * width + head * r.depth;
      for (int64_t k = 0; k < half; ++k) y[k] = turned(x[k], x[k + half], -1.0f, cos[k], sin[k]);
      for (int64_t k = half; k < r.depth; ++k) y[k] = turned(x[k], x[k - half], 1.0f, cos[k], sin[k]);
    }
  }
}

}  // namespace

void rotate(const Rotary& rotary, int64_t begin, int64_t end) {
  if (rotary.dtype == DType::bf16)
    rotate_rows<Bf16>(rotary, begin, end);
  else
    rotate_rows<float>(rotary, begin, end);
}

}  // namespace torchq
