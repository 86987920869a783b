// Cuts a problem into tiles: quantize rows -> micro-kernel and epilogue.
//
// Loop order, and why: a block of rows is quantized into scratch small enough to stay in L2; then each group of
// panels is read once per block and re-used from cache by the block's row tiles. K is never cut, so accumulators stay
// in registers for the whole depth and no int32 matrix goes through memory.
//
//   for each block of rows (codes fit in L2)
//     quantize the block's rows
//     for each group of tile.n columns
//       for each tile of up to tile.m rows, balanced (10 rows with tile.m 6 are 5 + 5, not 6 + 4) or full_tiles
//         kernel.run(): full depth, then the epilogue, straight into y

#include "gemm.h"

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cstring>
#include <limits>

namespace torchq {
namespace {

constexpr int64_t kWeightsNear = 2 << 20;  // L2 of the CPUs with AMX, whose kernel alone distinguishes
constexpr int64_t kRowsTogether = 32;      // rows quantized together, one step of all after the other ...
constexpr int64_t kRowsInL1 = 16 * 1024;   // ... if their x, read twice, stays in L1: bytes

constexpr float kRoundsToInteger = 0x1.8p23f;  // above it floats are integers: x + this - this is rne(x), and no call

std::atomic<const Kernel*> last{nullptr};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// The index-th of count nearly equal pieces of [0, n) starts here.
constexpr int64_t piece(int64_t n, int64_t index, int64_t count) { return n * index / count; }

// Bytes between rows of codes: whole vectors, and an odd number of cache lines so that rows spread over all sets.
int64_t codes_stride(int64_t k, int code_bytes) {
  const int64_t lines = ceil_div(round_up(k, 64) * code_bytes, 64);
  return (lines | 1) * 64;
}

bool far(const PackedHeader& header) { return packed_bytes(header.n, header.k) > kWeightsNear; }

// The kernel asked for, or the one that it leaves small problems to.
const Kernel& kernel_that_runs(const Kernel& kernel, const Problem& p) {
  const SmallProblems& small = kernel.small;
  if (!small.kernel) return kernel;
  const PackedHeader& header = *static_cast<const PackedHeader*>(p.packed);
  const int max_rows = far(header) ? small.max_rows_beyond_l2 : small.max_rows;
  return p.m <= max_rows || p.m * header.n * header.k <= small.max_work ? *small.kernel : kernel;
}

const TileShape& tile_for(const Kernel& kernel, int64_t m) {
  const Tiling& tiling = kernel.tiling;
  return m > tiling.tile.m && m <= tiling.tall.m ? tiling.tall : tiling.tile;
}

// Codes that arrive ready made: copied, moved from int8 to u8 or back, or widened, to what the kernel reads.
template <class Code>
void load_codes(const uint8_t* x, uint8_t flip, int64_t k, Code* codes) {
  if (sizeof(Code) == 1 && !flip) return void(std::memcpy(codes, x, k));
  for (int64_t i = 0; i < k; ++i) codes[i] = static_cast<uint8_t>(x[i] ^ flip);
}

// Where the scratch holds rows [0, row] and code k of that row, k a multiple of 8: CodeFormat::interleaved_rows.
uint8_t* code_at(const Kernel& kernel, uint8_t* codes, int64_t row, int64_t k, int64_t stride) {
  if (kernel.codes.interleaved_rows == 1) return codes + row * stride + k * kernel.codes.bytes;
  return codes + row / 2 * 2 * stride + row % 2 * 8 + k * 2;
}

// Every 8 codes to the even one of 8 bytes.
void load_paired_codes(const uint8_t* x, uint8_t flip, int64_t k, uint8_t* codes) {
  for (int64_t i = 0; i < k; i += 8) load_codes(x + i, flip, std::min<int64_t>(k - i, 8), codes + 2 * i);
}

// One thread's buffers, carved from the caller's scratch.
struct Scratch {
  uint8_t* codes;
  uint8_t* ragged;  // output for the last, partly filled panels: of one tile, or of one panel where a kernel sweeps
  int32_t* sums;    // Block::sums
  float* scale;
  int32_t* zero_point;
};

// Rows quantized at a time: whole tiles, whose codes fit the budget.
int64_t block_rows(const Kernel& kernel, const TileShape& tile, int64_t m, int64_t k) {
  const int64_t fit = kernel.tiling.codes_budget / codes_stride(k, kernel.codes.bytes);
  return std::min(round_up(m, tile.m), std::max<int64_t>(fit / tile.m, 1) * tile.m);
}

int64_t ragged_bytes(const Kernel& kernel, const TileShape& tile, int64_t rows) {
  return kernel.tiling.own_loops ? rows * kPanelColumns * 4 : int64_t{tile.m} * tile.n * 4;
}

int64_t sums_bytes(const Kernel& kernel, int64_t rows) { return kernel.tiling.own_loops ? rows * kSumColumns * 4 : 0; }

Scratch carve(const Kernel& kernel, const TileShape& tile, int64_t rows, int64_t k, void* memory) {
  auto* base = reinterpret_cast<uint8_t*>(round_up(reinterpret_cast<intptr_t>(memory), 64));
  Scratch s;
  s.codes = base;
  s.ragged = s.codes + rows * codes_stride(k, kernel.codes.bytes);
  s.sums = reinterpret_cast<int32_t*>(s.ragged + ragged_bytes(kernel, tile, rows));
  s.scale = reinterpret_cast<float*>(s.sums + sums_bytes(kernel, rows) / 4);
  s.zero_point = reinterpret_cast<int32_t*>(s.scale + rows);
  return s;
}

// Codes that arrive ready made.
void copy_rows(const Kernel& kernel, const Problem& p, const uint8_t* x, int64_t rows, int64_t k, const Scratch& s) {
  const bool is_signed = p.x_dtype == DType::i8;
  const uint8_t flip = is_signed != (kernel.codes.shift == 128) ? 0x80 : 0;
  for (int64_t r = 0; r < rows; ++r, x += p.x_stride) {
    uint8_t* codes = code_at(kernel, s.codes, r, 0, codes_stride(k, kernel.codes.bytes));
    if (kernel.codes.interleaved_rows == 2)
      load_paired_codes(x, flip, k, codes);
    else if (kernel.codes.bytes == 1)
      load_codes(x, flip, k, codes);
    else
      load_codes(x, flip, k, reinterpret_cast<int16_t*>(codes));
    s.scale[r] = p.x_qparams.scale;
    s.zero_point[r] = p.x_qparams.zero_point + (is_signed ? 128 : 0) - kernel.codes.shift;
  }
}

// Range, scale, codes: each for all rows before the next, so that the divisions of one row do not wait for the range
// of the same row. At K = 64 that is a third of the time.
void quantize_rows(const Kernel& kernel, const Problem& p, const uint8_t* x, int64_t rows, int64_t k,
                   const Scratch& s) {
  RowRange ranges[kRowsTogether];
  for (int64_t r = 0; p.per_token && r < rows; ++r) ranges[r] = kernel.range(x + r * p.x_stride, p.x_dtype, k);
  for (int64_t r = 0; r < rows; ++r) {
    const QParams q = p.per_token ? choose_qparams(ranges[r]) : p.x_qparams;
    s.scale[r] = q.scale;
    s.zero_point[r] = q.zero_point;
  }
  for (int64_t r = 0; r < rows; ++r) {
    kernel.quantize(x + r * p.x_stride, p.x_dtype, k, 1.0f / s.scale[r], s.zero_point[r],
                    code_at(kernel, s.codes, r, 0, codes_stride(k, kernel.codes.bytes)), p.per_token);
    s.zero_point[r] -= kernel.codes.shift;
  }
}

void load_rows(const Kernel& kernel, const Problem& p, int64_t row, int64_t rows, int64_t k, const Scratch& all) {
  const auto* x = static_cast<const uint8_t*>(p.x) + row * p.x_stride;
  const int64_t stride = codes_stride(k, kernel.codes.bytes);
  // The last group may be partly filled. Its weights are zero, its codes must only be readable.
  for (int64_t r = 0; k % 8 && r < rows; ++r)
    std::memset(code_at(kernel, all.codes, r, k / 8 * 8, stride), 0, 8 * kernel.codes.bytes);
  if (p.x_dtype == DType::u8 || p.x_dtype == DType::i8) return copy_rows(kernel, p, x, rows, k, all);
  const int64_t fit = kRowsInL1 / std::max<int64_t>(k * element_bytes(p.x_dtype), 1);
  const int64_t step = round_up(std::min(std::max<int64_t>(fit, 1), kRowsTogether), kernel.codes.interleaved_rows);
  for (int64_t r = 0; r < rows; r += step) {
    const Scratch s{all.codes + r * stride, nullptr, nullptr, all.scale + r, all.zero_point + r};
    quantize_rows(kernel, p, x + r * p.x_stride, std::min(step, rows - r), k, s);
  }
}

// What quantizing left behind the last code of each row, or a row before it.
void clear_step(const Kernel& kernel, int64_t rows, int64_t k, const Scratch& s) {
  const int64_t rest = round_up(k, kernel.codes.depth_multiple) - k, stride = codes_stride(k, kernel.codes.bytes);
  for (int64_t r = 0; rest && r < rows; ++r) std::memset(s.codes + r * stride + k, 0, rest);
}

// A tile where y ends inside its last panel: through the ragged buffer.
__attribute__((noinline)) void run_ragged(const Kernel& kernel, Block b, int64_t columns, uint8_t* ragged) {
  uint8_t* y = static_cast<uint8_t*>(b.out);
  const int64_t y_stride = b.out_stride, bytes = element_bytes(b.out_dtype);
  b.out = ragged;
  b.out_stride = b.panels * kPanelColumns * bytes;
  kernel.run(b);
  for (int r = 0; r < b.m; ++r) std::memcpy(y + r * y_stride, ragged + r * b.out_stride, columns * bytes);
}

// A block of rows by a kernel that sweeps: all whole panels at once, then the ragged one. b: all but what is set here.
void sweep(const Kernel& kernel, Block b, const Problem& p, const Part& part, int64_t row, int64_t rows,
           const Scratch& s) {
  const int64_t n = static_cast<const PackedHeader*>(p.packed)->n, y_bytes = element_bytes(p.y_dtype);
  const int64_t whole = std::min(part.panel_end, n / kPanelColumns);
  b.m = static_cast<int>(rows);
  b.codes = s.codes;
  b.scale = s.scale;
  b.zero_point = s.zero_point;
  b.sums = s.sums;
  const auto run_panels = [&](int64_t begin, int64_t end) {
    b.panels = static_cast<int>(end - begin);
    b.panel = static_cast<const uint8_t*>(p.packed) + sizeof(PackedHeader) + begin * b.panel_stride;
    b.out = static_cast<uint8_t*>(p.y) + row * p.y_stride + begin * kPanelColumns * y_bytes;
    end* kPanelColumns <= n ? kernel.run(b) : run_ragged(kernel, b, n - begin * kPanelColumns, s.ragged);
  };
  if (part.panel_begin < whole) run_panels(part.panel_begin, whole);
  if (whole < part.panel_end) run_panels(whole, part.panel_end);
}

}  // namespace

const Kernel* last_kernel() { return last.load(std::memory_order_relaxed); }

QParams choose_qparams(const RowRange& range) {
  // No branches: the data would decide them. NaN comes out of max(0, NaN) as 0.
  float scale = range.hi / 255.0f - range.lo / 255.0f;
  scale = scale >= FLT_MIN ? scale : 1.0f;
  scale = range.finite ? scale : std::numeric_limits<float>::quiet_NaN();
  const float zero_point = std::min(std::max(0.0f, -range.lo * (1.0f / scale)), 255.0f);
  return {scale, static_cast<int32_t>((zero_point + kRoundsToInteger) - kRoundsToInteger)};
}

size_t row_scratch_bytes(int64_t k) { return round_up(k, 64) * 2; }

QParams quantize_row(const Kernel& kernel, const void* x, DType dtype, int64_t k, uint8_t* codes, void* scratch) {
  last.store(&kernel, std::memory_order_relaxed);
  const QParams q = choose_qparams(kernel.range(x, dtype, k));
  kernel.quantize(x, dtype, k, 1.0f / q.scale, q.zero_point, scratch, true);
  auto* from = static_cast<uint8_t*>(scratch);
  const uint8_t flip = kernel.codes.shift == 128 ? 0x80 : 0;
  if (kernel.codes.interleaved_rows == 2)
    for (int64_t i = 0; i < k; ++i) codes[i] = code_at(kernel, from, 0, i / 8 * 8, 0)[i % 8] ^ flip;
  else if (kernel.codes.bytes == 1)
    load_codes(from, flip, k, codes);
  else
    for (int64_t i = 0; i < k; ++i) codes[i] = static_cast<uint8_t>(static_cast<const int16_t*>(scratch)[i]);
  return q;
}

namespace {

bool split_columns(const Kernel& kernel, const Problem& p) {
  const Threading& threading = kernel.threading;
  const bool beyond_l2 = far(*static_cast<const PackedHeader*>(p.packed));
  return p.m <= (beyond_l2 ? threading.max_rows_by_columns_beyond_l2 : threading.max_rows_by_columns);
}

}  // namespace

int count_parts(const Kernel& asked, const Problem& p, int max_threads) {
  const Kernel& kernel = kernel_that_runs(asked, p);
  const PackedHeader& header = *static_cast<const PackedHeader*>(p.packed);
  const int64_t work =
      std::max<int64_t>(p.m, kernel.threading.min_rows) * header.n * header.k / kernel.threading.work_per_thread;
  const TileShape& tile = tile_for(kernel, p.m);
  const int64_t pieces =
      split_columns(kernel, p) ? ceil_div(panel_count(header.n) * kPanelColumns, tile.n) : ceil_div(p.m, tile.m);
  return static_cast<int>(std::max<int64_t>(std::min({work, pieces, int64_t{max_threads}}), 1));
}

Part part(const Kernel& asked, const Problem& p, int index, int count) {
  const Kernel& kernel = kernel_that_runs(asked, p);
  const int64_t panels = panel_count(static_cast<const PackedHeader*>(p.packed)->n);
  if (!split_columns(kernel, p)) return {piece(p.m, index, count), piece(p.m, index + 1, count), 0, panels};
  const int64_t group = tile_for(kernel, p.m).n / kPanelColumns, groups = ceil_div(panels, group);
  const auto panel = [&](int64_t i) { return std::min(piece(groups, i, count) * group, panels); };
  return {0, p.m, panel(index), panel(index + 1)};
}

size_t scratch_bytes(const Kernel& asked, const Problem& p) {
  const Kernel& kernel = kernel_that_runs(asked, p);
  const TileShape& tile = tile_for(kernel, p.m);
  const int64_t k = static_cast<const PackedHeader*>(p.packed)->k, rows = block_rows(kernel, tile, p.m, k);
  return 64 + rows * (codes_stride(k, kernel.codes.bytes) + sizeof(float) + sizeof(int32_t)) +
         ragged_bytes(kernel, tile, rows) + sums_bytes(kernel, rows);
}

void run_part(const Kernel& asked, const Problem& p, const Part& part, void* memory) {
  last.store(&asked, std::memory_order_relaxed);
  const Kernel& kernel = kernel_that_runs(asked, p);
  if (part.row_begin == part.row_end) return;
  const PackedHeader& header = *static_cast<const PackedHeader*>(p.packed);
  const int64_t k = header.k, y_bytes = element_bytes(p.y_dtype);
  const TileShape& tile = tile_for(kernel, p.m);
  const int64_t group = tile.n / kPanelColumns;
  const int64_t max_rows = block_rows(kernel, tile, p.m, k);
  const Scratch s = carve(kernel, tile, max_rows, k, memory);
  const auto* panels = static_cast<const uint8_t*>(p.packed) + sizeof(PackedHeader);

  Block b{};
  b.layout = header.layout;
  b.k_groups = ceil_div(k, layout_depth(header.layout));
  b.codes_stride = codes_stride(k, kernel.codes.bytes);
  b.panel_stride = panel_bytes(k);
  b.out_stride = p.y_stride;
  b.out_dtype = p.y_dtype;
  b.activation = p.activation;
  b.out_inv_scale = 1.0f / p.y_qparams.scale;
  b.out_zero_point = p.y_qparams.zero_point;

  // Tiles are laid out over all rows, the larger ones first, and blocks balanced over all tiles: a last block of few
  // rows would read every panel for them.
  const int64_t all_rows = part.row_end - part.row_begin, tiles = ceil_div(all_rows, tile.m);
  const int64_t together = kernel.codes.interleaved_rows, units = ceil_div(all_rows, together);
  const int64_t each = kernel.tiling.full_tiles ? tile.m / together : units / tiles;
  const int64_t larger = kernel.tiling.full_tiles ? 0 : units % tiles;
  const int64_t larger_tile = (each + 1) * together, smaller_tile = each * together;
  const int64_t stride = b.codes_stride, y_stride = p.y_stride;
  const auto row_of = [&](int64_t tile) {
    return std::min(part.row_begin + (tile * each + std::min(tile, larger)) * together, part.row_end);
  };
  const int64_t blocks = ceil_div(tiles * tile.m, max_rows);
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = piece(tiles, block, blocks), end = piece(tiles, block + 1, blocks), row = row_of(first);
    const int64_t rows = row_of(end) - row;
    load_rows(kernel, p, row, rows, k, s);
    clear_step(kernel, rows, k, s);
    if (kernel.tiling.own_loops) {
      sweep(kernel, b, p, part, row, rows, s);
      continue;
    }
    for (int64_t panel = part.panel_begin; panel < part.panel_end; panel += group) {
      b.panels = static_cast<int>(std::min(group, part.panel_end - panel));
      b.panel = panels + panel * b.panel_stride;
      const int64_t column = panel * kPanelColumns, columns = std::min(b.panels * kPanelColumns, header.n - column);
      // Nothing here but what changes from tile to tile, in locals: the compiler must think that run() changes b.
      const bool whole = columns == b.panels * kPanelColumns;
      int64_t left = rows;
      const uint8_t* codes = s.codes;
      const float* scale = s.scale;
      const int32_t* zero_point = s.zero_point;
      uint8_t* y = static_cast<uint8_t*>(p.y) + row * p.y_stride + column * y_bytes;
      for (int64_t t = first; t < end; ++t) {
        const int64_t m = std::min(t < larger ? larger_tile : smaller_tile, left);
        b.m = static_cast<int>(m);
        b.codes = codes;
        b.scale = scale;
        b.zero_point = zero_point;
        b.out = y;
        whole ? kernel.run(b) : run_ragged(kernel, b, columns, s.ragged);
        left -= m, codes += m * stride, scale += m, zero_point += m, y += m * y_stride;
      }
    }
  }
}

}  // namespace torchq
