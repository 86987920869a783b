#pragma once

#include <pybind11/pybind11.h>

namespace torchq {

// Adds linear_dynamic and linear_static to torchq._C; direct.cpp says what they are.
void add_direct_calls(pybind11::module_& module);

}  // namespace torchq
