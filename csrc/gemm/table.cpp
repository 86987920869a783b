// Rows of a table -> floats. In int8 a row is of a matrix of codes, or of packed weights, where it lies in pieces.
//
// The loops are simple ones, which compilers vectorize for every CPU; the sum of a code and its residual is exact.

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

// y[i] = n[i] * unit * scale, where unit is a power of two, times the channel scale, if any.
template <class Integer, class T>
void scaled(const Integer* n, float unit, float scale, const float* channel_scale, int64_t count, T* y) {
  if (channel_scale)
    for (int64_t i = 0; i < count; ++i) store(static_cast<float>(n[i]) * unit * scale * channel_scale[i], y + i);
  else
    for (int64_t i = 0; i < count; ++i) store(static_cast<float>(n[i]) * unit * scale, y + i);
}

// Codes and their residuals, two in a byte, in sixteenths of a step: 16 * code + residual. n has room for one more.
void add_residuals(const int8_t* codes, const uint8_t* residuals, int64_t count, int16_t* n) {
  for (int64_t i = 0; i < (count + 1) / 2; ++i) {
    n[2 * i] = static_cast<int16_t>(((residuals[i] & 15) ^ 8) - 8);
    n[2 * i + 1] = static_cast<int16_t>(((residuals[i] >> 4) ^ 8) - 8);
  }
  for (int64_t i = 0; i < count; ++i) n[i] = static_cast<int16_t>(n[i] + codes[i] * 16);
}

template <class T>
void write_row(const Table& table, int64_t row, T* y) {
  int8_t gathered[kBlock];
  int16_t sixteenths[kBlock];
  const float* channel_scale = table.packed ? channel_scale_of(*table.packed) : nullptr;
  const uint8_t* matrix = table.packed ? nullptr : table.matrix + row * (table.width + sizeof(float));
  const uint8_t* residuals = table.residuals ? table.residuals + row * ((table.width + 1) / 2) : nullptr;
  float scale = 0;
  if (matrix) std::memcpy(&scale, matrix + table.width, sizeof(scale));
  for (int64_t k = 0; k < table.width; k += kBlock) {
    const int64_t count = std::min(kBlock, table.width - k);
    if (table.packed) scale = unpack_piece(*table.packed, row, k, count, gathered);
    const int8_t* codes = matrix ? reinterpret_cast<const int8_t*>(matrix + k) : gathered;
    const float* channels = channel_scale ? channel_scale + k : nullptr;
    if (!residuals) {
      scaled(codes, 1.0f, scale, channels, count, y + k);
      continue;
    }
    add_residuals(codes, residuals + k / 2, count, sixteenths);
    scaled(sixteenths, 0.0625f, scale, channels, count, y + k);
  }
}

void write_row(const Table& table, int64_t row, DType dtype, void* y) {
  switch (dtype) {
    case DType::bf16: return write_row(table, row, static_cast<Bf16*>(y));
    case DType::f16: return write_row(table, row, static_cast<F16*>(y));
    default: return write_row(table, row, static_cast<float*>(y));
  }
}

// Rows of a table lie anywhere in it, and most come from memory: so many are on their way at once.
constexpr int64_t kRowsAhead = 4;

void prefetch(const uint8_t* begin, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(begin + i);
  __builtin_prefetch(begin + bytes - 1);  // the line that the last bytes may reach into
}

// Asks for a row that is written soon. Rows of packed weights are long enough that the hardware follows them.
void prefetch_row(const Table& table, int64_t row) {
  const int64_t bytes = table.width + sizeof(float), residual_bytes = (table.width + 1) / 2;
  if (table.matrix) prefetch(table.matrix + row * bytes, bytes);
  if (table.residuals) prefetch(table.residuals + row * residual_bytes, residual_bytes);
  if (table.floats) prefetch(reinterpret_cast<const uint8_t*>(table.floats + row * table.width), table.width * 4);
}

// Calls write(i) for i in [begin, end). It is called with the rows of `count` tables on their way.
template <class Write>
void with_prefetch(const TableRows* terms, int count, int64_t begin, int64_t end, const Write& write) {
  const auto prefetch = [&](int64_t i) {
    for (int t = 0; i < end && t < count; ++t) prefetch_row(terms[t].table, terms[t].rows[i]);
  };
  for (int64_t i = begin; i < begin + kRowsAhead; ++i) prefetch(i);
  for (int64_t i = begin; i < end; ++i) {
    prefetch(i + kRowsAhead);
    write(i);
  }
}

// A row of a table as floats: where it lies, or written into `room`.
const float* row_of(const Table& table, int64_t row, float* room) {
  if (table.floats) return table.floats + row * table.width;
  write_row(table, row, room);
  return room;
}

constexpr int64_t kRowsNormalized = 8;  // at once: they are in L1 still

}  // namespace

void write_rows(const Table& table, const int64_t* rows, int64_t begin, int64_t end, DType dtype, void* y) {
  const TableRows one{table, rows};
  const int64_t row_bytes = table.width * element_bytes(dtype);
  with_prefetch(&one, 1, begin, end,
                [&](int64_t i) { write_row(table, rows[i], dtype, static_cast<uint8_t*>(y) + i * row_bytes); });
}

void write_sums(const Kernel& kernel, const TableSum& sum, int64_t begin, int64_t end, float* room) {
  const int64_t width = sum.terms[0].table.width;
  int64_t first = begin;  // of the rows that are not normalized yet
  with_prefetch(sum.terms, sum.count, begin, end, [&](int64_t i) {
    float* y = sum.y + i * width;
    const float* row = row_of(sum.terms[0].table, sum.terms[0].rows[i], y);
    if (row != y) std::copy_n(row, width, y);
    for (int t = 1; t < sum.count; ++t) {
      const float* added = row_of(sum.terms[t].table, sum.terms[t].rows[i], room);
      for (int64_t k = 0; k < width; ++k) y[k] += added[k];
    }
    if (!sum.norm || (i + 1 - first < kRowsNormalized && i + 1 < end)) return;
    normalize(kernel, sum.norm->part(first, i + 1));
    first = i + 1;
  });
}

}  // namespace torchq
