// Convolutions: every kernel against the oracle of the GEMM, which gets a matrix of all patches, with x, y and scratch
// between guard pages.

#include "../../csrc/conv/conv.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "check.h"
#include "../../csrc/conv/depthwise.h"
#include "problem.h"

namespace torchq::test {
namespace {

using conv::Axis;
using conv::Geometry;

// size, kernel, stride, dilation, zeros before and after
constexpr Geometry kGeometries[] = {
    {3, 20, 1, {{9, 7, 2, 1, 3, 3}, {}, {11, 7, 2, 1, 3, 3}}},
    {64, 65, 1, {{6, 3, 1, 1, 1, 1}, {}, {7, 3, 1, 1, 1, 1}}},
    {40, 33, 1, {{5}, {}, {6}}},                                   // pointwise: rows lie in the image
    {24, 16, 1, {{7, 1, 2}, {}, {5, 1, 2}}},                       // runs that end near the end of x
    {16, 17, 1, {{31, 5, 2}, {}, {}}},                             // one run for a patch
    {5, 40, 1, {{4, 2}, {5, 3, 1, 1, 1, 1}, {6, 2, 2, 1, 0, 1}}},  // three dimensions
    {12, 18, 3, {{6, 3, 1, 2, 2, 2}, {}, {7, 3, 1, 1, 1, 0}}},     // groups
    {130, 16, 1, {{150, 3, 1, 1, 1, 1}, {}, {50, 1}}},             // more than one band
    {35, 35, 35, {{9, 3, 1, 1, 1, 1}, {}, {8, 3, 2, 1, 1, 1}}},    // depthwise
    {32, 32, 32, {{40, 31, 1, 1, 15, 15}, {}, {}}},                // depthwise along a line
    {16, 16, 16, {{100, 3, 1, 1}, {}, {30, 5}}},                   // depthwise, x in place and more than one band
};

// Of residuals in codes. A power of two, so that the codes can be told from the values.
constexpr QParams kResidual{0.03125f, 100};

// A convolution with its input, and what the oracle has of it.
struct Case {
  Geometry g;
  bool depthwise, channels_last;
  int64_t batch;
  DType dtype;
  bool per_sample;
  Activation activation = Activation::none;
  std::vector<uint8_t> x{};  // as given
  QParams q{0.02f, 117};
  std::vector<QParams> samples{};
  std::vector<Weights> weights{};  // of each group
  std::vector<float> residual{};   // (batch, pixels, out_channels), or empty
  bool residual_in_codes = false;  // then all of them are multiples of kResidual.scale

  int64_t inputs() const { return batch * g.pixels() * g.in_channels; }
  int64_t outputs() const { return batch * g.out_pixels() * g.out_channels; }
  int64_t index(int64_t sample, int64_t pixel, int64_t channel) const {  // of x
    const int64_t first = sample * g.pixels() * g.in_channels;
    return first + (channels_last ? pixel * g.in_channels + channel : channel * g.pixels() + pixel);
  }
};

Case random_case(const Geometry& g, DType dtype, bool per_sample) {
  Random& r = random_source;
  Case c{g, conv::can_be_depthwise(g), dtype == DType::u8 || r.below(2), 1 + r.below(2), dtype, per_sample};
  c.activation = r.pick({Activation::none, Activation::relu, Activation::silu});
  std::vector<float> values(c.inputs());
  for (float& v : values) v = r.uniform(-2.0f, 3.0f);
  c.x = dtype == DType::u8 ? std::vector<uint8_t>(c.inputs()) : encode(values, dtype);
  for (uint8_t& code : c.x)
    if (dtype == DType::u8) code = static_cast<uint8_t>(r.below(256));
  const int64_t sample_bytes = g.pixels() * g.in_channels * element_bytes(dtype);
  for (int64_t n = 0; n < c.batch; ++n)
    c.samples.push_back(
        per_sample ? oracle_qparams(oracle_range(c.x.data() + n * sample_bytes, dtype, g.pixels() * g.in_channels))
                   : c.q);
  for (int64_t group = 0; group < g.groups; ++group) c.weights.push_back(random_weights(g.group_outputs(), g.depth()));
  const int residual = r.below(3);
  c.residual_in_codes = residual == 2;
  for (int64_t i = 0; i < c.outputs() && residual; ++i)
    c.residual.push_back(c.residual_in_codes ? (r.below(256) - kResidual.zero_point) * kResidual.scale
                                             : r.uniform(-3.0f, 3.0f));
  return c;
}

// Where the value of a tap is in x; -1 in the padding.
int64_t index_of(const Case& c, int64_t sample, const int64_t (&at)[3], int64_t channel) {
  int64_t pixel = 0;
  for (int a = 0; a < 3; ++a) {
    if (at[a] < 0 || at[a] >= c.g.axes[a].size) return -1;
    pixel = pixel * c.g.axes[a].size + at[a];
  }
  return c.index(sample, pixel, channel);
}

// The code of a value of x, or of the padding.
uint8_t code_of(const Case& c, int64_t sample, int64_t i) {
  const QParams& q = c.samples[sample];
  if (i < 0) return static_cast<uint8_t>(q.zero_point);
  if (c.dtype == DType::u8) return c.x[i];
  return oracle_code(rounded(element(c.x.data(), c.dtype, i) * rounded(1.0f / q.scale)), q.zero_point);
}

// Calls f with where each value of the patches of a sample's pixels for a group is in x.
template <class F>
void for_each_value(const Case& c, int64_t sample, int64_t group, const F& f) {
  const Geometry& g = c.g;
  const auto& [outer, middle, inner] = g.axes;
  for (int64_t p = 0; p < g.out_pixels(); ++p) {
    const int64_t out[] = {p / (middle.outputs() * inner.outputs()), p / inner.outputs() % middle.outputs(),
                           p % inner.outputs()};
    for (int64_t tap = 0; tap < g.taps(); ++tap) {
      const int64_t of[] = {tap / (middle.kernel * inner.kernel), tap / inner.kernel % middle.kernel,
                            tap % inner.kernel};
      int64_t at[3];
      for (int a = 0; a < 3; ++a) at[a] = out[a] * g.axes[a].stride + of[a] * g.axes[a].dilation - g.axes[a].before;
      for (int64_t i = 0; i < g.group_inputs(); ++i) f(index_of(c, sample, at, group * g.group_inputs() + i));
    }
  }
}

// These patches, as rows of codes.
Rows patches_of(const Case& c, int64_t sample, int64_t group) {
  Rows rows{c.g.out_pixels(), c.g.depth(), DType::u8, false, c.samples[sample], {}};
  for_each_value(c, sample, group, [&](int64_t i) { rows.bytes.push_back(code_of(c, sample, i)); });
  return rows;
}

// What a depthwise convolution of floats gives for a channel of a sample, before residual and activation.
std::vector<float> of_floats(const Case& c, int64_t sample, int64_t channel) {
  const Weights& w = c.weights[channel];
  std::vector<float> y;
  int64_t tap = 0;
  float sum = 0.0f;
  for_each_value(c, sample, channel, [&](int64_t i) {
    sum = std::fma(i < 0 ? 0.0f : element(c.x.data(), c.dtype, i), static_cast<float>(w.codes[tap]), sum);
    if (++tap < c.g.taps()) return;
    y.push_back(rounded(rounded(sum * w.scale[0]) + (w.bias.empty() ? 0.0f : w.bias[0])));
    tap = 0, sum = 0.0f;
  });
  return y;
}

// y (batch, pixels, channels) without activation; the activation follows the residual.
std::vector<float> expected(const Case& c) {
  std::vector<float> y(c.outputs());
  for (int64_t sample = 0; sample < c.batch; ++sample)
    for (int64_t group = 0; group < c.g.groups; ++group) {
      const bool floats = c.depthwise && c.per_sample;
      const Sums sums = oracle_sums(patches_of(c, sample, group), c.weights[group]);
      const std::vector<float> of = floats ? of_floats(c, sample, group) : std::vector<float>();
      for (int64_t p = 0; p < c.g.out_pixels(); ++p)
        for (int64_t n = 0; n < c.g.group_outputs(); ++n) {
          const int64_t i = (sample * c.g.out_pixels() + p) * c.g.out_channels + group * c.g.group_outputs() + n;
          y[i] = floats ? of[p] : oracle_value(sums, c.weights[group], Activation::none, p, n);
          if (!c.residual.empty()) y[i] = rounded(y[i] + c.residual[i]);
        }
    }
  kernel_reference.activate(c.activation, DType::f32, y.data(), y.data(), c.outputs());
  return y;
}

// The weights of all groups in one buffer, or of a depthwise convolution as one matrix.
std::vector<uint8_t> packed_weights(const Case& c, Layout layout, int64_t& stride) {
  if (!c.depthwise) {
    std::vector<uint8_t> all;
    for (const Weights& w : c.weights) {
      std::vector<uint8_t> one = packed_of(w, layout);
      one.resize((packed_bytes(w.n, w.k, false) + 63) / 64 * 64);
      all.insert(all.end(), one.begin(), one.end());
    }
    stride = static_cast<int64_t>(all.size()) / c.g.groups;
    return all;
  }
  Weights matrix{c.g.out_channels, c.g.taps(), {}, {}, std::vector<float>(c.g.out_channels)};
  for (int64_t n = 0; n < matrix.n; ++n) {
    const Weights& w = c.weights[n];
    matrix.codes.insert(matrix.codes.end(), w.codes.begin(), w.codes.end());
    matrix.scale.push_back(w.scale[0]);
    if (!w.bias.empty()) matrix.bias[n] = w.bias[0];
  }
  stride = packed_bytes(matrix.n, matrix.k, false);
  return packed_of(matrix, layout);
}

// y transposed to channels first, or back: (batch, a, b) to (batch, b, a).
std::vector<float> swapped(const std::vector<float>& y, int64_t batch, int64_t a, int64_t b) {
  std::vector<float> found(y.size());
  for (int64_t n = 0; n < batch && !y.empty(); ++n)
    for (int64_t i = 0; i < a; ++i)
      for (int64_t j = 0; j < b; ++j) found[(n * b + j) * a + i] = y[(n * a + i) * b + j];
  return found;
}

void check_case(const Case& c, const Kernel& kernel, bool y_last, const std::vector<float>& want) {
  const bool residual_last = y_last || random_source.below(2);
  static Guarded x, y, scratch;
  const int64_t pixels = c.g.out_pixels(), channels = c.g.out_channels;
  int64_t stride;
  const std::vector<uint8_t> packed = packed_weights(c, kernel.layout, stride);
  const std::vector<float> residual = residual_last ? c.residual : swapped(c.residual, c.batch, pixels, channels);
  std::vector<uint8_t> codes;
  for (const float v : residual) codes.push_back(static_cast<uint8_t>(v / kResidual.scale + kResidual.zero_point));
  uint8_t* given = x.place(c.x.size(), Side::end);
  std::copy(c.x.begin(), c.x.end(), given);
  auto* out = reinterpret_cast<float*>(y.place(c.outputs() * 4, Side::end));
  std::fill_n(reinterpret_cast<uint8_t*>(out), c.outputs() * 4, 0xFF);
  conv::Problem p{};
  p.geometry = c.g, p.batch = c.batch, p.is_depthwise = c.depthwise, p.activation = c.activation;
  p.x = {given, c.dtype, c.channels_last, c.per_sample, c.q, c.samples.data()};
  p.weights = packed.data(), p.weights_stride = stride;
  p.y = {out, DType::f32, y_last, {1.0f, 0}}, p.residual_last = residual_last;
  if (c.residual_in_codes)
    p.residual = {codes.data(), 0, DType::u8, kResidual.scale, kResidual.zero_point};
  else if (!c.residual.empty())
    p.residual.data = residual.data();
  conv::Job job = conv::schedule(kernel, p, 1 + static_cast<int>(random_source.below(4)));
  uint8_t* memory = scratch.place(job.scratch_bytes, Side::end);
  for (int part = 0; part < job.parts; ++part) conv::run(job, part, memory);
  const std::vector<float> got(out, out + c.outputs());
  const std::vector<float> found = y_last ? got : swapped(got, c.batch, channels, pixels);
  const auto differs = std::mismatch(found.begin(), found.end(), want.begin(), [](float a, float b) {
    return std::memcmp(&a, &b, 4) == 0 || (a != a && b != b);
  });
  const bool same = differs.first == found.end();
  check(kernel.name, same, "y[%d]: expected %.9g, got %.9g", static_cast<int>(differs.first - found.begin()),
        same ? 0.0 : *differs.second, same ? 0.0 : *differs.first);
}

// What a pointwise convolution of codes gives as codes by a kernel: for a zero point of x, of a residual and of y.
struct Codes {
  Activation activation;
  int32_t x, residual, y;
  DType dtype;  // of the residual; i8 for none
};

std::vector<uint8_t> codes_by(const Kernel& kernel, const Codes& c, const Weights& weights,
                              const std::vector<uint8_t>& x, const std::vector<uint8_t>& residual) {
  static Guarded memory, outputs, scratch;
  const int64_t pixels = static_cast<int64_t>(x.size()) / weights.k;
  const std::vector<uint8_t> packed = packed_of(weights, kernel.layout);
  uint8_t* given = memory.place(x.size(), Side::end);
  std::copy(x.begin(), x.end(), given);
  uint8_t* y = outputs.place(pixels * weights.n, Side::end);
  conv::Problem p{};
  p.geometry = {weights.k, weights.n, 1, {{pixels}, {}, {}}};
  p.batch = 1, p.activation = c.activation;
  p.x = {given, DType::u8, true, false, {0.02f, c.x}};
  p.weights = packed.data(), p.weights_stride = static_cast<int64_t>(packed.size());
  p.y = {y, DType::u8, true, {0.11f, c.y}}, p.residual_last = true;
  if (c.dtype != DType::i8) p.residual = {residual.data(), 0, c.dtype, 0.05f, c.residual};
  const conv::Job job = conv::schedule(kernel, p, 1);
  conv::run(job, 0, scratch.place(job.scratch_bytes, Side::end));
  return {y, y + pixels * weights.n};
}

// Codes between convolutions: a ReLU and zero points of 0, which have an epilogue of their own, and what is almost so.
void test_codes_between() {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  constexpr int64_t kPixels = 27, kInputs = 24;
  for (const int64_t n : {int64_t{64}, int64_t{150}}) {
    Weights weights = random_weights(n, kInputs);
    std::fill(weights.scale.begin(), weights.scale.end(), 0.01f);
    weights.bias.assign(n, 0.5f);
    weights.bias[3] = kInfinity, weights.bias[4] = -kInfinity, weights.bias[5] = std::nanf("");
    std::vector<uint8_t> x(kPixels * kInputs);
    for (uint8_t& code : x) code = static_cast<uint8_t>(random_source.below(256));
    std::vector<float> values(kPixels * n);
    for (float& v : values) v = random_source.uniform(-9.0f, 9.0f);
    values[7] = std::nanf(""), values[8] = kInfinity, values[9] = 1e38f;
    for (const DType dtype : {DType::i8, DType::u8, DType::f32, DType::bf16})
      for (const Codes& c : {Codes{Activation::relu, 0, 0, 0, dtype},
                             {Activation::relu, 9, 0, 0, dtype},
                             {Activation::relu6, 0, 0, 0, dtype},
                             {Activation::relu6, 9, 0, 0, dtype},
                             {Activation::relu, 0, 9, 0, dtype},
                             {Activation::relu, 0, 0, 9, dtype},
                             {Activation::none, 0, 0, 0, dtype},
                             {Activation::silu, 0, 0, 0, dtype}}) {
        std::vector<uint8_t> residual(kPixels * n);
        for (uint8_t& code : residual) code = static_cast<uint8_t>(random_source.below(256));
        if (dtype != DType::u8 && dtype != DType::i8) residual = encode(values, dtype);
        now("codes of %d channels, activation %d, zero points %d, %d, %d, residual %s", static_cast<int>(n),
            static_cast<int>(c.activation), c.x, c.residual, c.y, name_of(dtype));
        const std::vector<uint8_t> want = codes_by(kernel_reference, c, weights, x, residual);
        for (const Kernel* kernel : runnable()) {
          const std::vector<uint8_t> got = codes_by(*kernel, c, weights, x, residual);
          const auto at = std::mismatch(got.begin(), got.end(), want.begin()).first - got.begin();
          const bool same = got == want;
          check(kernel->name, same, "y[%d]: expected %d, got %d", static_cast<int>(at), same ? 0 : want[at],
                same ? 0 : got[at]);
        }
      }
  }
}

}  // namespace

void test_convolutions() {
  test_codes_between();
  for (const Geometry& g : kGeometries)
    for (const auto& [dtype, per_sample] :
         {Kind{DType::f32, true}, {DType::f32, false}, {DType::bf16, true}, {DType::u8, false}}) {
      const Case c = random_case(g, dtype, per_sample);
      const std::vector<float> want = expected(c);
      for (const Kernel* kernel : runnable())
        for (const bool y_last : {true, false}) {
          now("convolution of %d channels to %d, kernel %d x %d, %s %s, %s to %s", static_cast<int>(g.in_channels),
              static_cast<int>(g.out_channels), static_cast<int>(g.axes[0].kernel), static_cast<int>(g.axes[2].kernel),
              name_of(dtype), per_sample ? "per sample" : "static", c.channels_last ? "channels last" : "first",
              y_last ? "last" : "first");
          check_case(c, *kernel, y_last, want);
        }
    }
}

}  // namespace torchq::test
