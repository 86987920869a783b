// Inverted residuals computed at once: the bits of their convolutions one after the other, with x, y and scratch
// between guard pages.

#include "../../csrc/conv/inverted.h"

#include <algorithm>

#include "../../csrc/conv/depthwise.h"
#include "check.h"
#include "problem.h"

namespace torchq::test {
namespace {

using conv::Geometry;
using conv::Inverted;

// The channels of x and of y, and the depthwise convolution between them.
struct Block {
  int64_t inputs, outputs;
  Geometry g;
};

// size, kernel, stride, dilation, zeros before and after
constexpr Block kBlocks[] = {
    {16, 24, {48, 48, 48, {{21, 3, 1, 1, 1, 1}, {}, {30, 3, 1, 1, 1, 1}}}},      // long lines
    {9, 20, {37, 37, 37, {{7, 3, 1, 1, 1, 1}, {}, {7, 3, 1, 1, 1, 1}}}},         // short ones, ragged panels
    {16, 16, {32, 32, 32, {{70, 5, 2, 1, 2, 2}, {}, {113, 3, 2, 1, 0, 1}}}},     // many bands
    {24, 8, {16, 16, 16, {{50, 2, 3}, {}, {40, 2, 3}}}},                         // bands that share nothing
    {8, 40, {24, 24, 24, {{31, 3, 1, 2, 4, 3}, {}, {25, 1}}}},                   // zeros beyond what a patch has
    {12, 12, {20, 20, 20, {{5, 3, 1, 1, 1, 1}, {6, 3, 2, 1, 1, 1}, {7, 3, 1}}}}  // three dimensions
};

std::vector<uint8_t> random_packed(int64_t n, int64_t k, const Kernel& kernel) {
  return packed_of(random_weights(n, k), kernel.layout);
}

const PackedHeader* header_of(const std::vector<uint8_t>& packed) {
  return reinterpret_cast<const PackedHeader*>(packed.data());
}

void run_whole(const torchq::Job& job) {
  std::vector<uint8_t> memory(job.scratch_bytes);
  for (int part = 0; part < job.parts; ++part) run(job, part, memory.data());
}

void run_whole(const conv::Job& job) {
  std::vector<uint8_t> memory(job.scratch_bytes);
  for (int part = 0; part < job.parts; ++part) conv::run(job, part, memory.data());
}

torchq::Problem product_of(int64_t rows, const float* x, const std::vector<uint8_t>& packed, float* y,
                           Activation activation) {
  const PackedHeader* weights = header_of(packed);
  torchq::Problem p{};
  p.m = rows, p.weights = weights, p.activation = activation;
  p.x = {x, weights->k * 4, DType::f32, true, {1.0f, 0}};
  p.y = {y, weights->n * 4, DType::f32, {1.0f, 0}};
  return p;
}

void check_block(const Block& block, const Kernel& kernel, bool expands, bool projects) {
  static Guarded x, y, scratch;
  Random& r = random_source;
  const Geometry& g = block.g;
  const int64_t batch = 1 + r.below(3), pixels = batch * g.pixels(), out_pixels = batch * g.out_pixels();
  const int64_t inputs = expands ? block.inputs : g.in_channels, outputs = projects ? block.outputs : g.out_channels;
  const std::vector<uint8_t> expand = random_packed(g.in_channels, block.inputs, kernel);
  const std::vector<uint8_t> project = random_packed(block.outputs, g.out_channels, kernel);
  const std::vector<uint8_t> depthwise = random_packed(g.out_channels, g.taps(), kernel);
  const Activation activation = r.pick({Activation::none, Activation::relu6, Activation::silu});
  auto* given = reinterpret_cast<float*>(x.place(pixels * inputs * 4, Side::end));
  std::generate_n(given, pixels * inputs, [&] { return r.uniform(-2.0f, 3.0f); });
  std::vector<float> added(out_pixels * outputs);
  for (float& v : added) v = r.uniform(-2.0f, 2.0f);

  std::vector<float> wide(pixels * g.in_channels), thin(out_pixels * g.out_channels), want(out_pixels * outputs);
  torchq::Problem first = product_of(pixels, given, expand, wide.data(), activation);
  torchq::Problem then = product_of(out_pixels, thin.data(), project, want.data(), Activation::none);
  if (projects && r.below(2)) then.y.residual = {added.data(), outputs * 4};
  conv::Problem p{};
  p.geometry = g, p.batch = batch, p.is_depthwise = true, p.activation = activation;
  p.x = {expands ? wide.data() : given, DType::f32, true, true, {1.0f, 0}};
  p.weights = depthwise.data(), p.weights_stride = static_cast<int64_t>(depthwise.size());
  p.y = {projects ? thin.data() : want.data(), DType::f32, true, {1.0f, 0}};
  if (expands) run_whole(torchq::schedule(kernel, first));
  run_whole(conv::schedule(kernel, p, 1));
  if (projects) run_whole(torchq::schedule(kernel, then));

  auto* got = reinterpret_cast<float*>(y.place(out_pixels * outputs * 4, Side::end));
  std::fill_n(reinterpret_cast<uint8_t*>(got), out_pixels * outputs * 4, 0xFF);
  first.y.data = nullptr, then.x.data = nullptr, then.y.data = got;
  if (expands) p.x.data = nullptr;
  p.y.data = projects ? nullptr : got;
  const Inverted inverted{expands ? &first : nullptr, &p, projects ? &then : nullptr};
  if (!conv::pays(kernel, inverted, 1)) return;
  const conv::InvertedJob job = conv::schedule(kernel, inverted, 1 + static_cast<int>(r.below(4)));
  uint8_t* memory = scratch.place(job.scratch_bytes, Side::end);
  for (int part = 0; part < job.parts; ++part) conv::run(job, part, memory);
  const bool same = std::memcmp(got, want.data(), want.size() * 4) == 0;
  const auto at = std::mismatch(want.begin(), want.end(), got).first - want.begin();
  check(kernel.name, same, "y[%d] differs, of %d", static_cast<int>(at), static_cast<int>(want.size()));
}

}  // namespace

void test_inverted_residuals() {
  for (const Block& block : kBlocks)
    for (const Kernel* kernel : runnable())
      for (const int with : {1, 2, 3}) {
        now("inverted residual of %d, %d, %d channels, with %d", static_cast<int>(block.inputs),
            static_cast<int>(block.g.in_channels), static_cast<int>(block.outputs), with);
        check_block(block, *kernel, with & 1, with & 2);
      }
}

}  // namespace torchq::test
