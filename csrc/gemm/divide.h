// Integer arithmetic for dividing work.
#pragma once

#include <cstdint>

namespace torchq {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Where the index-th of count nearly equal pieces of [0, n) starts.
constexpr int64_t piece(int64_t n, int64_t index, int64_t count) { return n * index / count; }

}  // namespace torchq
