// One layer on one kernel, a number of times, and nothing else: what benchmarks/arm_analysis.py counts instructions of.
//
//   arm_layer <kernel> <m> <n> <k> <times>

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../csrc/gemm/gemm.h"

int main(int argc, char** argv) {
  const torchq::Kernel* kernel = argc == 6 ? torchq::find_kernel(argv[1]) : nullptr;
  if (!kernel || !torchq::can_run(*kernel)) {
    std::fprintf(stderr, "usage: arm_layer <kernel> <m> <n> <k> <times>, and a kernel this CPU can run\n");
    return 2;
  }
  const int64_t m = std::atoll(argv[2]), n = std::atoll(argv[3]), k = std::atoll(argv[4]), times = std::atoll(argv[5]);
  uint32_t state = 1;
  const auto random = [&] { return static_cast<int32_t>(state = state * 1664525u + 1013904223u) >> 16; };

  std::vector<int8_t> weight(n * k);
  for (int8_t& w : weight) w = static_cast<int8_t>(random());
  std::vector<float> scale(n, 1e-3f), bias(n, 0.5f), x(m * k), y(m * n);
  for (float& v : x) v = static_cast<float>(random()) * 1e-4f;
  std::vector<uint8_t> packed(torchq::packed_bytes(n, k, false));
  torchq::pack_begin(kernel->layout, n, k, true, nullptr, packed.data());
  torchq::pack_panels(weight.data(), scale.data(), bias.data(), packed.data(), 0, torchq::panel_count(n));

  torchq::Problem problem{};
  problem.m = m;
  problem.x = {x.data(), k * 4, torchq::DType::f32, true, {1.0f, 0}};
  problem.weights = torchq::packed_header(packed.data(), static_cast<int64_t>(packed.size()));
  problem.y = {y.data(), n * 4, torchq::DType::f32, {1.0f, 0}};
  std::vector<uint8_t> scratch(torchq::schedule(*kernel, problem).scratch_bytes);
  for (int64_t i = 0; i < times; ++i) {
    torchq::Job job = torchq::schedule(*kernel, problem);
    job.parts = 1;
    torchq::run(job, 0, scratch.data());
  }
  return 0;
}
