// Random problems, and running one on a kernel in guarded memory. gemm_test.cpp and parts_test.cpp.
#pragma once

#include <string>
#include <vector>

#include "oracle.h"

namespace torchq::test {

// How the rows of a problem come: every dtype, with a scale per row or one for all.
struct Kind {
  DType dtype;
  bool per_token;
};
constexpr Kind kKinds[] = {{DType::f32, true}, {DType::f32, false}, {DType::bf16, true}, {DType::bf16, false},
                           {DType::f16, true}, {DType::f16, false}, {DType::u8, false},  {DType::i8, false}};

// Full-range weights; scales and biases wide enough for f16 to overflow and to go subnormal.
Weights random_weights(int64_t n, int64_t k);
// For rows of floats: some channels far from the others, as smoothing gives them.
std::vector<float> random_channel_scale(int64_t k);
Rows random_rows(int64_t m, int64_t k, Kind kind);
// Rows of these float values, static with a range that some of them exceed.
Rows rows_of(const std::vector<float>& values, int64_t m, int64_t k, Kind kind);
// u8 codes that fill most of [0, 255] and exceed it on both sides, for these sums.
QParams output_qparams(const Sums& sums, const Weights& weights);

// Everything of a packed buffer that run() may read: not the bytes after the last panel.
std::vector<uint8_t> packed_of(const Weights& weights, Layout layout);

std::string describe(const Rows& rows, const Weights& weights, const Out& out, const char* fill);

// The problem's buffers, each between guard pages. x and packed are filled once, then run() as often as wanted.
class Stage {
 public:
  // pad: elements between the end of a row and the next one, of x and of y.
  Stage(const Rows& rows, const Weights& weights, Side side, int64_t pad);

  Problem problem(const Out& out, Layout layout = Layout::p16c4);
  // y with everything around it: canaries in the gaps between rows, and kMargin bytes at the end that has no guard.
  static constexpr int64_t kMargin = 64;
  std::vector<uint8_t> blank(const Out& out) const;
  std::vector<uint8_t> expected(const Out& out, const Sums& sums) const;
  // Runs these parts of `count`, in this order, on one thread.
  std::vector<uint8_t> run(const Kernel& kernel, const Out& out, const std::vector<int>& parts, int count,
                           Layout layout);
  std::vector<uint8_t> run(const Kernel& kernel, const Out& out, const std::vector<int>& parts, int count);
  std::vector<uint8_t> run(const Kernel& kernel, const Out& out);
  // One check of who: memcmp, and where the first difference lies.
  bool compare(const char* who, const Out& out, const std::vector<uint8_t>& got,
               const std::vector<uint8_t>& want) const;

  int64_t y_stride(const Out& out) const { return (weights_.n + pad_) * element_bytes(out.dtype); }
  int64_t y_bytes(const Out& out) const;

 private:
  int64_t y_offset() const { return side_ == Side::end ? kMargin : 0; }

  const Rows& rows_;
  const Weights& weights_;
  Side side_;
  int64_t pad_;
  const uint8_t* x_;
  const uint8_t* packed_[2];  // P16c4, P16c8
};

}  // namespace torchq::test
