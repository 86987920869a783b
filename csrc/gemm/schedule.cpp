// How a problem is computed: which kernel really runs, its tile shape, the blocks of rows, the parts, the scratch.

#include <algorithm>
#include <cstring>

#include "divide.h"
#include "gemm.h"
#include "scratch.h"

namespace torchq {
namespace {

// The size of L2 in CPUs with AMX, in bytes. Only amx_int8 has different limits for weights that do not fit in it.
constexpr int64_t kL2Bytes = 2 << 20;

constexpr int64_t kMaxParts = 1 << 16;  // more than there are threads

// Bytes of rows of x that are surely not all in L2, where the layer before left them.
constexpr int64_t kBeyondL2 = 1 << 20;

// Bytes of weights that stay in L2 beside a block of such rows, and of its codes then: to read the weights again costs
// nothing, and the rows of x come while the block before them multiplies. 1024x384x384 takes 3 % less than in one
// block.
constexpr int64_t kStaysInL2 = 640 << 10, kSmallBlock = 64 << 10;

// All weights of a job.
struct Size {
  int64_t n = 0, k = 0, bytes = 0;

  Size(const Problem* problems, int count) : k(problems->weights->k) {
    for (int i = 0; i < count; ++i) {
      const PackedHeader& weights = *problems[i].weights;
      n += weights.n, bytes += packed_bytes(weights.n, k, weights.has_channel_scale);
    }
  }
};

// The kernel asked for, or the one that it leaves small problems to.
const Kernel& choose_kernel(const Kernel& kernel, int64_t m, const Size& weights, bool beyond_l2) {
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

// Panels of a tile, and how many such groups of panels a problem's weights have.
int64_t panels_of_tile(const Job& job) { return job.tile.n / kPanelColumns; }
int64_t groups_of(const Job& job, const Problem& problem) {
  return ceil_div(panel_count(problem.weights->n), panels_of_tile(job));
}

// The same of the first problems of a job together.
int64_t groups_of(const Job& job, int problems) {
  int64_t groups = 0;
  for (int i = 0; i < problems; ++i) groups += groups_of(job, job.problem[i]);
  return groups;
}

// As many as there are threads that pay, and no more than there are tiles to hand out.
int count_parts(const Job& job, int64_t m, const Size& weights) {
  const Threading& threading = job.kernel->threading;
  const int64_t work = std::max<int64_t>(m, threading.min_rows) * weights.n * weights.k / threading.work_per_thread;
  if (work <= 1) return 1;
  const int64_t tiles = job.by_columns ? groups_of(job, job.problems) : ceil_div(m, job.tile.m);
  return static_cast<int>(std::max<int64_t>(std::min({work, tiles, kMaxParts}), 1));
}

// Rows of a block: whole tiles, whose codes fit the budget.
int64_t rows_of_block(const Job& job, const Problem& p, const Size& weights) {
  const Tiling& tiling = job.kernel->tiling;
  const int64_t m = p.m;
  const bool small = tiling.next_lines && m * p.x.stride > kBeyondL2 && weights.bytes <= kStaysInL2;
  const int64_t fit = (small ? kSmallBlock : tiling.codes_budget) / job.codes_stride, tile = job.tile.m;
  return std::min(round_up(m, tile), std::max<int64_t>(fit / tile, 1) * tile);
}

}  // namespace

bool read_the_same(const Problem& one, const Problem& other) {
  const Input &x = one.x, &y = other.x;
  if (one.m != other.m || x.data != y.data || x.stride != y.stride || x.dtype != y.dtype || x.ready || y.ready)
    return false;
  if (x.per_token != y.per_token) return false;
  if (!x.per_token && (x.qparams.scale != y.qparams.scale || x.qparams.zero_point != y.qparams.zero_point))
    return false;
  const PackedHeader &v = *one.weights, &w = *other.weights;
  if (v.k != w.k || v.layout != w.layout || v.has_channel_scale != w.has_channel_scale) return false;
  return !v.has_channel_scale || !std::memcmp(channel_scale_of(v), channel_scale_of(w), v.k * sizeof(float));
}

Job schedule(const Kernel& asked, const Problem* problems, int count) {
  const Problem& problem = *problems;
  const Size weights(problems, count);
  const int64_t m = problem.m;
  const bool beyond_l2 = weights.bytes > kL2Bytes;
  const Kernel& kernel = choose_kernel(asked, m, weights, beyond_l2);
  const Tiling& tiling = kernel.tiling;

  Job job;
  job.problem = problems;
  job.problems = count;
  job.kernel = &kernel;
  job.tile = m > tiling.tile.m && m <= tiling.tall.m ? tiling.tall : tiling.tile;
  job.by_columns = splits_by_columns(kernel.threading, m, beyond_l2);
  job.parts = count_parts(job, m, weights);
  job.codes_stride = stride_of_codes(weights.k, kernel.codes.bytes);
  job.block_rows = rows_of_block(job, problem, weights);
  job.scratch_bytes = scratch_bytes(job);
  return job;
}

Part part_of(const Job& job, int index) {
  const int64_t m = job.problem->m, group = panels_of_tile(job);
  const int64_t before = groups_of(job, job.problems - 1), groups = groups_of(job, job.problems);
  const int64_t panels = before * group + panel_count(job.problem[job.problems - 1].weights->n);
  if (!job.by_columns) {
    const int64_t unit = job.kernel->codes.interleaved_rows, units = ceil_div(m, unit);
    const auto row = [&](int64_t i) { return std::min(piece(units, i, job.parts) * unit, m); };
    return {row(index), row(index + 1), 0, panels};
  }
  const auto panel = [&](int64_t i) { return std::min(piece(groups, i, job.parts) * group, panels); };
  return {0, m, panel(index), panel(index + 1)};
}

Part part_in(const Job& job, const Part& part, int index) {
  const int64_t first = groups_of(job, index) * panels_of_tile(job),
                panels = panel_count(job.problem[index].weights->n);
  const auto within = [&](int64_t panel) { return std::clamp<int64_t>(panel - first, 0, panels); };
  return {part.row_begin, part.row_end, within(part.panel_begin), within(part.panel_end)};
}

}  // namespace torchq
