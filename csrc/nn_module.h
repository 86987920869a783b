// What stands between the call of an nn.Module and its forward(), and small helpers to read Python objects.

#pragma once

#include <pybind11/pybind11.h>

namespace torchq {

// Keeps an object for as long as the process lives.
inline PyObject* forever(pybind11::object object) { return object.release().ptr(); }

inline PyObject* name(const char* text) { return PyUnicode_InternFromString(text); }

// Whether a call returned a false value. Releases the result.
inline bool falsy(PyObject* result) {
  const bool yes = result && PyObject_Not(result) == 1;
  Py_XDECREF(result);
  return yes;
}

// To be called once, before plain_state.
void watch_nn_module();

// The state of a module whose call is nothing but cls.forward(), else null: its type is cls, which is as it was noted
// (classes.h), there is no hook on it or on all modules, it has no forward() of its own, and it is not compiled.
// nn.Module.__call__ checks all but the class, in 0.7 us, ten times as long.
PyObject* plain_state(PyObject* module, PyObject* cls);

// The same of a module that may have forward pre-hooks and forward hooks which are methods of these functions.
PyObject* plain_state(PyObject* module, PyObject* cls, PyObject* pre_hook, PyObject* hook);

}  // namespace torchq
