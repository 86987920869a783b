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
    {1, 1, 1, 1, 1, 1, false},     {2, 2, 5, 7, 3, 5, false},     {1, 1, 6, 16, 16, 16, true},
    {1, 2, 13, 33, 20, 31, true},  {2, 1, 49, 70, 64, 64, false}, {1, 1, 97, 65, 80, 17, true},
    {1, 3, 1, 100, 32, 48, false}, {1, 1, 7, 0, 8, 8, false},     {1, 1, 9, 129, 256, 100, true},
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

}  // namespace

void test_attention() {
  for (const Shape& shape : kShapes) {
    const Case c(shape);
    for (const Kernel* gemm : runnable())
      for (int i = 0; i < attention::kernel_count(); ++i)
        if (attention::can_run(attention::kernel_at(i))) check_case(c, attention::kernel_at(i), *gemm);
  }
}

}  // namespace torchq::test
