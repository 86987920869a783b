// torchq._C.call_linear: the call of a QuantizedLinear without nn.Module's and the dispatcher's shares of it. They take
// 0.7 us and 1.5 to 3 us before any arithmetic, more than a layer of 64 x 64 takes. torchq._C.call_fused is the same
// together with the activation that follows in an Int8Sequential, and with u8 codes from layer to layer. begin_linear
// and end_linear are its two halves: the first quantizes x, so that the second may come when x has changed.
//
// The module's state is read from its dict, and a tensor where it lies (plain_tensor.h).
//
// This serves plain eager calls on plain tensors. In all other cases (hooks, subclasses, modes, transforms, tracing,
// gradients, the profiler, any argument that the op would refuse) it returns NotImplemented, and the caller takes the
// usual way, which does the work or says what is wrong. So there are no messages here. What it accepts it computes
// exactly as forward() and the op would: linear.h fills the Problem for both.
//
// What is called from Python here throws nothing: CPython has no way to pass a C++ exception on. Another thread may
// give the module another packed weight whenever the GIL is released, which calls of torch's functions do, too; so the
// packed weight is held by a reference from when it is read, and x by the caller.

#include "direct.h"

#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "classes.h"
#include "direct_call.h"
#include "direct_layer.h"
#include "dlpack.h"
#include "nn_module.h"
#include "plain_tensor.h"
#include "run.h"

namespace py = pybind11;

namespace torchq {
namespace {

// Names of a QuantizedLinear's attributes.
struct Names {
  PyObject *buffers, *packed, *input_qparams;
  PyObject *scope, *defer;
  PyObject *training, *p;  // of any module, and of a Dropout
  PyObject* modules;
  PyObject *zero, *one;  // 0 and 1.0
} names;

bool simulating = false;  // whether any thread does: then Python must look whether this one does

// The header of packed weights, or null.
const PackedHeader* header_of(PyObject* object) {
  dlpack::Tensor packed;
  const bool bytes = view(object, &packed) && packed.ndim == 1 && is_contiguous(packed) && find(packed.dtype) == kU8;
  return bytes ? packed_header(data_of(packed), packed.shape[0]) : nullptr;
}

bool fits(const dlpack::Tensor& x, const PackedHeader& weights) {
  return x.ndim >= 1 && x.ndim <= kMostDims && x.shape[x.ndim - 1] == weights.k && is_contiguous(x);
}

bool read(PyObject* value, bool (*allowed)(int64_t), int32_t* out) {
  if (!value || !PyLong_Check(value)) return false;
  const long number = PyLong_AsLong(value);
  *out = static_cast<int32_t>(number);
  return allowed(number);
}

bool read_scale(PyObject* value, float* out) {
  if (!PyFloat_CheckExact(value)) return false;
  const double number = PyFloat_AS_DOUBLE(value);
  *out = static_cast<float>(number);
  return is_scale(number);
}

// A pair (scale, zero_point).
bool read(PyObject* value, QParams* out) {
  return value && PyTuple_Check(value) && PyTuple_GET_SIZE(value) == 2 &&
         read_scale(PyTuple_GET_ITEM(value, 0), &out->scale) &&
         read(PyTuple_GET_ITEM(value, 1), is_zero_point, &out->zero_point);
}

}  // namespace

bool read_input(PyObject* object, const Layer& layer, PlainInput* out) {
  if (simulating || !plain_eager() || !view(object, &out->x)) return false;
  out->dtype = find(out->x.dtype);
  out->weights = header_of(layer.packed.ptr());
  if (!out->dtype || !out->weights || (out->dtype == kU8) != static_cast<bool>(layer.codes_of)) return false;
  if (layer.codes_of && out->weights->has_channel_scale) return false;
  if (!fits(out->x, *out->weights)) return false;
  if (wants_gradient(object) || is_negated(object)) return false;
  out->count = 1;
  for (int i = 0; i + 1 < out->x.ndim; ++i) out->count *= out->x.shape[i];
  out->kernel = kernel_for(out->weights->layout);
  return out->count && out->weights->n && out->kernel;
}

bool read_layer(PyObject* state, Layer* out) {
  PyObject *buffers = PyDict_GetItemWithError(state, names.buffers),
           *pair = PyDict_GetItemWithError(state, names.input_qparams);
  if (!buffers || !pair) return false;
  out->packed = py::reinterpret_borrow<py::object>(PyDict_GetItemWithError(buffers, names.packed));
  out->numbers.per_token = pair == Py_None;
  return out->packed && (out->numbers.per_token || read(pair, &out->numbers.x));
}

bool read_layer_alone(PyObject* module, PyObject* cls, Layer* out) {
  PyObject* state = plain_state(module, cls);
  PyObject* scope = state ? PyDict_GetItemWithError(state, names.scope) : nullptr;
  return state && (!scope || scope == Py_None) && read_layer(state, out);
}

namespace {

// y. Null without an error set: this is not a plain call.
py::object multiply(PyObject* object, const Layer& layer) {
  PlainInput in;
  if (!read_input(object, layer, &in)) return {};
  const DTypePair* y_dtype = layer.gives_codes ? kU8 : layer.codes_of ? layer.codes_of : in.dtype;
  void* data;
  auto y = py::reinterpret_steal<py::object>(new_output(in.x.shape, in.x.ndim, in.weights->n, *y_dtype, &data));
  if (!y) return {};
  const Problem problem = linear_problem(layer.numbers, in.rows(), *in.weights, data, y_dtype->ours);
  {
    const Unlocked unlocked(in.work() >= kKeepGilBelow);
    run(*in.kernel, problem);
  }
  return y;
}

PyObject* is_plain(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count == 4) return PyBool_FromLong(plain_state(args[0], args[1], args[2], args[3]) != nullptr);
  return PyBool_FromLong(count == 2 && plain_state(args[0], args[1]));
}

PyObject* is_plain_eager(PyObject*, PyObject*) { return PyBool_FromLong(plain_eager()); }

PyObject* set_simulating(PyObject*, PyObject* yes) {
  simulating = yes == Py_True;
  Py_RETURN_NONE;
}

PyObject* is_autocast_enabled(PyObject*, PyObject*) { return PyBool_FromLong(autocast()); }

PyObject* count_function_modes(PyObject*, PyObject*) { return PyLong_FromLong(function_modes()); }

PyObject* call_linear(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return without_exceptions([=] {
    PyObject* state = count == 3 ? plain_state(args[0], args[1]) : nullptr;
    PyObject* scope = state ? PyDict_GetItemWithError(state, names.scope) : nullptr;
    if (scope && scope != Py_None) {
      PyObject* deferring[] = {scope, args[0], args[2]};
      PyObject* pending = PyObject_VectorcallMethod(names.defer, deferring, 3, nullptr);
      if (pending != Py_None) return pending;  // or null, for an error
      Py_DECREF(pending);
    }
    Layer layer;
    return or_not_implemented(state && read_layer(state, &layer) ? multiply(args[2], layer) : py::object());
  });
}

// The long way's last step. Null, too, stands for an error.
PyObject* call_op(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 4) Py_RETURN_NOTIMPLEMENTED;
  PyObject *x = args[1], *dynamic_op = args[2], *static_op = args[3];
  const auto state = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(args[0], nullptr));
  PyObject* buffers = state ? PyDict_GetItemWithError(state.ptr(), names.buffers) : nullptr;
  PyObject* pair = state ? PyDict_GetItemWithError(state.ptr(), names.input_qparams) : nullptr;
  if (!buffers || !pair || simulating || autocast() || may_want_gradient(x)) return or_not_implemented({});
  const auto packed = py::reinterpret_borrow<py::object>(PyDict_GetItemWithError(buffers, names.packed));
  if (!packed) return or_not_implemented({});
  if (pair == Py_None) {
    PyObject* arguments[] = {x, packed.ptr(), names.zero};
    return PyObject_Vectorcall(dynamic_op, arguments, 3, nullptr);
  }
  PyObject* dtype = dtype_of(x);
  if (!dtype || dtype == dtype_of(*kU8) || !PyTuple_Check(pair) || PyTuple_GET_SIZE(pair) != 2)
    return or_not_implemented({});
  PyObject* arguments[] = {
      x, packed.ptr(), PyTuple_GET_ITEM(pair, 0), PyTuple_GET_ITEM(pair, 1), dtype, names.one, names.zero, names.zero};
  return PyObject_Vectorcall(static_op, arguments, 8, nullptr);
}

// ---- In two steps ---------------------------------------------------------------------------------------------------

// A product that is half done: the rows of x are quantized, and belong to nobody else.
struct HalfDone {
  Layer layer;
  std::vector<int64_t> shape;  // of x
  const DTypePair* dtype;
  Problem problem;
  std::optional<QuantizedRows> rows;
};

constexpr const char* kHalfDone = "torchq._C.HalfDone";

void forget(PyObject* capsule) { delete static_cast<HalfDone*>(PyCapsule_GetPointer(capsule, kHalfDone)); }

PyObject* begin_linear(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return without_exceptions([=] {
    PyObject* state = count == 3 ? plain_state(args[0], args[1]) : nullptr;
    Layer layer;
    PlainInput in;
    if (!state || !read_layer(state, &layer) || !read_input(args[2], layer, &in)) return or_not_implemented({});
    const Problem problem = linear_problem(layer.numbers, in.rows(), *in.weights, nullptr, in.dtype->ours);
    const std::vector<int64_t> shape(in.x.shape, in.x.shape + in.x.ndim);
    std::unique_ptr<HalfDone> half(new HalfDone{std::move(layer), shape, in.dtype, problem, {}});
    {
      const Unlocked unlocked(in.count * in.weights->k >= kKeepGilBelowValues);
      half->rows.emplace(*in.kernel, problem);
    }
    PyObject* capsule = PyCapsule_New(half.get(), kHalfDone, forget);
    if (capsule) half.release();
    return capsule;
  });
}

PyObject* end_linear(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return without_exceptions([=]() -> PyObject* {
    Activation activation;
    if (count != 2 || !read_activation(args[1], &activation)) Py_RETURN_NOTIMPLEMENTED;
    const auto* half = static_cast<HalfDone*>(PyCapsule_GetPointer(args[0], kHalfDone));
    if (!half) return nullptr;
    Problem problem = half->problem;
    const int64_t n = problem.weights->n;
    auto y = py::reinterpret_steal<py::object>(
        new_output(half->shape.data(), static_cast<int>(half->shape.size()), n, *half->dtype, &problem.y.data));
    if (!y) return nullptr;
    problem.activation = activation;
    {
      const Unlocked unlocked(problem.m * n * problem.weights->k >= kKeepGilBelow);
      half->rows->multiply(problem);
    }
    return y.release().ptr();
  });
}

// ---- With what follows ----------------------------------------------------------------------------------------------

// Whether a module's attributes are still these.
bool has(PyObject* state, PyObject* settings) {
  PyObject *key, *value;
  Py_ssize_t at = 0;
  while (PyDict_Next(settings, &at, &key, &value))
    if (PyDict_GetItemWithError(state, key) != value) return false;
  return true;
}

}  // namespace

bool are_plain(PyObject* modules, PyObject* settings) {
  if (!PyTuple_Check(modules) || !PyTuple_Check(settings)) return false;
  if (PyTuple_GET_SIZE(settings) != PyTuple_GET_SIZE(modules)) return false;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(modules); ++i) {
    PyObject* module = PyTuple_GET_ITEM(modules, i);
    PyObject* state = plain_state(module, reinterpret_cast<PyObject*>(Py_TYPE(module)));
    PyObject* own = PyTuple_GET_ITEM(settings, i);
    if (!state || !PyDict_Check(own) || !has(state, own) || !computes_as_known(Py_TYPE(module))) return false;
    if (PyDict_GetItemWithError(state, names.p) && PyDict_GetItemWithError(state, names.training) != Py_False)
      return false;
  }
  return true;
}

bool read_activation(PyObject* number, Activation* out) {
  int32_t activation;
  if (!read(number, is_activation, &activation)) return false;
  *out = static_cast<Activation>(activation);
  return true;
}

namespace {

// What codes stand for: a pair (dtype, qparams).
bool read_codes(PyObject* codes, Layer* out) {
  if (!PyTuple_Check(codes) || PyTuple_GET_SIZE(codes) != 2 || out->numbers.per_token) return false;
  out->codes_of = find(PyTuple_GET_ITEM(codes, 0));
  return out->codes_of && out->codes_of != kU8 && read(PyTuple_GET_ITEM(codes, 1), &out->numbers.x);
}

}  // namespace

py::object packed_of(PyObject* module, PyObject* facts) {
  const auto state = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module, nullptr));
  if (!state || !PyDict_Check(facts) || !has(state.ptr(), facts)) return {};
  PyObject* buffers = PyDict_GetItemWithError(state.ptr(), names.buffers);
  if (!buffers || !PyDict_Check(buffers)) return {};
  return py::reinterpret_borrow<py::object>(PyDict_GetItemWithError(buffers, names.packed));
}

namespace {

PyObject* is_plain_row(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return PyBool_FromLong(count == 4 && plain_state(args[0], args[1]) && are_plain(args[2], args[3]));
}

// Whether a module's code would call these children, by their names; in_order: all that it has, in their order.
bool has_children(PyObject* state, PyObject* children, bool in_order) {
  PyObject* now = PyDict_GetItemWithError(state, names.modules);
  if (!PyDict_Check(children) || !now || !PyDict_Check(now)) return false;
  if (in_order && PyDict_GET_SIZE(now) != PyDict_GET_SIZE(children)) return false;
  PyObject *name, *child, *name_now, *child_now;
  Py_ssize_t at = 0, at_now = 0;
  while (PyDict_Next(children, &at, &name, &child)) {
    if (!in_order) child_now = PyDict_GetItemWithError(now, name);
    if (in_order && (!PyDict_Next(now, &at_now, &name_now, &child_now) || name_now != name)) return false;
    if (child_now != child || PyDict_GetItemWithError(state, name)) return false;
  }
  return true;
}

// Whether a part of a block, (module, class, children, in_order, settings), is as it was.
bool is_as_known(PyObject* part, PyObject* pre_hook, PyObject* hook) {
  if (!PyTuple_Check(part) || PyTuple_GET_SIZE(part) != 5) return false;
  PyObject *cls = PyTuple_GET_ITEM(part, 1), *children = PyTuple_GET_ITEM(part, 2), *own = PyTuple_GET_ITEM(part, 4);
  const bool in_order = PyTuple_GET_ITEM(part, 3) == Py_True;
  PyObject* state = plain_state(PyTuple_GET_ITEM(part, 0), cls, pre_hook, hook);
  if (!state || !PyDict_Check(children) || !PyDict_Check(own) || !has(state, own)) return false;
  if (!computes_as_known(reinterpret_cast<PyTypeObject*>(cls))) return false;
  if (PyDict_GetItemWithError(state, names.p) && PyDict_GetItemWithError(state, names.training) != Py_False)
    return false;
  return (!in_order && !PyDict_GET_SIZE(children)) || has_children(state, children, in_order);
}

PyObject* are_as_known(PyObject*, PyObject* const* args, Py_ssize_t count) {
  bool yes = count == 3 && PyTuple_Check(args[0]);
  for (Py_ssize_t i = 0; yes && i < PyTuple_GET_SIZE(args[0]); ++i)
    yes = is_as_known(PyTuple_GET_ITEM(args[0], i), args[1], args[2]);
  PyErr_Clear();
  return PyBool_FromLong(yes);
}

PyObject* call_fused(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return without_exceptions([=] {
    PyObject* state = count == 9 ? plain_state(args[0], args[1]) : nullptr;
    if (!state) Py_RETURN_NOTIMPLEMENTED;
    PyObject *x = args[2], *codes = args[3], *reader = args[7];
    Layer layer;
    LayerNumbers& numbers = layer.numbers;
    if (!read_layer(state, &layer) || !read_activation(args[4], &numbers.activation) || !are_plain(args[5], args[6]))
      return or_not_implemented({});
    if (codes != Py_None && !read_codes(codes, &layer)) return or_not_implemented({});
    if (reader != Py_None) {
      layer.gives_codes = plain_state(reader, args[1]) && !numbers.per_token && read(args[8], &numbers.y);
      if (!layer.gives_codes) return or_not_implemented({});
    }
    return or_not_implemented(multiply(x, layer));
  });
}

PyMethodDef methods[] = {
    {"is_plain", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(is_plain)), METH_FASTCALL,
     "is_plain(module, cls[, enter, leave]): whether a call of this nn.Module is nothing but cls.forward(), and these "
     "methods of scopes."},
    {"is_plain_eager", is_plain_eager, METH_NOARGS,
     "is_plain_eager(): whether nothing but the operation wants to know of a call: no mode, tracing or autocast."},
    {"is_plain_row", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(is_plain_row)), METH_FASTCALL,
     "is_plain_row(module, cls, behind, settings): the same, and whether the calls of the modules behind it are "
     "nothing but their forward() either, with these settings."},
    {"are_as_known", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(are_as_known)), METH_FASTCALL,
     "are_as_known(parts, enter, leave): whether the modules of a block (modules/conv_block.py) are as they were, and "
     "nothing but these methods of scopes sees their calls."},
    {"set_simulating", set_simulating, METH_O,
     "set_simulating(yes): whether any thread simulates. If so, all calls here return NotImplemented."},
    {"function_modes", count_function_modes, METH_NOARGS,
     "function_modes(): how many modes see the calls of torch's functions in this thread, without default devices."},
    {"is_autocast_enabled", is_autocast_enabled, METH_NOARGS,
     "is_autocast_enabled(): torch.is_autocast_enabled('cpu'), in a fifth of its time."},
    {"call_linear", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call_linear)), METH_FASTCALL,
     "call_linear(module, cls, x): cls.forward(module, x) of a QuantizedLinear, or what its scope defers; "
     "NotImplemented where only nn.Module.__call__ and the op will do."},
    {"call_op", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call_op)), METH_FASTCALL,
     "call_op(module, x, linear_dynamic, linear_static): forward(x) of a QuantizedLinear by one of these ops, or "
     "NotImplemented where it takes more than that: autocast, a gradient, codes."},
    {"begin_linear", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(begin_linear)), METH_FASTCALL,
     "begin_linear(module, cls, x): the half of call_linear that reads x, for end_linear; or NotImplemented."},
    {"end_linear", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(end_linear)), METH_FASTCALL,
     "end_linear(begun, activation): y, as call_linear gives it, with an activation. May be called again."},
    {"call_fused", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call_fused)), METH_FASTCALL,
     "call_fused(module, cls, x, codes, activation, between, settings, reader, y_qparams): the same with an "
     "activation, and with "
     "u8 codes, in qparams that the caller gives, since those of a layer may change between two calls; "
     "NotImplemented as well if any of the modules must be called by itself."},
    {nullptr, nullptr, 0, nullptr}};
}  // namespace

void add_direct_calls(py::module_& module) {
  watch_nn_module();
  watch_torch();
  names = {name("_buffers"), name("packed"), name("input_qparams"), name("scope"),      name("defer"),
           name("training"), name("p"),      name("_modules"),      PyLong_FromLong(0), PyFloat_FromDouble(1.0)};
  PyModule_AddFunctions(module.ptr(), methods);
}

}  // namespace torchq
