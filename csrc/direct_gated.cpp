// torchq._C.call_gated: act(gate(x)) * up(x) of two QuantizedLinears in a plain eager call, else NotImplemented, as
// call_linear in direct.cpp.

#include "classes.h"
#include "direct.h"
#include "direct_call.h"
#include "direct_layer.h"
#include "nn_module.h"
#include "run.h"

namespace py = pybind11;

namespace torchq {
namespace {

PyObject* scope_name;

// A layer that computes its output when it is called, and nothing else does.
bool read_plain_layer(PyObject* module, PyObject* cls, Layer* out) {
  PyObject* state = plain_state(module, cls);
  PyObject* scope = state ? PyDict_GetItemWithError(state, scope_name) : nullptr;
  return state && (!scope || scope == Py_None) && read_layer(state, out);
}

// Null: this is not a plain call, or one of so many rows that the product of both had better have all threads.
py::object product(const Layer& gate, const Layer& up, PyObject* x) {
  PlainInput in, again;
  if (!read_input(x, gate, &in) || !read_input(x, up, &again) || in.dtype->ours != DType::f32) return {};
  const int64_t n = in.weights->n, count = in.count * n;
  if (again.weights->n != n || count >= kKeepGilBelowValues) return {};
  void *data, *factors;
  auto y = py::reinterpret_steal<py::object>(new_output(in.x.shape, in.x.ndim, n, *in.dtype, &data));
  if (!y) return {};
  auto factor = py::reinterpret_steal<py::object>(new_output(in.x.shape, in.x.ndim, n, *in.dtype, &factors));
  if (!factor) return {};
  {
    const Unlocked unlocked(in.work() >= kKeepGilBelow);
    run(*in.kernel, linear_problem(gate.numbers, in.rows(), *in.weights, data, DType::f32));
    run(*again.kernel, linear_problem(up.numbers, again.rows(), *again.weights, factors, DType::f32));
    auto* __restrict values = static_cast<float*>(data);
    const auto* __restrict by = static_cast<const float*>(factors);
    for (int64_t i = 0; i < count; ++i) values[i] *= by[i];
  }
  return y;
}

PyObject* call_gated(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return without_exceptions([=] {
    Layer gate, up;
    const bool plain = count == 7 && read_plain_layer(args[0], args[2], &gate) &&
                       read_plain_layer(args[1], args[2], &up) && read_activation(args[4], &gate.numbers.activation) &&
                       are_plain(args[5], args[6]);
    return or_not_implemented(plain ? product(gate, up, args[3]) : py::object());
  });
}

PyMethodDef methods[] = {
    {"call_gated", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call_gated)), METH_FASTCALL,
     "call_gated(gate, up, cls, x, activation, between, settings): act(gate(x)) * up(x) of two QuantizedLinears, the "
     "activation being that of the modules between; or NotImplemented."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void add_direct_gated(py::module_& module) {
  scope_name = name("scope");
  PyModule_AddFunctions(module.ptr(), methods);
}

}  // namespace torchq
