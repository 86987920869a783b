// How a problem is computed: what lies where, the bands and blocks, the parts, the scratch.

#include <algorithm>

#include "conv.h"
#include "outputs.h"
#include "patches.h"
#include "scratch.h"

namespace torchq {
namespace conv {
namespace {

// Bytes of an image, and of the rows and outputs of a block, that stay in L2 beside the weights that stream past.
constexpr int64_t kImageBudget = 384 << 10, kRowsBudget = 256 << 10;
constexpr int64_t kLanesBudget = 128 << 10;                   // of 16 channels of a depthwise image
constexpr int64_t kOutputsPerThread = 64 << 10;               // of a depthwise convolution, that pay for a thread
constexpr int64_t kMostRows = 1024;                           // of a block
constexpr int64_t kWaitingRows = 192, kWaitingColumns = 192;  // of a block whose outputs wait

// A GEMM of these rows of ready codes.
torchq::Job product_of(const Kernel& kernel, const Problem& p, int64_t rows) {
  static constexpr CodeRows kReady{};
  torchq::Problem product{};
  product.m = rows;
  product.x.ready = &kReady;
  product.weights = &p.weights_of(0);
  product.y.residual.data = p.residual.data;
  torchq::Job job = torchq::schedule(kernel, product);
  job.problem = nullptr;
  return job;
}

// The output rows of a band: as many as there are, or whose image fits.
int64_t rows_of_band(const Job& job) {
  const Axis& outer = job.problem->geometry.axes[0];
  const int64_t all = outer.outputs();
  const bool is_depthwise = job.problem->is_depthwise;
  if (job.image_in_place && !is_depthwise) return all;
  int64_t rows = kImageBudget / job.plane_bytes;
  if (is_depthwise) rows = std::min(rows, kLanesBudget * job.pixel_bytes / (job.plane_bytes * kPanelColumns * 4));
  const int64_t fit = (rows - outer.extent()) / outer.stride + 1;
  return ceil_div(all, ceil_div(all, std::max<int64_t>(fit, 1)));
}

int64_t rows_of_block(const Job& job, int64_t tile_rows) {
  const Geometry& g = job.problem->geometry;
  int64_t fit = std::min(kRowsBudget / job.row_stride, kMostRows);
  if (!job.y_in_place) fit = std::min(fit, kWaitingRows);
  return std::min(round_up(g.out_pixels(), tile_rows), std::max<int64_t>(fit / tile_rows, 1) * tile_rows);
}

// What a GEMM needs to be scheduled: rows, blocks, columns.
void schedule_product(Job& job, int most_parts) {
  const Problem& p = *job.problem;
  const Geometry& g = p.geometry;
  const torchq::Job sample = product_of(*job.kernel, p, g.out_pixels());
  job.rows_in_place = rows_lie_in_image(job, job.row_stride);
  if (job.rows_in_place && job.image_in_place && g.depth() % 8) job.rows_in_place = false;  // nothing lies behind x
  if (!job.rows_in_place) job.row_stride = sample.codes_stride;
  job.band_rows = rows_of_band(job);
  job.block_rows = rows_of_block(job, sample.tile.m);

  const torchq::Job all = product_of(*job.kernel, p, p.batch * g.out_pixels());
  job.by_columns = all.by_columns && g.groups == 1 && job.y_in_place;
  job.parts = std::min(all.parts, most_parts);
  job.column_parts = job.by_columns ? job.parts : job.y_in_place ? 1 : ceil_div(g.group_outputs(), kWaitingColumns);
  job.product = product_of(*job.kernel, p, job.block_rows);
  job.product.codes_stride = job.row_stride;
  job.product.by_columns = true;
  job.product.parts = job.column_parts;
}

void schedule_depthwise(Job& job, int most_parts) {
  const Geometry& g = job.problem->geometry;
  job.image_in_place = job.image_in_place && g.in_channels % kPanelColumns == 0;  // 16 codes are read at once
  job.rows_in_place = true;                                                       // there are none
  job.row_stride = job.block_rows = 0;
  job.band_rows = rows_of_band(job);
  const int64_t outputs = job.problem->batch * g.out_pixels() * g.out_channels;
  job.parts = static_cast<int>(std::clamp<int64_t>(outputs / kOutputsPerThread, 1, most_parts));
}

// The kernel whose depthwise() takes floats: this one, or where it takes codes four taps at once, the best that does.
const Kernel& that_takes_floats(const Kernel& kernel) {
  for (int i = 0; kernel.interleave && i < kernel_count(); ++i)
    if (!kernel_at(i).interleave && can_run(kernel_at(i))) return kernel_at(i);
  return kernel;
}

}  // namespace

Job schedule(const Kernel& asked, const Problem& problem, int most_parts) {
  const Geometry& g = problem.geometry;
  const Kernel& kernel = problem.multiplies_floats() ? that_takes_floats(asked) : asked;
  const CodeFormat& format = kernel.codes;
  Job job{};
  job.problem = &problem;
  job.kernel = &kernel;
  job.pixel_bytes = g.in_channels * format.bytes;
  job.line_bytes = g.axes[2].padded() * job.pixel_bytes;
  job.plane_bytes = g.axes[1].padded() * job.line_bytes;
  bool is_padded = false;
  for (const Axis& axis : g.axes) is_padded |= axis.padded() > axis.size;
  job.image_in_place = problem.x.dtype == DType::u8 && !is_padded && format.bytes == 1 && format.shift == 0;
  job.runs = runs_of(job);
  job.y_in_place = problem.y.channels_last || g.out_pixels() == 1;
  problem.is_depthwise ? schedule_depthwise(job, most_parts) : schedule_product(job, most_parts);
  if (!job.image_in_place && !problem.multiplies_floats())
    job.image_bytes = job.image_rows() * job.plane_bytes + kSlack;
  job.scratch_bytes = scratch_bytes(job);
  return job;
}

}  // namespace conv
}  // namespace torchq
