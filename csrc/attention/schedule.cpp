// A problem -> a Job.

#include <algorithm>

#include "../gemm/divide.h"
#include "attention.h"
#include "products.h"
#include "scratch.h"

namespace torchq {
namespace attention {
namespace {

constexpr int64_t kMaxParts = 1 << 16;       // more than there are threads
constexpr int64_t kWorkPerThread = 1 << 19;  // multiply-adds that justify waking one more thread
constexpr int64_t kScoresBytes = 48 * 1024;  // of a block: they are written and read again, so they stay in L2

// Multiply-adds of a block of codes, up to which the GEMM's kernel leaves them to the one for its small problems. AMX's
// tiles are set up for each product: 64 x 64 x 32 takes 11 % less time without them, 32 x 128 x 64 as much.
constexpr int64_t kSmallBlock = 1 << 17;

constexpr int64_t kFewRows = 4;  // of all heads that share one of k and v: they are computed in place

void choose_products(const Problem& p, Job& job) {
  const bool few = p.rows * (p.heads / p.kv_heads) <= kFewRows;
  const bool codes = p.scheme == Scheme::codes || p.scheme == Scheme::codes_bf16;
  const bool halves = p.scheme == Scheme::bf16 || p.scheme == Scheme::codes_bf16;
  job.key_product = few ? &keys_in_place : codes ? &keys_in_codes : halves ? &keys_in_halves : &keys_in_floats;
  job.value_product = few                         ? &values_in_place
                      : halves                    ? &values_in_halves
                      : p.scheme == Scheme::codes ? &values_in_codes
                                                  : &values_in_floats;
}

void choose_blocks(const Problem& p, Job& job) {
  const Blocking& by = job.kernel->blocking;
  const int64_t fit = kScoresBytes / (4 * std::max<int64_t>(p.keys, 1));
  const bool sees_all = p.band.first <= 1 - p.rows && p.band.last >= p.keys - 1;
  const int64_t most = sees_all ? by.most_tiles : by.most_tiles_of_band;
  job.tiles = ceil_div(p.rows, by.tile_rows);
  job.blocks = ceil_div(job.tiles, std::clamp(fit / by.tile_rows, by.least_tiles, most));
  job.block_rows = ceil_div(job.tiles, job.blocks) * by.tile_rows;
}

bool is_small(const Problem& p, int64_t block_rows) {
  return block_rows * p.keys * std::max(p.depth, p.columns) <= kSmallBlock;
}

}  // namespace

Job schedule(const Kernel& kernel, const torchq::Kernel& gemm, const Problem& p) {
  Job job;
  job.problem = &p;
  job.kernel = &kernel;
  choose_products(p, job);
  choose_blocks(p, job);
  job.gemm = gemm.small.kernel && is_small(p, job.block_rows) ? gemm.small.kernel : &gemm;
  const int64_t heads = p.batch * p.heads;
  const int64_t work = heads * p.rows * p.keys * (p.depth + p.columns) / kWorkPerThread;
  job.parts = static_cast<int>(std::max<int64_t>(std::min({work, heads * job.blocks, kMaxParts}), 1));
  job.scratch_bytes = scratch_bytes(job);
  return job;
}

}  // namespace attention
}  // namespace torchq
