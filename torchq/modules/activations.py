"""The activations that a QuantizedLinear can compute in its epilogue, as modules and as torch functions."""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from torchq.ops import Activation

FUNCTIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.NONE: lambda y: y,
    Activation.RELU: nn.functional.relu,
    Activation.GELU: nn.functional.gelu,
    Activation.GELU_TANH: partial(nn.functional.gelu, approximate="tanh"),
    Activation.SILU: nn.functional.silu,
}
"""The functions that the simulated path calls instead of the epilogue."""


def activation_of(module: nn.Module | None) -> Activation:
    """The activation that can replace this module in a layer's epilogue; NONE if none can, and for None.

    >>> activation_of(nn.GELU(approximate="tanh"))
    <Activation.GELU_TANH: 3>
    """
    if type(module) is nn.GELU:
        return Activation.GELU if module.approximate == "none" else Activation.GELU_TANH
    if type(module) is nn.SiLU:
        return Activation.SILU
    return Activation.RELU if type(module) is nn.ReLU else Activation.NONE
