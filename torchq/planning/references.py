"""References to modules that a model keeps beside its children: in lists, dicts, objects, bound methods and closures.

Swapping a layer among its parent's children leaves these to the float one. Deepcopy follows most of them, but takes
functions for constants: `self.step = lambda x: self.fc(x)` of a copy would run the layers of the original.
"""

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from torchq.modules.base import Int8Module

Swap = Callable[[nn.Module], nn.Module | None]
"""What takes a module's place, or None where it stays."""

_DEPTH = 6  # of containers within containers, functions within functions
_PLAIN = (Tensor, str, bytes, int, float, complex, type(None), type, types.ModuleType)


def attributes(model: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """What each module keeps beside children, parameters and buffers: the dict it is in, and its key there."""
    for module in model.modules():
        values = vars(module)
        for key in list(values):
            if key not in ("_modules", "_parameters", "_buffers") and not isinstance(values[key], _PLAIN):
                yield values, key


def held(value: Any) -> set[int]:
    """The ids of the modules that `value` refers to, directly or through what it holds."""
    found: set[int] = set()
    replaced(value, lambda module: found.add(id(module)))
    return found


def replaced(value: Any, swap: Swap, *, ours: Callable[[Any], bool] = lambda holder: True) -> Any:
    """`value` with the modules in it swapped: lists, dicts and objects themselves, the rest as new ones.

    `ours` says which lists, dicts and objects may be changed.

    >>> old, new = nn.Linear(2, 2), nn.Linear(2, 2)
    >>> both, call = replaced(([old, 3], lambda layer=old: layer), lambda module: new if module is old else None)
    >>> both[0] is new, call() is new
    (True, True)
    """
    return _Replacer(swap, ours).of(value, _DEPTH)


class _Replacer:
    def __init__(self, swap: Swap, ours: Callable[[Any], bool]) -> None:
        self._swap, self._ours = swap, ours
        self._seen: set[int] = set()

    def of(self, value: Any, depth: int) -> Any:
        if isinstance(value, nn.Module):
            new = self._swap(value)
            return value if new is None else new
        if depth == 0 or isinstance(value, _PLAIN):
            return value
        if isinstance(value, tuple):
            items = [self.of(item, depth - 1) for item in value]
            return _like(value, items) if any(a is not b for a, b in zip(items, value, strict=True)) else value
        if isinstance(value, types.FunctionType):
            return self._function(value, depth)
        if isinstance(value, types.MethodType):
            return self._method(value, depth)
        if isinstance(value, functools.partial):
            function, *rest = (self.of(part, depth - 1) for part in (value.func, value.args, value.keywords))
            same = function is value.func and rest[0] is value.args
            return value if same else type(value)(function, *rest[0], **rest[1])
        if id(value) not in self._seen and self._ours(value):
            self._seen.add(id(value))
            self._within(value, depth)
        return value

    def _within(self, holder: Any, depth: int) -> None:
        values = holder if isinstance(holder, (list, dict)) else getattr(holder, "__dict__", None)
        if not isinstance(values, (list, dict)):
            return
        for key in range(len(values)) if isinstance(values, list) else list(values):
            new = self.of(values[key], depth - 1)
            if new is not values[key]:
                values[key] = new

    def _method(self, value: types.MethodType, depth: int) -> Any:
        """That of the new owner; or, if no class has the function, the function bound to the new owner."""
        owner, name = self.of(value.__self__, depth - 1), getattr(value.__func__, "__name__", "")
        if getattr(type(value.__self__), name, None) is not value.__func__:
            function = self.of(value.__func__, depth - 1)
            same = owner is value.__self__ and function is value.__func__
            return value if same else types.MethodType(function, owner)
        method = getattr(owner, name, value)
        int8 = isinstance(owner, Int8Module) and getattr(method, "__func__", None) is not value.__func__
        return method if owner is not value.__self__ or int8 else value

    def _function(self, function: types.FunctionType, depth: int) -> types.FunctionType:
        """A function of its own where it closes over a module that is swapped, or has one as a default."""
        if id(function) in self._seen:
            return function
        self._seen.add(id(function))
        cells = tuple(self._cell(cell, depth) for cell in function.__closure__ or ())
        defaults = self.of(function.__defaults__, depth - 1)
        same = all(a is b for a, b in zip(cells, function.__closure__ or (), strict=True))
        if same and defaults is function.__defaults__:
            return function
        new = types.FunctionType(function.__code__, function.__globals__, function.__name__, defaults, cells)
        new.__kwdefaults__, new.__dict__ = function.__kwdefaults__, dict(function.__dict__)
        new.__qualname__, new.__module__, new.__doc__ = function.__qualname__, function.__module__, function.__doc__
        return new

    def _cell(self, cell: types.CellType, depth: int) -> types.CellType:
        try:
            content = cell.cell_contents
        except ValueError:  # empty
            return cell
        new = self.of(content, depth - 1)
        return cell if new is content else types.CellType(new)


def _like(value: tuple[Any, ...], items: list[Any]) -> tuple[Any, ...]:
    return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
