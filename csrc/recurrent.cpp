// The loop over the steps. Only the state and one step's products are kept beside the layer's input and output, so they
// stay in cache; all of the loop is C++, and nothing is allocated inside it.

#include "recurrent.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "run.h"

namespace torchq {
namespace {

// y = x · wᵀ + bias for count rows.
Problem product(const PackedLayer& layer, const float* x, int64_t count, float* y) {
  const Rows rows{x, count, layer.weights->k, DType::f32};
  return linear_problem(layer.numbers, rows, *layer.weights, y, DType::f32);
}

}  // namespace

void run_direction(const Sequence& s, const Direction& d, int most_threads) {
  const int64_t gates = d.hh.weights->n, size = gates / gates_of(s.cell), width = d.hh.weights->k;
  const bool projects = d.project.weights;
  std::vector<float> products(s.batch * gates), wide(projects ? s.batch * size : 0);
  float* hidden = projects ? wide.data() : d.h;  // what a cell gives
  int64_t row = d.backwards ? s.rows : 0;
  for (int64_t i = 0; i < s.steps; ++i) {
    const int64_t count = s.batch_sizes ? s.batch_sizes[d.backwards ? s.steps - 1 - i : i] : s.batch;
    if (d.backwards) row -= count;
    run(*d.hh.kernel, product(d.hh, d.h, count, products.data()), most_threads);
    for (int64_t r = 0; r < count; ++r) {
      float* h = hidden + r * size;
      d.hh.kernel->cell(s.cell,
                        {size, d.gates + (row + r) * gates, products.data() + r * gates, d.c ? d.c + r * size : h, h});
    }
    if (projects) run(*d.project.kernel, product(d.project, hidden, count, d.h), most_threads);
    for (int64_t r = 0; r < count; ++r)
      std::memcpy(d.y + (row + r) * d.y_stride, d.h + r * width, width * sizeof(float));
    if (!d.backwards) row += count;
  }
}

int threads_that_pay(const Sequence& s, const Direction& d) {
  const Problem problem = product(d.hh, d.h, s.batch, nullptr);
  return schedule(*d.hh.kernel, problem).parts;
}

}  // namespace torchq
