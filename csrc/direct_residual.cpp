// torchq._C.call_residual: the call of a module that is proven to be norm(layer(x) + residual), as one product whose
// rows are added and normalized while they are in L2 (torchq/modules/straight_forms.py). call_sum is the same for a
// layer and a norm that the caller names. call_sums gives the sum, too, as layers whose norm comes first go on with
// both. As call_linear in direct.cpp they answer NotImplemented wherever anything could stand between the call, or
// those of the children, and the arithmetic.

#include <algorithm>

#include "classes.h"
#include "direct.h"
#include "direct_call.h"
#include "direct_layer.h"
#include "nn_module.h"
#include "run.h"

namespace py = pybind11;

namespace torchq {
namespace {

struct Names {
  PyObject *modules, *training, *scope;
} names;

// What the module's code was found to call.
struct Line {
  PyObject *calls, *norm;                             // names of children: the layer and those behind it; the norm
  PyObject *layer_class, *norm_class, *idle_classes;  // what they must be now

  bool read(PyObject* kinds) {
    if (!PyTuple_Check(calls) || !PyTuple_GET_SIZE(calls) || !PyTuple_Check(kinds) || PyTuple_GET_SIZE(kinds) != 3)
      return false;
    layer_class = PyTuple_GET_ITEM(kinds, 0), norm_class = PyTuple_GET_ITEM(kinds, 1);
    idle_classes = PyTuple_GET_ITEM(kinds, 2);
    return true;
  }
};

// The child that `self.name` gives, or null. It is held: another thread may replace it as soon as torch or Python runs.
py::object child(PyObject* state, PyObject* name) {
  PyObject* children = PyDict_GetItemWithError(state, names.modules);
  if (!children || !PyDict_Check(children) || PyDict_GetItemWithError(state, name)) return {};
  return py::reinterpret_borrow<py::object>(PyDict_GetItemWithError(children, name));
}

// Whether this child returns its input.
bool is_idle(const py::object& module, PyObject* classes) {
  if (!module) return false;
  auto* cls = reinterpret_cast<PyObject*>(Py_TYPE(module.ptr()));
  if (PySequence_Contains(classes, cls) != 1) return false;
  PyObject* own = plain_state(module.ptr(), cls);
  return own && computes_as_known(Py_TYPE(module.ptr())) && PyDict_GetItemWithError(own, names.training) == Py_False;
}

// Whether this can be added to y, which has x's shape but for the last dimension.
bool is_like(PyObject* object, const PlainInput& in, dlpack::Tensor* out) {
  if (!view(object, out) || wants_gradient(object) || is_negated(object)) return false;
  const DTypePair* dtype = find(out->dtype);
  const int last = in.x.ndim - 1;
  return dtype && dtype->ours == DType::f32 && out->ndim == in.x.ndim && out->shape[last] == in.weights->n &&
         std::equal(out->shape, out->shape + last, in.x.shape) && is_contiguous(*out);
}

// norm(layer(x) + residual). Null: this is not a plain call.
py::object computed(PyObject* linear_state, PyObject* norm_state, PyObject* x, PyObject* residual) {
  Layer layer;
  PlainInput in;
  dlpack::Tensor added;
  NormRows rows{};
  if (!read_layer(linear_state, &layer) || !read_input(x, layer, &in) || in.dtype->ours != DType::f32) return {};
  if (!is_like(residual, in, &added)) return {};
  const py::object held = held_parameters(norm_state);
  if (!held || !read_norm(norm_state, held, in.weights->n, &rows)) return {};
  void* data;
  auto y = py::reinterpret_steal<py::object>(new_output(in.x.shape, in.x.ndim, rows.n, *in.dtype, &data));
  if (!y) return {};
  rows.count = in.count;
  rows.x = rows.y = static_cast<float*>(data);
  rows.residual = reinterpret_cast<const float*>(data_of(added));
  Problem problem = linear_problem(layer.numbers, in.rows(), *in.weights, data, DType::f32);
  problem.norm = &rows;
  {
    const Unlocked unlocked(in.work() >= kKeepGilBelow);
    run(*in.kernel, problem);
  }
  return y;
}

py::object computed(PyObject* state, const Line& line, PyObject* x, PyObject* residual) {
  const py::object linear = child(state, PyTuple_GET_ITEM(line.calls, 0)), norm = child(state, line.norm);
  PyObject* linear_state = linear ? plain_state(linear.ptr(), line.layer_class) : nullptr;
  PyObject* norm_state = norm ? plain_state(norm.ptr(), line.norm_class) : nullptr;
  if (!linear_state || !norm_state) return {};
  for (Py_ssize_t i = 1; i < PyTuple_GET_SIZE(line.calls); ++i)
    if (!is_idle(child(state, PyTuple_GET_ITEM(line.calls, i)), line.idle_classes)) return {};
  return computed(linear_state, norm_state, x, residual);
}

PyObject* call_sum(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return without_exceptions([=] {
    PyObject* linear_state = count == 6 ? plain_state(args[0], args[1]) : nullptr;
    PyObject* norm_state = linear_state ? plain_state(args[2], args[3]) : nullptr;
    return or_not_implemented(norm_state ? computed(linear_state, norm_state, args[4], args[5]) : py::object());
  });
}

// The numbers of a LayerNorm, or, where it has numbers that set it apart, of an RMSNorm.
bool read_norm_of(PyObject* state, const py::object& parameters, PyObject* numbers, int64_t n, NormRows* out) {
  return numbers == Py_None ? read_norm(state, parameters, n, out) : read_rms_norm(state, parameters, numbers, n, out);
}

// layer(x) + residual, and that of a norm behind it: a tuple. Null: this is not a plain call.
py::object sums(const Layer& layer, const PlainInput& in, const float* added, NormRows rows) {
  void *data, *normalized;
  auto sum = py::reinterpret_steal<py::object>(new_output(in.x.shape, in.x.ndim, rows.n, *in.dtype, &data));
  if (!sum) return {};
  auto y = py::reinterpret_steal<py::object>(new_output(in.x.shape, in.x.ndim, rows.n, *in.dtype, &normalized));
  if (!y) return {};
  rows.count = in.count, rows.residual = added, rows.y = static_cast<float*>(normalized);
  rows.x = rows.sum = static_cast<float*>(data);
  Problem problem = linear_problem(layer.numbers, in.rows(), *in.weights, data, DType::f32);
  problem.norm = &rows;
  {
    const Unlocked unlocked(in.work() >= kKeepGilBelow);
    run(*in.kernel, problem);
  }
  return py::make_tuple(sum, y);
}

// The same without a norm. Null as well: it has so many rows that each step had better have all threads.
py::object sums(const Layer& layer, const PlainInput& in, const float* added) {
  const int64_t n = in.weights->n, count = in.count * n;
  void* data;
  if (count >= kKeepGilBelowValues) return {};
  auto sum = py::reinterpret_steal<py::object>(new_output(in.x.shape, in.x.ndim, n, *in.dtype, &data));
  if (!sum) return {};
  {
    const Unlocked unlocked(in.work() >= kKeepGilBelow);
    run(*in.kernel, linear_problem(layer.numbers, in.rows(), *in.weights, data, DType::f32));
    auto* __restrict total = static_cast<float*>(data);
    for (int64_t i = 0; i < count; ++i) total[i] += added[i];
  }
  return py::make_tuple(sum);
}

py::object sums(PyObject* linear_state, PyObject* norm_state, PyObject* numbers, PyObject* x, PyObject* residual) {
  Layer layer;
  PlainInput in;
  dlpack::Tensor other;
  NormRows rows{};
  PyObject* scope = PyDict_GetItemWithError(linear_state, names.scope);
  if (scope && scope != Py_None) return {};
  if (!read_layer(linear_state, &layer) || !read_input(x, layer, &in) || in.dtype->ours != DType::f32) return {};
  if (!is_like(residual, in, &other)) return {};
  const auto* added = reinterpret_cast<const float*>(data_of(other));
  if (!norm_state) return sums(layer, in, added);
  const py::object held = held_parameters(norm_state);
  if (!held || !read_norm_of(norm_state, held, numbers, in.weights->n, &rows)) return {};
  return sums(layer, in, added, rows);
}

PyObject* call_sums(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return without_exceptions([=] {
    PyObject* linear_state = count == 7 ? plain_state(args[0], args[1]) : nullptr;
    if (!linear_state) return or_not_implemented({});
    const bool normed = args[2] != Py_None;
    PyObject* norm_state = normed ? plain_state(args[2], args[3]) : nullptr;
    if (normed && (!norm_state || !computes_as_known(Py_TYPE(args[2])))) return or_not_implemented({});
    return or_not_implemented(sums(linear_state, norm_state, args[4], args[5], args[6]));
  });
}

PyObject* call_residual(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return without_exceptions([=] {
    if (count != 7) Py_RETURN_NOTIMPLEMENTED;
    Line line{args[2], args[3], nullptr, nullptr, nullptr};
    PyObject* state = line.read(args[4]) ? plain_state(args[0], args[1]) : nullptr;
    return or_not_implemented(state ? computed(state, line, args[5], args[6]) : py::object());
  });
}

PyMethodDef methods[] = {
    {"call_residual", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call_residual)), METH_FASTCALL,
     "call_residual(module, cls, calls, norm, (layer_class, norm_class, idle_classes), x, residual): "
     "norm(idle(layer(x)) + residual), where the children are what they are said to be; or NotImplemented."},
    {"call_sum", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call_sum)), METH_FASTCALL,
     "call_sum(layer, layer_class, norm, norm_class, x, residual): norm(layer(x) + residual), or NotImplemented."},
    {"call_sums", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call_sums)), METH_FASTCALL,
     "call_sums(layer, layer_class, norm, norm_class, numbers, x, residual): (sum, norm(sum)) of sum = layer(x) + "
     "residual, for a LayerNorm, or an RMSNorm with the numbers of call_rms_norm; (sum,) if norm is None. Or "
     "NotImplemented."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void add_direct_residual(py::module_& module) {
  names = {name("_modules"), name("training"), name("scope")};
  PyModule_AddFunctions(module.ptr(), methods);
}

}  // namespace torchq
