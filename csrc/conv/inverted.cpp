#include "inverted.h"

#include <algorithm>
#include <cstring>

#include "../gemm/codes.h"
#include "depthwise.h"
#include "image.h"
#include "scratch.h"

namespace torchq {
namespace conv {
namespace {

// Bytes of a band that stay in L2: the codes of x, the lanes of 16 channels, and the rows that `project` reads.
constexpr int64_t kBandBudget = 192 << 10;

constexpr int64_t kLongLine = 24;  // pixels: the tiles of a shorter line would have few rows

constexpr int64_t kOutputRowsPerThread = 8;  // at least, since the first band of a part computes more rows than others

struct InvertedScratch {
  Scratch depthwise;
  CodeRows codes;  // of the pixels of x that are new in a band
  float* kept;     // for each 16 channels the rows of lanes that the next band has, too
  float* lines;    // 16 channels of the new pixels, without padding, where lines are short
  float* rows;     // what `project` reads
  void* gemm;
};

const Axis& outer_of(const InvertedJob& job) { return job.of.depthwise->geometry.axes[0]; }

// Rows of the outer axis that two bands share.
int64_t shared_rows(const Geometry& g) { return std::max<int64_t>(g.axes[0].extent() - g.axes[0].stride, 0); }

// Of a row of the input, with and without its padding, and of a row of the output.
int64_t padded_pixels(const Geometry& g) { return g.axes[1].padded() * g.axes[2].padded(); }
int64_t row_pixels(const Geometry& g) { return g.axes[1].size * g.axes[2].size; }
int64_t out_row_pixels(const Geometry& g) { return g.axes[1].outputs() * g.axes[2].outputs(); }

InvertedScratch carve(const InvertedJob& job, Carver& from) {
  const Geometry& g = job.of.depthwise->geometry;
  const int64_t panels = panel_count(g.in_channels), pixels = job.depthwise.image_rows() * row_pixels(g);
  InvertedScratch s{};
  s.depthwise = carve(job.depthwise, from);
  if (job.of.expand) {
    const int64_t rows = pixels + job.expand.tile.m;  // a kernel may read whole tiles, and so rows that do not exist
    s.codes.codes = from.take<uint8_t>(rows * job.expand.codes_stride + kSlack);
    s.codes.scale = from.take<float>(rows);
    s.codes.zero_point = from.take<int32_t>(rows);
    s.kept = from.take<float>(panels * shared_rows(g) * padded_pixels(g) * kPanelColumns);
    s.lines = from.take<float>(pixels * kPanelColumns);
  }
  if (job.of.project) s.rows = from.take<float>(job.depthwise.band_rows * out_row_pixels(g) * g.out_channels);
  s.gemm = from.take<uint8_t>(std::max(job.expand.scratch_bytes, job.project.scratch_bytes));
  return s;
}

InvertedScratch carve(const InvertedJob& job, void* memory) {
  Carver from(memory);
  return carve(job, from);
}

// The lanes of a band that are what `expand` makes of x.
class ExpandedLanes final : public Lanes {
 public:
  // shared: so many of its rows the band before had, too. next: so many the next one has.
  ExpandedLanes(const InvertedJob& job, const Band& band, int64_t shared, int64_t next, const InvertedScratch& s)
      : job_(job), g_(job.of.depthwise->geometry), band_(band), shared_(shared), next_(next), s_(s) {
    const Places places = places_of(nullptr);
    begin_ = places.first(band.begin + shared), end_ = places.first(band.end);
    torchq::Problem rows = *job.of.expand;
    rows.x.data = static_cast<const uint8_t*>(rows.x.data) + (band.sample * g_.pixels() + begin_) * rows.x.stride;
    rows.m = end_ - begin_;
    torchq::Job its = job.expand;
    its.problem = &rows;
    quantize(its, 0, rows.m, s.codes);
  }

  void load(int64_t channel, int64_t channels) const override {
    auto* lanes = reinterpret_cast<float*>(s_.depthwise.lanes);
    const int64_t panel = channel / kPanelColumns, row = padded_pixels(g_) * kPanelColumns;
    float* kept = s_.kept + panel * shared_rows(g_) * row;
    const Places places = places_of(s_.depthwise.lanes);
    const auto clear = [](uint8_t* to, int64_t pixels) { std::memset(to, 0, pixels * kPanelColumns * 4); };
    if (channels < kPanelColumns)
      clear(places.image, (band_.end - band_.begin) * padded_pixels(g_));
    else
      places.for_each_padding(clear);
    std::memcpy(lanes, kept, shared_ * row * sizeof(float));
    expand(panel, channels, places);
    std::memcpy(kept, lanes + (band_.end - band_.begin - next_) * row, next_ * row * sizeof(float));
  }

 private:
  Places places_of(void* image) const { return {g_, band_, static_cast<uint8_t*>(image), kPanelColumns * 4}; }

  // The panel's products with pixels [first, end), to rows of 16 channels.
  void multiply(int64_t panel, int64_t first, int64_t end, float* to) const {
    torchq::Problem product = *job_.of.expand;
    torchq::Job its = job_.expand;
    const CodeRows codes = rows_from(its, s_.codes, first - begin_);
    product.m = end - first;
    product.x.ready = &codes;
    product.y = {to, kPanelColumns * 4, DType::f32, {1.0f, 0}, {}, panel};
    its.problem = &product;
    torchq::run(its, static_cast<int>(panel), s_.gemm);
  }

  void expand(int64_t panel, int64_t channels, const Places& places) const {
    const int64_t line = places.together();
    const bool directly = line >= kLongLine;
    if (!directly) {
      if (channels < kPanelColumns) std::memset(s_.lines, 0, (end_ - begin_) * kPanelColumns * sizeof(float));
      multiply(panel, begin_, end_, s_.lines);
    }
    for (int64_t pixel = begin_, next; pixel < end_; pixel = next) {
      next = std::min(end_, (pixel / line + 1) * line);
      auto* to = reinterpret_cast<float*>(places.of(pixel));
      const float* from = s_.lines + (pixel - begin_) * kPanelColumns;
      if (directly)
        multiply(panel, pixel, next, to);
      else
        std::memcpy(to, from, (next - pixel) * kPanelColumns * sizeof(float));
    }
  }

  const InvertedJob& job_;
  const Geometry& g_;
  const Band& band_;
  const int64_t shared_, next_;
  const InvertedScratch& s_;
  int64_t begin_, end_;  // pixels of x whose codes these are
};

class LanesOfX final : public Lanes {
 public:
  LanesOfX(const InvertedJob& job, const Band& band, const InvertedScratch& s) : job_(job), band_(band), s_(s) {}
  void load(int64_t channel, int64_t channels) const override {
    load_lanes_of_x(job_.depthwise, band_, channel, channels, s_.depthwise);
  }

 private:
  const InvertedJob& job_;
  const Band& band_;
  const InvertedScratch& s_;
};

// Output rows [begin, end) of a sample. shared, next: as ExpandedLanes has them.
void run_band(const InvertedJob& job, int64_t sample, int64_t begin, int64_t end, int64_t shared, int64_t next,
              const InvertedScratch& s) {
  const Problem& p = *job.of.depthwise;
  const Geometry& g = p.geometry;
  const int64_t row = out_row_pixels(g), stride = outer_of(job).stride, first = sample * g.out_pixels() + begin * row;
  const Band band{sample, begin * stride, (end - 1) * stride + outer_of(job).extent()};
  float* y = job.of.project ? s.rows : static_cast<float*>(p.y.data) + first * g.out_channels;
  const auto run_lanes = [&](const Lanes& lanes) {
    run_depthwise_lanes(job.depthwise, band, begin * row, end * row, lanes, y, s.depthwise);
  };
  if (job.of.expand)
    run_lanes(ExpandedLanes(job, band, shared, next, s));
  else
    run_lanes(LanesOfX(job, band, s));
  if (!job.of.project) return;
  torchq::Problem product = *job.of.project;
  const int64_t n = product.weights->n;
  product.m = (end - begin) * row;
  product.x.data = s.rows;
  product.y.data = static_cast<uint8_t*>(product.y.data) + first * product.y.stride;
  if (product.y.residual.data) product.y.residual = product.y.residual.from(first * n, n);
  torchq::Job its = job.project;
  its.problem = &product;
  torchq::run(its, 0, s.gemm);
}

// As many rows as the budget has room for, of nearly equal bands.
int64_t rows_of_band(const InvertedJob& job) {
  const Geometry& g = job.of.depthwise->geometry;
  const Axis& outer = outer_of(job);
  int64_t in_row = padded_pixels(g) * kPanelColumns * 4, out_row = 0;
  if (job.of.expand) in_row += row_pixels(g) * job.expand.codes_stride;
  if (job.of.project) out_row += out_row_pixels(g) * (g.out_channels * 4 + job.project.codes_stride);
  const int64_t room = kBandBudget - in_row * shared_rows(g);
  const int64_t fit = std::max<int64_t>(room / (in_row * outer.stride + out_row), 1);
  return ceil_div(outer.outputs(), ceil_div(outer.outputs(), fit));
}

}  // namespace

bool pays(const Kernel& kernel, const Inverted& inverted, int threads) {
  const bool by_panels = kernel.tiling.tile.n == kPanelColumns && !kernel.tiling.own_loops;
  if (!by_panels || kernel.codes.interleaved_rows > 1 || inverted.depthwise->has_channel_scale()) return false;
  const Problem& p = *inverted.depthwise;
  return threads == 1 || p.batch * p.geometry.axes[0].outputs() >= threads * kOutputRowsPerThread;
}

InvertedJob schedule(const Kernel& kernel, const Inverted& inverted, int most_parts) {
  const Problem& p = *inverted.depthwise;
  const Geometry& g = p.geometry;
  InvertedJob job{};
  job.of = inverted;
  job.depthwise = schedule(kernel, p, 1);
  job.depthwise.y_in_place = true;
  if (inverted.expand) {
    job.expand = torchq::schedule(kernel, *inverted.expand);
    job.expand.by_columns = true;
    job.expand.parts = static_cast<int>(panel_count(g.in_channels));
  }
  if (inverted.project) {
    job.project = torchq::schedule(kernel, *inverted.project);
    job.project.by_columns = false;
    job.project.parts = 1;
  }
  job.depthwise.band_rows = rows_of_band(job);
  if (inverted.expand) job.expand.block_rows = round_up(job.depthwise.image_rows() * row_pixels(g), job.expand.tile.m);
  job.parts = static_cast<int>(std::min<int64_t>(most_parts, p.batch * outer_of(job).outputs()));
  Carver from(nullptr);
  carve(job, from);
  job.scratch_bytes = from.bytes();
  return job;
}

void run(const InvertedJob& job, int index, void* memory) {
  const Problem& p = *job.of.depthwise;
  const InvertedScratch s = carve(job, memory);
  const int64_t rows = outer_of(job).outputs(), all = p.batch * rows;
  const int64_t begin = piece(all, index, job.parts), end = piece(all, index + 1, job.parts);
  for (int64_t row = begin, next; row < end; row = next) {
    const int64_t sample = row / rows, first = row % rows;
    next = std::min({end, row + job.depthwise.band_rows, (sample + 1) * rows});
    const bool follows = row > begin && first > 0, goes_on = next < end && next % rows > 0;
    const int64_t shared = shared_rows(p.geometry);
    run_band(job, sample, first, first + next - row, follows ? shared : 0, goes_on ? shared : 0, s);
  }
}

}  // namespace conv
}  // namespace torchq
