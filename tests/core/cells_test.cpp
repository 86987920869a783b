// A step of a recurrent cell, Kernel::cell: the reference kernel against the C library's functions in double, every
// other kernel against the reference, bit for bit. Rows lie against guard pages, at either end.

#include <cmath>
#include <limits>

#include "check.h"

#include "../../csrc/gemm/scalar.h"  // after kernel.h, whose Bf16 and F16 it needs

namespace torchq::test {
namespace {

const char* name_of(Cell cell) {
  static const char* const names[] = {"lstm", "gru", "rnn_tanh", "rnn_relu"};
  static_assert(sizeof(names) / sizeof(*names) == kCells, "one name for each");
  return names[static_cast<int>(cell)];
}

struct Values {
  std::vector<float> input, recurrent, c, h;
};

Values random_values(Cell cell, int64_t size, bool special) {
  static const float kSpecial[] = {std::numeric_limits<float>::quiet_NaN(),
                                   std::numeric_limits<float>::infinity(),
                                   -std::numeric_limits<float>::infinity(),
                                   0.0f,
                                   -0.0f,
                                   3e38f,
                                   -3e38f,
                                   1e-45f};
  const auto random = [&](int64_t count) {
    std::vector<float> values(count);
    for (float& v : values)
      v = special && random_source.below(4) == 0 ? random_source.pick(kSpecial) : random_source.uniform(-4, 4);
    return values;
  };
  const int64_t gates = gates_of(cell) * size;
  return {random(gates), random(gates), random(size), random(size)};
}

// The state after a step; all buffers end, or start, at a page that nobody may touch. Only an LSTM has a c.
Values stepped(const Kernel& kernel, Cell cell, const Values& values, Side side) {
  static Guarded memory[4];
  const std::vector<float>* from[] = {&values.input, &values.recurrent, &values.c, &values.h};
  float* at[4];
  for (int i = 0; i < 4; ++i) {
    at[i] = reinterpret_cast<float*>(memory[i].place(from[i]->size() * sizeof(float), side));
    std::memcpy(at[i], from[i]->data(), from[i]->size() * sizeof(float));
  }
  const auto size = static_cast<int64_t>(values.h.size());
  kernel.cell(cell, {size, at[0], at[1], cell == Cell::lstm ? at[2] : at[3], at[3]});
  return {{}, {}, {at[2], at[2] + size}, {at[3], at[3] + size}};
}

bool same(float a, float b) { return float_to_bits(a) == float_to_bits(b) || (a != a && b != b); }

void check_kernels(Cell cell, int64_t size, bool special) {
  now("%s of %d%s", name_of(cell), static_cast<int>(size), special ? ", special values" : "");
  const Values values = random_values(cell, size, special), want = stepped(kernel_reference, cell, values, Side::end);
  for (const Kernel* kernel : runnable())
    for (Side side : {Side::end, Side::start}) {
      const Values got = stepped(*kernel, cell, values, side);
      for (int64_t i = 0; i < size; ++i) {
        check(kernel->name, same(got.h[i], want.h[i]), "h %d: expected %.9g, got %.9g", static_cast<int>(i), want.h[i],
              got.h[i]);
        check(kernel->name, same(got.c[i], want.c[i]), "c %d: expected %.9g, got %.9g", static_cast<int>(i), want.c[i],
              got.c[i]);
      }
    }
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// The formulas of cell.inc. The curves are off by up to 6.5e-7, and there are up to five of them and a few products of
// numbers up to 4.
void check_formulas(Cell cell, int64_t size) {
  now("the formulas of %s", name_of(cell));
  const Values v = random_values(cell, size, false), got = stepped(kernel_reference, cell, v, Side::end);
  for (int64_t i = 0; i < size; ++i) {
    const auto x = [&](int gate) -> double { return v.input[gate * size + i]; };
    const auto p = [&](int gate) -> double { return v.recurrent[gate * size + i]; };
    const auto sum = [&](int gate) { return x(gate) + p(gate); };
    double c = v.c[i], h = v.h[i];
    if (cell == Cell::lstm) {
      c = sigmoid(sum(1)) * c + sigmoid(sum(0)) * std::tanh(sum(2));
      h = sigmoid(sum(3)) * std::tanh(c);
    } else if (cell == Cell::gru) {
      const double n = std::tanh(x(2) + sigmoid(sum(0)) * p(2));
      h = n + sigmoid(sum(1)) * (h - n);
    } else {
      h = cell == Cell::rnn_tanh ? std::tanh(sum(0)) : std::fmax(sum(0), 0);
    }
    check("reference", std::fabs(got.h[i] - h) < 1e-5, "h %d: expected %.9g, got %.9g", static_cast<int>(i), h,
          got.h[i]);
    check("reference", std::fabs(got.c[i] - c) < 1e-5, "c %d: expected %.9g, got %.9g", static_cast<int>(i), c,
          got.c[i]);
  }
}

}  // namespace

void test_cells() {
  for (int number = 0; number < kCells; ++number) {
    const auto cell = static_cast<Cell>(number);
    check_formulas(cell, 100);
    for (int64_t size : {1, 3, 4, 5, 7, 8, 15, 16, 17, 31, 33, 64, 100})
      for (bool special : {false, true}) check_kernels(cell, size, special);
  }
}

}  // namespace torchq::test
