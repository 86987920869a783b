"""WrittenAttention: finds modules that compute attention operation by operation: `softmax(q @ k.mT / 8 + mask) @ v`.

Nobody can put another function in the place of such code. The plan names the modules, so that the report can say what
would let torchq compute their attention.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from torchq.watching import name_of, storage_key

_PRODUCTS = (torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default)
_KEEP = {
    *(
        "aten::div",
        "aten::mul",
        "aten::add",
        "aten::sub",
        "aten::masked_fill",
        "aten::where",
        "aten::clone",
        "aten::cat",
    ),
    *("aten::_to_copy", "aten::tanh", "aten::maximum", "aten::constant_pad_nd"),
}
"""What code does to scores or weights between the products, beside taking views of them."""

_SOFTMAX = torch.ops.aten._softmax.default  # torch's own attention takes another one: _safe_softmax


class _Value(NamedTuple):
    """What came of a product of two inputs, and its storage. Of scores, weights are the softmax."""

    weights: bool
    storage: StorageWeakRef


class WrittenAttention:
    """Watches runs of a model: `found` has the modules whose code multiplies by the softmax of a product of inputs."""

    def __init__(self, model: nn.Module) -> None:
        self._names = {id(module): name for name, module in model.named_modules()}
        self._parameters = {storage_key(parameter) for parameter in model.parameters()} - {None}
        self._values: dict[int, _Value] = {}
        self.found: dict[str, None] = {}  # in the order of the runs

    @contextmanager
    def watching(self) -> Iterator[bool]:
        """Says that it is to be told of operations. It needs no hooks."""
        yield True

    def end_batch(self) -> None:
        """Forgets the tensors."""
        self._values.clear()

    def sees(self, func: Any, args: Any, kwargs: Any, keys: list[int | None]) -> Callable[[Any], None] | None:
        """Follows scores and weights from operation to operation."""
        values = [value for key in keys if (value := self._value(key)) is not None]
        if func in _PRODUCTS:
            if any(value.weights for value in values):
                self._note()
            inputs = not self._parameters.intersection(keys[-2:])
            return self._as(weights=False) if inputs else None
        if not values or not (func is _SOFTMAX or name_of(func) in _KEEP):  # what is written in place stays what it is
            return None
        return self._as(weights=values[0].weights or func is _SOFTMAX)

    def _as(self, *, weights: bool) -> Callable[[Any], None]:
        def register(y: Any) -> None:
            key = storage_key(y)
            if key is not None and isinstance(y, Tensor):
                self._values[key] = _Value(weights, StorageWeakRef(y.untyped_storage()))

        return register

    def _value(self, key: int | None) -> _Value | None:
        value = None if key is None else self._values.get(key)
        return None if value is None or value.storage.expired() else value

    def _note(self) -> None:
        """Notes the module whose code runs: the innermost that is the first argument of a function that runs."""
        frame = sys._getframe(1)
        while frame is not None:
            code = frame.f_code
            owner = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
            if isinstance(owner, nn.Module) and id(owner) in self._names:
                if not type(owner).__module__.startswith("torch."):
                    self.found[self._names[id(owner)]] = None
                return
            frame = frame.f_back  # type: ignore[assignment]
