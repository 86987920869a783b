// Whether classes of modules are as they were when it was proven what their modules compute: see
// torchq/modules/classes.py.

#pragma once

#include <pybind11/pybind11.h>

namespace torchq {

// Whether a class has what it had, and its forward() the code that it had. It may run Python, once for each state of
// the class.
bool is_as_known(PyTypeObject* cls);

// The same, and whether torch's functions that this code calls are those that it called.
bool computes_as_known(PyTypeObject* cls);

// Adds computes_as_known and set_comparison to torchq._C.
void add_classes(pybind11::module_& module);

}  // namespace torchq
