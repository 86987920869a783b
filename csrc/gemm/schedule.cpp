// How a problem is computed: which kernel really runs, its tile shape, the blocks of rows, the parts, the scratch.

#include <algorithm>

#include "divide.h"
#include "gemm.h"
#include "scratch.h"

namespace torchq {
namespace {

// The size of L2 in CPUs with AMX, in bytes. Only amx_int8 has different limits for weights that do not fit in it.
constexpr int64_t kL2Bytes = 2 << 20;

constexpr int64_t kMaxParts = 1 << 16;  // more than there are threads

// Bytes of rows, of x or of y, that are surely not all in L2, where layers before left them.
constexpr int64_t kBeyondL2 = 1 << 20;

// Bytes of weights that stay in L2 beside a block of such rows, and of its codes then: to read the weights again costs
// nothing, and the rows of x come while the block before them multiplies. 1024x384x384 takes 3 % less than in one
// block.
constexpr int64_t kStaysInL2 = 640 << 10, kSmallBlock = 64 << 10;

// The kernel asked for, or the one that it leaves small problems to.
const Kernel& choose_kernel(const Kernel& kernel, int64_t m, const PackedHeader& weights, bool beyond_l2) {
  const SmallProblems& small = kernel.small;
  if (!small.kernel) return kernel;
  const int max_rows = beyond_l2 ? small.max_rows_beyond_l2 : small.max_rows;
  return m <= max_rows || m * weights.n * weights.k <= small.max_work ? *small.kernel : kernel;
}

// Bytes between rows of codes: whole vectors, and an odd number of cache lines, so that rows spread over all sets.
int64_t stride_of_codes(int64_t k, int code_bytes) {
  const int64_t lines = ceil_div(round_up(k, 64) * code_bytes, 64);
  return (lines | 1) * 64;
}

bool splits_by_columns(const Threading& threading, int64_t m, bool beyond_l2) {
  return m <= (beyond_l2 ? threading.max_rows_by_columns_beyond_l2 : threading.max_rows_by_columns);
}

// As many as there are threads that pay, and no more than there are tiles to hand out.
int count_parts(const Job& job, int64_t m, const PackedHeader& weights) {
  const Threading& threading = job.kernel->threading;
  const int64_t work = std::max<int64_t>(m, threading.min_rows) * weights.n * weights.k / threading.work_per_thread;
  if (work <= 1) return 1;
  const int64_t columns = panel_count(weights.n) * kPanelColumns;
  const int64_t tiles = job.by_columns ? ceil_div(columns, job.tile.n) : ceil_div(m, job.tile.m);
  return static_cast<int>(std::max<int64_t>(std::min({work, tiles, kMaxParts}), 1));
}

// Rows of a block: whole tiles, whose codes fit the budget.
int64_t rows_of_block(const Job& job, const Problem& p) {
  const Tiling& tiling = job.kernel->tiling;
  const int64_t m = p.m, weights = packed_bytes(p.weights->n, p.weights->k, p.weights->has_channel_scale);
  const bool small = tiling.next_lines && m * p.x.stride > kBeyondL2 && weights <= kStaysInL2;
  const int64_t fit = (small ? kSmallBlock : tiling.codes_budget) / job.codes_stride, tile = job.tile.m;
  return std::min(round_up(m, tile), std::max<int64_t>(fit / tile, 1) * tile);
}

}  // namespace

Job schedule(const Kernel& asked, const Problem& problem) {
  const PackedHeader& weights = *problem.weights;
  const int64_t m = problem.m;
  const bool beyond_l2 = packed_bytes(weights.n, weights.k, weights.has_channel_scale) > kL2Bytes;
  const Kernel& kernel = choose_kernel(asked, m, weights, beyond_l2);
  const Tiling& tiling = kernel.tiling;

  Job job;
  job.problem = &problem;
  job.kernel = &kernel;
  job.tile = m > tiling.tile.m && m <= tiling.tall.m ? tiling.tall : tiling.tile;
  job.by_columns = splits_by_columns(kernel.threading, m, beyond_l2);
  job.parts = count_parts(job, m, weights);
  job.codes_stride = stride_of_codes(weights.k, kernel.codes.bytes);
  job.block_rows = rows_of_block(job, problem);
  job.fetches_outputs = m * problem.y.stride > kBeyondL2;
  job.scratch_bytes = scratch_bytes(job);
  return job;
}

Part part_of(const Job& job, int index) {
  const int64_t m = job.problem->m, panels = panel_count(job.problem->weights->n);
  if (!job.by_columns) {
    const int64_t unit = job.kernel->codes.interleaved_rows, units = ceil_div(m, unit);
    const auto row = [&](int64_t i) { return std::min(piece(units, i, job.parts) * unit, m); };
    return {row(index), row(index + 1), 0, panels};
  }
  const int64_t group = job.tile.n / kPanelColumns, groups = ceil_div(panels, group);
  const auto panel = [&](int64_t i) { return std::min(piece(groups, i, job.parts) * group, panels); };
  return {0, m, panel(index), panel(index + 1)};
}

}  // namespace torchq
