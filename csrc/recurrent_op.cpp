// torch.ops.torchq.recurrent: its schema and argument checks. torch_ops.cpp says how torch is reached.

#include <torch/csrc/stable/library.h>

#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "recurrent.h"
#include "run.h"
#include "torch_checks.h"

namespace {

using namespace torchq::ops;
using torchq::Cell;
using torchq::Direction;
using torchq::LayerNumbers;
using torchq::PackedLayer;
using torchq::Sequence;

constexpr const char* op = "torchq::recurrent";

// A copy of a float32 tensor of this shape, to be changed in place.
Tensor copy_of(const char* name, const Tensor& t, std::initializer_list<int64_t> sizes) {
  check_cpu(op, name, t);
  bool fits = t.scalar_type() == ScalarType::Float && t.dim() == static_cast<int64_t>(sizes.size());
  for (int64_t i = 0; fits && i < t.dim(); ++i) fits = t.size(i) == sizes.begin()[i];
  CHECK(fits, op, ": ", name, " must be float32 (directions, batch, features) = (", sizes.begin()[0], ", ",
        sizes.begin()[1], ", ", sizes.begin()[2], "), got ", name_of(t.scalar_type()), ' ', shape_of(t), '.');
  const Tensor dense = contiguous(op, t);
  Tensor copy = empty(op, sizes, ScalarType::Float);
  if (copy.numel()) std::memcpy(copy.mutable_data_ptr(), dense.const_data_ptr(), copy.numel() * sizeof(float));
  return copy;
}

// scale 0: dynamic.
LayerNumbers numbers_of(double scale, double zero_point) {
  LayerNumbers numbers;
  numbers.per_token = scale == 0;
  if (numbers.per_token) return numbers;
  const auto z = static_cast<int64_t>(zero_point);
  CHECK(torchq::is_scale(scale) && torchq::is_zero_point(z), op,
        ": qparams must be pairs of a positive normal float32 scale and a zero point in [0, 255], or 0 and 0, got ",
        scale, " and ", zero_point, '.');
  numbers.x = {static_cast<float>(scale), static_cast<int32_t>(z)};
  return numbers;
}

PackedLayer packed_layer(const char* name, const Tensor& packed, double scale, double zero_point) {
  const torchq::PackedHeader& weights = header_of(op, name, packed);
  return {&kernel_for(op, weights.layout), &weights, numbers_of(scale, zero_point)};
}

void check_gates(const Tensor& gates, int64_t rows, int64_t n) {
  check_cpu(op, "gates", gates);
  CHECK(gates.scalar_type() == ScalarType::Float && gates.dim() == 2 && gates.size(0) == rows && gates.size(1) == n, op,
        ": gates must be float32 (rows, gates x hidden) = (", rows, ", ", n,
        "), the products of packed_ih with x for all steps, got ", name_of(gates.scalar_type()), ' ', shape_of(gates),
        '.');
}

void check_weights(const PackedLayer& hh, const PackedLayer* project, Cell cell) {
  const int64_t gates = torchq::gates_of(cell), n = hh.weights->n, k = hh.weights->k;
  const int64_t size = n / gates, width = project ? project->weights->n : size;
  CHECK(n > 0 && n % gates == 0 && k == width, op, ": packed_hh must have (", gates, " x hidden, ",
        project ? "projected" : "hidden", ") weights, got (", n, ", ", k, ").");
  CHECK(!project || (cell == Cell::lstm && project->weights->k == size), op,
        ": packed_hr must have (projected, hidden) weights of an LSTM with ", size, " hidden values, got (",
        project ? project->weights->n : 0, ", ", project ? project->weights->k : 0, ").");
}

// The sizes of batches, or of steps that all have the whole batch.
Sequence sequence_of(Cell cell, int64_t rows, int64_t batch, const std::optional<Tensor>& batch_sizes) {
  if (!batch_sizes) {
    CHECK(batch > 0 ? rows % batch == 0 : rows == 0, op, ": gates must have rows of whole steps of ", batch,
          " rows, got ", rows, '.');
    return {cell, batch, batch > 0 ? rows / batch : 0, rows, nullptr};
  }
  check_cpu(op, "batch_sizes", *batch_sizes);
  CHECK(batch_sizes->scalar_type() == ScalarType::Long && batch_sizes->dim() == 1 && batch_sizes->is_contiguous(), op,
        ": batch_sizes must be int64 (steps,), as those of a PackedSequence, got ", name_of(batch_sizes->scalar_type()),
        ' ', shape_of(*batch_sizes), '.');
  const auto* sizes = static_cast<const int64_t*>(batch_sizes->const_data_ptr());
  const int64_t steps = batch_sizes->numel();
  int64_t total = 0;
  for (int64_t t = 0; t < steps; total += sizes[t++])
    CHECK(sizes[t] > 0 && sizes[t] <= (t ? sizes[t - 1] : batch), op, ": batch_sizes must be positive, at most ", batch,
          ", the batch of h0, and not increase; got ", sizes[t], " at step ", t, '.');
  CHECK(total == rows, op, ": batch_sizes add up to ", total, " rows, but gates has ", rows, '.');
  return {cell, batch, steps, rows, sizes};
}

float* floats(const Tensor& t, int64_t first) { return static_cast<float*>(t.mutable_data_ptr()) + first; }

std::tuple<Tensor, Tensor, Tensor> recurrent(int64_t number, const std::vector<Tensor>& gates,
                                             const std::vector<Tensor>& packed_hh, const std::vector<Tensor>& packed_hr,
                                             const Tensor& h0, const std::optional<Tensor>& c0,
                                             const std::optional<Tensor>& batch_sizes,
                                             const std::vector<double>& qparams) {
  CHECK(number >= 0 && number < torchq::kCells, op, ": cell must be a torchq.ops.Cell, 0 (lstm) to ",
        torchq::kCells - 1, " (rnn_relu), got ", number, '.');
  const auto cell = static_cast<Cell>(number);
  const size_t count = gates.size(), layers = count + packed_hr.size();
  CHECK(
      (count == 1 || count == 2) && packed_hh.size() == count && (packed_hr.empty() || packed_hr.size() == count), op,
      ": gates and packed_hh must be lists of one tensor for each of the one or two directions, and packed_hr too or ",
      "empty; got ", count, ", ", packed_hh.size(), " and ", packed_hr.size(), '.');
  CHECK(qparams.empty() || qparams.size() == 2 * layers, op, ": qparams must be empty or a scale and a zero point for ",
        "each of packed_hh and packed_hr, got ", qparams.size(), " numbers for ", layers, " weights.");
  CHECK((cell == Cell::lstm) == c0.has_value(), op,
        ": c0 is the state of an LSTM: it takes one, and no other cell does.");
  CHECK(h0.dim() == 3, op, ": h0 must be float32 (directions, batch, features), got ", shape_of(h0), '.');
  const auto layer = [&](const char* name, const Tensor& packed, size_t i) {
    return qparams.empty() ? packed_layer(name, packed, 0, 0)
                           : packed_layer(name, packed, qparams[2 * i], qparams[2 * i + 1]);
  };
  const int64_t batch = h0.size(1), rows = gates[0].dim() ? gates[0].size(0) : 0;
  const int64_t directions = static_cast<int64_t>(count);
  const Sequence sequence = sequence_of(cell, rows, batch, batch_sizes);
  std::vector<Direction> each(count);
  std::vector<Tensor> held;  // contiguous gates
  for (size_t i = 0; i < count; ++i) {
    Direction& d = each[i];
    d.backwards = i == 1;
    d.hh = layer("packed_hh", packed_hh[i], i);
    d.project = packed_hr.empty() ? PackedLayer{} : layer("packed_hr", packed_hr[i], count + i);
    check_weights(d.hh, packed_hr.empty() ? nullptr : &d.project, cell);
    CHECK(d.hh.weights->n == each[0].hh.weights->n && d.hh.weights->k == each[0].hh.weights->k, op,
          ": packed_hh of both directions must have the same shape.");
    check_gates(gates[i], rows, d.hh.weights->n);
    held.push_back(contiguous(op, gates[i]));
    d.gates = static_cast<const float*>(held[i].const_data_ptr());
  }
  const int64_t width = each[0].hh.weights->k, size = each[0].hh.weights->n / torchq::gates_of(cell);
  const Tensor h = copy_of("h0", h0, {directions, batch, width});
  const Tensor c = c0 ? copy_of("c0", *c0, {directions, batch, size}) : empty(op, {0}, ScalarType::Float);
  const Tensor y = empty(op, {rows, directions * width}, ScalarType::Float);
  for (int64_t i = 0; i < directions; ++i) {
    Direction& d = each[i];
    d.h = floats(h, i * batch * width);
    d.c = c0 ? floats(c, i * batch * size) : nullptr;
    d.y = floats(y, i * width);
    d.y_stride = directions * width;
  }
  if (rows > 0) with_scratch(op, [&] { torchq::run(sequence, each.data(), static_cast<int>(count)); });
  return {y, h, c};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torchq, m) {
  m.def(
      "recurrent(int cell, Tensor[] gates, Tensor[] packed_hh, Tensor[] packed_hr, Tensor h0, Tensor? c0=None, "
      "Tensor? batch_sizes=None, float[] qparams=[]) -> (Tensor y, Tensor h_n, Tensor c_n)");
}

STABLE_TORCH_LIBRARY_IMPL(torchq, CPU, m) { m.impl("recurrent", TORCH_BOX(&recurrent)); }
