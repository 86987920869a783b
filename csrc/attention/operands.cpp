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

FloatRows load_rows(const Job& job, const Row& first, int64_t count, int64_t n, const Scratch& s) {
  const View& view = first.view;
  const auto* x = view.at(first.batch, first.head, first.row);
  const bool in_place = view.dtype == DType::f32 && view.column == 4 && n % kPanel == 0 && count == kPanel;
  if (in_place) return {reinterpret_cast<const float*>(x), view.row / 4};
  const int64_t stride = odd_lines(n);
  for (int64_t r = 0; r < count; ++r)
    load_row(job, {view, first.batch, first.head, first.row + r}, n, 1.0f, s, s.rows + r * stride);
  std::fill(s.rows + count * stride, s.rows + kPanel * stride, 0.0f);
  return {s.rows, stride};
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
  std::fill(s.mask + p.keys, s.mask + round_up(p.keys, kPanel), 0.0f);
  return s.mask;
}

}  // namespace attention
}  // namespace torchq
