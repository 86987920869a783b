// What an attention kernel is. Plain C++17: no torch, no Python, no allocation, no threads.
//
// A kernel is one row of the table in dispatch.cpp: a name, the CPU features it needs, and the five steps that are
// worth vector instructions, and those of codes. Loops over heads and rows, and all that a mask means, are the same for
// all (attention.cpp). Kernels agree to rounding; `reference` is the definition.
#pragma once

#include <cstdint>

#include "../gemm/compiler.h"
#include "../gemm/cpu.h"
#include "../gemm/types.h"

namespace torchq {

struct Kernel;  // of the products of codes: ../gemm/kernel.h

namespace attention {

// Keys of a panel of k, and columns of a panel of v.
constexpr int64_t kPanel = 16;

// out (m, 16 · panels) = a (m, depth) · b. b is packed: panel p starts panel_stride · p further, and holds
// (depth, 16). Strides count floats. m, panels and depth may be any numbers, also 0.
struct Product {
  int64_t m, panels, depth;
  const float* a;
  int64_t a_stride;
  const float* b;
  int64_t panel_stride;
  float* out;
  int64_t out_stride;
};

// Of each column: the least and the greatest value so far, and 0, or NaN if one was not finite.
struct Ranges {
  float *lo, *hi, *zero;
};

// How the rows of a head are cut into blocks, which pass over the keys together: whole tiles of up to so many rows.
struct Blocking {
  int64_t tile_rows = 6;  // 1 where products divide any number of rows evenly by themselves
  int64_t least_tiles = 1, most_tiles = 11;
  int64_t most_tiles_of_band = 2;  // where rows see different keys: fewer rows, fewer keys that only some see
};

// Rows of scores, `stride` floats apart, of n each: a multiple of 16.
struct Scores {
  float* x;
  int64_t rows, stride, n;
};

struct Kernel {
  const char* name = nullptr;
  uint32_t needs = 0;  // Feature bits
  // The features of its vectors, any of which a GEMM kernel must need for this one to run beside it; 0: beside any.
  uint32_t beside = 0;
  Blocking blocking = {};
  // For fewer keys the scheme bf16 takes no more time than codes, and it is more exact.
  int64_t codes_pay_from = 0;

  // x[i] · factor for i < n, then zeros up to the next multiple of 16. Each 16 start `stride` floats after the last:
  // 16 for a row, the distance of panels for a row across panels.
  void (*to_floats)(const void* x, DType dtype, int64_t n, float factor, float* out, int64_t stride) = nullptr;
  // y[i] = x[i] · factor for i < n, rounded half to even.
  void (*from_floats)(const float* x, float factor, int64_t n, DType dtype, void* y) = nullptr;
  // 16 rows of n floats, `stride` floats apart, to n rows of 16. n is a multiple of 16.
  void (*transpose)(const float* x, int64_t stride, int64_t n, float* out) = nullptr;
  void (*multiply)(const Product& product) = nullptr;
  // Of up to kPanel rows: the largest of each, and of -FLT_MAX. NaN is not seen.
  void (*largest)(const Scores& scores, float* largest) = nullptr;
  // The same of a row x + mask, which x becomes. n is a multiple of 16, as everywhere below.
  float (*largest_masked)(float* x, const float* mask, int64_t n) = nullptr;
  // x[i] becomes exp(x[i] - largest); returns their sum: 0 where all are -inf, NaN where one is NaN or +inf.
  float (*weigh)(float* x, int64_t n, float largest) = nullptr;

  // For few rows. out[r] = q · x[r] for 16 rows x, `stride` floats apart.
  void (*dot_rows)(const float* q, const float* x, int64_t stride, int64_t n, float* out) = nullptr;
  // out[i] += Σ_r weights[r] · x[r][i].
  void (*add_weighted)(const float* weights, const float* x, int64_t stride, int64_t rows, int64_t n,
                       float* out) = nullptr;

  // For products of bfloat16, two in one float, the first lower; null where the CPU has no instruction for them.
  void (*multiply_halves)(const Product& product) = nullptr;
  // n / 2 floats of two halves each; x and out may be the same.
  void (*to_halves)(const float* x, int64_t n, float* out) = nullptr;
  // weigh() and to_halves() in one pass: n / 2 floats at x become the weights.
  float (*weigh_halves)(float* x, int64_t n, float largest) = nullptr;
  // Two rows of x, `stride` floats apart, to one of halves across panels of 16 columns, panel_stride floats apart.
  void (*join_halves)(const float* x, int64_t stride, int64_t n, float* out, int64_t panel_stride) = nullptr;

  // For the products of codes (codes.inc says more). All kernels give the same bits.
  void (*weigh_codes)(const Scores& scores, const float* largest, uint8_t* codes, int64_t code_stride,
                      float* sums) = nullptr;
  void (*quantize_keys)(const float* x, int64_t stride, const float* mean, int64_t n, uint8_t* groups, float* scale,
                        int32_t* sum) = nullptr;
  void (*quantize_values)(const float* x, int64_t stride, int64_t n, const float* middle, const float* inv_scale,
                          uint8_t* panel, int64_t panel_stride, int32_t* sums) = nullptr;
  void (*add_rows)(const float* x, int64_t stride, int64_t rows, int64_t n, float* sum) = nullptr;
  void (*extend_ranges)(const float* x, int64_t stride, int64_t rows, int64_t n, const Ranges& to) = nullptr;
};

extern const Kernel kernel_reference;
#if defined(__x86_64__)
extern const Kernel kernel_avx2;
extern const Kernel kernel_avx512;
extern const Kernel kernel_avx512_bf16;
extern const Kernel kernel_amx_bf16;
#elif defined(__aarch64__)
extern const Kernel kernel_neon;
#endif

}  // namespace attention
}  // namespace torchq
