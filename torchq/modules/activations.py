"""Activations that a QuantizedLinear computes in its epilogue: their modules, and torch's functions."""

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
"""What the simulated path computes in place of the epilogue."""


def activation_of(module: nn.Module | None) -> Activation:
    """What a layer can compute in its epilogue in place of this module; NONE if it can't, or for no module.

    >>> activation_of(nn.GELU(approximate="tanh"))
    <Activation.GELU_TANH: 3>
    """
    if type(module) is nn.GELU:
        return Activation.GELU if module.approximate == "none" else Activation.GELU_TANH
    if type(module) is nn.SiLU:
        return Activation.SILU
    return Activation.RELU if type(module) is nn.ReLU else Activation.NONE
