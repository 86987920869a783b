#include "patches.h"

#include <algorithm>
#include <cstring>

namespace torchq {
namespace conv {
namespace {

constexpr int64_t kVector = 16;  // bytes that are copied at once

// In whole vectors: it reads and writes up to kVector - 1 bytes beyond the end.
inline void copy_beyond(uint8_t* to, const uint8_t* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += kVector) std::memcpy(to + i, from + i, kVector);
}

// Copies a patch. Runs go in order, so that what one wrote too far is overwritten by the next.
void copy_patch(const Runs& runs, const uint8_t* from, bool to_the_byte, uint8_t* to) {
  for (int64_t o = 0; o < runs.counts[0]; ++o)
    for (int64_t m = 0; m < runs.counts[1]; ++m)
      for (int64_t i = 0; i < runs.counts[2]; ++i, to += runs.bytes) {
        const uint8_t* run = from + o * runs.steps[0] + m * runs.steps[1] + i * runs.steps[2];
        to_the_byte ? void(std::memcpy(to, run, runs.bytes)) : copy_beyond(to, run, runs.bytes);
      }
}

}  // namespace

Runs runs_of(const Job& job) {
  const Geometry& g = job.problem->geometry;
  const int64_t axis_bytes[] = {job.plane_bytes, job.line_bytes, job.pixel_bytes};
  Runs runs;
  runs.bytes = g.group_inputs() * job.kernel->codes.bytes;
  bool joins = true;  // as long as taps lie side by side
  for (int a = kAxes - 1; a >= 0; --a) {
    const Axis& axis = g.axes[a];
    runs.counts[a] = axis.kernel;
    runs.steps[a] = axis_bytes[a] * axis.dilation;
    joins = joins && (axis.kernel == 1 || runs.steps[a] == runs.bytes);
    if (!joins) continue;
    runs.bytes *= axis.kernel;
    runs.counts[a] = 1;
  }
  return runs;
}

bool rows_lie_in_image(const Job& job, int64_t& row_stride) {
  const Geometry& g = job.problem->geometry;
  const CodeFormat& format = job.kernel->codes;
  // A kernel reads whole groups of 8 codes, whose weights are 0 beyond the depth, and multiples of depth_multiple,
  // whose weights may be anything.
  if (job.runs.counts[0] * job.runs.counts[1] * job.runs.counts[2] > 1 || format.interleaved_rows > 1) return false;
  if (g.depth() % format.depth_multiple) return false;
  const int64_t axis_bytes[] = {job.plane_bytes, job.line_bytes, job.pixel_bytes};
  row_stride = 0;
  int64_t span = 0;  // from the first output of the axes seen so far to the one behind their last
  for (int a = kAxes - 1; a >= 0; --a) {
    const int64_t outputs = g.axes[a].outputs(), step = axis_bytes[a] * g.axes[a].stride;
    if (outputs == 1) continue;
    if (row_stride && step != span) return false;
    if (!row_stride) row_stride = step;
    span = outputs * step;
  }
  if (!row_stride) row_stride = job.plane_bytes;
  return true;
}

int64_t patch_at(const Job& job, int64_t pixel, int64_t first_outer, int64_t group) {
  const Geometry& g = job.problem->geometry;
  const int64_t inner = g.axes[2].outputs(), middle = g.axes[1].outputs();
  return (pixel / (inner * middle) * g.axes[0].stride - first_outer) * job.plane_bytes +
         pixel / inner % middle * g.axes[1].stride * job.line_bytes +
         pixel % inner * g.axes[2].stride * job.pixel_bytes + group * g.group_inputs() * job.kernel->codes.bytes;
}

void load_patches(const Job& job, const uint8_t* image, int64_t first_outer, int64_t group, int64_t pixel,
                  int64_t count, const Scratch& s) {
  const CodeFormat& format = job.kernel->codes;
  const int64_t depth = job.problem->geometry.depth();
  const int64_t whole = round_up(depth, std::max<int64_t>(8, format.depth_multiple));
  for (int64_t r = 0; r < count; ++r) {
    uint8_t* row = s.rows.codes + r * job.row_stride;
    uint8_t* to = format.interleaved_rows == 1 ? row : s.patch;
    copy_patch(job.runs, image + patch_at(job, pixel + r, first_outer, group), job.image_in_place, to);
    std::memset(to + depth * format.bytes, 0, (whole - depth) * format.bytes);
    if (format.interleaved_rows == 1) continue;
    row = s.rows.codes + r / 2 * 2 * job.row_stride + r % 2 * 8;
    for (int64_t i = 0; i < whole; i += 8) std::memcpy(row + 2 * i, to + i, 8);
  }
}

}  // namespace conv
}  // namespace torchq
