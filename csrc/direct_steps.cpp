// torchq._C.call_steps: calls one after the other, each of what those before it gave, as a layer of transformers makes
// them (torchq/modules/layer_steps.py). Most are the other direct calls. Between two products that stream their weights
// through L2, the bytecode and the frames of Python that would make them come from L3: 50 us of a BERT layer's 630 at
// 16 rows.

#include "direct.h"
#include "direct_call.h"
#include "nn_module.h"

namespace py = pybind11;

namespace torchq {
namespace {

constexpr Py_ssize_t kMostArguments = 12;

struct Names {
  PyObject *update, *more;
} names;

// What a step, (function, arguments, places, gives_all, unread), returns. places has pairs: which argument is which
// value.
PyObject* called(PyObject* step, PyObject* values) {
  PyObject *given = PyTuple_GET_ITEM(step, 1), *places = PyTuple_GET_ITEM(step, 2);
  PyObject* arguments[kMostArguments];
  const Py_ssize_t count = PyTuple_GET_SIZE(given);
  for (Py_ssize_t i = 0; i < count; ++i) arguments[i] = PyTuple_GET_ITEM(given, i);
  for (Py_ssize_t i = 0; i + 1 < PyTuple_GET_SIZE(places); i += 2)
    arguments[PyLong_AsSsize_t(PyTuple_GET_ITEM(places, i))] =
        PyList_GET_ITEM(values, PyLong_AsSsize_t(PyTuple_GET_ITEM(places, i + 1)));
  return PyObject_Vectorcall(PyTuple_GET_ITEM(step, 0), arguments, count, nullptr);
}

// Whether a step has no more arguments than fit, and all values that it takes are there.
bool is_step(PyObject* step, PyObject* values) {
  if (!PyTuple_Check(step) || PyTuple_GET_SIZE(step) != 5) return false;
  PyObject *given = PyTuple_GET_ITEM(step, 1), *places = PyTuple_GET_ITEM(step, 2);
  if (!PyTuple_Check(given) || PyTuple_GET_SIZE(given) > kMostArguments || !PyTuple_Check(places)) return false;
  if (!PyTuple_Check(PyTuple_GET_ITEM(step, 4))) return false;
  const Py_ssize_t ends[] = {PyTuple_GET_SIZE(given), PyList_GET_SIZE(values)};
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(places); ++i) {
    const Py_ssize_t at = PyLong_AsSsize_t(PyTuple_GET_ITEM(places, i));
    if (at < 0 || at >= ends[i % 2]) return false;
  }
  return true;
}

// Appends a value, or all of a tuple. False: there is an error.
bool append(PyObject* values, PyObject* y, bool gives_all) {
  if (!gives_all || !PyTuple_CheckExact(y)) return PyList_Append(values, y) == 0;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(y); ++i)
    if (PyList_Append(values, PyTuple_GET_ITEM(y, i))) return false;
  return true;
}

// Lets go of the values that no later step reads, so that q, k and v need no memory while the rest of the layer runs.
// False: there is an error.
bool forget(PyObject* values, PyObject* unread) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(unread); ++i) {
    const Py_ssize_t at = PyLong_AsSsize_t(PyTuple_GET_ITEM(unread, i));
    if (PyErr_Occurred() || PyList_SetItem(values, at, Py_NewRef(Py_None))) return false;
  }
  return true;
}

PyObject* call_steps(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return without_exceptions([=]() -> PyObject* {
    if (count != 2 || !PyTuple_Check(args[0]) || !PyList_CheckExact(args[1])) Py_RETURN_NOTIMPLEMENTED;
    PyObject *steps = args[0], *values = args[1];
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(steps); ++i) {
      PyObject* step = PyTuple_GET_ITEM(steps, i);
      if (!is_step(step, values)) return PyErr_Clear(), Py_NewRef(Py_False);
      const auto y = py::reinterpret_steal<py::object>(called(step, values));
      if (!y) return nullptr;
      if (y.ptr() == Py_NotImplemented) Py_RETURN_FALSE;
      if (!append(values, y.ptr(), PyTuple_GET_ITEM(step, 3) == Py_True)) return nullptr;
      if (!forget(values, PyTuple_GET_ITEM(step, 4))) return nullptr;
    }
    Py_RETURN_TRUE;
  });
}

// What cache.update(k, v, place) gives; k and v without a cache. Where that ends in an error, so do the steps: it has
// been called, and may not be once more.
PyObject* call_cache(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 6) Py_RETURN_NOTIMPLEMENTED;
  if (args[0] == Py_None) return PyTuple_Pack(2, args[1], args[2]);
  PyObject* given[] = {args[0], args[1], args[2], args[3], args[4]};
  PyObject* more = args[5] == Py_True ? names.more : nullptr;
  const auto y = py::reinterpret_steal<py::object>(PyObject_VectorcallMethod(names.update, given, 4, more));
  if (!y) return nullptr;
  PyObject* both = PySequence_Tuple(y.ptr());
  if (both && PyTuple_GET_SIZE(both) != 2) {
    Py_DECREF(both);
    PyErr_SetString(PyExc_ValueError, "torchq: update() of a cache gave other than keys and values");
    return nullptr;
  }
  return both;
}

PyMethodDef methods[] = {
    {"call_cache", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call_cache)), METH_FASTCALL,
     "call_cache(cache, k, v, place, others, hands_on): (keys, values) of cache.update(k, v, place), with "
     "kwargs=others if hands_on; of no cache (k, v)."},
    {"call_steps", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call_steps)), METH_FASTCALL,
     "call_steps(steps, values): appends to a list what each step, (function, arguments, places, gives_all, "
     "unread), returns: a value, or with gives_all a tuple of them. places has pairs: which argument is which value. "
     "The values at unread become None behind it. Stops, and returns False, where one returns NotImplemented."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void add_direct_steps(py::module_& module) {
  names = {name("update"), forever(py::make_tuple("kwargs"))};
  PyModule_AddFunctions(module.ptr(), methods);
}

}  // namespace torchq
