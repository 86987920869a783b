#pragma once

#include <pybind11/pybind11.h>

namespace torchq {

// Adds call_linear, call_fused and is_plain to torchq._C; direct.cpp says what they are.
void add_direct_calls(pybind11::module_& module);
// Adds call_layer_norm and call_rms_norm (direct_norm.cpp); after the above.
void add_direct_norm(pybind11::module_& module);
// Adds call_residual, call_sum and call_sums (direct_residual.cpp); after both.
void add_direct_residual(pybind11::module_& module);
// Adds call_attention (direct_attention.cpp); after the first.
void add_direct_attention(pybind11::module_& module);
// Adds call_rotary and call_heads (direct_rotary.cpp); after the first.
void add_direct_rotary(pybind11::module_& module);
// Adds call_gated (direct_gated.cpp); after the first.
void add_direct_gated(pybind11::module_& module);
// Adds call_together (direct_together.cpp); after the first.
void add_direct_together(pybind11::module_& module);
// Adds call_embedding_sum (direct_embedding.cpp); after add_direct_norm.
void add_direct_embedding(pybind11::module_& module);
// Adds call_convolution (direct_conv.cpp); after the first.
void add_direct_conv(pybind11::module_& module);
// Adds call_fine (direct_fine.cpp); after the first.
void add_direct_fine(pybind11::module_& module);
// Adds call_steps (direct_steps.cpp).
void add_direct_steps(pybind11::module_& module);

}  // namespace torchq
