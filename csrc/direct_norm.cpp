// torchq._C.call_layer_norm and call_rms_norm: the call of a LayerNorm or an RMSNorm without nn.Module's and the
// dispatcher's shares of it, as call_linear in direct.cpp: NotImplemented wherever anything could stand between the
// call and the arithmetic. The ops, torchq::layer_norm and rms_norm, compute the same.

#include "classes.h"
#include "direct.h"
#include "direct_call.h"
#include "direct_layer.h"
#include "nn_module.h"
#include "plain_tensor.h"
#include "run.h"

namespace py = pybind11;

namespace torchq {
namespace {

struct Names {
  PyObject *parameters, *weight, *bias, *eps;
} names;

// A parameter of n floats side by side that wants no gradient.
bool read_parameter(PyObject* object, int64_t n, const float** out) {
  dlpack::Tensor t;
  if (!object || !view_parameter(object, &t) || wants_gradient(object) || is_negated(object)) return false;
  const DTypePair* dtype = find(t.dtype);
  if (!dtype || dtype->ours != DType::f32 || t.ndim != 1 || t.shape[0] != n || !is_contiguous(t)) return false;
  *out = reinterpret_cast<const float*>(data_of(t));
  return true;
}

}  // namespace

py::object held_parameters(PyObject* state) {
  PyObject* parameters = PyDict_GetItemWithError(state, names.parameters);
  if (!parameters || !PyDict_Check(parameters)) return {};
  return py::reinterpret_steal<py::object>(PyDict_Copy(parameters));
}

bool read_norm(PyObject* state, const py::object& parameters, int64_t n, NormRows* out) {
  PyObject* eps = PyDict_GetItemWithError(state, names.eps);
  if (!eps || !PyFloat_CheckExact(eps)) return false;
  if (PyDict_GetItemWithError(state, names.weight) || PyDict_GetItemWithError(state, names.bias)) return false;
  PyObject* bias = PyDict_GetItemWithError(parameters.ptr(), names.bias);
  out->n = n;
  out->eps = static_cast<float>(PyFloat_AS_DOUBLE(eps));
  return bias && read_parameter(PyDict_GetItemWithError(parameters.ptr(), names.weight), n, &out->weight) &&
         (bias == Py_None || read_parameter(bias, n, &out->bias));
}

bool read_rms_norm(PyObject* state, const py::object& parameters, PyObject* numbers, int64_t n, NormRows* out) {
  if (!PyTuple_Check(numbers) || PyTuple_GET_SIZE(numbers) != 3) return false;
  PyObject *eps = PyDict_GetItemWithError(state, PyTuple_GET_ITEM(numbers, 0)), *gain = PyTuple_GET_ITEM(numbers, 2);
  if (eps == Py_None) eps = PyTuple_GET_ITEM(numbers, 1);
  if (!eps || !PyFloat_CheckExact(eps) || !PyFloat_CheckExact(gain)) return false;
  out->n = n;
  out->eps = static_cast<float>(PyFloat_AS_DOUBLE(eps));
  out->gain = static_cast<float>(PyFloat_AS_DOUBLE(gain));
  out->centered = false;
  return !PyDict_GetItemWithError(state, names.weight) &&
         read_parameter(PyDict_GetItemWithError(parameters.ptr(), names.weight), n, &out->weight);
}

namespace {

// y; `read` reads the numbers for rows of n values, given the parameters. Null: this is not a plain call.
template <class Read>
py::object normalized(PyObject* state, PyObject* object, const Read& read) {
  dlpack::Tensor x;
  NormRows rows{};
  if (!plain_eager() || !view(object, &x) || wants_gradient(object) || is_negated(object)) return {};
  const DTypePair* dtype = find(x.dtype);
  if (!dtype || dtype->ours != DType::f32 || x.ndim < 1 || x.ndim > kMostDims || !is_contiguous(x)) return {};
  const py::object held = held_parameters(state);
  if (!held || !read(held, x.shape[x.ndim - 1], &rows)) return {};
  rows.count = 1;
  for (int i = 0; i + 1 < x.ndim; ++i) rows.count *= x.shape[i];
  if (!rows.count || !rows.n) return {};
  void* data;
  auto y = py::reinterpret_steal<py::object>(new_output(x.shape, x.ndim, rows.n, *dtype, &data));
  if (!y) return {};
  rows.x = reinterpret_cast<const float*>(data_of(x)), rows.y = static_cast<float*>(data);
  {
    const Unlocked unlocked(rows.count * rows.n >= kKeepGilBelowValues);
    normalize_on_threads(active_kernel(), rows);
  }
  return y;
}

PyObject* call_layer_norm(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return without_exceptions([=] {
    PyObject* state = count == 3 ? plain_state(args[0], args[1]) : nullptr;
    if (!state) return or_not_implemented({});
    return or_not_implemented(normalized(state, args[2], [=](const py::object& held, int64_t n, NormRows* rows) {
      return read_norm(state, held, n, rows);
    }));
  });
}

PyObject* call_rms_norm(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return without_exceptions([=] {
    PyObject* state = count == 4 ? plain_state(args[0], args[1]) : nullptr;
    if (!state || !computes_as_known(Py_TYPE(args[0]))) return or_not_implemented({});
    return or_not_implemented(normalized(state, args[3], [=](const py::object& held, int64_t n, NormRows* rows) {
      return read_rms_norm(state, held, args[2], n, rows);
    }));
  });
}

PyMethodDef methods[] = {
    {"call_layer_norm", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call_layer_norm)), METH_FASTCALL,
     "call_layer_norm(module, cls, x): cls.forward(module, x) of a LayerNorm, or NotImplemented."},
    {"call_rms_norm", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call_rms_norm)), METH_FASTCALL,
     "call_rms_norm(module, cls, (eps, default_eps, gain), x): the same of an RMSNorm."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void add_direct_norm(py::module_& module) {
  names = {name("_parameters"), name("weight"), name("bias"), name("eps")};
  PyModule_AddFunctions(module.ptr(), methods);
}

}  // namespace torchq
