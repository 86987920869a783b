// The attention core: every kernel against `reference` and a formula in double, with scratch and all operands between
// guard pages.

#include <algorithm>
#include <cmath>
#include <limits>

#include "../../csrc/attention/attention.h"
#include "check.h"

namespace torchq::test {
namespace {

using attention::Scheme;

struct Shape {
  int64_t kv_heads, group, rows, keys, depth, columns;
  bool causal;
};

constexpr Shape kShapes[] = {
    {1, 1, 1, 1, 1, 1, false},     {2, 2, 5, 7, 3, 5, false},      {1, 1, 6, 16, 16, 16, true},
    {1, 2, 13, 33, 20, 31, true},  {2, 1, 49, 70, 64, 64, false},  {1, 1, 97, 65, 80, 17, true},
    {1, 1, 64, 64, 32, 32, false}, {1, 2, 67, 147, 72, 70, true},  {1, 3, 1, 100, 32, 48, false},
    {1, 1, 7, 0, 8, 8, false},     {1, 1, 9, 129, 256, 100, true}, {1, 1, 63, 40, 900, 20, false},
};

std::vector<float> values(int64_t count) {
  std::vector<float> x(count);
  for (float& one : x) one = random_source.uniform(-1.0f, 1.0f);
  return x;
}

// q, k and v, rows side by side, of one batch.
struct Case {
  Shape shape;
  std::vector<float> q, k, v;

  explicit Case(const Shape& s)
      : shape(s),
        q(values(s.kv_heads * s.group * s.rows * s.depth)),
        k(values(s.kv_heads * s.keys * s.depth)),
        v(values(s.kv_heads * s.keys * s.columns)) {}

  attention::Problem problem(Scheme scheme, float* y) const {
    const auto view = [](const std::vector<float>& x, int64_t rows, int64_t columns) {
      return attention::View{x.data(), DType::f32, 0, rows * columns * 4, columns * 4, 4};
    };
    attention::Problem p{};
    p.scheme = scheme;
    p.batch = 1, p.heads = shape.kv_heads * shape.group, p.kv_heads = shape.kv_heads;
    p.rows = shape.rows, p.keys = shape.keys, p.depth = shape.depth, p.columns = shape.columns;
    p.q = view(q, p.rows, p.depth), p.k = view(k, p.keys, p.depth), p.v = view(v, p.keys, p.columns);
    p.band = {-(int64_t{1} << 40), shape.causal ? 0 : int64_t{1} << 40};
    p.scale = 1.0f / std::sqrt(static_cast<float>(p.depth));
    p.y = y, p.y_dtype = DType::f32;
    p.y_head = p.rows * p.columns * 4, p.y_row = p.columns * 4;
    return p;
  }

  // The formula.
  std::vector<double> expected() const {
    std::vector<double> y(shape.kv_heads * shape.group * shape.rows * shape.columns);
    for (int64_t h = 0; h < shape.kv_heads * shape.group; ++h)
      for (int64_t r = 0; r < shape.rows; ++r) {
        const int64_t keys = shape.causal ? std::min(r + 1, shape.keys) : shape.keys;
        std::vector<double> w(keys);
        double sum = 0.0;
        for (int64_t j = 0; j < keys; ++j) {
          for (int64_t i = 0; i < shape.depth; ++i)
            w[j] += double{q[(h * shape.rows + r) * shape.depth + i]} *
                    k[(h / shape.group * shape.keys + j) * shape.depth + i];
          sum += w[j] = std::exp(w[j] / std::sqrt(static_cast<double>(shape.depth)));
        }
        for (int64_t c = 0; c < shape.columns; ++c)
          for (int64_t j = 0; j < keys; ++j)
            y[(h * shape.rows + r) * shape.columns + c] +=
                w[j] / sum * v[(h / shape.group * shape.keys + j) * shape.columns + c];
      }
    return y;
  }
};

// A copy of x whose end is the end of memory that may be touched.
float* guarded(Guarded& memory, const std::vector<float>& x) {
  auto* place = reinterpret_cast<float*>(memory.place(x.size() * 4, Side::end));
  std::copy(x.begin(), x.end(), place);
  return place;
}

std::vector<float> run_all(const attention::Kernel& kernel, const Kernel& gemm, const Case& c, Scheme scheme) {
  const Shape& s = c.shape;
  static Guarded q, k, v, y, scratch;
  const int64_t count = s.kv_heads * s.group * s.rows * s.columns;
  float* out = guarded(y, std::vector<float>(count, std::numeric_limits<float>::quiet_NaN()));
  attention::Problem problem = c.problem(scheme, out);
  problem.q.data = guarded(q, c.q), problem.k.data = guarded(k, c.k), problem.v.data = guarded(v, c.v);
  attention::Job job = attention::schedule(kernel, gemm, problem);
  job.parts = 1 + static_cast<int>(random_source.below(3));
  uint8_t* memory = scratch.place(job.scratch_bytes, Side::end);
  for (int part = 0; part < job.parts; ++part) attention::run(job, part, memory);
  return {out, out + count};
}

// Values are within [-1, 1]. Codes of 1/255 and of 1/127, and bfloat16, make errors of about 1 %.
void check_case(const Case& c, const attention::Kernel& kernel, const Kernel& gemm) {
  const std::vector<double> expected = c.expected();
  const bool few = c.shape.rows * c.shape.group <= 4;
  for (const Scheme scheme : {Scheme::f32, Scheme::bf16, Scheme::codes_bf16, Scheme::codes}) {
    now("attention %s beside %s, scheme %d, %lld rows, %lld keys, depth %lld", kernel.name, gemm.name,
        static_cast<int>(scheme), static_cast<long long>(c.shape.rows), static_cast<long long>(c.shape.keys),
        static_cast<long long>(c.shape.depth));
    const std::vector<float> y = run_all(kernel, gemm, c, scheme);
    const double allowed = scheme == Scheme::f32 || few ? 1e-5 : 0.03;
    double worst = 0.0;
    for (size_t i = 0; i < y.size(); ++i) {
      const double error = std::abs(y[i] - expected[i]);
      worst = error <= worst ? worst : error;  // NaN stays
    }
    check(gemm.name, worst <= allowed, "off by %g, allowed %g", worst, allowed);
    if (scheme != Scheme::codes || few) continue;
    const std::vector<float> bits = run_all(attention::kernel_reference, kernel_reference, c, scheme);
    check(gemm.name, std::memcmp(y.data(), bits.data(), y.size() * 4) == 0, "other bits than the reference's");
  }
}

// ---- The product with panels by itself ---------------------------------------------------------------------------

// Small integers, of which all kernels must give the exact sums. What lies between the rows is NaN, and must neither be
// read into a sum nor, in the output, be overwritten.
struct PanelProduct {
  int64_t m, panels, pairs;  // twice as many products to a sum
  std::vector<int> a, b;     // (m, 2 · pairs), (2 · pairs, 16 · panels)
  std::vector<float> sums;   // (m, 16 · panels)

  PanelProduct(int64_t rows, int64_t its_panels, int64_t its_pairs)
      : m(rows), panels(its_panels), pairs(its_pairs), a(rows * 2 * its_pairs), b(2 * its_pairs * 16 * its_panels) {
    for (std::vector<int>* x : {&a, &b})
      for (int& one : *x) one = static_cast<int>(random_source.between(-8, 8));
    for (int64_t r = 0; r < m; ++r)
      for (int64_t c = 0; c < 16 * panels; ++c) {
        int sum = 0;
        for (int64_t k = 0; k < 2 * pairs; ++k) sum += a[r * 2 * pairs + k] * b[k * 16 * panels + c];
        sums.push_back(static_cast<float>(sum));
      }
  }
};

// Two numbers as one float of two halves, the first lower.
float joined(int first, int second) {
  const float low = static_cast<float>(first), high = static_cast<float>(second);
  uint32_t bits[2];
  std::memcpy(bits, &low, 4), std::memcpy(bits + 1, &high, 4);
  const uint32_t both = bits[0] >> 16 | bits[1];
  float result;
  std::memcpy(&result, &both, 4);
  return result;
}

constexpr float kGap = std::numeric_limits<float>::quiet_NaN();

void check_product(const PanelProduct& of, const attention::Kernel& kernel, bool halves) {
  now("%s of %s, %lld rows, %lld panels, %lld pairs", halves ? "multiply_halves" : "multiply", kernel.name,
      static_cast<long long>(of.m), static_cast<long long>(of.panels), static_cast<long long>(of.pairs));
  const int64_t depth = halves ? of.pairs : 2 * of.pairs, n = 16 * of.panels;
  const int64_t a_stride = depth + 3, panel_stride = (depth + 1) * 16, out_stride = n + 5;
  std::vector<float> a((of.m - 1) * a_stride + depth, kGap), b((of.panels - 1) * panel_stride + depth * 16, kGap);
  const auto left = [&](int64_t r, int64_t k) { return of.a[r * 2 * of.pairs + k]; };
  const auto right = [&](int64_t k, int64_t c) { return of.b[k * n + c]; };
  for (int64_t k = 0; k < depth; ++k) {
    for (int64_t r = 0; r < of.m; ++r)
      a[r * a_stride + k] = halves ? joined(left(r, 2 * k), left(r, 2 * k + 1)) : static_cast<float>(left(r, k));
    for (int64_t c = 0; c < n; ++c)
      b[c / 16 * panel_stride + k * 16 + c % 16] =
          halves ? joined(right(2 * k, c), right(2 * k + 1, c)) : static_cast<float>(right(k, c));
  }
  static Guarded a_memory, b_memory, out_memory;
  float* out = guarded(out_memory, std::vector<float>((of.m - 1) * out_stride + n, kGap));
  const attention::Product product{
      of.m, of.panels, depth, guarded(a_memory, a), a_stride, guarded(b_memory, b), panel_stride, out, out_stride};
  halves ? kernel.multiply_halves(product) : kernel.multiply(product);
  bool right_sums = true, gaps = true;
  for (int64_t r = 0; r < of.m; ++r) {
    for (int64_t c = 0; c < n; ++c) right_sums &= out[r * out_stride + c] == of.sums[r * n + c];
    for (int64_t c = n; c < out_stride && r + 1 < of.m; ++c) gaps &= std::isnan(out[r * out_stride + c]);
  }
  check(kernel.name, right_sums, "other sums than those of the integers");
  check(kernel.name, gaps, "wrote between the rows of the output");
}

// Around tiles of 16 rows and of 16 pairs, groups of panels, and 64 rows.
void test_products() {
  for (int64_t m : {1, 5, 16, 17, 31, 33, 47, 64, 65, 97})
    for (int64_t panels : {1, 2, 3, 4, 5, 7})
      for (int64_t pairs : {0, 1, 15, 16, 17, 32, 45}) {
        const PanelProduct product(m, panels, pairs);
        for (int i = 0; i < attention::kernel_count(); ++i) {
          const attention::Kernel& kernel = attention::kernel_at(i);
          if (!attention::can_run(kernel)) continue;
          check_product(product, kernel, false);
          if (kernel.multiply_halves) check_product(product, kernel, true);
        }
      }
}

// Others that use a thread's tiles must find them as they left them.
void test_attentions_tiles_are_released() {
#if defined(__x86_64__) && TORCHQ_HAS_AMX
  if (!attention::can_run(attention::kernel_amx_bf16)) return;
  if (!__builtin_cpu_supports("amx-bf16")) return;  // the tiles are in memory (tiles_in_memory.inc)
  for (const PanelProduct& product : {PanelProduct(1, 1, 1), PanelProduct(65, 3, 17)}) {
    check_product(product, attention::kernel_amx_bf16, true);
    uint8_t config[64];
    std::memset(config, 0xAA, sizeof(config));
    __asm__ volatile("sttilecfg %0" : "=m"(config));
    check("amx_bf16", std::all_of(config, config + 64, [](uint8_t byte) { return byte == 0; }), "still configured");
  }
#endif
}

#if defined(__x86_64__) && TORCHQ_HAS_AMX
// How rows are cut into blocks, and which kernel multiplies codes: numbers, so any CPU can tell.
void check_job(const attention::Kernel& kernel, const Kernel& gemm, const Shape& shape, int64_t blocks, int64_t rows,
               const Kernel& by) {
  const Case c(shape);
  const attention::Problem problem = c.problem(Scheme::codes, nullptr);
  const attention::Job job = attention::schedule(kernel, gemm, problem);
  now("attention %s beside %s, %lld rows", kernel.name, gemm.name, static_cast<long long>(shape.rows));
  check(kernel.name, job.blocks == blocks && job.block_rows == rows, "%lld blocks of %lld rows",
        static_cast<long long>(job.blocks), static_cast<long long>(job.block_rows));
  check(kernel.name, job.gemm == &by, "codes are multiplied by %s", job.gemm->name);
}
#endif

void test_schedules() {
#if defined(__x86_64__) && TORCHQ_HAS_AMX
  const attention::Kernel &tiles = attention::kernel_amx_bf16, &vectors = attention::kernel_avx512_bf16;
  const Kernel &amx = kernel_amx_int8, &vnni = kernel_avx512_vnni;
  check_job(tiles, amx, {1, 1, 128, 128, 64, 64, false}, 2, 64, amx);
  check_job(tiles, amx, {1, 1, 197, 197, 64, 64, false}, 4, 50, amx);
  check_job(tiles, amx, {1, 1, 1500, 1500, 64, 64, false}, 47, 32, amx);
  check_job(tiles, amx, {1, 1, 128, 128, 64, 64, true}, 4, 32, amx);
  check_job(tiles, amx, {1, 1, 64, 64, 32, 32, false}, 1, 64, vnni);
  check_job(tiles, amx, {1, 1, 64, 65, 32, 32, false}, 1, 64, amx);
  check_job(tiles, amx, {1, 1, 64, 64, 32, 33, false}, 1, 64, amx);
  check_job(tiles, amx, {1, 1, 16, 16, 64, 64, false}, 1, 16, vnni);
  check_job(vectors, vnni, {1, 1, 16, 16, 64, 64, false}, 1, 18, vnni);
  check_job(vectors, vnni, {1, 1, 197, 197, 64, 64, false}, 4, 54, vnni);
  check_job(vectors, vnni, {1, 1, 64, 64, 32, 32, false}, 1, 66, vnni);
  check_job(vectors, vnni, {1, 1, 1500, 1500, 64, 64, false}, 250, 6, vnni);
  for (int i = 0; i < attention::kernel_count(); ++i) {
    const attention::Kernel& kernel = attention::kernel_at(i);
    check(kernel.name, kernel.codes_pay_from == (&kernel == &tiles ? 512 : 0), "codes pay from another number of keys");
  }
#endif
}

}  // namespace

void test_attention() {
  test_schedules();
  test_products();
  test_attentions_tiles_are_released();
  for (const Shape& shape : kShapes) {
    const Case c(shape);
    for (const Kernel* gemm : runnable())
      for (int i = 0; i < attention::kernel_count(); ++i)
        if (attention::can_run(attention::kernel_at(i))) check_case(c, attention::kernel_at(i), *gemm);
  }
}

}  // namespace torchq::test
