// What a kernel is. Plain C++17: no torch, no Python, no allocation, no threads.
//
// A kernel is one row of the table in dispatch.cpp: a name, the CPU features it needs, three functions, and how it
// differs from the defaults below. A kernel's row is constexpr, so that no code compiled for its CPU runs to build it.
//
// All kernels give the same bits, integers and floats; `reference` is the definition. One thing is open, as it is in
// IEEE 754: where two different NaNs meet, say a weight's scale and a bias, or x and |x| in GELU, either may survive.
#pragma once

#include <cstdint>

#include "compiler.h"
#include "cpu.h"
#include "types.h"

namespace torchq {

// ---- Weights ----------------------------------------------------------------------------------------------------

// How the weights of a panel lie in memory. P16c4: 16 columns x 4 consecutive k; P16c8: 16 columns x 8.
enum class Layout : uint32_t { p16c4 = 1, p16c8 = 2 };
constexpr int layout_depth(Layout layout) { return layout == Layout::p16c8 ? 8 : 4; }

constexpr int64_t kPanelColumns = 16;
constexpr int64_t kPanelMeta = 3 * kPanelColumns * 4;  // [colsum i32 x16][scale f32 x16][bias f32 x16]

// ---- What a kernel's functions take and give --------------------------------------------------------------------

// A row of the input as a kernel quantizes it: k values of dtype f32, bf16 or f16. With a channel scale [k] they are
// float(x[i]) * channel_scale[i], rounded once, in float32; with null they are x[i].
struct FloatRow {
  const void* x;
  DType dtype;
  int64_t k;
  const float* channel_scale;
};

// The smallest and the largest of a row's values and 0. If the row holds a NaN or an infinity, finite is false, and lo
// and hi mean nothing.
struct RowRange {
  float lo, hi;
  bool finite;
};

// Rows of floats, `stride` bytes apart, and where their codes go, code_stride apart, with the scale and the zero point
// of each.
struct OwnRows {
  FloatRow first;
  int64_t count, stride;  // up to kRowsTogether
  uint8_t* codes;
  int64_t code_stride;
  float* scale;
  int32_t* zero_point;
};
constexpr int64_t kRowsTogether = 16;

// What is added to outputs before the activation: rows of values, one for each output.
struct Residual {
  const void* data = nullptr;  // null for nothing
  int64_t stride = 0;          // bytes between rows; 0 for nothing, too
  DType dtype = DType::f32;    // f32, bf16 or f16; or u8: float(code - zero_point) * scale
  float scale = 1.0f;
  int32_t zero_point = 0;

  // So many values behind the first, or null.
  const void* at(int64_t value) const {
    return data ? static_cast<const uint8_t*>(data) + value * element_bytes(dtype) : nullptr;
  }
  // From there on, with rows of so many values.
  Residual from(int64_t value, int64_t row) const {
    return {at(value), data ? row * element_bytes(dtype) : 0, dtype, scale, zero_point};
  }
};

// One block of y = x · wᵀ, full depth. Codes and panels are what codes.cpp and pack.cpp prepared.
//
//   acc[r, c] = Σ_k codes[r, k]·w[c, k] - zero_point[r]·colsum[c]                      exact, int32
//   y[r, c]   = act(float(acc[r, c]) * (scale[r] * panel.scale[c]) + panel.bias[c])    float32, each operation rounded;
//               with a residual act(... + residual[r, c])
//   out       = y as float32 / bfloat16 / float16 (rounded half to even), or
//               u8: clamp(rne(y * out_inv_scale) + out_zero_point, 0, 255), NaN gives 0, or
//               i32: acc itself
//
// out always has room for `panels` whole panels per row; gemm.cpp redirects a panel that y only partly fills.
struct Block {
  int m;                      // rows: 1 to the m of the tile shape in use; with own_loops any number
  int panels;                 // panels of 16 columns: 1 to n / 16 of that tile shape; with own_loops any number
  int64_t k_groups;           // ceil(K / layout_depth(layout))
  const void* codes;          // row r starts codes_stride * r bytes further, and is padded to whole groups
  int64_t codes_stride;       // bytes
  const float* scale;         // [m]
  const int32_t* zero_point;  // [m]
  const uint8_t* panel;       // the first panel
  int64_t panel_stride;       // bytes
  const uint8_t* next;        // weights to bring into L2 meanwhile, Tiling::next_lines with each group; or null
  void* out;                  // row r starts out_stride * r bytes further
  int64_t out_stride;         // bytes
  DType out_dtype;
  Activation activation;
  float out_inv_scale;     // u8 out only
  int32_t out_zero_point;  // u8 out only
  Layout layout;           // of the panels. It must not follow `panels`: g++ would store both at once and load them
                           // one by one, and the CPU cannot forward such a store
  Residual residual;       // its rows are those of out, padded to whole panels, too
  int32_t* sums;           // with own_loops: of a part of the depth, kSumColumns of each row of whole tiles (tile.m)
};

// Columns of Block::sums.
constexpr int64_t kSumColumns = 32;

// One row of a recurrent layer at one step.
struct CellRow {
  int64_t size;            // hidden values
  const float* input;      // the products with x, [gates x size], each gate after the other
  const float* recurrent;  // the products with h, likewise
  float* c;                // the state of an LSTM [size], old and then new. Of other cells it is only copied
  float* h;                // the hidden values [size], old and then new
};

// Runs of bytes, counts[0] x counts[1] x counts[2] of them, steps[] apart.
struct Runs {
  int64_t bytes;
  int64_t counts[3], steps[3];
};

// Rows of codes from an image: row r has the runs from image + r * step on, and zeros behind them.
struct Gather {
  const uint8_t* image;
  int64_t count, step;
  Runs runs;
  uint8_t* rows;
  int64_t row_stride;
};

// So many bytes behind each run are read, and so many behind each row overwritten: those of the last with zeros.
constexpr int64_t kGatherBeyond = 64;

// Some pixels of a depthwise convolution, for 16 channels.
//
//   sum[p, c] = Σ_t image[p * step + offsets[t] + c] · weights[t * 16 + c]        tap by tap, by fma; exact of codes
//   y[p, c]   = act(sum[p, c] * (scale * panel.scale[c]) + panel.bias[c])         as a Block's, residual and all
//
// Image and weights are floats: codes as Kernel::widen() gives them, or values of x. Or, where a kernel has
// interleave(), each is four codes of a lane's channel, for four taps at once, and the sum is less zero_point *
// panel.colsum[c].
struct Depthwise {
  const int32_t* image;
  int64_t taps;  // or fours of them
  const int64_t* offsets;
  int64_t pixels, step;
  const int32_t* weights;
  const uint8_t* panel;
  float scale;  // of the input
  int32_t zero_point;
  void* out;
  int64_t out_stride;  // bytes between pixels; each has room for 16 channels
  Residual residual;   // a row for each pixel
  DType out_dtype;     // not i32
  Activation activation;
  float out_inv_scale;     // u8 out only
  int32_t out_zero_point;  // u8 out only
};

// The most taps whose sums float32 holds: 255 * 128 * 514 < 2^24.
constexpr int64_t kMaxTaps = 514;

// Rows of a LayerNorm or an RMSNorm (normalize.inc), side by side. weight [n]; bias [n] or null.
struct NormRows {
  int64_t count, n;
  const float *x, *weight, *bias;
  float eps;
  float* y;                         // x, or apart from it
  const float* residual = nullptr;  // if given, it is added to x first
  bool centered = true;             // false: an RMSNorm, whose mean counts as 0
  float gain = 0.0f;                // added to each weight, unless it is 0
  float* sum = nullptr;  // where x + residual is kept: x, or apart from it; y holds it meanwhile if not given

  // Rows [begin, end) of these.
  NormRows part(int64_t begin, int64_t end) const {
    const int64_t at = begin * n;
    NormRows rows = *this;
    rows.count = end - begin, rows.x = x + at, rows.y = y + at;
    rows.residual = residual ? residual + at : nullptr, rows.sum = sum ? sum + at : nullptr;
    return rows;
  }
};

// ---- What sets a kernel apart, by concept -----------------------------------------------------------------------

// How the codes of a row lie in the scratch.
struct CodeFormat {
  // Bytes of one code: 1 (u8), or 2 (the same code widened to int16).
  int bytes = 1;
  // The scratch holds code - shift. 128 where the multiplier takes signed bytes, else 0. Block::zero_point is shifted
  // by the same amount, so no sum changes.
  int32_t shift = 0;
  // 2 where the multiplier takes two rows at once, else 1. Rows 2i and 2i + 1 then alternate every 8 bytes, from where
  // row 2i starts: quantize() writes 8 bytes and skips 8. Tiles start at even rows.
  int interleaved_rows = 1;
  // run() reads this many k at once. From K to the next multiple of it the codes of a row are 0.
  int depth_multiple = 1;
};

// The largest block that one run() computes: rows, columns (whole panels), and how many k lie together in a panel.
struct TileShape {
  int m, n, k;
};

// How a problem is cut into tiles.
struct Tiling {
  TileShape tile = {0, 0, 0};
  // A shape of more rows and fewer columns, or m = 0 for none. It is used for problems of more than tile.m rows and at
  // most tall.m, because one tile of all rows reads each weight once, where two tiles would read it twice.
  // Attention uses it wherever a product has no more columns, whatever its rows: the fewer tiles, the fewer epilogues.
  TileShape tall = {0, 0, 0};
  // How rows are divided. False: into tiles of nearly equal heights (10 rows with tile.m = 6 are 5 + 5). True: into as
  // many full tiles as there are, and one tile for the rest (6 + 4).
  bool full_tiles = false;
  // run() takes any number of rows and panels, and has its own loops over tiles. `tile` is then the unit by which
  // problems are divided into parts and blocks.
  bool own_loops = false;
  // With each group of k, run() brings this many cache lines of the panels behind its own into L2. In a model's forward
  // all weights come from memory, and this way reading them overlaps with the products (docs/performance-zen4.md).
  int next_lines = 0;
  // The most bytes of codes quantized at once. They stay in L2 while the panels stream past them.
  int64_t codes_budget = 512 * 1024;
};

struct Kernel;

// Which problems another kernel computes faster. It must read the same layout of weights. A problem goes there if any
// of these limits holds, or if it has no depth. kernel = null: none.
struct SmallProblems {
  const Kernel* kernel = nullptr;
  int max_rows = 0;
  int max_rows_beyond_l2 = 0;  // where the weights do not fit in L2, so that reading them takes most of the time
  int64_t max_work = 0;        // multiply-adds
};

// When another thread pays, and what it gets.
struct Threading {
  // Multiply-adds that justify waking one more thread, which takes about 5 us. Fewer rows than min_rows take as long
  // as min_rows, and count as these.
  int64_t work_per_thread = 1 << 20;
  int min_rows = 2;
  // Up to this many rows, a thread gets a range of columns and quantizes all rows for itself. Beyond, it gets a range
  // of rows.
  int max_rows_by_columns = 32;
  int max_rows_by_columns_beyond_l2 = 32;  // where the weights do not fit in L2
};

struct Kernel {
  const char* name = nullptr;  // as /proc/cpuinfo spells the feature
  uint32_t needs = 0;          // Feature bits
  Layout layout = Layout::p16c4;

  // The range of the row's values.
  RowRange (*range)(const FloatRow& row) = nullptr;
  // codes[i] = clamp(rne(value[i] * inv_scale) + zero_point, 0, 255); NaN gives 0. Writes whole vectors: codes has room
  // for k rounded up to 64.
  // own: the caller promises that scale and zero point are choose_qparams() of this row's range. Then either
  // |value * inv_scale| < 256, or all products are NaN and the zero point is 0, and a kernel may clamp less.
  void (*quantize)(const FloatRow& row, float inv_scale, int32_t zero_point, void* codes, bool own) = nullptr;
  // range(), choose_qparams() and quantize() of several rows (rows_together.inc); null: they are taken one by one. Only
  // where CodeFormat has no shift and no interleaved rows.
  void (*quantize_own)(const OwnRows& rows) = nullptr;
  void (*run)(const Block& block) = nullptr;
  // y[i] = act(x[i]) for count values of dtype f32, bf16 or f16: computed in float32, as run() does. y may be x.
  void (*activate)(Activation activation, DType dtype, const void* x, void* y, int64_t count) = nullptr;
  void (*gather)(const Gather& gather) = nullptr;
  // Either of these two: what an image is made into for depthwise().
  // out[p * 16 + c] = float((code ^ flip) - zero_point) for the 16 codes, in this kernel's bytes, at each of some
  // pixels that lie stride bytes apart.
  void (*widen)(const void* codes, int64_t pixels, int64_t stride, uint8_t flip, int32_t zero_point,
                float* out) = nullptr;
  // out[p * 16 + c] = the codes lines[0 .. 3][p * stride + c], the first in the lowest byte.
  void (*interleave)(const uint8_t* const (&lines)[4], int64_t pixels, int64_t stride, int32_t* out) = nullptr;
  void (*depthwise)(const Depthwise& depthwise) = nullptr;
  // A step of a recurrent cell.
  void (*cell)(Cell cell, const CellRow& row) = nullptr;
  void (*normalize)(const NormRows& rows) = nullptr;

  CodeFormat codes = {};
  Tiling tiling = {};
  SmallProblems small = {};
  Threading threading = {};
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
