"""Functions that turn queries and keys by the angles of their positions, known by their code and by what they compute.

    q · cos + (-q₂, q₁) · sin        q = (q₁, q₂) the halves of a head's columns; and k likewise

Each family of transformers has a copy of this function. The code is read, since code that somebody could notice must
not run, and then run on numbers: it must give the bits of these operations.
"""

import dis
import functools
import itertools
import types
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Generator, Tensor, nn

from torchq import _C
from torchq.modules.classes import functions_of
from torchq.modules.facts import Facts, look_up
from torchq.modules.plain_code import odd_step

_WORDS = {"cat", "chunk", "shape", "unsqueeze"}
"""What such code looks up: nothing that depends on how large the numbers are."""

_CHOICES = ("COMPARE_OP", "CONTAINS_OP", "IS_OP", "POP_JUMP", "JUMP_IF", "FOR_ITER")
"""How instructions begin by which code does something else for some shapes or numbers, which none has shown then."""


class RotaryCode(NamedTuple):
    """What such a function computes.

    Args:
        function: the function, called as `(q, k, cos, sin)`, of q and k (batch, heads, rows, columns).
        facts: the codes of all functions that it calls, which may be replaced.
    """

    function: types.FunctionType
    facts: Facts

    def of(self, q: Tensor, k: Tensor, cos: Any, sin: Any) -> tuple[Tensor, Tensor]:
        """What it makes of these, which are (batch, rows, heads, columns) here: (batch, heads, rows, columns)."""
        one, two = (_C.call_rotary(x, cos, sin) for x in (q, k))
        if one is NotImplemented or two is NotImplemented:
            function: Any = self.function  # for mypy, a function in a tuple is a method
            return function(q.transpose(1, 2), k.transpose(1, 2), cos, sin)  # type: ignore[no-any-return]
        return one.transpose(1, 2), two.transpose(1, 2)


def rotary_of(function: Any) -> RotaryCode | None:
    """The code of a function, if it is such a one.

    >>> def rotate(x):
    ...     half = x.shape[-1] // 2
    ...     return torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    >>> def turned(q, k, cos, sin):
    ...     cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    ...     return q * cos + rotate(q) * sin, k * cos + rotate(k) * sin
    >>> scope = {"torch": torch, "rotate": rotate}
    >>> turned = types.FunctionType(turned.__code__, scope)
    >>> rotary_of(turned).function is turned, rotary_of(rotate)
    (True, None)
    """
    return _read(function, function.__code__) if type(function) is types.FunctionType else None


@functools.lru_cache(maxsize=256)
def _read(function: types.FunctionType, code: types.CodeType) -> RotaryCode | None:
    if code.co_argcount < 4 or odd_step(function, cast(nn.Module, _Nothing()), _WORDS) is not None:
        return None
    steps = (step.opname for each in _with_called(function) for step in dis.get_instructions(each))
    if any(step.startswith(_CHOICES) for step in steps) or not _turns(function):
        return None
    facts = Facts()
    for each in _with_called(function):
        for name in ("__code__", "__defaults__", "__kwdefaults__"):
            facts.add(getattr, each, name, getattr(each, name))
        for scope, name, value in functions_of(each):
            facts.add(look_up, scope, name, value)
        for name in each.__code__.co_names:
            if name in each.__globals__:
                facts.add(look_up, each.__globals__, name, each.__globals__[name])
    return RotaryCode(function, facts)


class _Nothing:
    """Stands for the module that a method has: a function has none."""


def _with_called(function: types.FunctionType) -> Iterator[types.FunctionType]:
    """The function, and those that it names. (None names itself: its code would be odd.)"""
    yield function
    for name in function.__code__.co_names:
        value = function.__globals__.get(name)
        if isinstance(value, types.FunctionType) and (value.__module__ or "").split(".")[0] != "torch":
            yield from _with_called(value)


_SHAPES = ((1, 1, 4, 2, 8), (2, 5, 3, 1, 64), (2, 3, 2, 2, 6), (1, 7, 6, 2, 96))
"""Batch, rows, heads of q and of k, columns."""

_LARGEST = (1e-4, 1.0, 3e4)


def _turns(function: types.FunctionType) -> bool:
    """Whether it gives the bits of the formula, for numbers of all sizes."""
    generator = Generator("cpu").manual_seed(0)
    try:
        for shape, largest, dtype in itertools.product(_SHAPES, _LARGEST, (torch.float32, torch.bfloat16)):
            batch, rows, heads, of_keys, columns = shape

            def drawn(*sizes: int, largest: float = largest, dtype: torch.dtype = dtype) -> Tensor:
                x = torch.rand(sizes, generator=generator, device="cpu", dtype=torch.float32) * 2 - 1
                return (x * largest).to(dtype)

            q, k = (drawn(batch, rows, count, columns).transpose(1, 2) for count in (heads, of_keys))
            cos, sin = drawn(1, rows, columns), drawn(batch, rows, columns)
            if not _gives(function, (q, k, cos, sin)):
                return False
    except Exception:  # a function of something else
        return False
    return True


def _gives(function: types.FunctionType, given: tuple[Tensor, ...]) -> bool:
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        copies = [each.clone() for each in given]
        found = function(*copies)
        if not all(map(torch.equal, copies, given)):
            return False
        q, k, cos, sin = given
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        for x, y in zip((q, k), found, strict=True):
            one, two = x.chunk(2, dim=-1)
            expected = x * cos + torch.cat((-two, one), dim=-1) * sin
            if type(y) is not Tensor or y.dtype != expected.dtype or not torch.equal(y, expected):
                return False
    return type(found) is tuple
