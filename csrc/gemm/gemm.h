// The int8 GEMM core: its whole public face. Plain C++17: no torch, no Python, no allocation, no threads.
//
//   y = act(dequantize(codes(x) · wᵀ) + bias)
//
// x (M, K) is quantized row by row to u8 codes in the caller's scratch. w (N, K) int8 is packed once, into panels.
// Products are exact in int32. The caller owns every buffer and every thread:
//
//   pack_begin, pack_panels    weights -> packed
//   schedule                   how a problem is computed, and in how many parts
//   run                        one part; each may run on a thread of its own
#pragma once

#include <cfloat>
#include <cstddef>
#include <cstdint>

#include "kernel.h"

namespace torchq {

// The deepest sum of u8 x int8 products that int32 holds: 255 * 128 * K < 2^31.
constexpr int64_t kMaxDepth = 65793;

// ---- Packed weights (pack.cpp) ----------------------------------------------------------------------------------
//
//   [header, 64 bytes][panel 0][panel 1]...[padding][channel scale][N encoding]
//
// A panel is 16 columns: [colsum i32 x16][scale f32 x16][bias f32 x16][weights]. In layout P16c4 the weights are groups
// of 4 k, each 16 columns x 4 bytes; in P16c8 groups of 8 k, each 16 columns x 8 bytes. In either layout K is padded
// with zeros to a multiple of 8, so that the length does not depend on the kernel that the weights are packed for.
//
// A kernel that takes 64 k at once reads past the end of a panel, into the next one or into the padding behind the last
// one. What it reads there does not matter, for the codes beyond K are 0.
//
// The channel scale, which weights may have or not, is a float for each input channel k, padded with zeros to whole
// cache lines. Every row of the input is multiplied by it before it is quantized.
//
// The N encoding is 16 * panels - N unused bytes. Once K is known, the length of the buffer tells N and whether there
// is a channel scale, so shapes can be inferred without reading the data: a panel is longer than both of these
// together.

struct PackedHeader {
  uint32_t magic;
  Layout layout;
  int64_t n, k;
  uint32_t has_bias, has_channel_scale;
  uint8_t unused[32];
};
static_assert(sizeof(PackedHeader) == 64);

constexpr int64_t panel_count(int64_t n) { return (n + kPanelColumns - 1) / kPanelColumns; }
constexpr int64_t panel_bytes(int64_t k) { return kPanelMeta + (k + 7) / 8 * 8 * kPanelColumns; }
constexpr int64_t padding_bytes(int64_t k) { return ((k + 63) / 64 * 64 - (k + 7) / 8 * 8) * kPanelColumns; }
constexpr int64_t channel_scale_bytes(int64_t k) { return (k * 4 + 63) / 64 * 64; }
constexpr int64_t packed_bytes(int64_t n, int64_t k, bool has_channel_scale) {
  return sizeof(PackedHeader) + panel_count(n) * panel_bytes(k) + padding_bytes(k) +
         (has_channel_scale ? channel_scale_bytes(k) : 0) + (panel_count(n) * kPanelColumns - n);
}

// The header of a buffer, or null if pack_begin() did not write these bytes.
const PackedHeader* packed_header(const void* packed, int64_t bytes);

// channel_scale [K], or null for none.
void pack_begin(Layout layout, int64_t n, int64_t k, bool has_bias, const float* channel_scale, void* packed);
// Panels [begin, end). weight (N, K) int8 row-major; scale [N]; bias [N] or null.
void pack_panels(const int8_t* weight, const float* scale, const float* bias, void* packed, int64_t begin, int64_t end);
// The exact inverse of pack_begin + pack_panels; bias and channel_scale may be null.
void unpack(const void* packed, int8_t* weight, float* scale, float* bias, float* channel_scale);
// The channel scale in a packed buffer, or null if it has none.
const float* channel_scale_of(const PackedHeader& weights);

// Codes [k, k + count) of row n of the weight, and the row's scale. k is a multiple of 8.
float unpack_piece(const PackedHeader& weights, int64_t n, int64_t k, int64_t count, int8_t* codes);

// ---- Tables (table.cpp) -----------------------------------------------------------------------------------------

// A table that is looked up by rows. In int8 it is either `matrix`: rows of width codes, each followed by its scale, a
// float; or `packed`: weights (rows, width), which a layer multiplies by as well. In float it is `floats` (rows,
// width).
//
// `residuals`, if any, are rows of (width + 1) / 2 bytes: for each code 4 more bits, in sixteenths of its step, from -8
// to 7. A byte has those of two codes, the first in its low bits.
struct Table {
  int64_t rows, width;
  const uint8_t* matrix;
  const PackedHeader* packed;
  const uint8_t* residuals = nullptr;
  const float* floats = nullptr;
};

// y[i] = row rows[i] of an int8 table, for i in [begin, end): (code[k] + residual[k] / 16) * scale, times the channel
// scale of packed weights, if any. dtype: f32, bf16 or f16.
void write_rows(const Table& table, const int64_t* rows, int64_t begin, int64_t end, DType dtype, void* y);

// A table, and the rows of it that are looked up.
struct TableRows {
  Table table;
  const int64_t* rows;
};

// y = rows of terms[0] + rows of terms[1] + ..., each sum rounded; then normalized, if there is a norm, in place.
struct TableSum {
  const TableRows* terms;
  int count;  // of terms
  float* y;
  const NormRows* norm;  // of all rows of y, or null
};

// Rows [begin, end) of sum.y. room: space for a row.
void write_sums(const Kernel& kernel, const TableSum& sum, int64_t begin, int64_t end, float* room);

// ---- Activations (codes.cpp) ------------------------------------------------------------------------------------

// The affine map x = (code - zero_point) * scale, codes in [0, 255].
struct QParams {
  float scale;
  int32_t zero_point;
};

// Every scale is a positive normal float32: within these bounds.
constexpr float kMinScale = FLT_MIN, kMaxScale = FLT_MAX;

// Scale and zero point for a row with this range, so that 0.0 is exact:
//   scale = hi / 255 - lo / 255,  zero_point = clamp(rne(-lo * (1 / scale)), 0, 255)
// Where the scale would be below kMinScale, for a row of zeros say, it is 1. A row with a NaN or an infinity gets scale
// NaN, so its outputs are NaN.
QParams choose_qparams(const RowRange& range);

// Quantizes one row, x [k] of dtype f32 / bf16 / f16, with its own scale and zero point, into k bytes.
// scratch: row_scratch_bytes(k).
QParams quantize_row(const Kernel& kernel, const void* x, DType dtype, int64_t k, uint8_t* codes, void* scratch);
size_t row_scratch_bytes(int64_t k);

// ---- A problem (schedule.cpp, gemm.cpp) -------------------------------------------------------------------------

// Room for the codes of rows.
struct CodeRows {
  uint8_t* codes;       // rows job.codes_stride bytes apart, in the kernel's CodeFormat
  float* scale;         // [rows]
  int32_t* zero_point;  // [rows], less CodeFormat::shift
};

// The rows that codes are made of.
struct Input {
  // (m, K): f32 / bf16 / f16, quantized here; u8, codes already; i8, codes - 128. Weights with a channel scale take
  // floats only.
  const void* data;
  int64_t stride;  // bytes between rows
  DType dtype;
  bool per_token;   // each row gets its own scale and zero point; else qparams
  QParams qparams;  // of i8 too: x = (value - zero_point) * scale
  // The codes of all rows, if quantize() has made them before, for the same kernel; data is not read then.
  const CodeRows* ready = nullptr;
};

struct Output {
  void* data;      // (m, N)
  int64_t stride;  // bytes between rows
  DType dtype;
  QParams qparams;          // u8 only
  Residual residual{};      // (m, N), as data
  int64_t first_panel = 0;  // the one that data begins with, if only some of them are computed
};

// The panels of weights that are read after this problem: their first group is brought into L2 with its last. They need
// not be: a prefetch of what is freed faults nowhere.
struct Ahead {
  const uint8_t* panels = nullptr;
  int64_t stride = 0, count = 0;  // bytes between panels; of panels
};

struct Problem {
  int64_t m;
  Input x;
  const PackedHeader* weights;  // the start of a packed buffer
  Output y;
  Activation activation;
  Ahead ahead = {};                // of several problems together: that of the first
  const NormRows* norm = nullptr;  // of all rows of y, float32, without an activation: where they are, it is computed
};

// Whether two problems read the same rows, and make the same codes of them. q, k and v of an attention do.
bool read_the_same(const Problem& one, const Problem& other);

// How a problem, or several that read_the_same(), are computed. schedule() derives it once; every part reads it.
struct Job {
  const Problem* problem;  // the first
  int problems;            // how many lie there, one behind the other
  const Kernel* kernel;    // the one that runs: the one asked for, or the one that it leaves small problems to
  TileShape tile;          // of that kernel
  bool by_columns;         // a part is a range of panels, else a range of rows
  int parts;               // 1, or as many as there are threads that pay. The caller may lower it.
  int64_t block_rows;      // rows quantized at once
  int64_t codes_stride;    // bytes between rows of codes in the scratch
  size_t scratch_bytes;
};

// The problems must outlive the job. Rows are quantized once for all of them, and threads share all of their columns.
Job schedule(const Kernel& kernel, const Problem* problems, int count);
inline Job schedule(const Kernel& kernel, const Problem& problem) { return schedule(kernel, &problem, 1); }

// Memory for the codes of all rows of a problem, and the rows carved from it.
size_t ready_bytes(const Job& job);
CodeRows ready_rows(const Job& job, void* memory);
// Fills them, rows [begin, end) at a time. begin is a multiple of CodeFormat::interleaved_rows.
void quantize(const Job& job, int64_t begin, int64_t end, const CodeRows& to);

// A rectangle of y: rows and panels, half open. The panels of a job's problems are numbered through, those of each from
// the next whole tile on.
struct Part {
  int64_t row_begin, row_end, panel_begin, panel_end;
};

// The index-th of job.parts parts. Together they cover y exactly once; some may be empty.
Part part_of(const Job& job, int index);

// The share of a part in the index-th problem: the panels as those of this problem alone.
Part part_in(const Job& job, const Part& part, int index);

// Whether every part gives whole rows of y: then Problem::norm is computed by the part. Else its caller does that, when
// all parts have run.
inline bool gives_whole_rows(const Job& job) { return !job.by_columns || job.parts == 1; }

// Computes a part. scratch: job.scratch_bytes, which parts running at the same time must not share.
void run(const Job& job, int index, void* scratch);

// Kernel::activate().
void activate(const Kernel& kernel, Activation activation, DType dtype, const void* x, void* y, int64_t count);

// Kernel::normalize().
void normalize(const Kernel& kernel, const NormRows& rows);

// The kernel that really ran in the latest run(), activate(), normalize() or quantize_row() of this process, or null.
const Kernel* last_kernel();

// ---- Dispatch (dispatch.cpp) ------------------------------------------------------------------------------------

// The kernels compiled in, best first.
int kernel_count();
const Kernel& kernel_at(int index);
const Kernel* find_kernel(const char* name);
// Whether a kernel of this name exists on any architecture or compiler, compiled in here or not.
bool is_kernel_name(const char* name);

// The name of any kernel, compiled in here or not, best first within an architecture; null past the last.
const char* kernel_name_at(int index);

bool can_run(const Kernel& kernel);
// Whether a kernel multiplies by weights packed in this layout. A kernel reads its own layout, and `reference` any.
bool reads(const Kernel& kernel, Layout layout);

// The kernel the ops use: the best this CPU can run, unless one was forced.
const Kernel& active_kernel();
// The kernel to multiply by weights in this layout: the active one if it reads the layout; else, unless a kernel was
// forced, the best that does. Null if there is none. `reference`, a hundred times slower, is never taken unasked.
const Kernel* kernel_for(Layout layout);
// Forces a kernel, which this CPU must be able to run, for the process. Null ends that.
void force_kernel(const Kernel* kernel);
// A function that says which kernel is forced for its caller's thread, or null for none: it goes before the process's.
// Null, of this function, ends that. It is asked once or twice for each product, on the thread that wants it.
using KernelOfContext = const Kernel* (*)();
void force_kernel_of(KernelOfContext function);
// The kernel forced for this thread.
const Kernel* forced_kernel();

}  // namespace torchq
