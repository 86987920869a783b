// A problem -> a Job.

#include <algorithm>

#include "../gemm/divide.h"
#include "attention.h"
#include "scratch.h"

namespace torchq {
namespace attention {
namespace {

constexpr int64_t kMaxParts = 1 << 16;              // more than there are threads
constexpr int64_t kWorkPerThread = 1 << 19;         // multiply-adds that justify waking one more thread
constexpr int64_t kScoresBytes = 48 * 1024;         // of a block: they are written and read again, so they stay in L2
constexpr int64_t kFewestRows = 6, kMostRows = 48;  // of a block: a tile; eight, for which each key is read once

}  // namespace

Job schedule(const Kernel& kernel, const Problem& p) {
  Job job;
  job.problem = &p;
  job.kernel = &kernel;
  const int64_t fit = kScoresBytes / (4 * std::max<int64_t>(p.keys, 1));
  job.blocks = ceil_div(p.rows, std::min(std::max(fit, kFewestRows), kMostRows));
  job.block_rows = ceil_div(p.rows, job.blocks);
  const int64_t heads = p.batch * p.heads;
  const int64_t work = heads * p.rows * p.keys * (p.depth + p.columns) / kWorkPerThread;
  job.parts = static_cast<int>(std::max<int64_t>(std::min({work, heads * job.blocks, kMaxParts}), 1));
  job.scratch_bytes = scratch_bytes(job);
  return job;
}

}  // namespace attention
}  // namespace torchq
