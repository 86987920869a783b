#pragma once

#include <pybind11/pybind11.h>

namespace torchq {

// Adds lines_of and fetch_lines to torchq._C (lines.cpp).
void add_lines(pybind11::module_& module);

}  // namespace torchq
