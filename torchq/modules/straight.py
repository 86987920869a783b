"""Modules of the user whose code is a straight line: children called one after the other, and perhaps one sum.

`self.norm(self.dropout(self.dense(x)) + residual)` is one. Nothing else happens in such a module, so it may be computed
as one product (`straight_forms.py`). That is proven by reading the code, which may only name its arguments, call
children and add. Then it runs once, on symbols, and they say what it computes.
"""

import abc
import dis
import functools
import inspect
import types
from collections.abc import Collection
from typing import Any, NamedTuple, cast

from torch import nn

from torchq.modules.plain_code import forward_of


class Line(NamedTuple):
    """What the code of a module computes.

    Args:
        forward: the function.
        code: its code, which may be replaced, as IPython's autoreload does.
        source: the argument that it begins with, by its index.
        calls: the children called one after the other.
        last: the child called on the sum of the result and the other argument; None where there is no sum.
    """

    forward: types.FunctionType
    code: types.CodeType
    source: int
    calls: tuple[str, ...]
    last: str | None

    def attributes(self) -> tuple[str, ...]:
        """The names that it looks up in the module."""
        return self.calls if self.last is None else (*self.calls, self.last)


def line_of(kind: type[nn.Module]) -> Line | None:
    """What modules of a class compute, if that is a straight line of children.

    >>> class Output(nn.Module):
    ...     def forward(self, x, residual):
    ...         return self.norm(self.dense(x) + residual)
    >>> line_of(Output)[2:], line_of(nn.TransformerEncoderLayer)
    ((0, ('dense',), 'norm'), None)
    """
    y, forward = _computed(kind)
    if y is None:
        return None
    code = forward.__code__
    if isinstance(y.of_, int):
        return Line(forward, code, y.of_, y.calls_, None) if y.calls_ and code.co_argcount == 2 else None
    one, other = y.of_ if y.of_[0].calls_ else reversed(y.of_)
    apart = one.calls_ and not other.calls_ and {one.of_, other.of_} == {0, 1}
    if not apart or len(y.calls_) != 1 or y.in_place_:
        return None
    return Line(forward, code, cast(int, one.of_), one.calls_, y.calls_[0])


def _computed(kind: type[nn.Module]) -> Any:
    """The symbol that a call gives, and the function; None and None if it is no straight line."""
    known: Any = kind  # for mypy, a class of torch has no hash
    forward = forward_of(kind)
    if not isinstance(forward, types.FunctionType):
        return None, None
    return _run_on_symbols(known, forward, forward.__code__), forward


_USUAL = (
    *("__call__", "__getattr__", "__getattribute__", "__class__", "__new__", "__init_subclass__"),
    *("__reduce__", "__reduce_ex__", "__getstate__", "__getnewargs__", "__getnewargs_ex__"),
)
"""What a class must have of nn.Module. One with a way of its own to be called, read, copied or subclassed would have a
part in what happens to its form."""


def is_usual(kind: type[nn.Module], but: Collection[str] = ()) -> bool:
    """Whether its modules are called, read, copied and subclassed as any nn.Module is, `but` for these names."""
    names = (name for name in _USUAL if name not in but)
    return type(kind) in (type, abc.ABCMeta) and all(_of(kind, name) is _of(nn.Module, name) for name in names)


def _of(kind: type, name: str) -> Any:
    """What a class or its first base that has the name has under it: inspect.getattr_static takes ten times as long."""
    return next((vars(each)[name] for each in kind.__mro__ if name in vars(each)), None)


@functools.lru_cache(maxsize=1024)
def _run_on_symbols(kind: type[nn.Module], forward: types.FunctionType, code: types.CodeType) -> "Symbol | None":
    if not is_usual(kind) or not is_harmless(forward):
        return None
    seen: list[str] = []
    try:
        y = forward(Parent(kind, seen, Symbol), *(Symbol(index) for index in range(code.co_argcount - 1)))
    except (UnknownError, AttributeError, TypeError, UnboundLocalError):
        return None
    return y if type(y) is Symbol and len(seen) == y.count() else None


_STEPS = (
    *(
        "LOAD_FAST",
        "LOAD_CONST",
        "LOAD_ATTR",
        "LOAD_METHOD",
        "STORE_FAST",
        "BINARY_OP",
        "BINARY_ADD",
        "BINARY_MULTIPLY",
        "INPLACE_ADD",
        "CALL",
        "PRECALL",
    ),
    *("PUSH_NULL", "RETURN_", "NOP", "CACHE", "RESUME", "COPY", "SWAP", "EXTENDED_ARG"),
)
"""How the bytecode instructions begin that may occur: no globals, no branches, no loops, no stores but to locals."""


def is_harmless(forward: types.FunctionType) -> bool:
    """Whether code only names its arguments, calls what it finds in them, and adds or multiplies."""
    code = forward.__code__
    plain = code.co_flags & ~inspect.CO_NESTED == inspect.CO_OPTIMIZED | inspect.CO_NEWLOCALS
    inner = code.co_freevars or code.co_cellvars or code.co_kwonlyargcount or forward.__defaults__
    steps = (step.opname.startswith(_STEPS) for step in dis.get_instructions(code))
    return plain and not inner and code.co_argcount in (2, 3) and all(steps)


class UnknownError(Exception):
    """The code does something else."""


class Symbol:
    """A symbol: an argument, by its index, or the sum of two; and the children called on it."""

    def __init__(self, of: Any, calls: tuple[Any, ...] = (), *, in_place: bool = False) -> None:
        self.of_, self.calls_, self.in_place_ = of, calls, in_place  # a sum may be written into its left side
        self.written_ = False

    def count(self) -> int:
        """How many calls it takes to compute it."""
        return len(self.calls_) + (0 if isinstance(self.of_, int) else sum(each.count() for each in self.of_))

    def after_(self, child: str) -> "Symbol":
        """What a child makes of it."""
        if self.written_:
            raise UnknownError
        return Symbol(self.of_, (*self.calls_, child), in_place=self.in_place_)

    def __add__(self, other: Any) -> "Symbol":
        return self._sum(other, in_place=False)

    def __iadd__(self, other: Any) -> "Symbol":
        y = self._sum(other, in_place=True)
        self.written_ = True
        return y

    def __bool__(self) -> bool:
        raise UnknownError

    __eq__ = __bool__  # type: ignore[assignment]
    __hash__ = None  # type: ignore[assignment]

    def _sum(self, other: Any, *, in_place: bool) -> "Symbol":
        if type(other) is not Symbol or self.written_ or other.written_:
            raise UnknownError
        return Symbol((self, other), in_place=in_place)


class Parent:
    """Stands for a module of a class, with all children that the class does not hide. Notes which are called.

    Args:
        kind: the class.
        seen: the names of the children, in the order in which they are called.
        symbol: the class of what they may be called on. Its method `after_` gives what they make of it.
    """

    def __init__(self, kind: type[nn.Module], seen: list[str], symbol: type[Any]) -> None:
        self.kind_, self.seen_, self.symbol_ = kind, seen, symbol

    def __getattr__(self, name: str) -> Any:
        if inspect.getattr_static(self.kind_, name, None) is not None:
            raise UnknownError

        def call(x: Any) -> Any:
            if type(x) is not self.symbol_:
                raise UnknownError
            self.seen_.append(name)
            return x.after_(name)

        return call
