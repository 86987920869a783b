// What schedule() decides, shown by spies: copies of the reference kernel that note when they run. No CPU feature is
// needed, so this tests on every machine what only amx_int8 uses.

#include "problem.h"

namespace torchq::test {
namespace {

const Kernel* ran = nullptr;

Kernel spy(const char* name, void (*run)(const Block&)) {
  Kernel kernel = kernel_reference;
  kernel.name = name;
  kernel.run = run;
  return kernel;
}

void run_large(const Block& block);
void run_small(const Block& block);

Kernel large = spy("large spy", run_large), small = spy("small spy", run_small);

void run_large(const Block& block) {
  ran = &large;
  kernel_reference.run(block);
}
void run_small(const Block& block) {
  ran = &small;
  kernel_reference.run(block);
}

// Runs m x n x k on the large spy: `want` must compute it, job and last_kernel() must name it, and the bits must be the
// reference's.
void check_runs(int64_t m, int64_t n, int64_t k, const Kernel& want) {
  const Weights weights = random_weights(n, k);
  const Rows rows = random_rows(m, k, {DType::f32, true});
  const Out out{DType::f32, Activation::none, {1.0f, 0}};
  Stage stage(rows, weights, Side::end, 0);
  const std::vector<uint8_t> expected = stage.run(kernel_reference, out);
  now("small problems of a spy: %s", describe(rows, weights, out, "random").c_str());
  ran = nullptr;
  stage.compare("core", out, stage.run(large, out), expected);
  check("core", ran == &want, "expected %s to compute it, got %s", want.name, ran ? ran->name : "none");
  check("core", last_kernel() == &want, "expected last_kernel() %s, got %s", want.name, last_kernel()->name);
  check("core", schedule(large, stage.problem(out)).kernel == &want, "the job names another kernel");
}

void test_small_problems() {
  large.small = {};
  check_runs(1, 16, 16, large);  // no other kernel: all its own
  large.small = {&small, 3, 8, 16 * 16 * 16};
  check_runs(3, 64, 64, small);
  check_runs(4, 64, 64, large);
  check_runs(16, 16, 16, small);
  check_runs(17, 16, 16, large);
  check_runs(20, 40, 0, small);
  check_runs(8, 600, 4096, small);  // 2.4 MiB of weights, beyond L2
  check_runs(9, 600, 4096, large);
  large.small = {&small, 0, 0, 0};
  check_runs(1, 1, 1, large);
  check_runs(5, 7, 0, small);
}

// Rows the tall tile holds, and no others, get it.
void test_tall_tile() {
  Kernel kernel = kernel_reference;
  kernel.tiling.tile = {6, 64, 4};
  kernel.tiling.tall = {8, 48, 4};
  const std::vector<uint8_t> packed = packed_of(random_weights(100, 20), Layout::p16c4);
  Problem problem{};
  problem.weights = reinterpret_cast<const PackedHeader*>(packed.data());
  for (int64_t m = 1; m <= 17; ++m) {
    problem.m = m;
    now("tile of m=%d", static_cast<int>(m));
    const int want = m == 7 || m == 8 ? 8 : 6, got = schedule(kernel, problem).tile.m;
    check("core", got == want, "expected a tile of %d rows, got %d", want, got);
  }
}

// A block is whole tiles, its codes fit the budget unless one tile alone exceeds it, and no larger than the problem.
void test_blocks_fit_the_budget() {
  Kernel kernel = kernel_reference;
  kernel.tiling.tile = {6, 16, 4};
  kernel.tiling.codes_budget = 64 * 1024;
  for (int64_t k : {1, 64, 1000, 5000, 20000}) {
    const std::vector<uint8_t> packed = packed_of(random_weights(3, k), Layout::p16c4);
    Problem problem{};
    problem.weights = reinterpret_cast<const PackedHeader*>(packed.data());
    for (int64_t m : {1, 6, 7, 100, 3000}) {
      problem.m = m;
      now("block of m=%d k=%d", static_cast<int>(m), static_cast<int>(k));
      const Job job = schedule(kernel, problem);
      check("core", job.block_rows % 6 == 0 && job.block_rows >= 6, "no whole tiles: %d rows", int(job.block_rows));
      check("core", job.block_rows == 6 || job.block_rows * job.codes_stride <= 64 * 1024, "beyond the budget");
      check("core", job.block_rows < m + 6, "%d rows", int(job.block_rows));
      check("core", job.codes_stride >= k && job.codes_stride / 64 % 2 == 1, "an even number of cache lines");
    }
  }
}

// ---- What is brought into L2 with a group of panels ----

std::vector<const uint8_t*> fetched;

// Runs the index-th part of a problem of 2 tiles and 3 groups, and expects that these were fetched, tile by tile.
void check_fetched(const Job& job, int index, const std::vector<const uint8_t*>& want) {
  std::vector<uint8_t> scratch(job.scratch_bytes);
  fetched.clear();
  run(job, index, scratch.data());
  check("core", fetched == want, "part %d of %d fetched something else", index, job.parts);
}

// With each group the next one; with the last group the first of the weights that follow, of which each part fetches
// what it will read.
void test_fetches() {
  Kernel kernel = spy("spy", [](const Block& block) { fetched.push_back(block.next); });
  kernel.tiling.tile = {2, 16, 4};
  kernel.tiling.next_lines = 1;
  constexpr int64_t kDepth = 64, kLines = kDepth / 4 * 64, kStride = panel_bytes(kDepth);
  const std::vector<uint8_t> packed = packed_of(random_weights(48, kDepth), Layout::p16c4), codes(4 * kDepth);
  std::vector<float> y(4 * 48);
  Problem problem{};
  problem.m = 4;
  problem.x.data = codes.data(), problem.x.stride = kDepth, problem.x.dtype = DType::u8;
  problem.weights = reinterpret_cast<const PackedHeader*>(packed.data());
  problem.y = {y.data(), 48 * 4, DType::f32, {1.0f, 0}};
  const uint8_t* own = packed.data() + sizeof(PackedHeader);
  static const uint8_t theirs[5 * kStride] = {};
  now("fetches without weights that follow");
  Job job = schedule(kernel, problem);
  job.parts = 1;
  const uint8_t *second = own + kStride, *third = own + 2 * kStride;
  check_fetched(job, 0, {second, second + kLines, third, third + kLines, nullptr, nullptr});
  now("fetches with weights that follow");
  problem.ahead = {theirs, kStride, 5};
  check_fetched(job, 0, {second, second + kLines, third, third + kLines, theirs, theirs + kLines});
  job.parts = 3;
  check("core", job.by_columns, "few rows are no longer divided by columns");
  for (int index : {0, 1, 2}) {
    const uint8_t* begin = theirs + (index == 2 ? 3 : index) * kStride;  // parts of 1, 2 and 2 panels
    check_fetched(job, index, {begin, begin + kLines});
  }
}

}  // namespace

void test_schedule() {
  test_small_problems();
  test_tall_tile();
  test_blocks_fit_the_budget();
  test_fetches();
}

}  // namespace torchq::test
