// Parts: they cover y exactly once, and in any order, on any thread, they give the bits of one part. So do problems
// that read the same rows, together.

#include <algorithm>
#include <thread>

#include "problem.h"

namespace torchq::test {
namespace {

std::vector<Part> parts_of(const Kernel& kernel, const Problem& problem, int count) {
  Job job = schedule(kernel, problem);
  job.parts = count;
  std::vector<Part> parts;
  for (int i = 0; i < count; ++i) parts.push_back(part_of(job, i));
  return parts;
}

// Paints every element of y as often as a part covers it.
void check_cover(const Kernel& kernel, const std::vector<Part>& parts, int64_t m, int64_t n) {
  std::vector<int> painted(m * n);
  bool inside = true;
  for (const Part& p : parts) {
    inside &= p.row_begin >= 0 && p.row_begin <= p.row_end && p.row_end <= m && p.panel_begin >= 0 &&
              p.panel_begin <= p.panel_end && p.panel_end <= panel_count(n);
    for (int64_t r = p.row_begin; inside && r < p.row_end; ++r)
      for (int64_t c = p.panel_begin * kPanelColumns; c < std::min(p.panel_end * kPanelColumns, n); ++c)
        ++painted[r * n + c];
  }
  check(kernel.name, inside, "a part lies outside y or is upside down");
  const auto wrong = std::find_if(painted.begin(), painted.end(), [](int times) { return times != 1; });
  const auto at = static_cast<int>(wrong - painted.begin());
  check(kernel.name, wrong == painted.end(), "element %d of y: expected 1 part, got %d", at,
        wrong == painted.end() ? 1 : *wrong);
}

// Two threads, each with every second part and its own scratch, into one y.
std::vector<uint8_t> run_on_two_threads(const Kernel& kernel, Stage& stage, const Out& out, int count) {
  Problem into = stage.problem(out, kernel.layout);
  std::vector<uint8_t> region = stage.blank(out);
  into.y.data = region.data();
  Job job = schedule(kernel, into);
  job.parts = count;
  const auto work = [&](int first) {
    std::vector<uint8_t> scratch(job.scratch_bytes);
    for (int i = first; i < count; i += 2) torchq::run(job, i, scratch.data());
  };
  std::thread other(work, 1);
  work(0);
  other.join();
  return region;
}

// The codes of all rows first, by parts of their own; x is lost when these are multiplied.
std::vector<uint8_t> run_ready(const Kernel& kernel, Stage& stage, const Out& out, int quantizing, int count) {
  Problem into = stage.problem(out, kernel.layout);
  std::vector<uint8_t> region = stage.blank(out);
  into.y.data = region.data();
  Job job = schedule(kernel, into);
  std::vector<uint8_t> memory(ready_bytes(job)), scratch(job.scratch_bytes);
  const CodeRows rows = ready_rows(job, memory.data());
  const int64_t unit = kernel.codes.interleaved_rows;
  for (int i = 0; i < quantizing; ++i)
    quantize(job, std::min(i * into.m / quantizing / unit * unit, into.m),
             i + 1 == quantizing ? into.m : (i + 1) * into.m / quantizing / unit * unit, rows);
  into.x.data = nullptr;
  into.x.ready = &rows;
  job.parts = count;
  for (int i = 0; i < count; ++i) torchq::run(job, i, scratch.data());
  return region;
}

void check_parts(const Kernel& kernel, int64_t m, int64_t n, int64_t k, Kind kind) {
  const Weights weights = random_weights(n, k);
  const Rows rows = random_rows(m, k, kind);
  const Out out{DType::f32, Activation::none, {1.0f, 0}};
  Stage stage(rows, weights, Side::start, 2);  // at the start y has no offset: run_on_two_threads() relies on it
  const std::vector<uint8_t> whole = stage.run(kernel, out);
  for (int count = 1; count <= 5; ++count) {
    now("%d parts, %s", count, describe(rows, weights, out, "random").c_str());
    check_cover(kernel, parts_of(kernel, stage.problem(out), count), m, n);
    std::vector<int> order(count);
    for (int i = 0; i < count; ++i) order[i] = count - 1 - i;
    stage.compare(kernel.name, out, stage.run(kernel, out, order, count), whole);
    std::rotate(order.begin(), order.begin() + count / 2, order.end());
    stage.compare(kernel.name, out, stage.run(kernel, out, order, count), whole);
    stage.compare(kernel.name, out, run_on_two_threads(kernel, stage, out, count), whole);
    stage.compare(kernel.name, out, run_ready(kernel, stage, out, 1 + count % 2, count), whole);
  }
}

// A sum and a LayerNorm of y: by each part, or where parts have some of its columns only, by the caller behind them.
// With `apart` y keeps the sum, and the LayerNorm gives other rows.
void check_norm(const Kernel& kernel, int64_t m, int64_t n, int64_t k, bool apart) {
  const Weights weights = random_weights(n, k);
  const Rows rows = random_rows(m, k, {DType::f32, true});
  const Out out{DType::f32, Activation::none, {1.0f, 0}};
  Stage stage(rows, weights, Side::start, 0);
  std::vector<float> weight(n), bias(n), residual(m * n);
  for (std::vector<float>* values : {&weight, &bias, &residual})
    for (float& v : *values) v = random_source.uniform(-2, 2);
  const auto norm_of = [&](std::vector<uint8_t>& region) {
    auto* y = reinterpret_cast<float*>(region.data());
    return NormRows{m, n, y, weight.data(), bias.data(), 1e-5f, y, residual.data()};
  };
  std::vector<uint8_t> want = stage.run(kernel, out), sums = want;
  for (int64_t i = 0; i < m * n; ++i) reinterpret_cast<float*>(sums.data())[i] += residual[i];
  normalize(kernel_reference, norm_of(want));
  for (int count = 1; count <= 3; ++count) {
    now("a norm behind %d parts, %s", count, describe(rows, weights, out, "random").c_str());
    std::vector<uint8_t> region = stage.blank(out);
    std::vector<uint8_t> normed = region;
    NormRows norm = norm_of(region);
    if (apart) norm.sum = reinterpret_cast<float*>(region.data()), norm.y = reinterpret_cast<float*>(normed.data());
    Problem into = stage.problem(out, kernel.layout);
    into.y.data = region.data();
    into.norm = &norm;
    Job job = schedule(kernel, into);
    job.parts = count;
    std::vector<uint8_t> scratch(job.scratch_bytes);
    for (int i = 0; i < count; ++i) torchq::run(job, i, scratch.data());
    if (!gives_whole_rows(job)) normalize(*job.kernel, norm);
    stage.compare(kernel.name, out, apart ? normed : region, want);
    if (apart) stage.compare(kernel.name, out, region, sums);
  }
}

// Weights that no L2 holds. Up to how many rows each thread reads only its own weights is the kernel's to say.
void check_weights_beyond_l2(const Kernel& kernel) {
  const int64_t n = 1000, k = 4096;
  std::vector<uint8_t> packed(packed_bytes(n, k, false));
  pack_begin(kernel.layout, n, k, false, nullptr, packed.data());
  Problem problem{};
  problem.weights = reinterpret_cast<const PackedHeader*>(packed.data());
  for (int64_t m : {9, 32, 33, 128, 129}) {
    problem.m = m;
    now("parts of m=%d n=1000 k=4096", static_cast<int>(m));
    const std::vector<Part> parts = parts_of(kernel, problem, 3);
    check_cover(kernel, parts, m, n);
    const bool columns = m <= (kernel.tiling.own_loops ? 128 : 32);
    check(kernel.name, (parts[0].row_end == m) == columns, "expected a split by %s", columns ? "columns" : "rows");
  }
}

// How many parts a problem is worth: one for little work, many for much.
void check_counts(const Kernel& kernel, int64_t m, int64_t n, int64_t k, bool large) {
  const Weights weights{n, k, std::vector<int8_t>(n * k), std::vector<float>(n), {}};
  const std::vector<uint8_t> packed = packed_of(weights, kernel.layout);
  Problem problem{};
  problem.m = m;
  problem.weights = reinterpret_cast<const PackedHeader*>(packed.data());
  now("parts of m=%d n=%d k=%d", static_cast<int>(m), static_cast<int>(n), static_cast<int>(k));
  const int parts = schedule(kernel, problem).parts;
  check(kernel.name, large ? parts >= 5 : parts == 1, "expected %s, got %d", large ? "at least 5" : "1", parts);
}

// A kernel that counts the rows whose range it finds.
int ranges_found = 0;
RowRange count_range(const FloatRow& row) {
  ++ranges_found;
  return kernel_reference.range(row);
}

// Three problems of the same rows, one with a ragged panel, one with an activation, one in bf16: each has the bits that
// it has alone, by any number of parts, and each row is quantized once for all of them by each part that has it.
void check_together(const Kernel& kernel, int64_t m, int64_t k, bool scaled) {
  const Rows rows = random_rows(m, k, {DType::f32, true});
  const Out outs[] = {{DType::f32, Activation::none, {1.0f, 0}},
                      {DType::f32, Activation::gelu, {1.0f, 0}},
                      {DType::bf16, Activation::none, {1.0f, 0}}};
  Weights weights[] = {random_weights(128, k), random_weights(70, k), random_weights(33, k)};
  const std::vector<float> scale = random_channel_scale(k);
  std::vector<Stage> stages;
  for (Weights& each : weights) {
    if (scaled) each.channel_scale = scale;
    stages.emplace_back(rows, each, Side::start, 2);
  }
  for (int count = 1; count <= 5; ++count) {
    now("%d parts of three problems, m=%d k=%d", count, static_cast<int>(m), static_cast<int>(k));
    std::vector<uint8_t> regions[3];
    Problem problems[3];
    for (int i = 0; i < 3; ++i) {
      problems[i] = stages[i].problem(outs[i], kernel.layout);
      regions[i] = stages[i].blank(outs[i]);
      problems[i].y.data = regions[i].data();
      problems[i].x.data = problems[0].x.data;
      check(kernel.name, read_the_same(problems[0], problems[i]), "problem %d reads other rows", i);
    }
    Job job = schedule(kernel, problems, 3);
    job.parts = count;
    std::vector<uint8_t> scratch(job.scratch_bytes);
    ranges_found = 0;
    for (int i = count - 1; i >= 0; --i) torchq::run(job, i, scratch.data());
    const int64_t once = job.by_columns ? m * count : m;
    if (kernel.range == count_range) check("core", ranges_found == once, "%d ranges, not one a row", ranges_found);
    for (int i = 0; i < 3; ++i) stages[i].compare(kernel.name, outs[i], regions[i], stages[i].run(kernel, outs[i]));
  }
}

// What makes codes differ, or where they are.
void check_read_the_same() {
  const Rows rows = random_rows(4, 24, {DType::f32, false});
  Weights weights[] = {random_weights(16, 24), random_weights(32, 24), random_weights(16, 24), random_weights(16, 16)};
  weights[1].channel_scale = weights[2].channel_scale = random_channel_scale(24);
  weights[2].channel_scale[23] *= 2;
  std::vector<std::vector<uint8_t>> packed;
  for (const Weights& each : weights) packed.push_back(packed_of(each, Layout::p16c4));
  const auto header = [&](int i) { return reinterpret_cast<const PackedHeader*>(packed[i].data()); };
  Stage stage(rows, weights[0], Side::start, 0);
  const Problem one = stage.problem({DType::f32, Activation::none, {1.0f, 0}});
  const auto differs = [&](const char* what, auto change) {
    Problem other = one;
    change(other);
    check("core", !read_the_same(one, other), "%s: expected other codes", what);
  };
  check("core", read_the_same(one, one), "a problem reads other rows than itself");
  differs("rows", [](Problem& p) { ++p.m; });
  differs("place", [](Problem& p) { p.x.data = static_cast<const float*>(p.x.data) + 1; });
  differs("stride", [](Problem& p) { p.x.stride += 4; });
  differs("dtype", [](Problem& p) { p.x.dtype = DType::bf16; });
  differs("ranges of rows", [](Problem& p) { p.x.per_token = true; });
  differs("scale", [](Problem& p) { p.x.qparams.scale *= 2; });
  differs("zero point", [](Problem& p) { ++p.x.qparams.zero_point; });
  differs("depth", [&](Problem& p) { p.weights = header(3); });
  differs("channel scale", [&](Problem& p) { p.weights = header(1); });
  Problem scaled = one, other = one;
  scaled.weights = header(1), other.weights = header(2);
  check("core", read_the_same(scaled, scaled) && !read_the_same(scaled, other), "channel scales count by their values");
}

}  // namespace

void test_parts() {
  check_read_the_same();
  Kernel counting = kernel_reference;
  counting.range = count_range;
  for (int64_t m : {5, 70}) check_together(counting, m, 37, false);
  for (const Kernel* kernel : runnable()) {
    for (int64_t m : {0, 1, 5, 32, 33, 64, 100})  // up to 32 rows columns are split, beyond it rows
      for (int64_t n : {0, 1, 16, 70, 200}) check_parts(*kernel, m, n, 37, {DType::f32, true});
    for (bool apart : {false, true}) {
      for (int64_t m : {1, 5, 33, 100}) check_norm(*kernel, m, 70, 37, apart);
      check_norm(*kernel, 200, 400, 384, apart);
    }
    check_parts(*kernel, 3, 70, 9001, {DType::bf16, true});
    check_parts(*kernel, 70, 33, 9001, {DType::u8, false});
    for (int64_t m : {1, 5, 33, 100})
      for (bool scaled : {false, true}) check_together(*kernel, m, 37, scaled);
    check_together(*kernel, 300, 384, true);
    check_weights_beyond_l2(*kernel);
    check_counts(*kernel, 0, 16, 16, false);
    check_counts(*kernel, 1, 0, 0, false);
    check_counts(*kernel, 6, 64, 64, false);
    check_counts(*kernel, 16, 1024, 4096, true);
    check_counts(*kernel, 512, 1024, 256, true);
  }
}

}  // namespace torchq::test
