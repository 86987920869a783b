// Attention: the core's whole public face. Plain C++17: no torch, no Python, no allocation, no threads.
//
//   y = softmax(scale · q · kᵀ + mask) · v,   for each batch and head
//
// q (L, D), k (S, D), v (S, E), y (L, E). A group of heads of q may share one head of k and v. The caller owns every
// buffer and every thread:
//
//   schedule   how a problem is computed, and in how many parts
//   run        one part; each may run on a thread of its own
#pragma once

#include <cstddef>
#include <cstdint>

#include "../gemm/gemm.h"
#include "kernel.h"

namespace torchq {
namespace attention {

// A tensor (batch, heads, rows, columns) anywhere in memory. Strides are in bytes, and may be 0 or negative.
struct View {
  const void* data;
  DType dtype;
  int64_t batch, head, row, column;

  const uint8_t* at(int64_t b, int64_t h, int64_t r) const {
    return static_cast<const uint8_t*>(data) + b * batch + h * head + r * row;
  }
};

// Which keys a row sees by position: row i sees key j if i + first <= j <= i + last.
struct Band {
  int64_t first, last;
};

// The precision of the two products. Softmax and all sums of floats are in float32.
//
//   f32         exact to rounding
//   bf16        q · scale, k, v and the weights are rounded to bfloat16
//   codes_bf16  q · k in codes, weights · v as in bf16
//   codes       q · k of u8 and s8 codes: a scale and a zero point for each row of q, a scale for each key. Keys are
//               taken less their mean, which moves all scores of a row alike. weights · v of u8 weights, 255 for the
//               largest, and s8 codes: a scale and a middle for each column of v.
//
// Few rows, as in decoding, are computed as in f32 whatever the scheme: it takes less time than packing would.
enum class Scheme : int { f32, bf16, codes_bf16, codes };
constexpr int kSchemes = 4;

// The most keys of which the sums of codes are exact.
constexpr int64_t kMostKeys = kMaxDepth;

struct Problem {
  Scheme scheme;
  int64_t batch, heads, kv_heads;      // heads is a multiple of kv_heads
  int64_t rows, keys, depth, columns;  // L, S, D, E
  View q, k, v;                        // f32 / bf16 / f16
  View mask;  // (batch, heads, rows, keys); u8: 0 hides a key. Floats are added. data null: none
  Band band;
  float scale;
  void* y;  // (batch, heads, rows, columns) of dtype y_dtype. Columns are adjacent; the other strides are in bytes
  DType y_dtype;
  int64_t y_batch, y_head, y_row;
};

struct KeyProduct;  // products.h
struct ValueProduct;

// How a problem is computed. schedule() derives it once; every part reads it.
struct Job {
  const Problem* problem;
  const Kernel* kernel;
  const torchq::Kernel* gemm;  // for the products of codes
  const KeyProduct* key_product;
  const ValueProduct* value_product;
  int64_t tiles;       // of rows, of each head
  int64_t blocks;      // of tiles
  int64_t block_rows;  // of the largest
  int parts;           // 1, or as many as there are threads that pay. The caller may lower it.
  size_t scratch_bytes;
};

// The problem must outlive the job. It has no empty output: batch, heads, rows and columns are positive.
Job schedule(const Kernel& kernel, const torchq::Kernel& gemm, const Problem& problem);

// Computes the index-th of job.parts parts. scratch: job.scratch_bytes, which parts running at the same time must not
// share.
void run(const Job& job, int index, void* scratch);

// ---- Dispatch (dispatch.cpp) ------------------------------------------------------------------------------------

// The kernels compiled in, best first.
int kernel_count();
const Kernel& kernel_at(int index);
bool can_run(const Kernel& kernel);
// The kernel to use where this one multiplies codes: the best that needs no vectors which that one does without.
const Kernel& kernel_beside(const torchq::Kernel& gemm);

}  // namespace attention
}  // namespace torchq
