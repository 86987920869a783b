#include "outputs.h"

#include <algorithm>
#include <cstring>

#include "transpose.h"

namespace torchq {
namespace conv {
namespace {

// A matrix in memory: rows `stride` elements apart.
template <class T>
struct Matrix {
  T* data;
  int64_t stride;
};

// A tile of whole blocks is kTileRows rows of one cache line, so that what is read for a block is still there for the
// next one beside it.
constexpr int64_t kTileRows = 32, kTileBytes = 64;

template <class T>
void transpose_tile(int64_t rows, int64_t columns, const Matrix<const T>& from, const Matrix<T>& to) {
  constexpr int64_t kSide = kBlock<T>;
  for (int64_t c = 0; c < columns; c += kSide)
    for (int64_t r = 0; r < rows; r += kSide) {
      Vec<T> v[kSide];
      TORCHQ_UNROLL
      for (int i = 0; i < kSide; ++i) std::memcpy(&v[i], from.data + (r + i) * from.stride + c, sizeof(v[i]));
      transpose_block<T>(v);
      TORCHQ_UNROLL
      for (int i = 0; i < kSide; ++i) std::memcpy(to.data + (c + i) * to.stride + r, &v[i], sizeof(v[i]));
    }
}

// to (columns, rows) = from (rows, columns), transposed.
template <class T>
void transpose(int64_t rows, int64_t columns, const Matrix<const T>& from, const Matrix<T>& to) {
  constexpr int64_t kSide = kBlock<T>, kTileColumns = kTileBytes / sizeof(T);
  const int64_t whole_rows = rows / kSide * kSide, whole_columns = columns / kSide * kSide;
  for (int64_t r = 0; r < whole_rows; r += kTileRows)
    for (int64_t c = 0; c < whole_columns; c += kTileColumns)
      transpose_tile<T>(std::min(kTileRows, whole_rows - r), std::min(kTileColumns, whole_columns - c),
                        {from.data + r * from.stride + c, from.stride}, {to.data + c * to.stride + r, to.stride});
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t r = c < whole_columns ? whole_rows : 0; r < rows; ++r)
      to.data[c * to.stride + r] = from.data[r * from.stride + c];
}

// Where a block lies in y, or in a residual.
template <class T>
Matrix<T> place_of(const Geometry& g, const Outputs& o, bool channels_last, void* all) {
  const int64_t pixels = g.out_pixels();
  const int64_t pixel_step = channels_last ? g.out_channels : 1, channel_step = channels_last ? 1 : pixels;
  T* data = static_cast<T*>(all) + o.sample * pixels * g.out_channels + o.pixel * pixel_step + o.channel * channel_step;
  return {data, channels_last ? pixel_step : channel_step};
}

template <class T>
void copy(int64_t rows, int64_t columns, const Matrix<const T>& from, const Matrix<T>& to) {
  for (int64_t r = 0; r < rows; ++r)
    std::memcpy(to.data + r * to.stride, from.data + r * from.stride, columns * sizeof(T));
}

template <class T>
void write_as(const Problem& p, const Outputs& o, const void* waiting) {
  const Matrix<const T> from{static_cast<const T*>(waiting), o.stride};
  const bool last = p.y.channels_last;
  (last ? copy<T> : transpose<T>)(o.count, o.channels, from, place_of<T>(p.geometry, o, last, p.y.data));
}

template <class T>
void read_as(const Problem& p, const Outputs& o, void* waiting) {
  const Matrix<T> from = place_of<T>(p.geometry, o, p.residual_last, const_cast<void*>(p.residual.data));
  const Matrix<T> to{static_cast<T*>(waiting), o.stride};
  if (p.residual_last) return copy<T>(o.count, o.channels, {from.data, from.stride}, to);
  transpose<T>(o.channels, o.count, {from.data, from.stride}, to);
}

}  // namespace

void write_outputs(const Problem& p, const Outputs& o, const void* waiting) {
  switch (element_bytes(p.y.dtype)) {
    case 4: return write_as<uint32_t>(p, o, waiting);
    case 2: return write_as<uint16_t>(p, o, waiting);
    default: return write_as<uint8_t>(p, o, waiting);
  }
}

Residual residual_of(const Problem& p, const Outputs& o, void* waiting) {
  if (!p.residual.data) return {};
  switch (element_bytes(p.residual.dtype)) {
    case 4: read_as<uint32_t>(p, o, waiting); break;
    case 2: read_as<uint16_t>(p, o, waiting); break;
    default: read_as<uint8_t>(p, o, waiting);
  }
  Residual residual = p.residual;
  residual.data = waiting;
  return residual.from(0, o.stride);
}

}  // namespace conv
}  // namespace torchq
