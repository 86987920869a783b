// Percent of peak, per kernel: the GEMM core alone, one thread, no torch.
//
//   make bench-core                             builds this with the core and runs it
//   build/bench_core 9 16x4096x1024 avx2        rounds, one shape, one kernel
//   build/bench_core 60 curves                  the activations: ns a value in L1, and what they add to a layer
//
// The peak of a kernel is its multiply instruction (with what it cannot do without) on registers only, measured in
// the same run and interleaved with the GEMM, so that clock changes fall on both. 1 multiply-add counts as 2
// operations; padding does not count. Each figure is the best of several rounds.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../csrc/gemm/gemm.h"

extern "C" double peak_of(const char* kernel);  // peak.cpp

namespace {

using torchq::Kernel;

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

struct Shape {
  int64_t m, n, k;
};

struct Run {
  double whole, gemm;  // operations a second: quantize + GEMM + epilogue, and with codes ready made
};

class Layer {
 public:
  Layer(const Kernel& kernel, Shape s) : kernel_(kernel), shape_(s) {
    std::mt19937 random(1);
    std::vector<int8_t> weight(s.n * s.k);
    for (auto& w : weight) w = static_cast<int8_t>(random());
    std::vector<float> scale(s.n, 1e-3f);
    void* packed = aligned<uint8_t>(packed_, torchq::packed_bytes(s.n, s.k, false));
    torchq::pack_begin(kernel.layout, s.n, s.k, false, nullptr, packed);
    torchq::pack_panels(weight.data(), scale.data(), nullptr, packed, 0, torchq::panel_count(s.n));
    x_ = aligned<float>(x_bytes_, s.m * s.k);
    for (int64_t i = 0; i < s.m * s.k; ++i) x_[i] = std::normal_distribution<float>()(random);
    codes_.resize(s.m * s.k, 77);
    problem_.m = s.m;
    problem_.x.per_token = true;
    problem_.x.qparams = {1.0f, 128};
    problem_.weights = static_cast<const torchq::PackedHeader*>(packed);
    problem_.y = {aligned<float>(y_bytes_, s.m * s.n), s.n * 4, torchq::DType::f32, {1.0f, 128}};
    scratch_.resize(torchq::schedule(kernel, problem_).scratch_bytes);
  }

  // Seconds of one product of float rows, with an activation.
  double time(torchq::Activation activation) {
    problem_.activation = activation;
    return 2.0 * shape_.m * shape_.n * shape_.k / rate(false);
  }

  double rate(bool ready_made) {
    problem_.x.data = ready_made ? static_cast<const void*>(codes_.data()) : x_;
    problem_.x.stride = shape_.k * (ready_made ? 1 : 4);
    problem_.x.dtype = ready_made ? torchq::DType::u8 : torchq::DType::f32;
    const double ops = 2.0 * shape_.m * shape_.n * shape_.k;
    // About a millisecond at most: some rounds must fall between two ticks of the kernel's timer, 4 ms.
    const int repeats = std::max(1, static_cast<int>(5e8 / ops));
    const double start = seconds();
    for (int i = 0; i < repeats; ++i) {
      torchq::Job job = torchq::schedule(kernel_, problem_);
      job.parts = 1;
      torchq::run(job, 0, scratch_.data());
    }
    return ops * repeats / (seconds() - start);
  }

 private:
  // Room for so many T, at a cache line's start, where torch's tensors start too.
  template <class T>
  static T* aligned(std::vector<uint8_t>& v, int64_t count) {
    v.resize(count * sizeof(T) + 64);
    return reinterpret_cast<T*>(v.data() + (64 - reinterpret_cast<uintptr_t>(v.data()) % 64));
  }

  const Kernel& kernel_;
  Shape shape_;
  torchq::Problem problem_{};
  std::vector<uint8_t> packed_, codes_, scratch_, x_bytes_, y_bytes_;
  float* x_;
};

void print(const Kernel& kernel, const Shape& s, int rounds) {
  Layer layer(kernel, s);
  double peak = 0, gemm = 0, whole = 0;
  for (int r = 0; r < rounds; ++r) {
    peak = std::max(peak, peak_of(kernel.name));
    gemm = std::max(gemm, layer.rate(true));
    whole = std::max(whole, layer.rate(false));
  }
  char name[64];
  std::snprintf(name, sizeof(name), "%dx%dx%d", int(s.m), int(s.n), int(s.k));
  std::printf("%-14s %-16s %12.1f %12.1f %8.1f%% %8.1f%%\n", kernel.name, name, peak / 1e9, gemm / 1e9,
              100 * gemm / peak, 100 * whole / peak);
  std::fflush(stdout);
}

// The multiply step of engines that take 7 bits where there is no VNNI.
void print_pairs(int rounds) {
  double peak = 0;
  for (int r = 0; r < rounds; ++r) peak = std::max(peak, peak_of("pairs"));
  std::printf("%-14s %-16s %12.1f\n", "7 bits, others", "", peak / 1e9);
}

constexpr const char* kActivationNames[] = {"none",      "relu",  "gelu", "gelu_tanh", "silu", "quick_gelu",
                                            "hardswish", "relu2", "tanh", "sigmoid",   "relu6"};

// Each activation of 4096 values in L1, and a layer of 128 x 3072 x 768 with it against the same layer with ReLU.
void print_curves(const Kernel& kernel, int rounds) {
  alignas(64) static float x[4096], y[4096];
  for (int i = 0; i < 4096; ++i) x[i] = -6 + 12.0f * i / 4096;
  Layer layer(kernel, {128, 3072, 768});
  double value[torchq::kActivations], whole[torchq::kActivations];
  std::fill_n(value, torchq::kActivations, 1e9), std::fill_n(whole, torchq::kActivations, 1e9);
  for (int r = 0; r < rounds; ++r)
    for (int i = 0; i < torchq::kActivations; ++i) {
      const auto activation = static_cast<torchq::Activation>(i);
      const double start = seconds();
      for (int repeat = 0; repeat < 50; ++repeat) kernel.activate(activation, torchq::DType::f32, x, y, 4096);
      value[i] = std::min(value[i], (seconds() - start) / 50 / 4096);
      whole[i] = std::min(whole[i], layer.time(activation));
    }
  for (int i = 0; i < torchq::kActivations; ++i)
    std::printf("%-14s %-12s %8.3f ns a value %10.1f us a layer %+7.1f%% against relu\n", kernel.name,
                kActivationNames[i], value[i] * 1e9, whole[i] * 1e6, 100 * (whole[i] / whole[1] - 1));
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 15;
  std::vector<Shape> shapes = {{512, 4096, 4096}, {128, 768, 768}, {128, 3072, 768}, {64, 1024, 1024}, {16, 4096, 1024},
                               {16, 1024, 1024},  {4, 1024, 1024}, {1, 768, 768},    {1, 4096, 4096}};
  int m, n, k;
  if (argc > 2 && std::sscanf(argv[2], "%dx%dx%d", &m, &n, &k) == 3) shapes = {{m, n, k}};
  const bool curves = argc > 2 && std::strcmp(argv[2], "curves") == 0;
  if (!curves)
    std::printf("%-14s %-16s %12s %12s %9s %9s\n", "kernel", "M x N x K", "peak Gop/s", "gemm Gop/s", "gemm %",
                "layer %");
  for (int i = 0; i < torchq::kernel_count(); ++i) {
    const Kernel& kernel = torchq::kernel_at(i);
    if (argc > 3 && std::strcmp(kernel.name, argv[3]) != 0) continue;
    if (!torchq::can_run(kernel))
      std::printf("%-14s this CPU cannot run it\n", kernel.name);
    else if (curves && kernel.needs)
      print_curves(kernel, rounds);
    else if (!curves && peak_of(kernel.name) > 0)
      for (const Shape& s : shapes) print(kernel, s, rounds);
    if (!curves && std::strcmp(kernel.name, "avx2") == 0 && torchq::can_run(kernel)) print_pairs(rounds);
  }
}
