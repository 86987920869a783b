// Computes a part of a problem: quantized rows -> tiles -> y.
//
// A block of rows is quantized into scratch that stays in L2. Then each group of panels is read once per block, and the
// block's tiles of rows read it again from cache. K is never cut: accumulators stay in registers for the whole depth,
// and no int32 matrix goes through memory.
//
//   for each block of rows (job.block_rows)
//     load_rows(): their codes
//     for each problem that reads these rows
//       for each group of job.tile.n columns
//         for each tile of rows (RowTiles)
//           kernel.run(): full depth, then the epilogue, straight into y
//       kernel.normalize(): the block's rows of y, while they are in L2

#include "gemm.h"

#include <algorithm>
#include <cstring>

#include "codes.h"
#include "divide.h"
#include "scratch.h"

namespace torchq {
namespace {

// From this many groups on, a single tile leaves it to the hardware to read ahead: it follows long panels well.
constexpr int64_t kLongPanel = 512;

// How the rows of a part are cut into tiles. Rows are counted in units that stay together: pairs for a kernel that
// interleaves two rows, else single rows. The first `larger` tiles have one unit more than the others.
struct RowTiles {
  int64_t begin, end;  // rows
  int64_t unit, count, height, larger;

  RowTiles(const Job& job, const Part& part) : begin(part.row_begin), end(part.row_end) {
    const bool full = job.kernel->tiling.full_tiles;
    unit = job.kernel->codes.interleaved_rows;
    const int64_t units = ceil_div(end - begin, unit);
    count = ceil_div(end - begin, job.tile.m);
    height = full ? job.tile.m / unit : units / count;
    larger = full ? 0 : units % count;
  }
  int64_t start(int64_t tile) const { return std::min(begin + (tile * height + std::min(tile, larger)) * unit, end); }
};

// What all blocks of a problem have in common.
Block common_block(const Job& job, const Problem& p) {
  const PackedHeader& weights = *p.weights;
  Block b{};
  b.layout = weights.layout;
  b.k_groups = ceil_div(weights.k, layout_depth(weights.layout));
  b.codes_stride = job.codes_stride;
  b.panel_stride = panel_bytes(weights.k);
  b.out_stride = p.y.stride;
  b.out_dtype = p.y.dtype;
  b.activation = p.activation;
  b.out_inv_scale = 1.0f / p.y.qparams.scale;
  b.out_zero_point = p.y.qparams.zero_point;
  b.residual = p.y.residual;
  return b;
}

const uint8_t* panel_at(const Problem& p, int64_t panel, int64_t stride) {
  return reinterpret_cast<const uint8_t*>(p.weights + 1) + panel * stride;
}

uint8_t* output_at(const Problem& p, int64_t row, int64_t panel) {
  const int64_t column = (panel - p.y.first_panel) * kPanelColumns;
  return static_cast<uint8_t*>(p.y.data) + row * p.y.stride + column * element_bytes(p.y.dtype);
}

const uint8_t* residual_at(const Problem& p, int64_t row, int64_t panel) {
  const Residual& residual = p.y.residual;
  const auto* column = static_cast<const uint8_t*>(residual.at((panel - p.y.first_panel) * kPanelColumns));
  return column ? column + row * residual.stride : nullptr;
}

// Runs a block whose last panel y only partly fills: into the ragged buffer, and from there the columns that exist. The
// residual goes the other way, into the buffer's second half.
__attribute__((noinline)) void run_ragged(const Job& job, Block b, int64_t columns, uint8_t* ragged) {
  uint8_t* y = static_cast<uint8_t*>(b.out);
  const int64_t y_stride = b.out_stride, bytes = columns * element_bytes(b.out_dtype);
  b.out = ragged;
  b.out_stride = b.panels * kPanelColumns * element_bytes(b.out_dtype);
  if (b.residual.data) {
    const Residual from = b.residual;
    const int64_t element = element_bytes(from.dtype);
    const auto* rows = static_cast<const uint8_t*>(from.data);
    uint8_t* to = ragged + ragged_bytes(job) / 2;
    b.residual.data = to;
    b.residual.stride = b.panels * kPanelColumns * element;
    for (int r = 0; r < b.m; ++r) std::memcpy(to + r * b.residual.stride, rows + r * from.stride, columns * element);
  }
  job.kernel->run(b);
  for (int r = 0; r < b.m; ++r) std::memcpy(y + r * y_stride, ragged + r * b.out_stride, bytes);
}

// A block of rows by a kernel with own_loops: all whole panels at once, then the ragged one.
void run_at_once(const Job& job, const Problem& p, const Part& part, int64_t row, int64_t rows, Block b,
                 const Scratch& s) {
  const int64_t n = p.weights->n, whole = std::min(part.panel_end, n / kPanelColumns);
  b.m = static_cast<int>(rows);
  b.codes = s.rows.codes;
  b.scale = s.rows.scale;
  b.zero_point = s.rows.zero_point;
  b.sums = s.sums;
  const auto run_panels = [&](int64_t begin, int64_t end) {
    b.panels = static_cast<int>(end - begin);
    b.panel = panel_at(p, begin, b.panel_stride);
    b.out = output_at(p, row, begin);
    b.residual.data = residual_at(p, row, begin);
    if (end * kPanelColumns <= n)
      job.kernel->run(b);
    else
      run_ragged(job, b, n - begin * kPanelColumns, s.ragged);
  };
  if (part.panel_begin < whole) run_panels(part.panel_begin, whole);
  if (whole < part.panel_end) run_panels(whole, part.panel_end);
}

// Weights, or rows of x, to bring into L2: [begin, end).
struct Lines {
  const uint8_t *begin, *end;
};

// The first group of the panels that are read after the job, of those that its index-th part will read.
Lines lines_ahead(const Job& job, int index) {
  const Ahead& a = job.problem->ahead;
  const int64_t group = job.tile.n / kPanelColumns, groups = ceil_div(a.count, group);
  const int64_t first = job.by_columns ? piece(groups, index, job.parts) * group : 0;
  const uint8_t* begin = a.panels + first * a.stride;
  return {begin, begin + std::min(group, a.count - first) * a.stride};
}

// The first group of the panels of this problem that the part reads.
Lines lines_of_panels(const Job& job, const Problem& p, const Part& part) {
  const int64_t stride = panel_bytes(p.weights->k), group = job.tile.n / kPanelColumns;
  const int64_t end = std::min(part.panel_begin + group, part.panel_end);
  return {panel_at(p, part.panel_begin, stride), panel_at(p, end, stride)};
}

// Rows [begin, end) of x, where they lie side by side and are still to be quantized.
Lines lines_of_rows(const Job& job, int64_t begin, int64_t end) {
  const Input& x = job.problem->x;
  if (x.ready || x.stride != job.problem->weights->k * element_bytes(x.dtype)) return {};
  const auto* data = static_cast<const uint8_t*>(x.data);
  return {data + begin * x.stride, data + end * x.stride};
}

// Tiles [first, end) of rows, which are in the scratch, by the part's panels. then: what to bring into L2 with the last
// group of these. kMore: whether tiles may have a residual, or fetch panels; without, they set nothing for it.
template <bool kMore>
void run_tiles(const Job& job, const Problem& p, const Part& part, const RowTiles& tiles, int64_t first, int64_t end,
               Block& b, const Scratch& s, const Lines& then) {
  const Kernel& kernel = *job.kernel;
  const int64_t n = p.weights->n, group = job.tile.n / kPanelColumns;
  const int64_t row = tiles.start(first), rows = tiles.start(end) - row;
  const int64_t larger = tiles.larger, height = tiles.height * tiles.unit, larger_height = height + tiles.unit;
  const int64_t stride = b.codes_stride, y_stride = p.y.stride;
  const int64_t next_bytes = int64_t{kernel.tiling.next_lines} * 64 * b.k_groups;
  const bool fetches = next_bytes && (end - first > 1 || b.k_groups < kLongPanel);
  const bool adds = b.residual.stride;
  b.next = nullptr;
  for (int64_t panel = part.panel_begin; panel < part.panel_end; panel += group) {
    b.panels = static_cast<int>(std::min(group, part.panel_end - panel));
    b.panel = panel_at(p, panel, b.panel_stride);
    const int64_t columns = std::min(b.panels * kPanelColumns, n - panel * kPanelColumns);
    const bool whole = columns == b.panels * kPanelColumns;
    // The loop sets only what changes from tile to tile, from locals: for all the compiler knows, run() changes b.
    // Each tile fetches some of the next group, so that reading it from memory overlaps with this one's products.
    const bool last = panel + group >= part.panel_end;
    const uint8_t* next = last ? then.begin : b.panel + group * b.panel_stride;
    const uint8_t* next_end = !fetches ? next : last ? then.end : next + group * b.panel_stride;
    int64_t left = rows;
    const uint8_t* codes = s.rows.codes;
    const float* scale = s.rows.scale;
    const int32_t* zero_point = s.rows.zero_point;
    uint8_t* y = output_at(p, row, panel);
    for (int64_t t = first; t < end; ++t) {
      const int64_t m = std::min(t < larger ? larger_height : height, left);
      b.m = static_cast<int>(m);
      b.codes = codes;
      b.scale = scale;
      b.zero_point = zero_point;
      b.out = y;
      if (kMore && adds) b.residual.data = residual_at(p, row + rows - left, panel);
      if (kMore && fetches) {
        b.next = next < next_end ? next : nullptr;
        next += next_bytes;
      }
      whole ? kernel.run(b) : run_ragged(job, b, columns, s.ragged);
      left -= m, codes += m * stride, scale += m, zero_point += m, y += m * y_stride;
    }
  }
}

// The same rows by the part's share of the index-th problem, whichever way the kernel wants it.
void run_rows(const Job& job, int index, const Part& part, const RowTiles& tiles, int64_t first, int64_t end,
              const Scratch& s, Lines then) {
  const Problem& p = job.problem[index];
  const Part own = part_in(job, part, index);
  if (own.panel_begin == own.panel_end) return;
  if (index + 1 < job.problems) {
    const Part following = part_in(job, part, index + 1);
    if (following.panel_begin < following.panel_end) then = lines_of_panels(job, job.problem[index + 1], following);
  }
  const int64_t row = tiles.start(first), rows = tiles.start(end) - row;
  Block b = common_block(job, p);
  if (job.kernel->tiling.own_loops)
    run_at_once(job, p, own, row, rows, b, s);
  else if (b.residual.stride || job.kernel->tiling.next_lines)
    run_tiles<true>(job, p, own, tiles, first, end, b, s, then);
  else
    run_tiles<false>(job, p, own, tiles, first, end, b, s, then);
  if (p.norm && gives_whole_rows(job)) job.kernel->normalize(p.norm->part(row, row + rows));
}

}  // namespace

void run(const Job& job, int index, void* memory) {
  remember(*job.kernel);
  const Part part = part_of(job, index);
  if (part.row_begin == part.row_end) return;
  Scratch s = carve(job, memory);
  const CodeRows* ready = job.problem->x.ready;
  const Lines then = lines_ahead(job, index);
  // Blocks are nearly equal numbers of tiles. A small last block would read every panel for its few rows.
  const RowTiles tiles(job, part);
  const int64_t blocks = ceil_div(tiles.count * job.tile.m, job.block_rows);
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = piece(tiles.count, block, blocks), end = piece(tiles.count, block + 1, blocks);
    const int64_t row = tiles.start(first), rows = tiles.start(end) - row;
    if (ready)
      s.rows = rows_from(job, *ready, row);
    else
      load_rows(job, row, rows, s.rows);
    const bool last = block + 1 == blocks;
    const Lines next = last ? then : lines_of_rows(job, row + rows, tiles.start(piece(tiles.count, block + 2, blocks)));
    for (int i = 0; i < job.problems; ++i) run_rows(job, i, part, tiles, first, end, s, next);
  }
}

void activate(const Kernel& kernel, Activation activation, DType dtype, const void* x, void* y, int64_t count) {
  remember(kernel);
  kernel.activate(activation, dtype, x, y, count);
}

void normalize(const Kernel& kernel, const NormRows& rows) {
  remember(kernel);
  kernel.normalize(rows);
}

}  // namespace torchq
