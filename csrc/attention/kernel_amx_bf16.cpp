// AMX with BF16 (Sapphire Rapids and its successors): as AVX512 with BF16, and for products of bfloat16
//
//   TDPBF16PS tmm, tmm, tmm   acc (16 x 16) += 16 rows of 32 halves · 32 x 16 halves    16 cycles
//
// 16 rows of pairs of a panel, 64 bytes each, are a tile as they lie; so are 64 bytes of 16 rows of a. For more than 16
// rows there are 2 x 2 tiles of sums, else 1 x 4. As in the GEMM's kernel of tiles (../gemm/kernel_amx_int8.cpp), rows
// are divided evenly, the last tiles begin a few rows early where that leaves a remainder, and sums are stored while
// the next ones begin: here straight to the output.
//
// A depth that is no multiple of 16 pairs ends in a step of copies that have zeros behind them: what lies behind the
// operands may be no number.

#include "kernel.h"

#if defined(__x86_64__) && TORCHQ_HAS_AMX
#include <float.h>
#include <immintrin.h>
#include <string.h>

#include "../gemm/kernel.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")

namespace torchq {
namespace attention {
namespace amx_bf16 {

#include "vec512.inc"

#include "floats.inc"
#include "softmax.inc"
#include "codes.inc"
#include "in_place.inc"
#include "halves.inc"

constexpr int kMaxRows = 6, kMaxPanels = 4, kAhead = 64;

#include "multiply.inc"

#ifdef TORCHQ_TILES  // registers in memory, for CPUs without AMX: tests/core
#include TORCHQ_TILES
#else
#include "../gemm/tiles.inc"
#endif
#include "../gemm/tile_step.inc"

constexpr int64_t kTileRows = 16, kTileBytes = kTileRows * 64, kPairs = 16, kRowsTogether = 64;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// What a tile of outputs is made of, over some steps.
struct Operands {
  const uint8_t *a, *b;
  int64_t a_stride, panel_stride;  // bytes
};

// Stores old sums and starts new ones.
template <int kTall>
struct Exchange {
  float *before, *now;
  int64_t out_stride, second_row;

  template <int kIndex>
  float* place(float* out) const {
    constexpr int kRow = kIndex / (4 / kTall), kColumn = kIndex % (4 / kTall) * 16;
    return out + kRow * second_row * out_stride + kColumn;
  }
  template <int kIndex>
  TORCHQ_INLINE void store(float* out) const {
    store_tile<kIndex>(place<kIndex>(out), out_stride * 4);
  }
  template <int kIndex>
  TORCHQ_INLINE void at() const {
    store<kIndex>(before);
    zero_tile<kIndex>();
  }
};

// A product of up to kRowsTogether rows, from `row` on.
class Rows {
 public:
  Rows(const Product& product, int64_t row, int64_t count)
      : p_(product), row_(row), count_(count), steps_(p_.depth / kPairs), rest_(p_.depth % kPairs) {
    if (has_tail()) copy_tails(bytes_of(p_.a + row * p_.a_stride + steps_ * kPairs), p_.a_stride * 4, count, tail_a_);
  }

  void run() {
    if (count_ > kTileRows) {
      divide<2>();
      sweep<2, 2>(0, p_.panels & ~1);
      return sweep<2, 1>(p_.panels & ~1, p_.panels);
    }
    divide<1>();
    sweep<1, 4>(0, p_.panels & ~3);
    switch (p_.panels & 3) {
      case 3: return sweep<1, 3>(p_.panels & ~3, p_.panels);
      case 2: return sweep<1, 2>(p_.panels & ~3, p_.panels);
      default: return sweep<1, 1>(p_.panels & ~3, p_.panels);
    }
  }

 private:
  static const uint8_t* bytes_of(const float* x) { return reinterpret_cast<const uint8_t*>(x); }

  // Also where there is no depth at all: the sums of no products are 0.
  bool has_tail() const { return rest_ != 0 || steps_ == 0; }

  // The pairs of each row behind the last whole step, and zeros.
  void copy_tails(const uint8_t* rows, int64_t stride, int64_t count, float* out) const {
    const __mmask16 pairs = static_cast<__mmask16>((1u << rest_) - 1);
    for (int64_t r = 0; r < count; ++r) store(out + r * 16, _mm512_maskz_loadu_ps(pairs, rows + r * stride));
  }
  void copy_panel_tail(const float* pairs, float* out) const {
    memcpy(out, pairs, rest_ * 64);
    memset(out + rest_ * 16, 0, (kPairs - rest_) * 64);
  }

  template <int kTall>
  void divide() {
    tiles_ = ceil_div(count_, kTall * kTileRows), height_ = ceil_div(count_, tiles_);
    const int first = static_cast<int>(ceil_div(height_, kTall)), second = static_cast<int>(height_) - first;
    first_rows_ = first;
    if (kTall == 2)
      configure({first, first, second, second, first, second, kTileRows, kTileRows});
    else
      configure({first, first, first, first, first, kTileRows, kTileRows, kTileRows});
  }

  template <int kTall, int kWide>
  __attribute__((noinline)) void multiply(Operands whole, const Operands& tail, const Exchange<kTall>& exchange) const {
    const int64_t second = first_rows_ * whole.a_stride, second_of_tail = first_rows_ * tail.a_stride;
    if (steps_ == 0)
      return step<DotHalves, kTall, kWide>(tail.a, tail.a_stride, second_of_tail, tail.b, tail.panel_stride, exchange);
    step<DotHalves, kTall, kWide>(whole.a, whole.a_stride, second, whole.b, whole.panel_stride, exchange);
    for (int64_t s = 1; s < steps_; ++s) {
      whole.a += 64, whole.b += kTileBytes;
      step<DotHalves, kTall, kWide>(whole.a, whole.a_stride, second, whole.b, whole.panel_stride, NoExchange());
    }
    if (has_tail())
      step<DotHalves, kTall, kWide>(tail.a, tail.a_stride, second_of_tail, tail.b, tail.panel_stride, NoExchange());
  }

  // All rows, by panels [first, end) in groups of kWide.
  template <int kTall, int kWide>
  void sweep(int64_t first, int64_t end) {
    if (first == end) return;
    alignas(64) float tail_b[kWide * kPairs * 16];
    Exchange<kTall> exchange{nullptr, nullptr, p_.out_stride, first_rows_};
    for (int64_t panel = first; panel < end; panel += kWide) {
      const float* b = p_.b + panel * p_.panel_stride;
      for (int64_t c = 0; has_tail() && c < kWide; ++c)
        copy_panel_tail(b + c * p_.panel_stride + steps_ * kPairs * 16, tail_b + c * kPairs * 16);
      for (int64_t t = 0; t < tiles_; ++t) {
        const int64_t row = smaller(t * height_, count_ - height_);
        const float* a = p_.a + (row_ + row) * p_.a_stride;
        exchange.now = p_.out + (row_ + row) * p_.out_stride + panel * kPanel;
        if (!exchange.before) exchange.before = exchange.now;  // what the registers happen to hold
        multiply<kTall, kWide>({bytes_of(a), bytes_of(b), p_.a_stride * 4, p_.panel_stride * 4},
                               {bytes_of(tail_a_ + row * 16), bytes_of(tail_b), 64, kTileBytes}, exchange);
        exchange.before = exchange.now;
      }
    }
    store_all<kTall, kWide>(exchange);
  }

  template <int kTall, int kWide>
  static void store_all(const Exchange<kTall>& exchange) {
    float* out = exchange.now;
    exchange.template store<0>(out);
    if constexpr (kWide > 1) exchange.template store<1>(out);
    if constexpr (kTall > 1 || kWide > 2) exchange.template store<2>(out);
    if constexpr (kTall == 2 ? kWide > 1 : kWide > 3) exchange.template store<3>(out);
  }

  const Product& p_;
  int64_t row_, count_, steps_, rest_;  // rest: pairs
  int64_t tiles_, height_,
      first_rows_;  // tiles of up to kTall · 16 rows, the rows of each, those of its first register
  alignas(64) float tail_a_[kRowsTogether * 16];
};

void multiply_halves(const Product& p) {
  for (int64_t row = 0; row < p.m; row += kRowsTogether) Rows(p, row, smaller(kRowsTogether, p.m - row)).run();
  release_tiles();
}

}  // namespace amx_bf16

constexpr Kernel kernel_amx_bf16 = [] {
  Kernel k;
  k.name = "amx_bf16";
  k.needs = kAvx512Vnni | kAvx512Bf16 | kAmxBf16;
  k.beside = kAmxInt8;
  k.blocking = {1, 2 * amx_bf16::kTileRows, amx_bf16::kRowsTogether, 2 * amx_bf16::kTileRows};
  k.codes_pay_from = 512;
  k.to_floats = amx_bf16::to_floats;
  k.from_floats = amx_bf16::from_floats;
  k.transpose = amx_bf16::transpose;
  k.multiply = amx_bf16::multiply;
  k.multiply_halves = amx_bf16::multiply_halves;
  k.to_halves = amx_bf16::to_halves;
  k.weigh_halves = amx_bf16::weigh_halves;
  k.join_halves = amx_bf16::join_halves;
  k.largest = amx_bf16::largest;
  k.largest_masked = amx_bf16::largest_masked;
  k.weigh = amx_bf16::weigh;
  k.dot_rows = amx_bf16::dot_rows;
  k.add_weighted = amx_bf16::add_weighted;
  k.weigh_codes = amx_bf16::weigh_codes;
  k.quantize_keys = amx_bf16::quantize_keys;
  k.quantize_values = amx_bf16::quantize_values;
  k.add_rows = amx_bf16::add_rows;
  k.extend_ranges = amx_bf16::extend_ranges;
  return k;
}();

}  // namespace attention
}  // namespace torchq

#pragma GCC pop_options
#endif
