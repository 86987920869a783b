"""What a QuantizedLinear may be fused with, and what that can be among the modules that follow it."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import nn

from torchq.modules.activations import activation_of
from torchq.modules.classes import know
from torchq.modules.curve import Curve
from torchq.numerics.qparams import QParams
from torchq.ops import Activation

IDLE = (nn.Dropout, nn.Identity)
"""They return their input in eval mode."""

for _kind in IDLE:
    know(_kind)


class Fold(NamedTuple):
    """A permission that the plan gives a layer. It says what may be fused; whoever runs the layer decides each time.

    Args:
        activation: the `Activation` that follows, and may be computed in the layer's epilogue.
        codes: whether the output may reach a static layer as u8 codes, in that layer's `input_qparams`.
        adds: whether another tensor is added to the output before the activation (of a convolution).
        sum_qparams: of the u8 codes that this sum is handed over as; None for floats.

    >>> Fold() == Fold(Activation.NONE, codes=False)
    True
    """

    activation: int = Activation.NONE
    codes: bool = False
    adds: bool = False
    sum_qparams: QParams | None = None


NOTHING = Fold()
"""Nothing may be fused."""


class Followers(NamedTuple):
    """What follows a layer in a row of modules, by index: an activation, and the layer that reads the result.

    Args:
        kind: which activation it is; NONE if there is none.
        activation: its index.
        reader: the index of the next layer, if nothing lies between but the activation and modules without effect.
    """

    kind: Activation
    activation: int | None
    reader: int | None


def followers(modules: Sequence[nn.Module | None], is_layer: Callable[[nn.Module], bool]) -> Followers:
    """What follows a layer, given the modules behind it in order; None stands for one that must run by itself.

    >>> followers([nn.ReLU(), nn.Dropout(), nn.Linear(2, 2)], lambda module: isinstance(module, nn.Linear))
    Followers(kind=<Activation.RELU: 1>, activation=0, reader=2)
    """
    kind, activation = Activation.NONE, None
    for i, module in enumerate(modules):
        if module is None:
            break
        if is_layer(module):
            return Followers(kind, activation, i)
        if type(module) in IDLE:
            continue
        found = Activation(module.kind) if isinstance(module, Curve) else activation_of(module)
        if kind == Activation.NONE != found:
            kind, activation = found, i
        elif not kind == found == Activation.RELU:  # relu(relu(x)) = relu(x)
            break
    return Followers(kind, activation, None)
