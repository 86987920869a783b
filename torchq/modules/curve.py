"""Curve: an activation module that is one operation of torchq, in place of one that is several of torch's."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from torchq.modules.activations import FUNCTIONS, activation_of
from torchq.modules.base import FLOATS
from torchq.modules.pending import ACTIVATIONS, Deferred
from torchq.modules.tracing import Leaf
from torchq.ops import Activation
from torchq.watching import Watch, may_write

_activate = torch.ops.torchq.activate.default


class Curve(Leaf):
    """`ops.activate` as a module. An int8 layer before it computes it in its epilogue, where calibration saw that.

    transformers' NewGELUActivation, say, passes eight times over its tensor. This passes once, or not at all.

    Args:
        kind: the activation.
        inplace: whether it writes over its input, which it then returns, as those of torch do that are made so.

    >>> Curve(Activation.RELU2)(torch.tensor([-1.0, 3.0]))
    tensor([0., 9.])
    """

    def __init__(self, kind: Activation, inplace: bool = False) -> None:
        super().__init__()
        self.kind, self.inplace = int(kind), inplace

    @classmethod
    def of(cls, module: nn.Module) -> nn.Module:
        """One that computes what this activation does; the module itself, if it is none.

        >>> Curve.of(nn.ReLU(inplace=True))
        Curve(relu)
        """
        kind = activation_of(module)
        return module if kind == Activation.NONE else cls(kind).train(module.training)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("kind", "inplace", "training") and name[0] != "_":
            raise AttributeError(
                f"{name!r} can't be set: torchq replaced this activation by one operation that computes {self}, and "
                "has no settings. Set it in the float model before convert(), or convert with QConfig(fuse=False)."
            )
        super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape. By torch's function in torch.func, for forward-mode derivatives and in float64."""
        if self.inplace:
            return self._over(x)
        if isinstance(x, Deferred):  # past the dispatcher, whose way through autograd takes 20 us
            return type(x).__torch_dispatch__(_activate, (type(x),), (x, self.kind))  # type: ignore
        return self._value(x)

    def _value(self, x: Tensor) -> Tensor:
        transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
        if transformed or x.dtype not in FLOATS:  # the op has no formula for these
            return FUNCTIONS[Activation(self.kind)](x)
        return _activate(x, self.kind)  # type: ignore[no-any-return]

    def _over(self, x: Tensor) -> Tensor:
        y = x.overwritten_by(self.kind) if isinstance(x, Deferred) else None
        if y is None:
            differentiated = torch.is_grad_enabled() and x.requires_grad  # by what x was
            y = x.copy_(self._value(x.clone() if differentiated else x))
        return y

    def extra_repr(self) -> str:
        """The activation, for `repr`."""
        return Activation(self.kind).name.lower() + (", inplace=True" if self.inplace else "")


_EXACT = (Activation.RELU, Activation.RELU6)
"""The operations of torch that give the bits of an epilogue."""


def exact_activation_of(module: nn.Module | None) -> Activation:
    """The activation that a module is, if it has the bits of an epilogue; else NONE. A Curve always has them.

    >>> exact_activation_of(nn.ReLU()), exact_activation_of(nn.GELU()), exact_activation_of(Curve(Activation.GELU))
    (<Activation.RELU: 1>, <Activation.NONE: 0>, <Activation.GELU: 2>)
    """
    if isinstance(module, Curve):
        return Activation(module.kind)
    found = activation_of(module)
    return found if found in _EXACT else Activation.NONE


class _Operations(Watch):
    """Lists the operations that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def faster(module: nn.Module) -> nn.Module:
    """A Curve that computes the same; or the module itself, if it is no activation, or one operation that serves.

    That is one that a `Pending` waits for, or one that works in place: it would not be the same.

    >>> faster(nn.GELU()), faster(nn.Hardswish())
    (GELU(approximate='none'), Curve(hardswish))
    """
    if activation_of(module) == Activation.NONE:
        return module
    first, *others = _operations(module)
    stays = not others and (first in ACTIVATIONS or may_write(first))
    return module if stays else Curve.of(module)


def exact(module: nn.Module) -> nn.Module:
    """What computes the same with the bits of an epilogue, in place if the module does; itself, if it has them already.

    >>> exact(nn.ReLU()), exact(nn.GELU()), exact(nn.SiLU(inplace=True))
    (ReLU(), Curve(gelu), Curve(silu, inplace=True))
    """
    kind = activation_of(module)
    if kind == Activation.NONE or exact_activation_of(module) != Activation.NONE:
        return module
    return Curve(kind, any(map(may_write, _operations(module)))).train(module.training)


def _operations(module: nn.Module) -> list[Any]:
    """What an activation runs."""
    x = torch.zeros(1, device="cpu", dtype=torch.float32)
    operations = _Operations()
    with torch.no_grad(), operations:
        type(module).forward(module, x)
    return operations.seen
