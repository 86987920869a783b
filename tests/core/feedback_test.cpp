// round_with_feedback(): by vectors against one column at a time, bit for bit, and that against the formula in double.
// All buffers lie against guard pages, at either end.

#include <cmath>
#include <limits>

#include "../../csrc/gemm/feedback.h"
#include "check.h"

#include "../../csrc/gemm/scalar.h"  // after kernel.h, whose Bf16 and F16 it needs

namespace torchq::test {
namespace {

struct Weights {
  int64_t rows, columns;
  std::vector<float> targets, weight, factor, scale;
};

struct Rounded {
  std::vector<int8_t> codes;
  std::vector<float> errors;
};

Weights random_weights(int64_t rows, int64_t columns) {
  const auto random = [&](int64_t size, float lo, float hi) {
    std::vector<float> values(size);
    for (float& v : values) v = random_source.uniform(lo, hi);
    return values;
  };
  Weights w{
      rows, columns, random(rows * columns, -1, 1), {}, random(rows * rows, -1, 1), random(columns, 0.005f, 0.02f)};
  w.weight = w.targets;
  for (float& v : w.targets) v += random_source.uniform(-0.05f, 0.05f);
  return w;
}

template <class T>
T* placed(Guarded& memory, const std::vector<T>& from, Side side) {
  T* at = reinterpret_cast<T*>(memory.place(from.size() * sizeof(T), side));
  if (!from.empty()) std::memcpy(at, from.data(), from.size() * sizeof(T));
  return at;
}

// Columns from `begin` on; those before it keep zeros.
Rounded rounded(decltype(round_with_feedback) round, const Weights& w, int64_t begin, Side side) {
  static Guarded memory[7];
  const size_t count = static_cast<size_t>(w.rows * w.columns);
  const FeedbackBlock block{w.rows,
                            w.columns,
                            placed(memory[0], w.targets, side),
                            placed(memory[1], w.weight, side),
                            placed(memory[2], w.factor, side),
                            placed(memory[3], w.scale, side),
                            placed(memory[4], std::vector<int8_t>(count), side),
                            placed(memory[5], std::vector<float>(count), side)};
  round(block, begin, w.columns, memory[6].place(feedback_scratch_bytes(block), side));
  return {{block.codes, block.codes + count}, {block.errors, block.errors + count}};
}

bool same(float a, float b) { return float_to_bits(a) == float_to_bits(b) || (a != a && b != b); }

void check_vectors(const Weights& w) {
  for (int64_t begin = 0; begin < w.columns; begin += kFeedbackColumns) {
    const Rounded want = rounded(round_with_feedback_by_one, w, begin, Side::end);
    for (Side side : {Side::end, Side::start}) {
      const Rounded got = rounded(round_with_feedback, w, begin, side);
      for (size_t i = 0; i < want.codes.size(); ++i) {
        const int at = static_cast<int>(i);
        check("core", got.codes[i] == want.codes[i], "code %d: expected %d, got %d", at, want.codes[i], got.codes[i]);
        check("core", same(got.errors[i], want.errors[i]), "error %d: expected %.9g, got %.9g", at, want.errors[i],
              got.errors[i]);
      }
    }
  }
}

// Each code by its formula in double, from the errors that were given, and each error from its code.
void check_formula(const Weights& w) {
  const Rounded got = rounded(round_with_feedback_by_one, w, 0, Side::end);
  for (int64_t j = 0; j < w.rows; ++j)
    for (int64_t c = 0; c < w.columns; ++c) {
      const int64_t at = j * w.columns + c;
      double target = w.targets[at];
      for (int64_t i = j + 1; i < w.rows; ++i)
        target += double{w.factor[j * w.rows + i]} * got.errors[i * w.columns + c];
      const double code = std::fmin(std::fmax(target / w.scale[c], -127), 127), error = got.errors[at];
      check("core", std::fabs(code - got.codes[at]) < 0.5 + 1e-3, "code %d: expected %.9g, got %d",
            static_cast<int>(at), code, got.codes[at]);
      const double exact = w.weight[at] - double{w.scale[c]} * got.codes[at];
      check("core", std::fabs(error - exact) <= 1e-7 * std::fabs(exact), "error %d: expected %.9g, got %.9g",
            static_cast<int>(at), exact, error);
    }
}

}  // namespace

void test_feedback() {
  for (int64_t rows : {1, 2, 3, 17, 128})
    for (int64_t columns : {1, 7, 8, 31, 32, 33, 70}) {
      now("rounding with feedback, %d x %d", static_cast<int>(rows), static_cast<int>(columns));
      Weights w = random_weights(rows, columns);
      check_formula(w);
      check_vectors(w);
      w.weight[random_source.below(rows * columns)] = std::numeric_limits<float>::infinity();
      w.targets[random_source.below(rows * columns)] = std::numeric_limits<float>::quiet_NaN();
      w.targets[0] = -1e38f;
      check_vectors(w);
    }
}

}  // namespace torchq::test
