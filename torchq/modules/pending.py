"""Pending: the output of an int8 layer that waits for its reader, so that an activation can be computed with it.

In `self.act(self.dense(x))` nothing tells the layer that an activation follows. Where calibration has seen it, the
layer quantizes x and returns a Pending: a tensor without memory, which has the codes. If the next operation is the
activation that the plan names, one fused product gives its result. Whatever else reads the Pending gets the layer's own
output: it is then computed, once. So no control flow gives a wrong value, and nothing that happens to x or to the layer
meanwhile changes it. A fold that is not met costs a few microseconds.

A Pending lives no longer than the call of one module, the `Scope`: the innermost that holds both the layer and the
activation. When that call ends, what is left of it gets its value, and what the module returns is an ordinary tensor. A
layer called outside of it, or with hooks, gradients, modes, tracing or little work, returns its output at once.
"""

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.utils._pytree import tree_map_only

from torchq import _C
from torchq.modules import writes
from torchq.modules.made import MadeTensor
from torchq.modules.writes import run_on_values
from torchq.ops import Activation

MIN_VALUES = 1 << 15
"""A layer defers if it gives at least so many values: an activation of fewer costs no more than a Pending."""

_aten = torch.ops.aten


class Deferred(MadeTensor):
    """A tensor that is made when it is read, or when the call of the module that it belongs to ends."""

    def end(self) -> None:
        """That call ends."""
        self.make()

    def overwritten_by(self, activation: int) -> Tensor | None:
        """Itself, with this activation of its values in their place; None if it takes no such part."""
        return None


class Pending(Deferred):
    """The output `layer(x)`, computed when it is read; or `act(layer(x))` at once, if that is what it is read for."""

    @staticmethod
    def __new__(cls, layer: Any, x: Tensor, begun: Any) -> Any:
        """Of a QuantizedLinear, and what `_C.begin_linear` returned for x."""
        shape = (*x.shape[:-1], layer.out_features)
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=x.dtype, device=x.device, storage_size=0)

    def __init__(self, layer: Any, x: Tensor, begun: Any) -> None:
        self._waits_for: int = layer.fold.activation
        self._begun: Any = begun
        self._value: Tensor | None = None

    def make(self) -> Tensor:
        """The layer's output. Every call gives the same tensor, so a write into it is seen by all later readers."""
        if self._value is None:
            self._value = _C.end_linear(self._begun, Activation.NONE)
            self._begun = None
        return self._value

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Runs the activation fused, if nobody has read the output before; any other operation on the values."""
        first = args[0] if args else None
        if isinstance(first, Pending) and first._value is None:
            activation = _activation_of(func, args, kwargs or {})
            if activation == first._waits_for != Activation.NONE:
                return _C.end_linear(first._begun, activation)
        args, kwargs = tree_map_only(Pending, lambda pending: pending.make(), (args, kwargs or {}))
        return run_on_values(func, args, kwargs)


ACTIVATIONS = {
    _aten.relu.default: Activation.RELU,
    _aten.gelu.default: Activation.GELU,
    _aten.silu.default: Activation.SILU,
}
"""The operations that run fused. GELU has two forms, which its argument tells."""


def _activation_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The activation that an operation computes; NONE for any other operation."""
    if func is torch.ops.torchq.activate.default:
        return int(args[1])
    tanh = kwargs.get("approximate") == "tanh"
    return Activation.GELU_TANH if tanh else ACTIVATIONS.get(func, Activation.NONE)


class Scope:
    """The calls of one module, during which its layers may defer. Its methods are that module's hooks.

    It has no state of its own: copies and pickles of a model share one between its module and its layers.
    """

    def attach(self, module: nn.Module) -> None:
        """Installs the hooks."""
        module.register_forward_pre_hook(self.enter)
        module.register_forward_hook(self.leave, always_call=True)

    def enter(self, module: nn.Module, args: Any) -> None:
        """A call of the module begins in this thread."""
        if not is_dynamo_compiling():
            _calls.entered.append((self, []))

    def leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        """It ends, by an error too: what is still pending gets its value, and the output holds values only."""
        if is_dynamo_compiling():
            return None
        scope, deferred = _calls.entered.pop()
        while scope is not self:  # a call inside that never said that it ended
            scope, deferred = _calls.entered.pop()
        alive = [pending for pending in (reference() for reference in deferred) if pending is not None]
        for pending in alive:
            pending.end()
        writes.rest() if _calls.entered else writes.stop()
        if not alive or type(output) is Tensor:
            return None
        own = set(map(id, alive))  # others end with the calls that they belong to
        if isinstance(output, Tensor):
            return _made(output, own)
        return tree_map_only(Deferred, lambda pending: _made(pending, own), output)

    @contextmanager
    def entered(self, module: nn.Module) -> Iterator[None]:
        """Inside, it is as in a call of the module, which gives values only."""
        self.enter(module, ())
        try:
            yield
        finally:
            self.leave(module, (), None)

    def deferred(self) -> list[weakref.ref[Any]] | None:
        """What is deferred in the innermost call of the module that this thread is inside of; None outside."""
        found: list[weakref.ref[Any]] | None
        for scope, found in reversed(_calls.entered):
            if scope is self:
                return found
        return None

    def defer(self, layer: Any, x: Any) -> Tensor | None:
        """The Pending of a plain call with enough work, if this thread is inside the module's call. Else None."""
        if type(x) is not Tensor or x.numel() * layer.out_features < MIN_VALUES * layer.in_features:
            return None
        deferred = self.deferred()
        if deferred is None or (begun := _C.begin_linear(layer, type(layer), x)) is NotImplemented:
            return None
        pending: Tensor = Pending(layer, x, begun)
        deferred.append(weakref.ref(pending))
        return pending


def within_scopes(module: nn.Module, compute: Callable[[], Any]) -> Any:
    """What this gives as a call of a module whose hooks are those of scopes."""
    y = None
    for enter in module._forward_pre_hooks.values():
        enter(module, ())
    try:
        y = compute()
    finally:
        for leave in module._forward_hooks.values():
            values = leave(module, (), y)
            y = y if values is None else values
    return y


def _made(y: Any, own: set[int]) -> Any:
    """The values of what is one of `own`, and of what that gives in its turn."""
    while isinstance(y, Deferred) and id(y) in own:
        y = y.make()
    return y


class _Calls(threading.local):
    """The calls of scopes that this thread is in, the innermost last, and what was deferred in each."""

    def __init__(self) -> None:
        self.entered: list[tuple[Scope, list[weakref.ref[Any]]]] = []


_calls = _Calls()
