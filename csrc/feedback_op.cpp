// torch.ops.torchq.round_with_feedback: its schema and its checks.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "run.h"
#include "torch_checks.h"

namespace {

using namespace torchq::ops;

constexpr const char* kOp = "torchq::round_with_feedback";

void check_floats(const char* name, const Tensor& t, std::initializer_list<int64_t> sizes) {
  check_cpu(kOp, name, t);
  const auto shape = t.sizes();
  CHECK(t.scalar_type() == ScalarType::Float && std::equal(shape.begin(), shape.end(), sizes.begin(), sizes.end()), kOp,
        ": ", name, " does not fit targets: got ", name_of(t.scalar_type()), ' ', shape_of(t), '.');
}

std::tuple<Tensor, Tensor> round_with_feedback(const Tensor& targets, const Tensor& weight, const Tensor& factor,
                                               const Tensor& scale) {
  CHECK(targets.dim() == 2, kOp, ": targets must be (rows, columns), got ", shape_of(targets), '.');
  const int64_t rows = targets.size(0), columns = targets.size(1);
  check_floats("targets", targets, {rows, columns});
  check_floats("weight", weight, {rows, columns});
  check_floats("factor", factor, {rows, rows});
  check_floats("scale", scale, {columns});
  const Tensor t = contiguous(kOp, targets), w = contiguous(kOp, weight), f = contiguous(kOp, factor),
               s = contiguous(kOp, scale);
  Tensor codes = empty(kOp, {rows, columns}, ScalarType::Char), errors = empty(kOp, {rows, columns}, ScalarType::Float);
  const auto floats = [](const Tensor& x) { return static_cast<const float*>(x.const_data_ptr()); };
  torchq::round_on_threads({rows, columns, floats(t), floats(w), floats(f), floats(s),
                            static_cast<int8_t*>(codes.mutable_data_ptr()),
                            static_cast<float*>(errors.mutable_data_ptr())});
  return {codes, errors};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torchq, m) {
  m.def(
      "round_with_feedback(Tensor targets, Tensor weight, Tensor factor, Tensor scale) -> (Tensor codes, Tensor "
      "errors)");
}

STABLE_TORCH_LIBRARY_IMPL(torchq, CPU, m) { m.impl("round_with_feedback", TORCH_BOX(&round_with_feedback)); }
