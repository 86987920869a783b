// What the direct calls share (direct.cpp, direct_norm.cpp). They are called from Python and throw nothing: CPython has
// no way to pass a C++ exception on.
#pragma once

#include <pybind11/pybind11.h>

#include <exception>
#include <new>

namespace torchq {

// Values to read, about 5 us. A shorter call keeps the GIL: to wake a thread that waits for it would take longer.
constexpr int64_t kKeepGilBelowValues = 1 << 16;

// The GIL, given away for as long as this lives, whatever is thrown.
class Unlocked {
 public:
  explicit Unlocked(bool yes) : state_(yes ? PyEval_SaveThread() : nullptr) {}
  ~Unlocked() {
    if (state_) PyEval_RestoreThread(state_);
  }
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;

 private:
  PyThreadState* state_;
};

// y, or NotImplemented for null. If something went wrong, the op will meet it again and say what.
inline PyObject* or_not_implemented(pybind11::object y) {
  if (y) return y.release().ptr();
  PyErr_Clear();
  Py_RETURN_NOTIMPLEMENTED;
}

// What `f` returns; null, with a Python error set, for what it throws.
template <class F>
PyObject* without_exceptions(const F& f) {
  try {
    return f();
  } catch (const std::bad_alloc&) {
    PyErr_SetString(PyExc_MemoryError, "torchq: out of memory for what a call needs beside its output");
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  } catch (...) {
    PyErr_SetString(PyExc_RuntimeError, "torchq: an unknown C++ exception");
  }
  return nullptr;
}

}  // namespace torchq
