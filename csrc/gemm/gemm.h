// The int8 GEMM core: the whole public face. Plain C++17: no torch, no Python, no allocation, no threads.
//
//   y = act(dequantize(codes(x) · wᵀ) + bias)
//
// x (M, K) is quantized to u8 codes row by row into the caller's scratch, w (N, K) int8 is packed once into panels,
// products are exact in int32, and the epilogue runs from registers. The caller owns every buffer and every thread:
//
//   pack_begin, pack_panels        weights -> packed
//   count_parts, part, run_part    a problem, cut into independent parts, one per thread
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernel.h"

namespace torchq {

// The deepest sum of u8 x int8 products that int32 holds: 255 * 128 * K < 2^31.
constexpr int64_t kMaxDepth = 65793;

// ---- Packed weights (pack.cpp) ----------------------------------------------------------------------------------
//
//   [header, 64 bytes][panel 0][panel 1]...[room to read][N encoding]
//
// A panel is 16 columns: [colsum i32 x16][scale f32 x16][bias f32 x16][weights]. Weights in layout P16c4: for each
// group of 4 k, 16 columns x 4 bytes; P16c8: for each group of 8 k, 16 columns x 8 bytes. Zero-padded, in either layout
// to whole groups of 8, so that the length does not depend on the kernel the weights are packed for. A kernel that
// takes 64 k at once reads on into the next panel, and behind the last one into room of as many bytes: these weights
// meet codes of 0. The bytes after that are unused: their number, 16 * panels - N, lets the length of the buffer tell N
// once K is known, so shapes can be inferred without reading it.

struct PackedHeader {
  uint32_t magic;
  Layout layout;
  int64_t n, k;
  uint32_t has_bias;
  uint8_t unused[36];
};
static_assert(sizeof(PackedHeader) == 64);

constexpr int64_t panel_count(int64_t n) { return (n + kPanelColumns - 1) / kPanelColumns; }
constexpr int64_t panel_bytes(int64_t k) { return kPanelMeta + (k + 7) / 8 * 8 * kPanelColumns; }
constexpr int64_t room_to_read(int64_t k) { return ((k + 63) / 64 * 64 - (k + 7) / 8 * 8) * kPanelColumns; }
constexpr int64_t packed_bytes(int64_t n, int64_t k) {
  return sizeof(PackedHeader) + panel_count(n) * panel_bytes(k) + room_to_read(k) +
         (panel_count(n) * kPanelColumns - n);
}

// The header of a buffer, or null if these bytes were not written by pack_begin().
const PackedHeader* packed_header(const void* packed, int64_t bytes);

void pack_begin(Layout layout, int64_t n, int64_t k, bool has_bias, void* packed);
// Panels [begin, end). weight (N, K) int8 row-major; scale [N]; bias [N] or null.
void pack_panels(const int8_t* weight, const float* scale, const float* bias, void* packed, int64_t begin, int64_t end);
// The exact inverse of pack_begin + pack_panels; bias may be null.
void unpack(const void* packed, int8_t* weight, float* scale, float* bias);

// ---- Activations ------------------------------------------------------------------------------------------------

// The affine map x = (code - zero_point) * scale, codes in [0, 255].
struct QParams {
  float scale;
  int32_t zero_point;
};

// Scale and zero point for a row with this range, so that 0.0 is exact:
//   scale = hi / 255 - lo / 255,  zero_point = clamp(rne(-lo * (1 / scale)), 0, 255)
// A row whose scale would be below FLT_MIN (zeros, say) gets scale 1. A row with NaN or infinity gets scale NaN, so its
// outputs are NaN.
QParams choose_qparams(const RowRange& range);

// Quantizes one row, x [k] of dtype f32 / bf16 / f16, with its own scale and zero point, into k bytes.
// scratch: row_scratch_bytes(k).
QParams quantize_row(const Kernel& kernel, const void* x, DType dtype, int64_t k, uint8_t* codes, void* scratch);
size_t row_scratch_bytes(int64_t k);

// ---- A problem, and its parts (gemm.cpp) ------------------------------------------------------------------------

struct Problem {
  int64_t m;
  const void* x;     // (m, K); f32 / bf16 / f16: quantized here. u8: codes already. i8: codes - 128.
  int64_t x_stride;  // bytes between rows
  DType x_dtype;
  bool per_token;  // each row its own scale and zero point; else x_qparams
  QParams x_qparams;
  const void* packed;
  void* y;  // (m, N), rows y_stride bytes apart
  int64_t y_stride;
  DType y_dtype;
  QParams y_qparams;  // u8 out only
  Activation activation;
};

// A rectangle of y: rows and panels, half open.
struct Part {
  int64_t row_begin, row_end, panel_begin, panel_end;
};

// How many threads this problem pays for, 1 .. max_threads.
int count_parts(const Kernel& kernel, const Problem& problem, int max_threads);
// The index-th of count parts. Together they cover y exactly once; some may be empty.
Part part(const Kernel& kernel, const Problem& problem, int index, int count);
size_t scratch_bytes(const Kernel& kernel, const Problem& problem);
void run_part(const Kernel& kernel, const Problem& problem, const Part& part, void* scratch);
// The kernel of the latest run_part() or quantize_row() in this process, or null: how a test knows what really ran.
const Kernel* last_kernel();

// ---- Dispatch (dispatch.cpp) ------------------------------------------------------------------------------------

// The kernels compiled in, best first.
int kernel_count();
const Kernel& kernel_at(int index);
const Kernel* find_kernel(const char* name);
// Whether a kernel of this name exists on any architecture or compiler, compiled in here or not.
bool is_kernel_name(const char* name);

bool can_run(const Kernel& kernel);
// Whether a kernel multiplies by weights packed in this layout: its own, and `reference` any.
bool reads(const Kernel& kernel, Layout layout);

// The kernel the ops use: the best this CPU can run, unless one was forced.
const Kernel& active_kernel();
// The kernel to multiply by weights in this layout: the active one if it reads it, else, unless one was forced, the
// best other. Null if there is none; `reference`, a hundred times slower, is not taken unasked.
const Kernel* kernel_for(Layout layout);
// Forces a kernel (it must be one this CPU can run); null gives the choice back.
void force_kernel(const Kernel* kernel);
const Kernel* forced_kernel();

}  // namespace torchq
