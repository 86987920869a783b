// The activations, Kernel::activate: the reference kernel against the C library's functions in double, every other
// kernel against the reference, bit for bit. Values lie against guard pages.

#include <algorithm>
#include <cmath>
#include <limits>

#include "check.h"

#include "../../csrc/gemm/scalar.h"  // after kernel.h, whose Bf16 and F16 it needs

namespace torchq::test {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity(), kNaN = std::numeric_limits<float>::quiet_NaN();

Guarded x_memory, y_memory;

Activation activation_at(int kind) { return static_cast<Activation>(kind); }

double exact(Activation activation, double x) {
  const double u = std::sqrt(2 / std::acos(-1.0)) * (x + 0.044715 * x * x * x);
  switch (activation) {
    case Activation::none: return x;
    case Activation::relu: return std::fmax(x, 0);
    case Activation::gelu: return x / 2 * std::erfc(-x / std::sqrt(2.0));
    case Activation::gelu_tanh: return x / (1 + std::exp(-2 * u));
    case Activation::silu: return x / (1 + std::exp(-x));
    case Activation::quick_gelu: return x / (1 + std::exp(-1.702 * x));
    case Activation::hardswish: return x * std::fmin(std::fmax(x + 3, 0), 6) / 6;
    case Activation::relu2: return std::fmax(x, 0) * std::fmax(x, 0);
    case Activation::tanh: return std::tanh(x);
    case Activation::sigmoid: return 1 / (1 + std::exp(-x));
    case Activation::relu6: return std::fmin(std::fmax(x, 0), 6);
  }
  return 0;
}

// The greatest relative error for this negative x, or 0 where nothing is said of it. activations.inc has the same
// table.
double tail(Activation activation, double x) {
  if (x < -10) return 0;
  if (activation == Activation::gelu) return x > -1 ? 5e-6 : x > -3 ? 6e-5 : x > -4 ? 3e-4 : x > -5 ? 1e-2 : 0;
  if (activation == Activation::gelu_tanh) return 1.2e-5;
  return 1.2e-6;
}

float activated(const Kernel& kernel, Activation activation, float x) {
  float y;
  kernel.activate(activation, DType::f32, &x, &y, 1);
  return y;
}

void check_value(Activation activation, float x) {
  now("%s of %.9g", name_of(activation), x);
  const double want = exact(activation, x), got = activated(kernel_reference, activation, x);
  const double error = std::fabs(got - want), size = std::fabs(want);
  if (size > 3e38) return;
  // One rounding of y, but two of hardswish's 6·y.
  check("reference", error <= 6.5e-7 + size * (activation == Activation::hardswish ? 0x1p-23 : 0x1p-24),
        "expected %.9g, got %.9g", want, got);
  const double relative = x < 0 ? tail(activation, x) : 0;
  if (relative && size > 1e-35) check("reference", error <= relative * size, "expected %.9g, got %.9g", want, got);
}

void test_values(bool quick) {
  const int steps = quick ? 2000 : 200000;
  for (int kind = 0; kind < kActivations; ++kind) {
    for (int i = -steps; i <= steps; ++i) check_value(activation_at(kind), 13.0f * static_cast<float>(i) / steps);
    for (int exponent = -126; exponent < 60; ++exponent)
      for (int i = 0; i < (quick ? 4 : 64); ++i) {
        const float x = std::ldexp(1 + random_source.unit(), exponent);
        check_value(activation_at(kind), x);
        check_value(activation_at(kind), -x);
      }
  }
}

// As in torch: -inf gives NaN where an activation is a product of x and a limit of 0.
void test_ends() {
  for (int kind = 0; kind < kActivations; ++kind) {
    const Activation a = activation_at(kind);
    now("the ends of %s", name_of(a));
    const bool saturates = a == Activation::tanh || a == Activation::sigmoid || a == Activation::relu6;
    const float high = a == Activation::relu6 ? 6.0f : saturates ? 1.0f : kInf;
    const bool product = (a >= Activation::gelu && a <= Activation::hardswish);
    const float low = product ? kNaN : a == Activation::none ? -kInf : a == Activation::tanh ? -1.0f : 0.0f;
    const float got_high = activated(kernel_reference, a, kInf), got_low = activated(kernel_reference, a, -kInf);
    check("reference", got_high == high, "expected %g, got %g", high, got_high);
    check("reference", got_low == low || (std::isnan(low) && std::isnan(got_low)), "expected %g, got %g", low, got_low);
    for (uint32_t bits : {0x7FC00000u, 0xFFC00000u, 0x7F800001u, 0x7FC00001u, 0x7FFFFFFFu, 0xFFFFFFFFu, 0x7FC001FFu})
      check("reference", std::isnan(activated(kernel_reference, a, bits_to_float(bits))), "NaN 0x%08X was lost", bits);
  }
}

// x as bits of dtype, in guarded memory.
void lay(DType dtype, const std::vector<float>& values, Side side, uint8_t** x) {
  *x = x_memory.place(values.size() * element_bytes(dtype), side);
  for (size_t i = 0; i < values.size(); ++i) {
    const float f32 = values[i];
    const Bf16 bf16 = to_bf16(f32);
    const F16 f16 = to_f16(f32);
    const void* bits = dtype == DType::f32    ? static_cast<const void*>(&f32)
                       : dtype == DType::bf16 ? &bf16.bits
                                              : &f16.bits;
    std::memcpy(*x + i * element_bytes(dtype), bits, element_bytes(dtype));
  }
}

std::vector<float> results(const Kernel& kernel, Activation activation, DType dtype, const uint8_t* x, uint8_t* y,
                           int64_t count) {
  kernel.activate(activation, dtype, x, y, count);
  std::vector<float> read(count);
  for (int64_t i = 0; i < count; ++i) {
    if (dtype == DType::f32) std::memcpy(&read[i], y + 4 * i, 4);
    if (dtype == DType::bf16) read[i] = to_float(reinterpret_cast<const Bf16*>(y)[i]);
    if (dtype == DType::f16) read[i] = to_float(reinterpret_cast<const F16*>(y)[i]);
  }
  return read;
}

// Every kernel, into memory of its own and in place.
void check_kernels(Activation activation, DType dtype, const std::vector<float>& values, Side side) {
  const auto count = static_cast<int64_t>(values.size());
  now("%s of %d x %s", name_of(activation), static_cast<int>(count), name_of(dtype));
  uint8_t *x, *y = y_memory.place(count * element_bytes(dtype), side);
  lay(dtype, values, side, &x);
  const std::vector<float> want = results(kernel_reference, activation, dtype, x, y, count);
  for (const Kernel* kernel : runnable())
    for (bool in_place : {false, true}) {
      const std::vector<float> got = results(*kernel, activation, dtype, x, in_place ? x : y, count);
      for (int64_t i = 0; i < count; ++i)
        check(kernel->name, float_to_bits(got[i]) == float_to_bits(want[i]) || (got[i] != got[i] && want[i] != want[i]),
              "%d, x = %.9g: expected %.9g, got %.9g", static_cast<int>(i), values[i], want[i], got[i]);
      if (in_place) lay(dtype, values, side, &x);
    }
}

void test_kernels(bool quick) {
  std::vector<float> values = {kNaN,    kInf,  -kInf,  0.0f,   -0.0f,   1e-45f,
                               -1e-45f, 3e38f, -3e38f, 1e-38f, -9.999f, -10.001f};
  for (int i = 0; i < (quick ? 600 : 5000); ++i) values.push_back(random_source.uniform(-20, 20));
  for (int i = 0; i < (quick ? 600 : 5000); ++i)
    values.push_back(bits_to_float(static_cast<uint32_t>(random_source.bits())));
  for (DType dtype : {DType::f32, DType::bf16, DType::f16})
    for (int kind = 0; kind < kActivations; ++kind) {
      check_kernels(activation_at(kind), dtype, values, kind % 2 ? Side::end : Side::start);
      for (int count : {0, 1, 3, 4, 7, 8, 15, 16, 17, 33})
        check_kernels(activation_at(kind), dtype, {values.begin(), values.begin() + count}, Side::end);
    }
}

}  // namespace

void test_curves(bool quick) {
  test_values(quick);
  test_ends();
  test_kernels(quick);
}

}  // namespace torchq::test
