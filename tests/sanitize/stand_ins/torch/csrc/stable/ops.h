// What csrc/run.cpp uses of torch's stable ABI, on std::thread: TSan sees these threads, and none of libgomp's, which
// is not instrumented. Each chunk gets a thread of its own, so that all of them run at the same time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace torch::stable {

constexpr int64_t kThreads = 4;

inline uint32_t get_num_threads() { return kThreads; }

template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  const int64_t chunk = std::max((end - begin + kThreads - 1) / kThreads, std::max<int64_t>(grain, 1));
  std::vector<std::thread> threads;
  for (int64_t i = begin + chunk; i < end; i += chunk)
    threads.emplace_back([=, &f] { f(i, std::min(i + chunk, end)); });
  if (begin < end) f(begin, std::min(begin + chunk, end));
  for (std::thread& thread : threads) thread.join();
}

}  // namespace torch::stable
