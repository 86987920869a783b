"""Code of other people that calls torch's `scaled_dot_product_attention`, and the same code with another in its place.

A function finds what it calls in its globals: `F`, `torch`, or the function's own name. So a copy of it with other
globals calls something else, and neither torch nor the user's module is changed. These globals are a dict that looks up
everything in the real ones at the moment it is asked, and gives a stand-in for the names that lead to the attention.
"""

import dis
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

SDPA: Any = torch._C._nn.scaled_dot_product_attention
"""What `torch.nn.functional.scaled_dot_product_attention` is, unless somebody has put another function there."""

_OPAQUE = {"globals", "eval", "exec"}
"""Functions that would show the code its globals."""

_BETWEEN = ("CACHE", "EXTENDED_ARG", "PUSH_NULL", "NOP")
_OF_MODULE = ("__name__", "__package__", "__spec__", "__file__", "__builtins__")


def names_of_sdpa(function: types.FunctionType) -> frozenset[str]:
    """The globals by which a function calls torch's attention, itself or by another function that it calls.

    None of one that writes globals, or reads them otherwise than by name: a copy of it would not do the same.

    >>> from torch.nn import functional as F
    >>> def attend(q, k, v):
    ...     return F.scaled_dot_product_attention(q, k, v)
    >>> names_of_sdpa(types.FunctionType(attend.__code__, {"F": F}))
    frozenset({'F'})
    """
    return _names(function, {})


def _names(function: types.FunctionType, seen: dict[types.FunctionType, frozenset[str]]) -> frozenset[str]:
    """The same; `seen` has the functions that were read, and those that are being read."""
    if function not in seen:
        seen[function] = frozenset()
        if (function.__module__ or "").split(".")[0] not in ("torch", "torchq"):
            seen[function] = _read(function, seen)
    return seen[function]


def _read(function: types.FunctionType, seen: dict[types.FunctionType, frozenset[str]]) -> frozenset[str]:
    found: set[str] = set()
    for part in _parts(function.__code__):
        steps = list(dis.get_instructions(part))
        if any(step.opname in ("STORE_GLOBAL", "DELETE_GLOBAL") for step in steps) or _OPAQUE & set(part.co_names):
            return frozenset()
        root, value = "", None
        for step in steps:
            if step.opname == "LOAD_GLOBAL":
                root, value = step.argval, function.__globals__.get(step.argval)
            elif step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                value = vars(value).get(step.argval) if _is_of_torch(value) else None
            elif step.opname not in _BETWEEN:
                value = None
            if value is SDPA or (isinstance(value, types.FunctionType) and _names(value, seen)):
                found.add(root)
    return frozenset(found)


def _parts(code: types.CodeType) -> Iterator[types.CodeType]:
    """The code, and that of functions within."""
    yield code
    for each in code.co_consts:
        if isinstance(each, types.CodeType):
            yield from _parts(each)


def _is_of_torch(value: Any) -> bool:
    return isinstance(value, types.ModuleType) and value.__name__.split(".")[0] == "torch"


def with_other_sdpa(function: types.FunctionType, other: Callable[..., Any]) -> types.FunctionType:
    """The function, calling `other` where it calls torch's attention; itself where it doesn't.

    >>> from torch.nn import functional as F
    >>> def attend(q):
    ...     return F.relu(F.scaled_dot_product_attention(q, q, q))
    >>> attend = types.FunctionType(attend.__code__, {"F": F})
    >>> with_other_sdpa(attend, lambda q, k, v: q - 1)(torch.tensor([0.0, 3.0]))
    tensor([0., 2.])
    """
    made = _copied(function, function.__code__, other)
    if made is not function:
        for name in ("__defaults__", "__kwdefaults__"):  # which may be set in a function
            if getattr(made, name) is not getattr(function, name):
                setattr(made, name, getattr(function, name))
    return made


@functools.lru_cache(maxsize=1024)
def _copied(function: types.FunctionType, code: types.CodeType, other: Callable[..., Any]) -> types.FunctionType:
    """A copy, of this code. The code is a copy, too: what CPython remembers in it is about globals of one kind."""
    names = names_of_sdpa(function)
    if not names:
        return function
    scope = _Scope(function.__globals__, names, other)
    made = types.FunctionType(code.replace(), scope, function.__name__, None, function.__closure__)
    made.__qualname__, made.__module__, made.__doc__ = function.__qualname__, function.__module__, function.__doc__
    made.__dict__ = function.__dict__
    return made


class _Scope(dict[str, Any]):
    """The globals of a function, with stand-ins for these names. It holds only what imports and warnings look up."""

    def __init__(self, real: dict[str, Any], names: frozenset[str], other: Callable[..., Any]) -> None:
        super().__init__({name: real[name] for name in _OF_MODULE if name in real})
        self._real, self._names, self._other = real, names, other

    def __missing__(self, name: str) -> Any:
        value = self._real[name]
        return _stand_in(value, self._other) if name in self._names else value


def _stand_in(value: Any, other: Callable[..., Any]) -> Any:
    """What gives `other` where this gives torch's attention."""
    if value is SDPA:
        return other
    if isinstance(value, types.FunctionType):
        return with_other_sdpa(value, other)
    return _library(value, other) if _is_of_torch(value) else value


@functools.lru_cache(maxsize=1024)
def _library(real: types.ModuleType, other: Callable[..., Any]) -> types.ModuleType:
    """torch, or a module of it, whose attributes are looked up as they are now."""
    made = types.ModuleType(real.__name__, real.__doc__)
    vars(made)["__getattr__"] = lambda name: _stand_in(getattr(real, name), other)
    return made
