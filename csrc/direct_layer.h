// Modules as the direct calls read them: the state of a QuantizedLinear (direct.cpp) and of a LayerNorm
// (direct_norm.cpp), from their dicts.
#pragma once

#include <pybind11/pybind11.h>

#include "linear.h"
#include "plain_tensor.h"

namespace torchq {

// What a product is made of beside x.
struct Layer {
  pybind11::object packed;
  const DTypePair* codes_of = nullptr;  // if x is codes: of the floats that they stand for; y is such a float
  bool gives_codes = false;
  LayerNumbers numbers;
};

// An input that is multiplied, with its weights and their kernel.
struct PlainInput {
  dlpack::Tensor x;
  const DTypePair* dtype;
  const PackedHeader* weights;
  const Kernel* kernel;
  int64_t count;  // rows

  Rows rows() const { return {data_of(x), count, weights->k, dtype->ours}; }
  int64_t work() const { return count * weights->n * weights->k; }
};

// Multiply-adds, about 5 us: a shorter product keeps the GIL.
constexpr int64_t kKeepGilBelow = 1 << 20;

// The attributes of a QuantizedLinear. They mean here what its forward() makes of them as arguments of the op.
bool read_layer(PyObject* state, Layer* out);

// The same of a module whose call is nothing but that, and whose output waits for nobody.
bool read_layer_alone(PyObject* module, PyObject* cls, Layer* out);

// The packed weight of a module whose dict holds these facts; null if it doesn't.
pybind11::object packed_of(PyObject* module, PyObject* facts);

bool read_activation(PyObject* number, Activation* out);

// Whether these modules, which the layer computes or skips, have no hooks and the settings that they had when it was
// found what they compute, and no Dropout among them is in training.
bool are_plain(PyObject* modules, PyObject* settings);

// False: this is not a plain call.
bool read_input(PyObject* object, const Layer& layer, PlainInput* out);

// Layers that are called on one x, each in a plain call.
struct Together {
  static constexpr int kMost = 4;
  Layer layers[kMost];
  PlainInput inputs[kMost];
  int count = 0;

  // False: this is not a plain call, or one layer too many.
  bool add(PyObject* module, PyObject* cls, PyObject* x);
  int64_t work() const;
  // y: room for the output of each. Layers that make the same codes of x are one job.
  void multiply(void* const* y) const;
};

// Keeps the parameters of a module, by their names: another thread may replace them as soon as torch or Python runs.
// Null: it has none, or, with a Python error set, no memory.
pybind11::object held_parameters(PyObject* state);

// The numbers of a LayerNorm with these parameters for rows of n values.
bool read_norm(PyObject* state, const pybind11::object& parameters, int64_t n, NormRows* out);

// The same of an RMSNorm. What sets it apart: a tuple (eps, default_eps, gain). `eps` is the name of an attribute;
// where that is None it means default_eps, if this is a number.
bool read_rms_norm(PyObject* state, const pybind11::object& parameters, PyObject* numbers, int64_t n, NormRows* out);

}  // namespace torchq
