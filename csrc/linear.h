// The call of a linear layer as a Problem. The torch ops and the direct calls may differ in what they accept, but not
// in what they compute: both fill their Problem here.
#pragma once

#include "gemm/gemm.h"

namespace torchq {

// The numbers of a layer: what linear_dynamic and linear_static take beside their tensors. For gemm the defaults.
struct LayerNumbers {
  bool per_token = false;          // dynamic: each row of the input gets its own scale and zero point
  QParams x{1.0f, 0}, y{1.0f, 0};  // of a static input, and of u8 output
  Activation activation = Activation::none;
};

// What each number may be. NaN is no scale.
constexpr bool is_scale(double scale) { return scale >= kMinScale && scale <= kMaxScale; }
constexpr bool is_zero_point(int64_t zero_point) { return zero_point >= 0 && zero_point <= 255; }
constexpr bool is_activation(int64_t number) { return number >= 0 && number < kActivations; }

// Rows in memory, stride elements apart.
struct Rows {
  const void* data;
  int64_t count, stride;
  DType dtype;
};

// y: room for (x.count, weights.n) elements of y_dtype.
inline Problem linear_problem(const LayerNumbers& layer, const Rows& x, const PackedHeader& weights, void* y,
                              DType y_dtype) {
  const Input input{x.data, x.stride * element_bytes(x.dtype), x.dtype, layer.per_token, layer.x};
  const Output output{y, weights.n * element_bytes(y_dtype), y_dtype, layer.y};
  return {x.count, input, &weights, output, layer.activation};
}

}  // namespace torchq
