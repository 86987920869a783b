// The only file with threads, which are torch's, reached through the stable ABI. It includes no pybind11 and no DLPack
// header: torch's headers may not meet those.

#include "run.h"

#include <torch/csrc/stable/ops.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include "gemm/divide.h"
#include "linear.h"

namespace torchq {
namespace {

// Sizes in bytes from which huge pages pay. Weights, which every call reads: twice a huge page, so that they surely
// contain a whole one. An output, which is written once: the size from which glibc maps fresh pages for each allocation
// instead of recycling freed memory.
constexpr int64_t kHugeWeights = 4 << 20, kHugeOutput = 32 << 20;

constexpr int64_t kGatheredWeights = 128 << 10;  // bytes of weights for which sharing huge pages pays

constexpr int64_t kPanelsPerThread = 4;  // the fewest for which pack() wakes a thread

// The fewest values for which activate(), normalize() and look_up() wake a thread, which takes about 5 us: they take
// up to 10. A multiple of 64, so that threads write to cache lines of their own.
constexpr int64_t kValuesPerThread = 32 * 1024;

// Requests huge pages for a fresh buffer, where the system has them. They mean fewer page faults when it is first
// written, and fewer TLB misses whenever it is read.
void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 4096;  // madvise takes whole pages, and finds the huge ones within them itself
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // it may refuse, which is no error
#else
  (void)data, (void)bytes;
#endif
}

// Lets glibc keep freed memory of up to 64 MB, its own limit, for the next call. It gives back what is more than twice
// the largest block that was mapped and freed so far, and the activations of a network are then new pages in every
// call: ResNet-50, static, had 2320 page faults a call. A block as large as counts for that rule moves the bound once.
// A bound that the user has set stays, and other allocators do nothing but allocate. What lies free before is no
// activation, but what a model was loaded from, a third of a process that has loaded a Llama: that is given back.
void keep_freed_memory() {
#if defined(__GLIBC__)
  malloc_trim(0);
  constexpr size_t kLargest = (32 << 20) - (64 << 10);
  void* volatile block = std::malloc(kLargest);  // volatile, for compilers leave out what has no effect; never touched
  std::free(block);
#endif
}

// Each thread keeps its scratch from call to call.
void* thread_scratch(size_t bytes) {
  static thread_local std::vector<uint8_t> scratch;
  if (scratch.size() < bytes) {
    // Once in a process. Not by std::call_once, which asks for glibc 2.34.
    static const bool kept = (keep_freed_memory(), true);
    (void)kept;
    scratch.resize(bytes);
  }
  return scratch.data();
}

// Calls f(0), ..., f(count - 1) on torch's threads.
template <class F>
void in_parallel(int count, const F& f) {
  std::atomic<bool> out_of_memory{false};  // of a thread whose exceptions do not reach the caller as they are
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    try {
      for (int64_t i = begin; i < end; ++i) f(static_cast<int>(i));
    } catch (const std::bad_alloc&) {
      out_of_memory = true;
    }
  });
  if (out_of_memory) throw std::bad_alloc();
}

int thread_count() { return static_cast<int>(torch::stable::get_num_threads()); }

// Runs the parts of a job, of products or of attention, on as many of torch's threads as there are parts.
template <class Job>
void run_parts(Job& job) {
  if (job.parts > 1) job.parts = std::min(job.parts, thread_count());
  if (job.parts == 1) return run(job, 0, thread_scratch(job.scratch_bytes));
  in_parallel(job.parts, [&](int i) { run(job, i, thread_scratch(job.scratch_bytes)); });
}

// Which weights a thread multiplies by after which. A model calls its layers in the same order again and again. Of
// those that follow, the first are in L2 then: 16x768x768 from memory takes 51 us instead of 58
// (docs/performance-zen4.md).
class Order {
 public:
  // What follows these weights, if the same did the last two times. They now follow the last ones.
  Ahead after(const PackedHeader* weights) {
    const auto* panels = reinterpret_cast<const uint8_t*>(weights + 1);
    Entry& before = entry(last_);
    const bool again = before.weights == last_ && before.ahead.panels == panels;
    before = {last_, {panels, panel_bytes(weights->k), panel_count(weights->n)}, again};
    last_ = weights;
    const Entry& own = entry(weights);
    return own.weights == weights && own.again ? own.ahead : Ahead{};
  }

 private:
  struct Entry {
    const PackedHeader* weights;
    Ahead ahead;
    bool again;
  };

  static constexpr int kBits = 9;
  // One of two places, so that weights seldom take the place of others.
  Entry& entry(const PackedHeader* weights) {
    const uint64_t place = reinterpret_cast<uintptr_t>(weights) * 0x9E3779B97F4A7C15u >> (64 - kBits);  // Knuth's hash
    Entry &one = entries_[place], &other = entries_[place ^ 1];
    const bool taken = one.weights && one.weights != weights;
    return taken && (!other.weights || other.weights == weights) ? other : one;
  }

  Entry entries_[1 << kBits] = {};
  const PackedHeader* last_ = nullptr;
};

}  // namespace

namespace {

// Problems that all read the same rows.
void run_together(const Kernel& kernel, Problem* problems, int count, int most_threads) {
  static thread_local Order order;
  problems->ahead = order.after(problems->weights);
  for (int i = 0; i < count; ++i) {
    const int64_t y_bytes = problems[i].m * problems[i].y.stride;
    if (y_bytes > kHugeOutput) prefer_huge_pages(problems[i].y.data, y_bytes);
  }
  Job job = schedule(kernel, problems, count);
  job.parts = std::min(job.parts, most_threads);
  run_parts(job);
  for (int i = 0; i < count; ++i)
    if (problems[i].norm && !gives_whole_rows(job)) normalize_on_threads(*job.kernel, *problems[i].norm);
}

}  // namespace

void run(const Kernel& kernel, Problem problem, int most_threads) { run_together(kernel, &problem, 1, most_threads); }

void run(const Kernel& kernel, Problem* problems, int count) {
  for (int first = 0, end; first < count; first = end) {
    for (end = first + 1; end < count && read_the_same(problems[first], problems[end]);) ++end;
    run_together(kernel, problems + first, end - first, INT_MAX);
  }
}

QuantizedRows::QuantizedRows(const Kernel& kernel, const Problem& problem) : kernel_(kernel) {
  const Job job = schedule(kernel, problem);
  memory_.reset(new uint8_t[ready_bytes(job)]);  // as it comes: make_unique would clear it
  rows_ = ready_rows(job, memory_.get());
  torch::stable::parallel_for(0, job.by_columns ? 1 : job.parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Part part = part_of(job, static_cast<int>(i));
      quantize(job, part.row_begin, part.row_end, rows_);
    }
  });
}

void QuantizedRows::multiply(Problem problem) const {
  problem.x.ready = &rows_;
  run(kernel_, problem);
}

void run(const Kernel& gemm, const attention::Problem& problem) {
  attention::Job job = attention::schedule(attention::kernel_beside(gemm), gemm, problem);
  run_parts(job);
}

namespace {

// The scale and zero point of each sample, by its range, which threads find in pieces.
std::vector<QParams> qparams_of_samples(const conv::Job& job) {
  const conv::Problem& p = *job.problem;
  const int64_t lines = p.x.channels_last ? p.geometry.pixels() : p.geometry.in_channels, pieces = job.parts;
  std::vector<RowRange> ranges(p.batch * pieces);
  in_parallel(pieces, [&](int i) {
    auto* room = static_cast<float*>(thread_scratch(p.geometry.in_channels * sizeof(float)));
    for (int64_t sample = 0; sample < p.batch; ++sample)
      ranges[sample * pieces + i] = conv::range_of(job, sample, lines * i / pieces, lines * (i + 1) / pieces, room);
  });
  std::vector<QParams> qparams(p.batch);
  for (int64_t sample = 0; sample < p.batch; ++sample) {
    RowRange all = ranges[sample * pieces];
    for (int64_t i = 1; i < pieces; ++i) all = conv::join(all, ranges[sample * pieces + i]);
    qparams[sample] = choose_qparams(all);
  }
  return qparams;
}

}  // namespace

void run(const Kernel& kernel, conv::Problem problem) {
  conv::Job job = conv::schedule(kernel, problem, thread_count());
  std::vector<QParams> samples;
  if (problem.x.per_sample && !problem.multiplies_floats()) samples = qparams_of_samples(job);
  problem.x.samples = samples.data();
  run_parts(job);
}

bool pays(const Kernel& kernel, const conv::Inverted& inverted) { return conv::pays(kernel, inverted, thread_count()); }

void run(const Kernel& kernel, const conv::Inverted& inverted) {
  conv::InvertedJob job = conv::schedule(kernel, inverted, thread_count());
  run_parts(job);
}

namespace {

// How many rows are computed at once, and for how many bytes of products: these stay in L2 until both are added.
constexpr int64_t kFineRows = 64, kFineBytes = 256 << 10;

// What the codes of a row leave of it. codes [k].
void leave_rest(const Kernel& kernel, const float* x, const PackedHeader& weights, uint8_t* codes, float* rest) {
  const float* scale = channel_scale_of(weights);
  const int64_t k = weights.k;
  for (int64_t i = 0; i < k; ++i) rest[i] = scale ? x[i] * scale[i] : x[i];
  const QParams q = quantize_row(kernel, rest, DType::f32, k, codes, thread_scratch(row_scratch_bytes(k)));
  for (int64_t i = 0; i < k; ++i) {
    const float found = static_cast<float>(codes[i] - q.zero_point) * q.scale;
    rest[i] = x[i] - (scale ? found / scale[i] : found);
  }
}

// The rows, and behind them what their codes leave.
std::unique_ptr<float[]> with_rests(const Kernel& kernel, const FineRows& rows, const PackedHeader& weights) {
  const int64_t m = rows.count, k = weights.k;
  std::unique_ptr<float[]> both(new float[2 * m * k]);
  std::copy(rows.x, rows.x + m * k, both.get());
  std::unique_ptr<uint8_t[]> codes(new uint8_t[m * k]);
  const int64_t rows_per_thread = kValuesPerThread / std::max<int64_t>(k, 1) + 1;
  torch::stable::parallel_for(0, m, rows_per_thread, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      leave_rest(kernel, rows.x + r * k, weights, codes.get() + r * k, both.get() + (m + r) * k);
  });
  return both;
}

// y of the columns from this panel on: the two products of each row, which lie stride values apart, less one bias.
void add_products(const FineRows& rows, const PackedHeader& weights, int64_t panel, int64_t columns,
                  const float* products, int64_t stride) {
  const uint8_t* panels = reinterpret_cast<const uint8_t*>(&weights + 1) + panel * panel_bytes(weights.k);
  const float* rests = products + rows.count * stride;
  for (int64_t r = 0; r < rows.count; ++r, products += stride, rests += stride) {
    float* y = rows.y + r * weights.n + panel * kPanelColumns;
    for (int64_t c = 0; c < columns; c += kPanelColumns) {
      const auto* bias = reinterpret_cast<const float*>(panels + c / kPanelColumns * panel_bytes(weights.k)) +
                         (kPanelMeta / 4 - kPanelColumns);
      const int64_t count = std::min(columns - c, kPanelColumns);
      for (int64_t i = 0; i < count; ++i) y[c + i] = products[c + i] + (rests[c + i] - bias[i]);
    }
  }
}

void run_fine_block(const Kernel& kernel, const FineRows& rows, const PackedHeader& weights, Activation activation) {
  const int64_t m = rows.count, panels = panel_count(weights.n), panel_stride = panel_bytes(weights.k);
  const std::unique_ptr<float[]> both = with_rests(kernel, rows, weights);
  LayerNumbers numbers;
  numbers.per_token = true;
  Problem problem = linear_problem(numbers, {both.get(), 2 * m, weights.k, DType::f32}, weights, nullptr, DType::f32);
  Job job = schedule(kernel, problem);
  const std::unique_ptr<uint8_t[]> memory(new uint8_t[ready_bytes(job)]);
  const CodeRows codes = ready_rows(job, memory.get());
  quantize(job, 0, 2 * m, codes);
  problem.x.ready = &codes;

  const int threads = job.parts == 1 ? 1 : thread_count();
  const int64_t group = job.tile.n / kPanelColumns, groups = ceil_div(panels, group);
  const int64_t wanted = std::max<int64_t>(ceil_div(groups * 2 * m * job.tile.n * 4, kFineBytes), threads);
  job.by_columns = true;
  job.parts = static_cast<int>(std::min(wanted, groups));
  const int64_t stride = ceil_div(groups, job.parts) * job.tile.n, products_bytes = 2 * m * stride * 4;
  const auto run_part = [&](int i) {
    auto* room = static_cast<uint8_t*>(thread_scratch(products_bytes + job.scratch_bytes));
    auto* products = reinterpret_cast<float*>(room);
    const Part part = part_of(job, i);
    Problem own = problem;
    own.y = {products, stride * 4, DType::f32, {}, {}, part.panel_begin};
    own.ahead = {reinterpret_cast<const uint8_t*>(&weights + 1) + part.panel_end * panel_stride, panel_stride,
                 std::min(group, panels - part.panel_end)};
    Job its = job;
    its.problem = &own;
    run(its, i, room + products_bytes);
    const int64_t first = part.panel_begin * kPanelColumns;
    const int64_t columns = std::min(part.panel_end * kPanelColumns, weights.n) - first;
    add_products(rows, weights, part.panel_begin, columns, products, stride);
    for (int64_t r = 0; activation != Activation::none && r < m; ++r) {
      float* y = rows.y + r * weights.n + first;
      activate(kernel, activation, DType::f32, y, y, columns);
    }
  };
  if (threads > 1) return in_parallel(job.parts, run_part);
  for (int i = 0; i < job.parts; ++i) run_part(i);
}

}  // namespace

void run_fine(const Kernel& kernel, const FineRows& rows, const PackedHeader& weights, Activation activation) {
  if (rows.count * weights.n * 4 > kHugeOutput) prefer_huge_pages(rows.y, rows.count * weights.n * 4);
  for (int64_t row = 0; row < rows.count; row += kFineRows) {
    const int64_t count = std::min(kFineRows, rows.count - row);
    run_fine_block(kernel, {count, rows.x + row * weights.k, rows.y + row * weights.n}, weights, activation);
  }
}

// Two directions side by side take half the time of one after the other, whose threads wait for each other at each
// step. With four threads and more, products that pay for all of them are faster one after the other.
void run(const Sequence& sequence, const Direction* directions, int count) {
  const int threads = thread_count();
  if (count == 2 && threads >= 2 && (threads < 4 || threads_that_pay(sequence, directions[0]) == 1))
    return in_parallel(count, [&](int i) { run_direction(sequence, directions[i], 1); });
  for (int i = 0; i < count; ++i) run_direction(sequence, directions[i], threads);
}

void activate(const Kernel& kernel, Activation activation, const Values& v) {
  const int64_t parts = (v.count + kValuesPerThread - 1) / kValuesPerThread, bytes = element_bytes(v.dtype);
  if (v.count * bytes > kHugeOutput) prefer_huge_pages(v.y, v.count * bytes);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kValuesPerThread, last = std::min(end * kValuesPerThread, v.count);
    activate(kernel, activation, v.dtype, static_cast<const uint8_t*>(v.x) + first * bytes,
             static_cast<uint8_t*>(v.y) + first * bytes, last - first);
  });
}

void in_ranges(int64_t count, int64_t least, const std::function<void(int64_t, int64_t)>& f) {
  torch::stable::parallel_for(0, count, least, f);
}

void normalize_on_threads(const Kernel& kernel, const NormRows& rows) {
  const int64_t n = rows.n, bytes = rows.count * n * 4;
  if (bytes > kHugeOutput) prefer_huge_pages(rows.y, bytes);
  torch::stable::parallel_for(0, rows.count, kValuesPerThread / n + 1,
                              [&](int64_t begin, int64_t end) { normalize(kernel, rows.part(begin, end)); });
}

void run(const Rotary& rotary) {
  const int64_t width = std::max<int64_t>(1, rotary.heads * rotary.depth);
  torch::stable::parallel_for(0, rotary.batch * rotary.rows, kValuesPerThread / width + 1,
                              [&](int64_t begin, int64_t end) { rotate(rotary, begin, end); });
}

void round_on_threads(const FeedbackBlock& block) {
  constexpr int64_t kGroups = 4;  // of columns, at least, for each thread
  const int64_t groups = ceil_div(block.columns, kFeedbackColumns);
  torch::stable::parallel_for(0, groups, kGroups, [&](int64_t begin, int64_t end) {
    round_with_feedback(block, begin * kFeedbackColumns, std::min(end * kFeedbackColumns, block.columns),
                        thread_scratch(feedback_scratch_bytes(block)));
  });
}

void look_up(const Table& table, const int64_t* rows, int64_t count, DType dtype, void* y) {
  const int64_t bytes = count * table.width * element_bytes(dtype);
  if (bytes > kHugeOutput) prefer_huge_pages(y, bytes);
  const int64_t rows_per_thread = kValuesPerThread / std::max<int64_t>(1, table.width) + 1;
  torch::stable::parallel_for(0, count, rows_per_thread,
                              [&](int64_t begin, int64_t end) { write_rows(table, rows, begin, end, dtype, y); });
}

void look_up(const Kernel& kernel, const TableSum& sum, int64_t count) {
  const int64_t width = std::max<int64_t>(1, sum.terms[0].table.width);
  torch::stable::parallel_for(0, count, kValuesPerThread / width + 1, [&](int64_t begin, int64_t end) {
    write_sums(kernel, sum, begin, end, static_cast<float*>(thread_scratch(width * sizeof(float))));
  });
}

void pack(Layout layout, const Weights& w, void* packed) {
  const int64_t bytes = packed_bytes(w.n, w.k, w.channel_scale != nullptr);
  if (bytes >= kHugeWeights) prefer_huge_pages(packed, bytes);
  pack_begin(layout, w.n, w.k, w.has_bias, w.channel_scale, packed);
  torch::stable::parallel_for(0, panel_count(w.n), kPanelsPerThread, [&](int64_t begin, int64_t end) {
    pack_panels(w.weight, w.scale, w.bias, packed, begin, end);
  });
}

void gather_into_huge_pages(const void* data, int64_t bytes) {
  if (bytes < kGatheredWeights) return;
#if defined(__linux__)
  constexpr uintptr_t kHugePage = 2 << 20;
  constexpr int kCollapse = 25;  // MADV_COLLAPSE, of Linux 6.1
  const uintptr_t end = reinterpret_cast<uintptr_t>(data) + bytes;
  for (uintptr_t page = reinterpret_cast<uintptr_t>(data) / kHugePage * kHugePage; page < end; page += kHugePage)
    madvise(reinterpret_cast<void*>(page), kHugePage, kCollapse);  // refuses where not all of it is ours: no error
#else
  (void)data;
#endif
}

}  // namespace torchq
