#include "patches.h"

#include <algorithm>
#include <cstring>

namespace torchq {
namespace conv {
namespace {

// Copies a patch to the byte, and zeros up to `whole` bytes.
void copy_patch(const Runs& runs, const uint8_t* from, int64_t whole, uint8_t* to) {
  uint8_t* end = to + whole;
  for (int64_t o = 0; o < runs.counts[0]; ++o)
    for (int64_t m = 0; m < runs.counts[1]; ++m)
      for (int64_t i = 0; i < runs.counts[2]; ++i, to += runs.bytes)
        std::memcpy(to, from + o * runs.steps[0] + m * runs.steps[1] + i * runs.steps[2], runs.bytes);
  std::memset(to, 0, end - to);
}

// Of these patches, so many may be gathered, which reads beyond their runs. The image of a band has slack behind it,
// and x has none.
int64_t count_inside(const Job& job, const uint8_t* patch, int64_t step, int64_t count) {
  const Problem& p = *job.problem;
  if (!job.image_in_place || step == 0) return job.image_in_place ? 0 : count;
  const uint8_t* end = static_cast<const uint8_t*>(p.x.data) + p.batch * p.geometry.axes[0].size * job.plane_bytes;
  int64_t read = job.runs.bytes + kGatherBeyond;
  for (int a = 0; a < kAxes; ++a) read += (job.runs.counts[a] - 1) * job.runs.steps[a];
  const int64_t left = end - patch - read;
  return left < 0 ? 0 : std::min(count, left / step + 1);
}

// Rows one after the other: copied to s.patch, and from there to every other 8 bytes.
void load_interleaved(const Job& job, const uint8_t* patch, int64_t step, int64_t row, int64_t count, int64_t whole,
                      const Scratch& s) {
  for (int64_t end = row + count; row < end; ++row, patch += step) {
    copy_patch(job.runs, patch, whole, s.patch);
    uint8_t* to = s.rows.codes + row / 2 * 2 * job.row_stride + row % 2 * 8;
    for (int64_t i = 0; i < whole; i += 8) std::memcpy(to + 2 * i, s.patch + i, 8);
  }
}

void load_line(const Job& job, const uint8_t* patch, int64_t step, int64_t row, int64_t count, int64_t whole,
               const Scratch& s) {
  if (job.kernel->codes.interleaved_rows > 1) return load_interleaved(job, patch, step, row, count, whole, s);
  const int64_t inside = count_inside(job, patch, step, count);
  uint8_t* to = s.rows.codes + row * job.row_stride;
  job.kernel->gather({patch, inside, step, job.runs, to, job.row_stride});
  for (int64_t i = inside; i < count; ++i) copy_patch(job.runs, patch + i * step, whole, to + i * job.row_stride);
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

Line line_of(const Geometry& g, int64_t pixel, int64_t end) {
  const int64_t inner = g.axes[2].outputs(), middle = g.axes[1].outputs();
  const bool by_outer = inner * middle == 1;
  return {by_outer ? end - pixel : std::min(end, (pixel / inner + 1) * inner) - pixel,
          pixel / (inner * middle) * g.axes[0].stride, pixel / inner % middle * g.axes[1].stride,
          pixel % inner * g.axes[2].stride, by_outer ? 0 : 2};
}

int64_t patch_at(const Job& job, int64_t pixel, int64_t first_outer, int64_t group) {
  const Geometry& g = job.problem->geometry;
  const Line line = line_of(g, pixel, pixel + 1);
  return (line.outer - first_outer) * job.plane_bytes + line.middle * job.line_bytes + line.inner * job.pixel_bytes +
         group * g.group_inputs() * job.kernel->codes.bytes;
}

void load_patches(const Job& job, const uint8_t* image, int64_t first_outer, int64_t group, int64_t pixel,
                  int64_t count, const Scratch& s) {
  const Geometry& g = job.problem->geometry;
  const CodeFormat& format = job.kernel->codes;
  const int64_t whole = round_up(g.depth(), std::max<int64_t>(8, format.depth_multiple)) * format.bytes;
  int64_t row = 0;
  while (row < count) {
    const Line line = line_of(g, pixel + row, pixel + count);
    const int64_t step = g.axes[line.axis].stride * (line.axis == 0 ? job.plane_bytes : job.pixel_bytes);
    load_line(job, image + patch_at(job, pixel + row, first_outer, group), step, row, line.count, whole, s);
    row += line.count;
  }
}

}  // namespace conv
}  // namespace torchq
