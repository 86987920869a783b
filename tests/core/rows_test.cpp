// Row quantization, Kernel::range and Kernel::quantize: the reference kernel against the oracle, every other kernel
// against the reference. Rows and codes lie against guard pages, so reading past a row or writing past the room that
// kernel.h promises dies.

#include <algorithm>
#include <cmath>
#include <limits>

#include "problem.h"

namespace torchq::test {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity(), kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr DType kFloats[] = {DType::f32, DType::bf16, DType::f16};

Guarded x_memory, codes_memory, scratch_memory, scale_memory;

uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

float value(const FloatRow& row, int64_t i) {
  return scaled_element(static_cast<const uint8_t*>(row.x), row.dtype, i, row.channel_scale);
}

RowRange range_by_oracle(const FloatRow& row) {
  return oracle_range(static_cast<const uint8_t*>(row.x), row.dtype, row.k, row.channel_scale);
}

std::string describe(const FloatRow& row, const char* fill) {
  char text[96];
  std::snprintf(text, sizeof(text), "%d x %s%s, fill %s", static_cast<int>(row.k), name_of(row.dtype),
                row.channel_scale ? " with a channel scale" : "", fill);
  return text;
}

int64_t room_for(int64_t k) { return (k + 63) / 64 * 64; }

// kernel.quantize() of a row in guarded memory, one int per code. Runs of 8 codes may lie apart: kernel.h,
// CodeFormat::interleaved_rows.
std::vector<int> codes_of(const Kernel& kernel, const FloatRow& row, float inverse, int32_t zp) {
  const int64_t k = row.k;
  const int64_t bytes = room_for(k) * kernel.codes.bytes * kernel.codes.interleaved_rows;
  uint8_t* codes = codes_memory.place(bytes, Side::end);
  std::memset(codes, kCanary, bytes);
  kernel.quantize(row, inverse, zp, codes, false);
  std::vector<int> out(k);
  for (int64_t i = 0; i < k; ++i) {
    const int64_t at = i / 8 * 8 * kernel.codes.interleaved_rows + i % 8;
    const auto byte = static_cast<uint8_t>(codes[at] + kernel.codes.shift);
    out[i] = kernel.codes.bytes == 1 ? byte : reinterpret_cast<const int16_t*>(codes)[at];
  }
  for (int64_t i = 0; kernel.codes.interleaved_rows == 2 && i < room_for(k); ++i)
    if (codes[i / 8 * 16 + 8 + i % 8] != kCanary && i / 8 * 16 + 8 < bytes)
      check(kernel.name, false, "byte %d of the other row was written", static_cast<int>(i));
  return out;
}

void check_range(const FloatRow& row, const char* fill) {
  RowRange want = range_by_oracle(row);
  now("range of %s", describe(row, fill).c_str());
  for (const Kernel* kernel : runnable()) {
    const RowRange got = kernel->range(row);
    const bool same = got.finite == want.finite &&
                      (!want.finite || (bits_of(got.lo) == bits_of(want.lo) && bits_of(got.hi) == bits_of(want.hi)));
    check(kernel->name, same, "expected [%g, %g] finite %d, got [%g, %g] finite %d", want.lo, want.hi, want.finite,
          got.lo, got.hi, got.finite);
    if (kernel == &kernel_reference) want = got;
  }
}

void check_codes(const FloatRow& row, float inverse, int32_t zero_point, const char* fill) {
  const int64_t k = row.k;
  std::vector<int> want(k);
  for (int64_t i = 0; i < k; ++i) want[i] = oracle_code(rounded(value(row, i) * inverse), zero_point);
  now("codes of %s, inverse scale %.9g, zero point %d", describe(row, fill).c_str(), inverse, zero_point);
  for (const Kernel* kernel : runnable()) {
    const std::vector<int> got = codes_of(*kernel, row, inverse, zero_point);
    const int64_t at = std::mismatch(want.begin(), want.end(), got.begin()).first - want.begin();
    if (at == k)
      check(kernel->name, true, "%s", "");
    else
      check(kernel->name, false, "at %d, x = %.9g: expected %d, got %d", static_cast<int>(at), value(row, at), want[at],
            got[at]);
    if (kernel == &kernel_reference) want = got;
  }
}

// quantize_row(): what choose_qparams() and quantize() give, in exactly k bytes, with exactly the scratch it asks for.
void check_row(const uint8_t* x, DType dtype, int64_t k, const char* fill) {
  const QParams want = oracle_qparams(oracle_range(x, dtype, k));
  const float inverse = rounded(1 / want.scale);
  for (const Kernel* kernel : runnable()) {
    now("quantize_row of %d x %s, fill %s", static_cast<int>(k), name_of(dtype), fill);
    uint8_t* codes = codes_memory.place(k, Side::end);
    uint8_t* scratch = scratch_memory.place(row_scratch_bytes(k), Side::end);
    const QParams got = quantize_row(*kernel, x, dtype, k, codes, scratch);
    check(kernel->name, bits_of(got.scale) == bits_of(want.scale) && got.zero_point == want.zero_point,
          "expected scale %.9g zero point %d, got %.9g and %d", want.scale, want.zero_point, got.scale, got.zero_point);
    int64_t at = 0;
    while (at < k && codes[at] == oracle_code(rounded(element(x, dtype, at) * inverse), want.zero_point)) ++at;
    check(kernel->name, at == k, "code %d of x = %.9g is wrong: %d", static_cast<int>(at),
          at < k ? element(x, dtype, at) : 0.0f, at < k ? codes[at] : 0);
  }
}

const uint8_t* placed(const std::vector<uint8_t>& bytes, Side side) {
  uint8_t* x = x_memory.place(bytes.size(), side);
  if (!bytes.empty()) std::memcpy(x, bytes.data(), bytes.size());
  return x;
}

const float* placed(const std::vector<float>& scale, Side side) {
  uint8_t* at = scale_memory.place(scale.size() * 4, side);
  if (!scale.empty()) std::memcpy(at, scale.data(), scale.size() * 4);
  return reinterpret_cast<const float*>(at);
}

std::vector<uint8_t> random_bits(DType dtype, int64_t k) {
  std::vector<uint8_t> bytes(k * element_bytes(dtype));
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random_source.bits());
  return bytes;
}

std::vector<uint8_t> random_values(DType dtype, int64_t k) {
  std::vector<float> values(k);
  for (float& v : values) v = random_source.uniform(-3.0f, 2.0f);
  return encode(values, dtype);
}

// Every length that fills the unrolled loop, the vector loop and the tail differently.
void test_lengths() {
  const float inverses[] = {100.0f, 0.37f, 1e30f, 1e-30f, kInf, kNaN, 0.0f};
  for (DType dtype : kFloats)
    for (int64_t k = 0; k <= 130; ++k)
      for (Side side : {Side::end, Side::start})
        for (int variant = 0; variant < 4; ++variant) {
          const bool any_bits = variant & 1, scaled = variant & 2;
          const char* fill = any_bits ? "random bits" : "uniform(-3, 2)";
          const uint8_t* x = placed(any_bits ? random_bits(dtype, k) : random_values(dtype, k), side);
          const FloatRow row{x, dtype, k, scaled ? placed(random_channel_scale(k), side) : nullptr};
          check_range(row, fill);
          check_codes(row, random_source.pick(inverses), static_cast<int32_t>(random_source.below(256)), fill);
          check_codes(row, 50.0f, 128, fill);
          if (!row.channel_scale) check_row(x, dtype, k, fill);
        }
}

// kernel.quantize_own() against the same rows one by one. `x`: rows that lie `stride` bytes apart.
void check_together(const Kernel& kernel, const FloatRow& first, int64_t count, int64_t stride) {
  const int64_t room = room_for(first.k) * kernel.codes.bytes;
  uint8_t* codes = codes_memory.place(count * room, Side::end);
  std::vector<float> scale(count);
  std::vector<int32_t> zero_point(count);
  kernel.quantize_own({first, count, stride, codes, room, scale.data(), zero_point.data()});
  const std::vector<uint8_t> got(codes, codes + count * room);
  for (int64_t r = 0; r < count; ++r) {
    FloatRow row = first;
    row.x = static_cast<const uint8_t*>(first.x) + r * stride;
    const QParams want = choose_qparams(kernel.range(row));
    check(kernel.name, bits_of(scale[r]) == bits_of(want.scale) && zero_point[r] == want.zero_point,
          "row %d: expected scale %.9g zero point %d, got %.9g and %d", static_cast<int>(r), want.scale,
          want.zero_point, scale[r], zero_point[r]);
    uint8_t* alone = codes_memory.place(room, Side::end);
    kernel.quantize(row, 1 / want.scale, want.zero_point, alone, true);
    check(kernel.name, !std::memcmp(alone, &got[r * room], first.k * kernel.codes.bytes), "the codes of row %d differ",
          static_cast<int>(r));
  }
}

void test_rows_together() {
  for (const Kernel* kernel : runnable()) {
    if (!kernel->quantize_own) continue;
    for (DType dtype : kFloats)
      for (int64_t k : {0, 1, 15, 16, 32, 33, 64, 100, 130})
        for (int64_t count = 1; count <= kRowsTogether; ++count)
          for (bool any_bits : {false, true}) {
            const int64_t apart = k + count % 3, values = (count - 1) * apart + k;
            const uint8_t* x = placed(any_bits ? random_bits(dtype, values) : random_values(dtype, values), Side::end);
            const FloatRow first{x, dtype, k, count % 2 ? placed(random_channel_scale(k), Side::end) : nullptr};
            now("%d rows together, %s", static_cast<int>(count), describe(first, any_bits ? "bits" : "values").c_str());
            check_together(*kernel, first, count, apart * element_bytes(dtype));
          }
  }
}

// All 65536 bit patterns, and for float32 a sample of as many. quick: each inverse scale and each zero point, but not
// all pairs of them.
void test_all_patterns(bool quick) {
  int pair = 0;
  for (DType dtype : kFloats) {
    std::vector<uint8_t> bytes = random_bits(dtype, 65536);
    for (int i = 0; i < 65536 && dtype != DType::f32; ++i) {
      const auto bits = static_cast<uint16_t>(i);
      std::memcpy(&bytes[2 * i], &bits, 2);
    }
    const uint8_t* x = placed(bytes, Side::end);
    for (float inverse : {1.0f, 255.0f, 0.1f, 1e6f, 1e-30f, 1e38f, kInf, kNaN, 0.0f, -1.0f})
      for (int32_t zero_point : {0, 1, 127, 128, 255})
        if (!quick || pair++ % 6 == 0) check_codes({x, dtype, 65536, nullptr}, inverse, zero_point, "all patterns");
    check_range({x, dtype, 65536, nullptr}, "all patterns");
    // In slices, most of which hold no NaN: the whole row always has one.
    for (int64_t i = 0; i < 65536; i += 32)
      check_range({x + i * element_bytes(dtype), dtype, 32, nullptr}, "slice of all patterns");
  }
}

// Zeros of both signs, of which the range knows only +0; and one special value at every position.
void test_special_ranges() {
  for (DType dtype : kFloats)
    for (int64_t k : {1, 5, 16, 37, 67}) {
      std::vector<float> values(k);
      for (float& v : values) v = random_source.pick({0.0f, -0.0f});
      check_range({placed(encode(values, dtype), Side::end), dtype, k, nullptr}, "zeros of both signs");
      for (float special : {kInf, -kInf, kNaN, -0.0f, 1000.0f, -1000.0f})
        for (float base : {0.0f, -1.0f, 1.0f})
          for (int64_t at = 0; at < k; ++at) {
            std::fill(values.begin(), values.end(), base);
            values[at] = special;
            check_range({placed(encode(values, dtype), Side::end), dtype, k, nullptr}, "a special value among others");
          }
    }
}

// x exactly half way between two codes, its two neighbours, and x far outside: all of the static path's rounding.
void test_ties() {
  for (DType dtype : kFloats)
    for (float scale : {0.25f, 1.0f, 0.1f, 3e-3f}) {
      std::vector<float> values = {kNaN, -kNaN, kInf, -kInf, 3e38f, -3e38f, 1e-40f, -1e-40f, 0.0f, -0.0f};
      for (int half = -1030; half <= 1030; ++half) {
        const float x = static_cast<float>(half) * 0.5f * scale;
        values.insert(values.end(), {std::nextafter(x, -kInf), x, std::nextafter(x, kInf)});
      }
      const uint8_t* x = placed(encode(values, dtype), Side::end);
      for (int32_t zero_point : {0, 1, 127, 128, 254, 255})
        check_codes({x, dtype, static_cast<int64_t>(values.size()), nullptr}, rounded(1 / scale), zero_point, "ties");
    }
}

// With its own scale, every value of a row comes back within half a step. 2^-12 is for float32: x * inverse is at
// most 255, and inverse, the product and the scale are each off by 2^-24 of that, less than 2^-12 together.
void test_round_trip() {
  for (DType dtype : kFloats)
    for (int trial = 0; trial < 200; ++trial) {
      const int64_t k = random_source.between(1, 200);
      const float size = std::ldexp(1.0f, static_cast<int>(random_source.between(-12, 12)));
      std::vector<float> values(k);
      for (float& v : values) v = random_source.uniform(-1.0f, 1.5f) * size;
      const uint8_t* x = placed(encode(values, dtype), Side::end);
      for (const Kernel* kernel : runnable()) {
        now("round trip of %d x %s", static_cast<int>(k), name_of(dtype));
        const FloatRow row{x, dtype, k, nullptr};
        const QParams q = choose_qparams(kernel->range(row));
        const std::vector<int> codes = codes_of(*kernel, row, 1 / q.scale, q.zero_point);
        double worst = 0;
        for (int64_t i = 0; i < k; ++i)
          worst = std::max(worst, std::fabs((codes[i] - q.zero_point) * double{q.scale} - element(x, dtype, i)));
        check(kernel->name, worst <= (0.5 + 0x1p-12) * q.scale, "expected at most half a step, got %g steps",
              worst / q.scale);
      }
    }
}

}  // namespace

void test_rows(bool quick) {
  test_lengths();
  test_rows_together();
  test_all_patterns(quick);
  test_special_ranges();
  test_ties();
  test_round_trip();
}

}  // namespace torchq::test
