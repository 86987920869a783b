#include "operands.h"

#include <algorithm>
#include <cstring>
#include <limits>

namespace torchq {
namespace attention {
namespace {

template <class T>
void gather(const uint8_t* x, int64_t stride, int64_t n, T* out) {
  for (int64_t i = 0; i < n; ++i) std::memcpy(out + i, x + i * stride, sizeof(T));
}

// The n elements of a row, side by side: in place, or copied to `out`.
const void* adjacent(const View& view, const void* x, int64_t n, void* out) {
  const int64_t bytes = element_bytes(view.dtype);
  if (view.column == bytes) return x;
  const auto* from = static_cast<const uint8_t*>(x);
  if (bytes == 4)
    gather(from, view.column, n, static_cast<uint32_t*>(out));
  else if (bytes == 2)
    gather(from, view.column, n, static_cast<uint16_t*>(out));
  else
    gather(from, view.column, n, static_cast<uint8_t*>(out));
  return out;
}

}  // namespace

void load_row(const Job& job, const Row& row, int64_t n, float factor, const Scratch& s, float* out, int64_t stride) {
  const void* x = adjacent(row.view, row.view.at(row.batch, row.head, row.row), n, s.gathered);
  job.kernel->to_floats(x, row.view.dtype, n, factor, out, stride);
}

void prefetch_row(const Row& row, int64_t n) {
  const uint8_t* x = row.view.at(row.batch, row.head, row.row);
  const int64_t bytes = n * std::abs(row.view.column);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(x + i, 0, 2);
}

void pack_keys(const Job& job, int64_t batch, int64_t head, const Scratch& s) {
  const Problem& p = *job.problem;
  for (int64_t key = 0; key < p.keys; key += kPanel) {
    const int64_t count = std::min(kPanel, p.keys - key);
    for (int64_t r = 0; r < count; ++r)
      load_row(job, {p.k, batch, head, key + r}, p.depth, 1.0f, s, s.rows + r * s.depth_stride);
    for (int64_t r = count; r < kPanel; ++r) std::fill_n(s.rows + r * s.depth_stride, round_up(p.depth, kPanel), 0.0f);
    job.kernel->transpose(s.rows, s.depth_stride, round_up(p.depth, kPanel), s.keys + key / kPanel * s.key_panel);
  }
}

void pack_values(const Job& job, int64_t batch, int64_t head, const Scratch& s) {
  const Problem& p = *job.problem;
  for (int64_t key = 0; key < p.keys; ++key)
    load_row(job, {p.v, batch, head, key}, p.columns, 1.0f, s, s.values + key * kPanel, s.value_panel);
}

const float* mask_row(const Job& job, int64_t batch, int64_t head, int64_t row, const Scratch& s) {
  const Problem& p = *job.problem;
  const uint8_t* x = p.mask.at(batch, head, row);
  if (*s.mask_in_cache == x) return s.mask;  // heads and rows often share one
  *s.mask_in_cache = x;
  if (p.mask.dtype != DType::u8) {
    job.kernel->to_floats(adjacent(p.mask, x, p.keys, s.gathered), p.mask.dtype, p.keys, 1.0f, s.mask, kPanel);
    return s.mask;
  }
  const auto* sees = static_cast<const uint8_t*>(adjacent(p.mask, x, p.keys, s.gathered));
  for (int64_t j = 0; j < p.keys; ++j) s.mask[j] = sees[j] ? 0.0f : -std::numeric_limits<float>::infinity();
  return s.mask;
}

}  // namespace attention
}  // namespace torchq
