// torchq._C.call_gated: act(gate(x)) * up(x) of two QuantizedLinears in a plain eager call, else NotImplemented, as
// call_linear in direct.cpp.

#include "direct.h"
#include "direct_call.h"
#include "direct_layer.h"
#include "run.h"

namespace py = pybind11;

namespace torchq {
namespace {

// values[i] *= by[i], on torch's threads.
void multiply(void* values, const void* by, int64_t count) {
  in_ranges(count, kKeepGilBelowValues, [=](int64_t begin, int64_t end) {
    auto* __restrict to = static_cast<float*>(values);
    const auto* __restrict from = static_cast<const float*>(by);
    for (int64_t i = begin; i < end; ++i) to[i] *= from[i];
  });
}

// Null: this is not a plain call.
py::object product(const Together& both) {
  const PlainInput &in = both.inputs[0], &up = both.inputs[1];
  const int64_t n = in.weights->n;
  if (in.dtype->ours != DType::f32 || up.weights->n != n) return {};
  void* data[2];
  auto y = py::reinterpret_steal<py::object>(new_output(in.x.shape, in.x.ndim, n, *in.dtype, &data[0]));
  if (!y) return {};
  auto factor = py::reinterpret_steal<py::object>(new_output(in.x.shape, in.x.ndim, n, *in.dtype, &data[1]));
  if (!factor) return {};
  {
    const Unlocked unlocked(both.work() >= kKeepGilBelow);
    both.multiply(data);
    multiply(data[0], data[1], in.count * n);
  }
  return y;
}

PyObject* call_gated(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return without_exceptions([=] {
    Together both;
    const bool plain = count == 7 && both.add(args[0], args[2], args[3]) && both.add(args[1], args[2], args[3]) &&
                       read_activation(args[4], &both.layers[0].numbers.activation) && are_plain(args[5], args[6]);
    return or_not_implemented(plain ? product(both) : py::object());
  });
}

PyMethodDef methods[] = {
    {"call_gated", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call_gated)), METH_FASTCALL,
     "call_gated(gate, up, cls, x, activation, between, settings): act(gate(x)) * up(x) of two QuantizedLinears, the "
     "activation being that of the modules between; or NotImplemented."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void add_direct_gated(py::module_& module) { PyModule_AddFunctions(module.ptr(), methods); }

}  // namespace torchq
