// Square blocks of 1-, 2- or 4-byte elements, transposed in 16-byte vectors, which every x86-64 and Arm CPU has.
#pragma once

#include <cstdint>
#include <cstring>

#include "../gemm/compiler.h"

namespace torchq {
namespace conv {

template <class T>
struct Vector {
  typedef T Type __attribute__((vector_size(16)));
};
template <class T>
using Vec = typename Vector<T>::Type;

// Rows, and columns, of a block.
template <class T>
constexpr int kBlock = 16 / sizeof(T);

#if defined(__clang__)
#define TORCHQ_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define TORCHQ_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, decltype(a){__VA_ARGS__})
#endif

// The elements of the first halves of a and b, or of the second, in turn.
inline Vec<uint8_t> zip_first(Vec<uint8_t> a, Vec<uint8_t> b) {
  return TORCHQ_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
inline Vec<uint8_t> zip_second(Vec<uint8_t> a, Vec<uint8_t> b) {
  return TORCHQ_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
inline Vec<uint16_t> zip_first(Vec<uint16_t> a, Vec<uint16_t> b) {
  return TORCHQ_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
}
inline Vec<uint16_t> zip_second(Vec<uint16_t> a, Vec<uint16_t> b) {
  return TORCHQ_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
}
inline Vec<uint32_t> zip_first(Vec<uint32_t> a, Vec<uint32_t> b) { return TORCHQ_SHUFFLE(a, b, 0, 4, 1, 5); }
inline Vec<uint32_t> zip_second(Vec<uint32_t> a, Vec<uint32_t> b) { return TORCHQ_SHUFFLE(a, b, 2, 6, 3, 7); }

// Row i of the block becomes column i. Each round zips row i with the one half a block further: after as many rounds as
// an index has bits, every bit of the row's index has changed places with one of the column's.
template <class T, int kRounds = kBlock<T>>
TORCHQ_INLINE void transpose_block(Vec<T> (&v)[kBlock<T>]) {
  constexpr int kHalf = kBlock<T> / 2;
  Vec<T> zipped[kBlock<T>];
  TORCHQ_UNROLL
  for (int i = 0; i < kHalf; ++i) {
    zipped[2 * i] = zip_first(v[i], v[i + kHalf]);
    zipped[2 * i + 1] = zip_second(v[i], v[i + kHalf]);
  }
  TORCHQ_UNROLL
  for (int i = 0; i < kBlock<T>; ++i) v[i] = zipped[i];
  if constexpr (kRounds > 2) transpose_block<T, kRounds / 2>(v);
}

}  // namespace conv
}  // namespace torchq
