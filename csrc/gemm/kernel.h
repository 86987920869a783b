// What a kernel is. Plain C++17: no torch, no Python, no allocation, no threads.
//
// A kernel is one row of the table in dispatch.cpp: a name, the CPU features it needs, the tile it computes, three
// functions, and what else sets it apart. Its file names what differs from the defaults here; constexpr, so that no
// code built for that CPU runs to make it. All kernels agree bit for bit, integers and floats; `reference` is the
// definition. (Where two different NaNs meet, a weight scale's and a bias's, which of them survives is open, as in IEEE
// 754.)
#pragma once

#include <cstdint>

#include "compiler.h"
#include "cpu.h"
#include "types.h"

namespace torchq {

// How the weights of a panel lie in memory. P16c4: 16 columns x 4 consecutive k; P16c8: 16 columns x 8.
enum class Layout : uint32_t { p16c4 = 1, p16c8 = 2 };
constexpr int layout_depth(Layout layout) { return layout == Layout::p16c8 ? 8 : 4; }

constexpr int64_t kPanelColumns = 16;
constexpr int64_t kPanelMeta = 3 * kPanelColumns * 4;  // [colsum i32 x16][scale f32 x16][bias f32 x16]

// The largest block one run() computes (rows, columns: whole panels), and how many k lie together in a panel.
struct Tile {
  int m, n, k;
};

// The smallest and largest of a row's values and 0; finite is false if the row holds a NaN or an infinity, and then lo
// and hi mean nothing.
struct RowRange {
  float lo, hi;
  bool finite;
};

// One block of y = x · wᵀ, full depth. Codes and panels are what gemm.cpp and pack.cpp prepared.
//
//   acc[r, c] = Σ_k codes[r, k]·w[c, k] - zero_point[r]·colsum[c]                      exact, int32
//   y[r, c]   = act(float(acc[r, c]) * (scale[r] * panel.scale[c]) + panel.bias[c])    float32, each operation rounded
//   out       = y as float32 / bfloat16 / float16 (rounded half to even), or
//               u8: clamp(rne(y * out_inv_scale) + out_zero_point, 0, 255), NaN gives 0, or
//               i32: acc itself
//
// out always has room for `panels` whole panels per row; gemm.cpp redirects the ragged last one.
struct Block {
  int m;                      // rows, 1 .. tile.m or tall.m
  int panels;                 // panels of 16 columns, 1 .. n / 16 of that tile
  int64_t k_groups;           // ceil(K / layout_depth(layout))
  const void* codes;          // row r starts codes_stride * r bytes further; padded to whole groups, or steps
  int64_t codes_stride;       // bytes
  const float* scale;         // [m]
  const int32_t* zero_point;  // [m]
  const uint8_t* panel;       // the first panel
  int64_t panel_stride;       // bytes
  void* out;                  // row r starts out_stride * r bytes further
  int64_t out_stride;         // bytes
  DType out_dtype;
  Activation activation;
  float out_inv_scale;     // u8 out only
  int32_t out_zero_point;  // u8 out only
  Layout layout;           // of the panels. Not above: after panels it makes gcc store pairs that loads then wait for
  int32_t* sums;           // m x kSumColumns, for a kernel that sweeps: room for sums of a part of the depth
};

// Columns of Block::sums.
constexpr int64_t kSumColumns = 32;

struct Kernel;

// A kernel of the same layout and codes, faster for small problems, and the size up to which it is. It also takes
// problems without depth. kernel null: there is none.
struct Few {
  const Kernel* kernel;
  int rows, rows_from_far;  // the latter where the weights do not fit in L2, so that reading them takes the time
  int64_t work;             // or so many multiply-adds
};

struct Kernel {
  const char* name = nullptr;  // as /proc/cpuinfo spells the feature
  uint32_t needs = 0;          // Feature bits
  Layout layout = Layout::p16c4;
  Tile tile = {0, 0, 0};
  int code_bytes = 1;  // one activation code in the scratch: 1 (u8), or 2 (the same code widened to int16)

  // x: k values of dtype f32, bf16 or f16.
  RowRange (*range)(const void* x, DType dtype, int64_t k) = nullptr;
  // codes[i] = clamp(rne(x[i] * inv_scale) + zero_point, 0, 255), NaN gives 0. Writes whole vectors: codes has room
  // for k rounded up to 64.
  // own: scale and zero point are choose_qparams() of x's own range, so that |x * inv_scale| < 256, or all is NaN and
  // the zero point 0; a kernel may then leave out what else needs clamping.
  void (*quantize)(const void* x, DType dtype, int64_t k, float inv_scale, int32_t zero_point, void* codes,
                   bool own) = nullptr;
  void (*run)(const Block& block) = nullptr;

  // What the scratch holds is code - code_shift: 0, or 128 where the multiplier takes signed bytes. Block::zero_point
  // is shifted alike, which changes no sum.
  int32_t code_shift = 0;
  // 1, or 2 where the multiplier takes two rows at once: the codes of rows 2i and 2i + 1 lie in turns of 8 bytes, from
  // where row 2i starts. quantize() writes every other 8 bytes, and tiles start at even rows.
  int rows_together = 1;
  // A tile of more rows and fewer columns, for problems of more rows than tile.m that it holds all of: they read each
  // weight once instead of twice. m = 0: none.
  Tile tall = {0, 0, 0};

  // run() takes any number of rows and panels at once and orders its tiles itself; `tile` is then what parts and blocks
  // of rows are made of.
  bool sweeps = false;
  // Rows go to as many full tiles as there are, and the rest to one, instead of to tiles of nearly equal heights: 10
  // with tile.m 6 to 6 + 4, not 5 + 5.
  bool full_tiles = false;
  // run() takes so many k at once, more than a group: the codes of a row are 0 from K to the next multiple.
  int step = 1;
  Few few = {nullptr, 0, 0, 0};
  int64_t codes_budget = 512 * 1024;  // bytes of quantized rows kept in L2 beside the streaming panels
  // Multiply-adds that pay for waking one more thread, about 5 us; fewer rows than min_rows cost as much as these.
  int64_t part_work = 1 << 20;
  int min_rows = 2;
};

extern const Kernel kernel_reference;
#if defined(__x86_64__)
extern const Kernel kernel_avx2;
extern const Kernel kernel_avx_vnni;
extern const Kernel kernel_avx512vl_vnni;
extern const Kernel kernel_avx512_vnni;
extern const Kernel kernel_amx_int8;
#elif defined(__aarch64__)
extern const Kernel kernel_neon;
extern const Kernel kernel_neon_dotprod;
extern const Kernel kernel_neon_i8mm;
#endif

}  // namespace torchq
