"""Gated feed forwards, `down(act(gate(x)) * up(x))`: the activation is computed with its layer, past nn.Module.

Llama, Mistral, Qwen, Gemma and their kin have one in each block. That it is the whole forward is proven by its code: it
may load its argument, call children and multiply, nothing else; so it is run once on symbols. Children are called as
they are, in the order of the code. Wherever anybody could see a difference the user's code runs (`straight_forms.py`).
"""

import functools
import types
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from torchq import _C
from torchq.modules.folding import followers
from torchq.modules.int8_sequential import settings_of
from torchq.modules.parts import Part
from torchq.modules.plain_code import forward_of
from torchq.modules.quantized_linear import QuantizedLinear
from torchq.modules.straight import Parent, UnknownError, is_harmless, is_usual
from torchq.modules.straight_forms import Form, become, may_become
from torchq.ops import Activation


class GatedCode(NamedTuple):
    """What the code of a gated feed forward calls.

    Args:
        forward: the function.
        code: its code, which may be replaced.
        gate: the child whose output the activation gets.
        act: the activation.
        up: the child whose output is multiplied.
        down: the child called on the product.
        gate_first: whether the gate is called before `up`.
    """

    forward: types.FunctionType
    code: types.CodeType
    gate: str
    act: str
    up: str
    down: str
    gate_first: bool

    def attributes(self) -> tuple[str, ...]:
        """The names that it looks up in the module."""
        return self.gate, self.act, self.up, self.down


def gated_of(kind: type[nn.Module]) -> GatedCode | None:
    """What modules of a class compute, if that is a gated feed forward.

    >>> class MLP(nn.Module):
    ...     def forward(self, x):
    ...         return self.down(self.act(self.gate(x)) * self.up(x))
    >>> gated_of(MLP)[2:], gated_of(nn.Bilinear)
    (('gate', 'act', 'up', 'down', True), None)
    """
    known: Any = kind  # for mypy, a class of torch has no hash
    forward = forward_of(kind)
    return _read(known, forward, forward.__code__) if isinstance(forward, types.FunctionType) else None


class Gated(Form):
    """`down(act(gate(x)) * up(x))`, with the activation in the epilogue of the gate."""

    line: GatedCode  # type: ignore[assignment]
    reads = staticmethod(gated_of)  # type: ignore[assignment]
    _known: tuple[nn.Module, dict[str, Any], int]  # the activation, its settings, and which one it is

    @staticmethod
    def adopt(module: nn.Module) -> None:
        """Makes a module a Gated, if this is its code, with an int8 gate that may compute the activation."""
        code = gated_of(type(module))
        if code is None or not may_become(Gated, module):
            return
        gate, act, up, down = map(module._modules.get, code.attributes())
        if type(gate) is not QuantizedLinear or type(up) is not QuantizedLinear or act is None or down is None:
            return
        activation = followers([act], lambda _: False).kind
        if activation == gate.fold.activation != Activation.NONE:
            become(Gated, module, code)
            module.__dict__["_known"] = (act, settings_of(act), activation)

    def computes(self, layer: nn.Module) -> bool:
        """Whether the activation behind this child is computed with it."""
        return self._modules.get(self.line.gate) is layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """forward(), skipping nn.Module's part of the calls where it has nothing to do."""
        if not is_dynamo_compiling() and len(args) == 1 and not kwargs and type(args[0]) is Tensor:
            y = self._run(args[0])
            if y is not NotImplemented:
                return y
        return super().__call__(*args, **kwargs)

    def _run(self, x: Tensor) -> Any:
        line, state = self.line, self.__dict__
        names = line.attributes()
        gate, act, up, down = map(state["_modules"].get, names)
        known, settings, _ = state["_known"]
        if act is not known or down is None or not state.keys().isdisjoint(names) or torch._C._get_tracing_state():
            return NotImplemented
        if not _C.is_plain(self, type(self)) or not _C.is_plain(up, QuantizedLinear):
            return NotImplemented
        if not _C.is_plain_row(gate, QuantizedLinear, (act,), (settings,)):
            return NotImplemented
        return down(self.product(x))

    def product(self, x: Tensor) -> Any:
        """`act(gate(x)) * up(x)`, in a call in which these are as they are known."""
        line, state = self.line, self.__dict__
        gate, act, up, _ = map(state["_modules"].get, line.attributes())
        _, settings, activation = state["_known"]
        y = _C.call_gated(gate, up, QuantizedLinear, x, activation, (act,), (settings,))
        if y is not NotImplemented:
            return y
        factor = None if line.gate_first else up(x)
        y = _C.call_fused(gate, QuantizedLinear, x, None, activation, (act,), (settings,), None, None)
        if y is NotImplemented:
            y = act(gate(x))
        return y * (up(x) if factor is None else factor)

    def parts(self) -> tuple[Part, ...]:
        """What it is made of. Nothing if it may not be computed in fewer calls."""
        act, settings, _ = self.__dict__["_known"]
        children: dict[str, Any] = {name: self._modules.get(name) for name in self.line.attributes()}
        gate, known, up, down = children.values()
        if known is not act or any(type(each) is not QuantizedLinear for each in (gate, up, down)):
            return ()
        leaves = (Part(each, type(each), {}, False, settings if each is act else {}) for each in children.values())
        return Part(self, type(self), children, False, {}), *leaves


# ---- The proof ------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def _read(kind: type[nn.Module], forward: types.FunctionType, code: types.CodeType) -> GatedCode | None:
    if not is_usual(kind) or code.co_argcount != 2 or not is_harmless(forward):
        return None
    seen: list[str] = []
    try:
        y = forward(Parent(kind, seen, _Value), _Value())
    except (UnknownError, AttributeError, TypeError, UnboundLocalError):
        return None
    if type(y) is not _Value or y.factors_ is None or len(y.calls_) != 1:
        return None
    gate, up = sorted(y.factors_, key=lambda factor: -len(factor.calls_))
    one, two = gate.calls_, up.calls_
    if gate.factors_ is not None or up.factors_ is not None or (len(one), len(two)) != (2, 1):
        return None
    names = (*one, *two, *y.calls_)
    gate_first = {names: True, (*two, *one, *y.calls_): False}.get(tuple(seen))
    gate_name, act, up_name, down = names
    return None if gate_first is None else GatedCode(forward, code, gate_name, act, up_name, down, gate_first)


class _Value:
    """The argument, or the product of two values; and the children called on it."""

    def __init__(self, factors: "tuple[_Value, _Value] | None" = None, calls: tuple[str, ...] = ()) -> None:
        self.factors_, self.calls_ = factors, calls

    def after_(self, child: str) -> "_Value":
        """What a child makes of it."""
        return _Value(self.factors_, (*self.calls_, child))

    def __mul__(self, other: Any) -> "_Value":
        if type(other) is not _Value:
            raise UnknownError
        return _Value((self, other))

    def __bool__(self) -> bool:
        raise UnknownError

    __eq__ = __bool__  # type: ignore[assignment]
    __hash__ = None  # type: ignore[assignment]
