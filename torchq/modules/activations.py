"""The activations that a QuantizedLinear can compute in its epilogue: functions, and their slopes."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from torchq.ops import Activation

FUNCTIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.NONE: lambda y: y,
    Activation.RELU: nn.functional.relu,
    Activation.GELU: nn.functional.gelu,
    Activation.GELU_TANH: partial(nn.functional.gelu, approximate="tanh"),
    Activation.SILU: nn.functional.silu,
    Activation.QUICK_GELU: lambda y: y * torch.sigmoid(1.702 * y),
    Activation.HARDSWISH: nn.functional.hardswish,
    Activation.RELU2: lambda y: nn.functional.relu(y).square(),
    Activation.TANH: torch.tanh,
    Activation.SIGMOID: torch.sigmoid,
    Activation.RELU6: nn.functional.relu6,
}
"""The functions that the simulated path calls instead of the epilogue."""


def times_slope(v: Tensor, z: Tensor, activation: int) -> Tensor:
    """`v ∘ act'(z)`, made of operations that have derivatives themselves. Where act has a kink, what torch takes there.

    >>> times_slope(torch.ones(3), torch.tensor([-1.0, 0.5, 7.0]), Activation.RELU6)
    tensor([0., 1., 0.])
    """
    if activation == Activation.NONE:
        return v
    if activation == Activation.RELU:
        return torch.where(z > 0, v, 0.0)
    if activation == Activation.RELU6:
        return torch.where((z > 0) & (z < 6), v, 0.0)
    if activation in (Activation.GELU, Activation.GELU_TANH):
        approximate = "none" if activation == Activation.GELU else "tanh"
        return torch.ops.aten.gelu_backward(v, z, approximate=approximate)  # type: ignore[no-any-return]
    return v * _SLOPES[activation](z)


def _logistic_slope(rate: float, z: Tensor) -> Tensor:
    """Of `z · sigmoid(rate · z)`. Torch's own silu_backward has no derivative."""
    s = (rate * z).sigmoid()
    return s * (1 + rate * z * (1 - s))


_SLOPES: dict[int, Callable[[Tensor], Tensor]] = {
    Activation.SILU: partial(_logistic_slope, 1.0),
    Activation.QUICK_GELU: partial(_logistic_slope, 1.702),
    Activation.HARDSWISH: lambda z: torch.where(z < 3, (z / 3 + 0.5) * (z > -3), 1.0),
    Activation.RELU2: lambda z: 2 * z.relu(),
    Activation.TANH: lambda z: 1 - z.tanh().square(),
    Activation.SIGMOID: lambda z: z.sigmoid() * (1 - z.sigmoid()),
}

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
