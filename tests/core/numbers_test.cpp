// scalar.h and choose_qparams(), what the reference kernel and the row quantization stand on, against the oracle.

#include <cfloat>
#include <cmath>
#include <limits>

#include "oracle.h"

#include "../../csrc/gemm/scalar.h"  // after kernel.h, whose Bf16 and F16 it needs

namespace torchq::test {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity(), kNaN = std::numeric_limits<float>::quiet_NaN();

bool same(float a, float b) { return float_to_bits(a) == float_to_bits(b) || (std::isnan(a) && std::isnan(b)); }

// All 65536 patterns of both formats: widened, and there and back. A NaN comes back quiet, or as bf16's only one.
void test_every_half() {
  for (int i = 0; i < 65536; ++i) {
    const auto bits = static_cast<uint16_t>(i);
    now("16-bit pattern 0x%04X", i);
    const float f16 = to_float(F16{bits}), bf16 = to_float(Bf16{bits});
    check("core", same(f16, widen(DType::f16, bits)), "to_float(F16) gave %.9g", f16);
    check("core", same(bf16, widen(DType::bf16, bits)), "to_float(Bf16) gave %.9g", bf16);
    const int f16_back = std::isnan(f16) ? i | 0x200 : i, bf16_back = std::isnan(bf16) ? 0x7FC0 : i;
    check("core", to_f16(f16).bits == f16_back, "to_f16 gave 0x%04X", to_f16(f16).bits);
    check("core", to_bf16(bf16).bits == bf16_back, "to_bf16 gave 0x%04X", to_bf16(bf16).bits);
  }
}

void check_narrow(float x) {
  now("float 0x%08X", float_to_bits(x));
  const uint16_t f16 = narrow(DType::f16, x), bf16 = narrow(DType::bf16, x);
  check("core", to_f16(x).bits == f16, "to_f16: expected 0x%04X, got 0x%04X", f16, to_f16(x).bits);
  check("core", to_bf16(x).bits == bf16, "to_bf16: expected 0x%04X, got 0x%04X", bf16, to_bf16(x).bits);
}

void test_narrowing(bool quick) {
  for (DType dtype : {DType::f16, DType::bf16})
    for (float x : rounding_boundaries(dtype, quick ? 13 : 1)) check_narrow(x);
  for (int i = 0; i < 100000; ++i) check_narrow(bits_to_float(static_cast<uint32_t>(random_source.bits())));
  for (float x : {kInf, -kInf, FLT_MAX, -FLT_MAX, kNaN, -kNaN}) check_narrow(x);
}

void check_qparams(float lo, float hi, bool finite) {
  now("choose_qparams of [%.9g, %.9g], finite %d", lo, hi, finite);
  const QParams want = oracle_qparams({lo, hi, finite}), got = choose_qparams({lo, hi, finite});
  check("core", same(got.scale, want.scale) && got.zero_point == want.zero_point,
        "expected scale %.9g zero point %d, got %.9g and %d", want.scale, want.zero_point, got.scale, got.zero_point);
}

void test_qparams() {
  const float edges[] = {0.0f, 1e-45f, FLT_MIN, 254 * FLT_MIN, 255 * FLT_MIN, 256 * FLT_MIN, 1.0f, 255.0f, FLT_MAX};
  for (float lo : edges)
    for (float hi : edges) {
      check_qparams(-lo, hi, true);
      check_qparams(-lo, hi, false);
    }
  for (int i = 0; i < 20000; ++i) {
    const float size = std::ldexp(1.0f, static_cast<int>(random_source.between(-130, 126)));
    check_qparams(-random_source.unit() * size, random_source.unit() * size, true);
  }
  const auto by_hand = [](float lo, float hi, float scale, int zero_point) {
    now("choose_qparams of [%g, %g] by hand", lo, hi);
    const QParams got = choose_qparams({lo, hi, true});
    check("core", got.scale == scale && got.zero_point == zero_point, "expected scale %g zero point %d, got %g and %d",
          scale, zero_point, got.scale, got.zero_point);
  };
  by_hand(0.0f, 0.0f, 1.0f, 0);
  by_hand(0.0f, 255.0f, 1.0f, 0);
  by_hand(-255.0f, 0.0f, 1.0f, 255);
  by_hand(-255.0f, 255.0f, 2.0f, 128);  // 127.5 is a tie: half to even
}

}  // namespace

void test_numbers(bool quick) {
  test_every_half();
  test_narrowing(quick);
  test_qparams();
}

}  // namespace torchq::test
