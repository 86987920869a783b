// Rows of an int8 table -> floats. A row is of a matrix of codes, or of packed weights, where it lies in pieces.

#include <algorithm>
#include <cstring>

#include "gemm.h"
#include "scalar.h"

namespace torchq {
namespace {

constexpr int64_t kBlock = 512;  // codes gathered at once, on the stack; a multiple of every layout's depth

inline void store(float x, float* to) { *to = x; }
inline void store(float x, Bf16* to) { *to = to_bf16(x); }
inline void store(float x, F16* to) { *to = to_f16(x); }

template <class T>
void scaled(const int8_t* codes, float scale, const float* channel_scale, int64_t count, T* y) {
  if (channel_scale)
    for (int64_t i = 0; i < count; ++i) store(static_cast<float>(codes[i]) * scale * channel_scale[i], y + i);
  else
    for (int64_t i = 0; i < count; ++i) store(static_cast<float>(codes[i]) * scale, y + i);
}

template <class T>
void write_row(const Table& table, int64_t row, T* y) {
  if (!table.packed) {
    const uint8_t* codes = table.matrix + row * (table.width + sizeof(float));
    float scale;
    std::memcpy(&scale, codes + table.width, sizeof(scale));
    return scaled(reinterpret_cast<const int8_t*>(codes), scale, nullptr, table.width, y);
  }
  int8_t codes[kBlock];
  const float* channel_scale = channel_scale_of(*table.packed);
  for (int64_t k = 0; k < table.width; k += kBlock) {
    const int64_t count = std::min(kBlock, table.width - k);
    const float scale = unpack_piece(*table.packed, row, k, count, codes);
    scaled(codes, scale, channel_scale ? channel_scale + k : nullptr, count, y + k);
  }
}

}  // namespace

void write_row(const Table& table, int64_t row, DType dtype, void* y) {
  switch (dtype) {
    case DType::bf16: return write_row(table, row, static_cast<Bf16*>(y));
    case DType::f16: return write_row(table, row, static_cast<F16*>(y));
    default: return write_row(table, row, static_cast<float*>(y));
  }
}

}  // namespace torchq
