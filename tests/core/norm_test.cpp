// LayerNorm and RMSNorm, Kernel::normalize: the reference kernel against double, every other kernel against the
// reference, bit for bit. All buffers lie against guard pages, at either end.

#include <cmath>
#include <limits>

#include "check.h"

#include "../../csrc/gemm/scalar.h"  // after kernel.h, whose Bf16 and F16 it needs

namespace torchq::test {
namespace {

constexpr float kEps = 1e-5f;

struct Norm {
  int64_t count, n;
  std::vector<float> x, weight, bias, residual;  // an empty bias is none, an empty residual too
  bool centered = true;
  float gain = 0.0f;
};

Norm random_norm(int64_t count, int64_t n, bool with_bias, bool with_residual) {
  const auto random = [&](int64_t size, float lo, float hi) {
    std::vector<float> values(size);
    for (float& v : values) v = random_source.uniform(lo, hi);
    return values;
  };
  return {count,
          n,
          random(count * n, -3, 5),
          random(n, -2, 2),
          random(with_bias ? n : 0, -2, 2),
          random(with_residual ? count * n : 0, -3, 3)};
}

std::vector<float> normalized(const Kernel& kernel, const Norm& norm, Side side) {
  static Guarded memory[5];
  const std::vector<float> room(norm.x.size());
  const std::vector<float>* from[] = {&norm.x, &norm.weight, &norm.bias, &room, &norm.residual};
  float* at[5];
  for (int i = 0; i < 5; ++i) {
    at[i] = reinterpret_cast<float*>(memory[i].place(from[i]->size() * sizeof(float), side));
    if (!from[i]->empty()) std::memcpy(at[i], from[i]->data(), from[i]->size() * sizeof(float));
  }
  kernel.normalize({norm.count, norm.n, at[0], at[1], norm.bias.empty() ? nullptr : at[2], kEps, at[3],
                    norm.residual.empty() ? nullptr : at[4], norm.centered, norm.gain});
  return {at[3], at[3] + room.size()};
}

bool same(float a, float b) { return float_to_bits(a) == float_to_bits(b) || (a != a && b != b); }

void check_kernels(const Norm& norm) {
  const std::vector<float> want = normalized(kernel_reference, norm, Side::end);
  for (const Kernel* kernel : runnable())
    for (Side side : {Side::end, Side::start}) {
      const std::vector<float> got = normalized(*kernel, norm, side);
      for (size_t i = 0; i < want.size(); ++i)
        check(kernel->name, same(got[i], want[i]), "y %d: expected %.9g, got %.9g", static_cast<int>(i), want[i],
              got[i]);
    }
}

// Each row by its formula in double. Of values up to 5 and weights up to 2, a few float32 roundings are below 1e-5.
void check_formula(const Norm& norm) {
  const std::vector<float> got = normalized(kernel_reference, norm, Side::end);
  for (int64_t r = 0; r < norm.count; ++r) {
    std::vector<float> x(norm.x.begin() + r * norm.n, norm.x.begin() + (r + 1) * norm.n);
    for (int64_t i = 0; i < norm.n && !norm.residual.empty(); ++i) x[i] += norm.residual[r * norm.n + i];
    double mean = 0, square = 0;
    for (int64_t i = 0; i < norm.n && norm.centered; ++i) mean += x[i] / static_cast<double>(norm.n);
    for (int64_t i = 0; i < norm.n; ++i) square += (x[i] - mean) * (x[i] - mean) / static_cast<double>(norm.n);
    for (int64_t i = 0; i < norm.n; ++i) {
      const double bias = norm.bias.empty() ? 0 : norm.bias[i];
      const double want = (x[i] - mean) / std::sqrt(square + kEps) * (norm.gain + norm.weight[i]) + bias;
      const float y = got[r * norm.n + i];
      check("reference", std::fabs(y - want) < 1e-5, "y %d %d: expected %.9g, got %.9g", static_cast<int>(r),
            static_cast<int>(i), want, y);
    }
  }
}

}  // namespace

void test_norm() {
  for (int64_t n : {1, 2, 3, 15, 16, 17, 63, 64, 65, 100, 128, 200})
    for (int64_t count : {1, 3, 4, 6, 9})
      for (int with = 0; with < 8; ++with) {
        const bool centered = with & 4, with_residual = with & 2;
        const bool with_bias = centered && (with & 1), with_gain = !centered && (with & 1);
        now("%s of %d x %d%s%s%s", centered ? "LayerNorm" : "RMSNorm", static_cast<int>(count), static_cast<int>(n),
            with_bias ? " with a bias" : "", with_gain ? " with a gain" : "", with_residual ? " of sums" : "");
        Norm norm = random_norm(count, n, with_bias, with_residual);
        norm.centered = centered, norm.gain = with_gain ? 1.0f : 0.0f;
        if (n > 1 || !centered) check_formula(norm);  // of one value, the difference from the mean is 0
        check_kernels(norm);
        norm.x[random_source.below(count * n)] = std::numeric_limits<float>::infinity();
        norm.x[0] = 1e38f;
        check_kernels(norm);
      }
}

}  // namespace torchq::test
