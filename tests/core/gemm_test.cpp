// Whole problems: the reference kernel against the oracle, every other kernel against the reference, byte for byte.
// Every run is in guarded memory, so each of these checks also says that nothing outside the buffers was touched.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>
#include <set>

#include "problem.h"

namespace torchq::test {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity(), kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr DType kFloats[] = {DType::f32, DType::bf16, DType::f16};
constexpr DType kOutputs[] = {DType::i32, DType::f32, DType::bf16, DType::f16, DType::u8};
constexpr Activation kExact[] = {Activation::none, Activation::relu};

float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Alternates from problem to problem: which end of the buffers is guarded, and the gap between rows.
int64_t problems = 0;

// The outputs with one NaN for all: in GELU x meets |x|, and of two NaNs either may survive.
std::vector<uint8_t> with_one_nan(std::vector<uint8_t> y, DType dtype) {
  const auto replace = [&](auto infinity, auto magnitude) {
    for (size_t i = 0; i + sizeof(infinity) <= y.size(); i += sizeof(infinity)) {
      auto bits = infinity;
      std::memcpy(&bits, y.data() + i, sizeof(bits));
      if ((bits & magnitude) > infinity) std::memcpy(y.data() + i, &magnitude, sizeof(bits));
    }
  };
  if (dtype == DType::f32) replace(uint32_t{0x7F800000}, uint32_t{0x7FFFFFFF});
  if (dtype == DType::f16) replace(uint16_t{0x7C00}, uint16_t{0x7FFF});
  return y;
}

// The other activations have one source for all kernels, so no oracle here: curves_test.cpp knows their values.
template <class Outputs>
void compare_curves(const char* fill, const Rows& rows, const Weights& weights, const Outputs& outputs, Stage& stage,
                    QParams y_qparams) {
  for (DType dtype : outputs)
    for (int kind = static_cast<int>(Activation::gelu); kind < kActivations; ++kind) {
      const auto activation = static_cast<Activation>(kind);
      const Out out{dtype, activation, y_qparams};
      now("%s", describe(rows, weights, out, fill).c_str());
      const std::vector<uint8_t> want = with_one_nan(stage.run(kernel_reference, out), dtype);
      for (const Kernel* kernel : runnable())
        if (kernel != &kernel_reference)
          stage.compare(kernel->name, out, with_one_nan(stage.run(*kernel, out), dtype), want);
    }
}

template <class Outputs>
void check_problem(const char* fill, const Rows& rows, const Weights& weights, const Outputs& outputs) {
  const Sums sums = oracle_sums(rows, weights);
  const QParams y_qparams = output_qparams(sums, weights);
  const int64_t pads[] = {0, 3, 17};
  Stage stage(rows, weights, problems % 2 ? Side::end : Side::start, pads[problems % 3]);
  ++problems;
  for (DType dtype : outputs)
    for (Activation activation : kExact) {
      const Out out{dtype, activation, y_qparams};
      now("%s", describe(rows, weights, out, fill).c_str());
      std::vector<uint8_t> want = stage.expected(out, sums);
      for (const Kernel* kernel : runnable()) {
        const std::vector<uint8_t> got = stage.run(*kernel, out);
        stage.compare(kernel->name, out, got, want);
        if (kernel == &kernel_reference) want = got;  // from here on kernels are compared with the reference
      }
      // The reference reads either layout; the loop above gave it P16c4.
      stage.compare("reference", out, stage.run(kernel_reference, out, {0}, 1, Layout::p16c8), want);
    }
  const bool quick = rows.m * weights.n * weights.k < int64_t{1} << 20;  // what a tile does with its sums is the same
  if (quick && problems % 5 == 0) compare_curves(fill, rows, weights, outputs, stage, y_qparams);
}

void check_problem(const char* fill, const Rows& rows, const Weights& weights) {
  check_problem(fill, rows, weights, kOutputs);
}

std::vector<int64_t> sorted(const std::set<int64_t>& sizes) { return {sizes.begin(), sizes.end()}; }

// 0, everything up to one past a tile, and one past two.
std::vector<int64_t> row_counts() {
  std::set<int64_t> sizes{0, 1, 2};
  for (const Kernel* kernel : runnable()) {
    for (int m = 1; m <= kernel->tiling.tile.m + 1; ++m) sizes.insert(m);
    sizes.insert(2 * kernel->tiling.tile.m + 1);
  }
  return sorted(sizes);
}

// 0, 1, around a panel, around every tile, and one past two.
std::vector<int64_t> column_counts() {
  std::set<int64_t> sizes{0, 1, 15, 16, 17};
  for (const Kernel* kernel : runnable()) {
    const int n = kernel->tiling.tile.n;
    sizes.insert({n - 1, n, n + 1, 2 * n + 1});
    for (int panels = kPanelColumns; panels < n; panels += kPanelColumns) sizes.insert({panels, panels + 1});
  }
  return sorted(sizes);
}

// Around groups of 4 and of 8, around vectors of 16, 32 and 64 codes; 255 and 257 around a whole cycle of codes.
constexpr int64_t kDepths[] = {0, 1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 100, 255, 257};

void test_shapes(bool quick) {
  int64_t kind = 0;
  for (int64_t n : column_counts())
    for (int64_t k : kDepths) {
      Weights weights = random_weights(n, k);
      const std::vector<float> channel_scale = random_channel_scale(k);
      for (int64_t m : row_counts()) {
        ++kind;
        if (quick && kind % 7 != 0) continue;
        const bool scaled = element_bytes(kKinds[kind % 8].dtype) > 1 && kind / 8 % 2;
        weights.channel_scale = scaled ? channel_scale : std::vector<float>();
        check_problem("random", random_rows(m, k, kKinds[kind % 8]), weights);
      }
    }
}

// Several blocks of rows, the last one not full. Deep, so that few rows fill the scratch a block may take.
void test_blocks() {
  const int64_t m = 49, n = 17, k = 16 * 1024 + 3;
  Weights weights = random_weights(n, k);
  for (const Kind& kind : kKinds) {
    weights.channel_scale = kind.dtype == DType::f32 ? random_channel_scale(k) : std::vector<float>();
    const Rows rows = random_rows(m, k, kind);
    const DType outputs[] = {kind.per_token ? DType::f32 : DType::u8};
    check_problem("random", rows, weights, outputs);
    Stage stage(rows, weights, Side::end, 0);
    const Problem problem = stage.problem({DType::f32, Activation::none, {1.0f, 0}});
    for (const Kernel* kernel : runnable())
      check(kernel->name, schedule(*kernel, problem).scratch_bytes < static_cast<size_t>(m * k * kernel->codes.bytes),
            "all rows fit into one block: this test needs more rows");
  }
}

// The corners of int8 arithmetic: where instructions saturate and sums are largest.
Rows constant_codes(int64_t m, int64_t k, uint8_t code, int32_t zero_point) {
  return {m, k, DType::u8, false, {0.01f, zero_point}, std::vector<uint8_t>(m * k, code)};
}

Weights constant_weights(int64_t n, int64_t k, int8_t code) {
  return {n, k, std::vector<int8_t>(n * k, code), std::vector<float>(n, 0.005f), std::vector<float>(n, 0.5f)};
}

template <class Outputs>
void test_corners(int64_t m, int64_t n, int64_t k, const Outputs& outputs) {
  for (int8_t w : {-128, -127, 127, 0})
    for (uint8_t code : {0, 255})
      for (int32_t zero_point : {0, 128, 255}) {
        char fill[64];
        std::snprintf(fill, sizeof(fill), "weights %d, codes %d", w, code);
        check_problem(fill, constant_codes(m, k, code, zero_point), constant_weights(n, k, w), outputs);
      }
}

// Corners mixed at random, so that neighbours differ: pairs that saturate only beside a pair that does not.
void test_mixed_corners(int64_t m, int64_t n, int64_t k) {
  Random& r = random_source;
  for (int32_t zero_point : {0, 128, 255}) {
    Weights weights = constant_weights(n, k, 0);
    Rows rows = constant_codes(m, k, 0, zero_point);
    for (int8_t& w : weights.codes) w = r.pick<int8_t>({-128, -127, 127, 0});
    for (uint8_t& code : rows.bytes) code = r.pick<uint8_t>({0, 255});
    check_problem("mixed corners", rows, weights);
  }
}

std::vector<float> concat(std::initializer_list<std::vector<float>> rows) {
  std::vector<float> out;
  for (const auto& row : rows) out.insert(out.end(), row.begin(), row.end());
  return out;
}

// A row of base with value at one position.
std::vector<float> with(int64_t k, float base, int64_t at, float value) {
  std::vector<float> row(k, base);
  row[at] = value;
  return row;
}

// Rows whose arithmetic is special: every one must have the outputs the oracle gives it.
void test_special_rows(int64_t k, Kind kind) {
  Random& r = random_source;
  const float huge = kind.dtype == DType::f16 ? 65504.0f : 3e38f, tiny = kind.dtype == DType::f16 ? 6e-8f : 1e-40f;
  std::vector<float> denormals(k), zeros(k), mix(k), large(k);
  for (int64_t i = 0; i < k; ++i) {
    denormals[i] = r.pick({tiny, -tiny, 3 * tiny, 0.0f});
    zeros[i] = r.pick({0.0f, -0.0f});
    mix[i] = r.pick({huge, tiny, -tiny, -huge, 1.0f});
    large[i] = r.pick({huge, -huge});
  }
  const float smallest = 255 * FLT_MIN;  // the range whose scale is the smallest normal number
  const std::vector<float> values = concat({
      std::vector<float>(k, 0.0f),
      std::vector<float>(k, -0.0f),
      std::vector<float>(k, 1.5f),
      std::vector<float>(k, -3.0f),
      denormals,
      zeros,
      mix,
      large,
      std::vector<float>(k, kNaN),
      std::vector<float>(k, kInf),
      std::vector<float>(k, -kInf),
      with(k, 1.0f, k - 1, kNaN),
      with(k, 1.0f, 0, kInf),
      with(k, 1.0f, k / 2, -kInf),
      with(k, 0.0f, k - 1, 1.0f),
      with(k, 0.0f, 0, -1.0f),
      with(k, 0.0f, 0, smallest),
      with(k, 0.0f, 0, std::nextafter(smallest, 0.0f)),
      with(k, FLT_MIN, 0, -FLT_MIN),
  });
  const auto m = static_cast<int64_t>(values.size()) / k;
  check_problem("special rows", rows_of(values, m, k, kind), random_weights(17, k));
}

// Row r has the value at position r: every lane of every vector loop, and of the tail, must see it.
void test_every_position(int64_t k, float base, float value, const char* fill) {
  for (DType dtype : kFloats) {
    std::vector<float> values(k * k, base);
    for (int64_t r = 0; r < k; ++r) values[r * k + r] = value;
    constexpr DType outputs[] = {DType::f32, DType::i32};
    check_problem(fill, rows_of(values, k, k, {dtype, true}), random_weights(1, k), outputs);
  }
}

// Special scales and biases, every pair, on rows of which one is constant 0, whose product with infinity is NaN.
void test_special_columns() {
  const std::vector<float> scales = {kNaN, kInf, -kInf, 0.0f, -0.0f, 1e-40f, 3e38f, -1.0f, 1.0f};
  const std::vector<float> biases = {kInf, -kInf, 0.0f, -0.0f, 1e-40f, 3e38f, -3e38f, 1.0f};
  const int64_t n = static_cast<int64_t>(scales.size() * biases.size()), k = 5;
  Weights weights = random_weights(n, k);
  weights.bias.resize(n);
  for (int64_t c = 0; c < n; ++c) {
    weights.scale[c] = scales[c / biases.size()];
    weights.bias[c] = biases[c % biases.size()];
  }
  check_problem("special scales and biases", random_rows(5, k, {DType::u8, false}), weights);
  check_problem("special scales and biases", rows_of(std::vector<float>(k), 1, k, {DType::f32, true}), weights);
}

// At depth 0 y is the bias, so the bias takes every store through every boundary of its rounding.
void check_stores(const char* fill, const std::vector<float>& values, DType dtype, QParams q) {
  const auto n = static_cast<int64_t>(values.size());
  const Weights weights{n, 0, {}, std::vector<float>(n, 1.0f), values};
  const Rows rows{1, 0, DType::u8, false, {1.0f, 0}, {}};
  const Sums sums = oracle_sums(rows, weights);
  Stage stage(rows, weights, Side::end, 0);
  for (Activation activation : kExact) {
    const Out out{dtype, activation, q};
    now("%s", describe(rows, weights, out, fill).c_str());
    std::vector<uint8_t> want = stage.expected(out, sums);
    for (const Kernel* kernel : runnable()) {
      const std::vector<uint8_t> got = stage.run(*kernel, out);
      stage.compare(kernel->name, out, got, want);
      if (kernel == &kernel_reference) want = got;
    }
  }
}

void test_stores(bool quick) {
  for (DType dtype : {DType::bf16, DType::f16}) {
    std::vector<float> values = rounding_boundaries(dtype, quick ? 13 : 1);
    for (uint32_t bits : {0x7F800000u, 0xFF800000u, 0x7F7FFFFFu, 0x7FC00000u, 0xFFC00000u, 0x7FC02000u, 0x7FFFFFFFu,
                          0xFFC12345u, 0x7FDFFFFFu, 0x00000001u, 0x80000001u, 0x007FFFFFu})
      values.push_back(float_of(bits));
    check_stores("rounding boundaries", values, dtype, {1.0f, 0});
    check_stores("rounding boundaries", values, DType::f32, {1.0f, 0});
  }
  for (float scale : {0.25f, 0.1f, 3e38f, 1e-30f})
    for (int32_t zero_point : {0, 3, 128, 255}) {
      std::vector<float> values = {kNaN, -kNaN, kInf, -kInf, 3e38f, -3e38f, 1e-40f, -0.0f};
      for (int half = -600; half <= 600; ++half) {
        const float x = static_cast<float>(half) * 0.5f * scale;
        values.insert(values.end(), {std::nextafter(x, -kInf), x, std::nextafter(x, kInf)});
      }
      check_stores("halves of a code", values, DType::u8, {scale, zero_point});
    }
}

// A thread's tiles are shared with oneDNN and others, which must not find them configured otherwise than they left
// them.
void test_tiles_are_released() {
#if defined(__x86_64__) && TORCHQ_HAS_AMX
  if (!(cpu_features() & kAmxInt8)) return;
  if (!__builtin_cpu_supports("amx-int8")) return;  // the tiles are in memory (tiles_in_memory.inc)
  const Weights weights = random_weights(33, 64);
  for (int64_t m : {1, 7, 16, 17, 100}) {
    now("tiles after %d rows", static_cast<int>(m));
    Stage stage(random_rows(m, 64, {DType::f32, true}), weights, Side::end, 0);
    stage.run(kernel_amx_int8, {DType::f32, Activation::none, {1.0f, 0}});
    uint8_t config[64];
    std::memset(config, 0xAA, sizeof(config));
    __asm__ volatile("sttilecfg %0" : "=m"(config));
    check("amx_int8", std::all_of(config, config + 64, [](uint8_t byte) { return byte == 0; }), "still configured");
  }
#endif
}

// Depths and rows around the kernel of tiles' own limits: a step, a depth that is cut and one that is not yet, an odd
// number of steps; rows that two tiles share.
void test_sweeps() {
  constexpr DType outputs[] = {DType::i32, DType::f32, DType::u8};
  for (int64_t k : {63, 128, 768, 769, 1000, 1344})
    for (int64_t m : {33, 47, 64, 97})
      check_problem("random", random_rows(m, k, kKinds[m % 8]), random_weights(m == 64 ? 96 : 71, k), outputs);
}

}  // namespace

void test_gemm(bool quick) {
  constexpr DType exact[] = {DType::i32, DType::f32};
  test_shapes(quick);
  test_blocks();
  test_sweeps();
  test_tiles_are_released();
  test_corners(7, 33, 13, kOutputs);
  test_corners(1, 17, kMaxDepth, exact);
  test_corners(33, 17, 1000, exact);
  check_problem("random", random_rows(7, kMaxDepth, {DType::f32, true}), random_weights(3, kMaxDepth), exact);
  for (int64_t k : {8, 65, 257}) test_mixed_corners(13, 65, k);
  for (int64_t k : {1, 5, 16, 17, 64, 67, 130})
    for (const Kind& kind : kKinds)
      if (element_bytes(kind.dtype) > 1) test_special_rows(k, kind);
  test_every_position(131, 1.0f, kNaN, "NaN at every position");
  test_every_position(131, 1.0f, kInf, "+Inf at every position");
  test_every_position(131, 1.0f, -kInf, "-Inf at every position");
  test_every_position(131, 1.0f, 1000.0f, "maximum at every position");
  test_every_position(131, 1.0f, -1000.0f, "minimum at every position");
  test_special_columns();
  test_stores(quick);
}

}  // namespace torchq::test
