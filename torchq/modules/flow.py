"""What modules of convolutions compute, by their code and by what it reads: children in a row, zeros around, a sum.

    if self.config.tf_padding:
        x = apply_tf_padding(x, self.convolution)
    x = self.convolution(x)
    return x if self.activation is None else self.activation(x)

The code runs once on stand-ins: a symbol for the argument, and one for each object that it reads. So it takes the
branches that it takes for this module. What it has read, numbers and the like, is kept as facts: each call compares
them, and where one has changed the user's code runs. Global names give it nothing but numbers, and functions that only
add zeros.
"""

import builtins
import dis
import functools
import inspect
import math
import types
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from torchq.modules.facts import MISSING, Facts, look_up
from torchq.modules.others import apart, hands_on, unknown
from torchq.modules.plain_code import forward_of, is_plain_value, runs_straight
from torchq.modules.straight import Symbol, UnknownError, is_usual


class Zeros:
    """Zeros around the spatial dimensions of a tensor, as many as a function of its shape says.

    Args:
        amounts: the function; it raises UnknownError, or returns what nn.functional.pad takes.
    """

    def __init__(self, amounts: Callable[[tuple[int, ...]], tuple[int, ...]]) -> None:
        self._amounts = amounts
        self._known: dict[tuple[int, ...], tuple[int, ...]] = {}

    def around(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The zeros around a tensor of this shape; () for none."""
        known = self._known.get(shape)
        if known is None:
            if len(self._known) >= 256:  # of images of all sizes
                self._known = {}
            known = self._known[shape] = _checked(self._amounts(shape), len(shape))
        return known

    def are_known(self, shape: tuple[int, ...]) -> bool:
        """Whether the function says how many there are around a tensor of this shape."""
        with suppress(UnknownError):
            self.around(shape)
            return True
        return False

    @staticmethod
    def constant(amounts: Any) -> "Zeros":
        """The same zeros around any tensor."""
        return Zeros(lambda _: amounts)


def _checked(amounts: Any, dimensions: int) -> tuple[int, ...]:
    counts = tuple(amounts)
    plain = all(type(count) is int and count >= 0 for count in counts)
    if not plain or len(counts) % 2 or len(counts) > 2 * (dimensions - 2):
        raise UnknownError
    return counts if any(counts) else ()


Step = str | Zeros
"""A child that is called, by its name, or zeros."""


class Flow(NamedTuple):
    """What the code of a module computes: `last(one(x) + other(x))`, or `one(x)`.

    Args:
        one: the steps on the argument, one after the other; of a sum, those on the left.
        other: those on the right of the sum; None without a sum.
        in_place: whether the sum is written into the left side.
        last: the steps on the sum.
        children: the children that the code has looked at, by name; some may be None.
        settings: the module's own attributes that it has read.
        names: all names that it has looked up in the module.
        facts: what it has read elsewhere.
    """

    one: tuple[Step, ...]
    other: tuple[Step, ...] | None
    in_place: bool
    last: tuple[Step, ...]
    children: dict[str, nn.Module | None]
    settings: dict[str, Any]
    names: tuple[str, ...]
    facts: Facts


class Code(NamedTuple):
    """The code of a class of modules, which may be run on stand-ins."""

    forward: types.FunctionType
    code: types.CodeType

    def attributes(self) -> tuple[str, ...]:
        """None: what names a run looks up depends on the module (`Flow.names`)."""
        return ()


def code_of(kind: type[nn.Module]) -> Code | None:
    """The code of a class, if running it on stand-ins is all that happens.

    >>> code_of(nn.Identity) is None, code_of(nn.ModuleList) is None
    (False, True)
    """
    forward = forward_of(kind)
    if not isinstance(forward, types.FunctionType) or not is_usual(kind) or not may_run(forward):
        return None
    return Code(forward, forward.__code__) if forward.__code__.co_argcount == 2 else None


def flow_of(module: nn.Module, kind: type[nn.Module], facts: Facts | None = None) -> Flow | None:
    """What a module computes under the code of this class, if that is such a flow. What it reads joins these facts.

    >>> class Padded(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.conv, self.act, self.adds = nn.Conv2d(8, 8, 3, padding=1), None, True
    ...     def forward(self, x):
    ...         y = self.conv(x)
    ...         if self.act is not None:
    ...             y = self.act(y)
    ...         return x + y if self.adds else y
    >>> flow_of(Padded(), Padded)[:4]
    ((), ('conv',), False, ())
    """
    code = code_of(kind)
    if code is None:
        return None
    run = Run(module, kind, Facts() if facts is None else facts)
    try:
        y = run.apart(code[0])(run.itself(), Symbol(0))
    except Exception:  # whatever the code meets on stand-ins
        return None
    if type(y) is not Symbol or len(run.seen) != y.count():
        return None
    one: Symbol = y
    other: Symbol | None = None
    last: tuple[Step, ...] = ()
    if not isinstance(y.of_, int):
        (one, other), last = y.of_, y.calls_
        if one.of_ != 0 or other.of_ != 0:
            return None
    names = (*run.children, *run.settings)
    right = None if other is None else other.calls_
    return Flow(one.calls_, right, y.in_place_, last, run.children, run.settings, names, run.facts)


def may_run(function: types.FunctionType) -> bool:
    """Whether all that code does goes to what it is given, and to global names."""
    code = function.__code__
    inner = set(code.co_freevars) - {"__class__"} or code.co_cellvars or code.co_kwonlyargcount
    plain = is_plain_value(function.__defaults__ or ())
    usual = code.co_flags & ~_MORE_FLAGS == inspect.CO_OPTIMIZED | inspect.CO_NEWLOCALS
    return usual and not inner and plain and hands_on(code) and runs_straight(code)


_MORE_FLAGS = inspect.CO_NESTED | inspect.CO_VARKEYWORDS


# ---- Stand-ins ------------------------------------------------------------------------------------------------------


class StandIn:
    """Stands for an object: `read` gives its attributes, `call` what a call of it does."""

    __slots__ = ("call", "of", "read")

    def __init__(self, read: Callable[[str], Any], call: Callable[..., Any] = unknown, of: Any = None) -> None:
        self.read, self.call, self.of = read, call, of

    def __getattribute__(self, name: str) -> Any:
        return object.__getattribute__(self, "read")(name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What a call of the object gives."""
        return object.__getattribute__(self, "call")(*args, **kwargs)

    __bool__ = __eq__ = __hash__ = unknown


def stood_for(stand_in: Any) -> Any:
    """The object itself."""
    return object.__getattribute__(stand_in, "of")


_PAD = nn.functional.pad
_LIBRARIES = {id(torch): "nn", id(nn): "functional", id(nn.functional): "pad", id(math): "ceil"}
_BUILTINS = ("int", "max", "min", "abs", "divmod", "getattr")
_DEEPEST = 4
_PROBES = [(1, 8, 16), (1, 8, 16, 16), (1, 8, 16, 16, 16)]
"""Shapes of one, two and three dimensions: a function that knows none of them does something else."""


class Run:
    """One run of a module's code on stand-ins.

    Args:
        module: the module.
        kind: the class whose code it is.
        facts: get what it reads.
    """

    def __init__(self, module: nn.Module, kind: type[nn.Module], facts: Facts) -> None:
        self._module, self._kind, self.facts = module, kind, facts
        self.seen: list[Step] = []
        self.children: dict[str, nn.Module | None] = {}
        self.settings: dict[str, Any] = {}
        self._depth = 0

    def itself(self) -> StandIn:
        """Stands for the module."""
        return StandIn(self.read, of=self._module)

    def read(self, name: str) -> Any:
        """An attribute of the module."""
        state = vars(self._module)
        if name in state:
            value = self._plainly(self._module, name)
            self.settings[name] = value
            return value if is_plain_value(value) else self._held(value)
        if name not in state["_modules"] or inspect.getattr_static(self._kind, name, None) is not None:
            raise UnknownError
        child = self.children[name] = state["_modules"][name]
        return None if child is None else StandIn(self._held_read(child), self.called(name, child), child)

    def called(self, name: str, child: nn.Module) -> Callable[..., Any]:
        """What stands for the call of a child."""
        return lambda x: self.then(x, name)

    def then(self, x: Any, step: Step) -> Any:
        """What a step makes of x."""
        if type(x) is not Symbol or x.written_:
            raise UnknownError
        self.seen.append(step)
        return Symbol(x.of_, (*x.calls_, step), in_place=x.in_place_)

    def _plainly(self, of: Any, name: str) -> Any:
        """An attribute that an object itself has, and nothing computes."""
        value, hidden = vars(of)[name], inspect.getattr_static(type(of), name, None)
        if hasattr(type(hidden), "__get__") or getattr(of, name) is not value:
            raise UnknownError
        return value

    def _held(self, of: Any) -> StandIn:
        """Stands for an object that the code has read, such as a config."""
        return StandIn(self._held_read(of), of=of)

    def _held_read(self, of: Any) -> Callable[[str], Any]:
        def read(name: str) -> Any:
            value = self._plainly(of, name)
            self.facts.add(getattr, of, name, value)
            return value if is_plain_value(value) else self._held(value)

        return read

    # ---- Global names of the code --------------------------------------------------------------------------------

    def apart(self, function: types.FunctionType) -> Callable[..., Any]:
        """The function, to whom all names of its module are stand-ins, and its `**kwargs` too."""
        if not may_run(function) or self._depth > _DEEPEST:
            raise UnknownError
        for name in ("__code__", "__defaults__"):
            self.facts.add(getattr, function, name, getattr(function, name))
        loads = [step for step in dis.get_instructions(function) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")]
        names = {step.argval: self.named(function.__globals__, step.argval) for step in loads}
        known = {name: value for name, value in names.items() if value is not MISSING}
        return apart(function, known)

    def named(self, scope: dict[str, Any], name: str) -> Any:
        """What a name of a function's module stands for; MISSING if nothing that may be used."""
        value = scope.get(name, MISSING)
        if value is MISSING and name in _BUILTINS:
            usable: Any = self._getattr if name == "getattr" else getattr(builtins, name)
        elif id(value) in _LIBRARIES:
            usable = self.library(value)
        elif isinstance(value, types.FunctionType):
            usable = StandIn(unknown, functools.partial(self.call, value))
        elif is_plain_value(value):
            usable = value
        else:
            return MISSING
        self.facts.add(look_up, scope, name, value)
        return usable

    def _getattr(self, of: Any, name: str, *default: Any) -> Any:
        """An attribute that the module may lack."""
        if stood_for(of) is not self._module:
            raise UnknownError
        if not default or hasattr(self._module, name):
            return self.read(name)
        self.facts.add(getattr, self._module, name, MISSING)
        return default[0]

    def library(self, library: Any) -> StandIn:
        """Stands for torch, or a module of it."""

        def read(name: str) -> Any:
            if name != _LIBRARIES[id(library)]:
                raise UnknownError
            value = getattr(library, name)
            self.facts.add(getattr, library, name, value)
            if id(value) in _LIBRARIES:
                return self.library(value)
            return StandIn(unknown, self._pad) if value is _PAD else value

        return StandIn(read)

    def call(self, function: types.FunctionType, *args: Any) -> Any:
        """A function by a global name is called. On the symbol it must add zeros, as many as the shape asks for."""
        if args and type(args[0]) is Symbol:
            zeros = Zeros(lambda shape: self._amounts(function, shape, args[1:]))
            if not any(map(zeros.are_known, _PROBES)):
                raise UnknownError
            return self.then(args[0], zeros)
        self._depth += 1
        try:
            return self.apart(function)(*args)
        finally:
            self._depth -= 1

    def _pad(self, x: Any, pad: Any, mode: Any = "constant", value: Any = None) -> Any:
        if mode != "constant" or value not in (None, 0) or not isinstance(pad, tuple | list):
            raise UnknownError
        if type(x) is Symbol:
            return self.then(x, Zeros.constant(tuple(pad)))
        if not isinstance(stood_for(x), _Shape):
            raise UnknownError
        return StandIn(unknown, of=_Padded(tuple(pad)))

    def _amounts(self, function: types.FunctionType, shape: tuple[int, ...], rest: tuple[Any, ...]) -> Any:
        """What a function adds around a tensor of this shape."""
        try:
            y = stood_for(self.call(function, _Shape(shape).stand_in(), *rest))
        except Exception:
            raise UnknownError from None
        if isinstance(y, _Padded):
            return y.amounts
        if isinstance(y, _Shape):
            return ()
        raise UnknownError


class _Padded(NamedTuple):
    amounts: tuple[int, ...]


class _Shape(NamedTuple):
    """A tensor of which code may ask the shape."""

    shape: tuple[int, ...]

    def stand_in(self) -> StandIn:
        return StandIn(self._read, of=self)

    def _read(self, name: str) -> Any:
        if name == "shape":
            return self.shape
        if name == "size":
            return lambda axis=None: self.shape if axis is None else self.shape[cast(int, axis)]
        if name in ("ndim", "dim"):
            return len(self.shape) if name == "ndim" else lambda: len(self.shape)
        raise UnknownError
