// csrc/run.cpp and the core on many threads, for TSan: callers that share packed weights, each on several threads of
// its own, while others pack and force kernels. Every answer is compared with that of one thread.
//
// Prints "<number> answers, <number> wrong".

#include <atomic>
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

#include "../../csrc/run.h"

namespace torchq::test {
namespace {

constexpr int kCallers = 4, kRounds = 3;
constexpr int64_t kHidden = 64;                              // of a recurrent layer, whose gates are numbers of x
constexpr int64_t kRows = 70, kColumns = 300, kDepth = 260;  // 5 M multiply-adds: every kernel takes several threads

struct Matrices {
  std::vector<int8_t> weight = std::vector<int8_t>(kColumns * kDepth);
  std::vector<float> scale = std::vector<float>(kColumns, 0.01f), bias = std::vector<float>(kColumns, 0.5f);
  std::vector<float> x = std::vector<float>(kRows * kDepth);

  Matrices() {
    uint32_t state = 1;
    const auto next = [&state] { return (state = state * 1664525 + 1013904223) >> 24; };
    for (int8_t& w : weight) w = static_cast<int8_t>(next());
    for (float& value : x) value = static_cast<float>(next()) / 16 - 8;
  }
  std::vector<uint8_t> packed(Layout layout, int64_t n = kColumns, int64_t k = kDepth) const {
    std::vector<uint8_t> out(packed_bytes(n, k, false));
    pack(layout, {n, k, weight.data(), scale.data(), bias.data(), nullptr, true}, out.data());
    return out;
  }
};

Problem problem_of(const Matrices& matrices, const std::vector<uint8_t>& packed, std::vector<float>& y) {
  Problem problem{};
  problem.m = kRows;
  problem.x = {matrices.x.data(), kDepth * 4, DType::f32, true, {1.0f, 0}};
  problem.weights = reinterpret_cast<const PackedHeader*>(packed.data());
  problem.y = {y.data(), kColumns * 4, DType::f32, {1.0f, 0}};
  problem.activation = Activation::gelu;
  return problem;
}

std::vector<float> on_one_thread(const Kernel& kernel, const Matrices& matrices, const std::vector<uint8_t>& packed) {
  std::vector<float> y(kRows * kColumns);
  const Problem problem = problem_of(matrices, packed, y);
  Job job = schedule(kernel, problem);
  job.parts = 1;
  std::vector<uint8_t> scratch(job.scratch_bytes);
  run(job, 0, scratch.data());
  return y;
}

attention::Problem attention_of(int scheme, const Matrices& matrices, std::vector<float>& y) {
  attention::Problem p{};
  p.scheme = static_cast<attention::Scheme>(scheme);
  p.batch = 1, p.heads = 5, p.kv_heads = 1, p.rows = kRows, p.keys = kRows, p.depth = p.columns = kDepth / 5;
  p.q = {matrices.x.data(), DType::f32, 0, p.depth * 4, kDepth * 4, 4};
  p.k = p.v = {matrices.x.data(), DType::f32, 0, 0, kDepth * 4, 4};
  p.band = {-kRows, kRows};
  p.scale = 0.1f;
  p.y = y.data(), p.y_dtype = DType::f32;
  p.y_head = p.rows * p.columns * 4, p.y_row = p.columns * 4;
  return p;
}

std::vector<float> attention_on_one_thread(const Kernel& gemm, int scheme, const Matrices& matrices) {
  std::vector<float> y(kRows * kDepth);
  const attention::Problem problem = attention_of(scheme, matrices, y);
  attention::Job job = attention::schedule(attention::kernel_beside(gemm), gemm, problem);
  job.parts = 1;
  std::vector<uint8_t> scratch(job.scratch_bytes);
  run(job, 0, scratch.data());
  return y;
}

// y of an LSTM of two directions: each on a thread of its own, or one after the other.
std::vector<float> recurrent(const Kernel& kernel, const Matrices& matrices, const std::vector<uint8_t>& hh,
                             bool on_one_thread) {
  constexpr int64_t kBatch = 8, kSteps = 8;
  std::vector<float> h(2 * kBatch * kHidden), c(h.size()), y(kSteps * kBatch * 2 * kHidden);
  const Sequence sequence{Cell::lstm, kBatch, kSteps, kSteps * kBatch, nullptr};
  LayerNumbers dynamic;
  dynamic.per_token = true;
  Direction directions[2];
  for (int i = 0; i < 2; ++i) {
    const int64_t state = i * kBatch * kHidden;
    directions[i] = {i == 1,
                     matrices.x.data(),
                     {&kernel, reinterpret_cast<const PackedHeader*>(hh.data()), dynamic},
                     {},
                     h.data() + state,
                     c.data() + state,
                     y.data() + i * kHidden,
                     2 * kHidden};
    if (on_one_thread) run_direction(sequence, directions[i], 1);
  }
  if (!on_one_thread) run(sequence, directions, 2);
  return y;
}

const Kernel* no_kernel() { return nullptr; }

// Until `done`: what torchq.kernels.use() and force() do in other threads.
void force_kernels(const std::atomic<bool>& done) {
  for (int i = 0; !done; i = (i + 1) % kernel_count()) {
    if (can_run(kernel_at(i))) force_kernel(&kernel_at(i));
    force_kernel_of(i % 2 ? &no_kernel : nullptr);
    (void)last_kernel();
    (void)active_kernel();
  }
  force_kernel(nullptr);
  force_kernel_of(nullptr);
}

std::atomic<int> answers{0}, wrong{0};

void count(bool right) { ++answers, wrong += !right; }

// `call` on every caller's thread, some rounds each.
template <class F>
void for_all_callers(const F& call) {
  std::vector<std::thread> callers;
  for (int c = 0; c < kCallers; ++c)
    callers.emplace_back([&] {
      for (int round = 0; round < kRounds; ++round) call();
    });
  for (std::thread& caller : callers) caller.join();
}

bool equal(const std::vector<float>& one, const std::vector<float>& other) {
  return std::memcmp(one.data(), other.data(), one.size() * 4) == 0;
}

int test() {
  const Matrices matrices;
  std::atomic<bool> done{false};
  std::thread other(force_kernels, std::cref(done));
  for (int i = 0; i < kernel_count(); ++i) {
    const Kernel& kernel = kernel_at(i);
    if (!can_run(kernel)) continue;
    const std::vector<uint8_t> packed = matrices.packed(kernel.layout);
    const std::vector<float> expected = on_one_thread(kernel, matrices, packed);
    for_all_callers([&] {
      std::vector<float> y(kRows * kColumns);
      run(kernel, problem_of(matrices, packed, y));
      count(equal(y, expected));
      count(matrices.packed(kernel.layout) == packed);
    });
    for (int scheme = 0; scheme < attention::kSchemes; ++scheme) {
      const std::vector<float> attended = attention_on_one_thread(kernel, scheme, matrices);
      for_all_callers([&] {
        std::vector<float> y(kRows * kDepth);
        run(kernel, attention_of(scheme, matrices, y));
        count(equal(y, attended));
      });
    }
    const std::vector<uint8_t> hh = matrices.packed(kernel.layout, 4 * kHidden, kHidden);
    const std::vector<float> stepped = recurrent(kernel, matrices, hh, true);
    for_all_callers([&] { count(equal(recurrent(kernel, matrices, hh, false), stepped)); });
  }
  done = true;
  other.join();
  std::printf("%d answers, %d wrong\n", answers.load(), wrong.load());
  return answers == 0 || wrong != 0;
}

}  // namespace
}  // namespace torchq::test

int main() { return torchq::test::test(); }
