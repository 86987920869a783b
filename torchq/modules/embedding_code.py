"""Sums of embeddings, `norm(words(ids) + positions(position_ids) + types(type_ids))`, by the code of their module.

    if position_ids is None:
        position_ids = self.position_ids[:, :ids.size(1)]
    x = self.words(ids) + self.positions(position_ids)
    return self.dropout(self.norm(x))

Which row of a table is added to which depends on the arguments, and each family of transformers has ways of its own to
count positions. So that part of the code runs as it is, in each call, on the tensors of the call. What it calls on them
stands for a child: a table gives `Rows`, which are no tensor but a note of what would be looked up; they are added,
normalized once, and returned. A world of its own makes that harmless: of torch the code has functions that make or
count indices, and no way to write into anything, so nobody can notice it, even if it is run and comes to nothing.
"""

import dis
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchq import _C
from torchq.modules import gradients
from torchq.modules.classes import know
from torchq.modules.embedding import QuantizedEmbedding
from torchq.modules.facts import MISSING, Facts, look_up
from torchq.modules.folding import IDLE
from torchq.modules.layer_norm import LayerNorm
from torchq.modules.others import apart
from torchq.modules.plain_code import forward_of, is_plain_value, runs_straight
from torchq.modules.straight import UnknownError, is_usual

_FUNCTIONS = {
    *("arange", "cumsum", "eq", "full", "gather", "ne", "ones", "ones_like", "zeros", "zeros_like"),
    *("bool", "int", "int32", "int64", "long"),
}
"""What code may look up in torch."""

_METHODS = _FUNCTIONS | {
    *("contiguous", "device", "dim", "dtype", "expand", "expand_as", "ndim", "shape", "size", "to", "type_as"),
    *("reshape", "squeeze", "unsqueeze", "view", "weight"),
}
"""What it may look up in tensors, tables and torch."""


def _has(owner: Any, name: Any) -> bool:
    """hasattr(), of the module alone: other stand-ins have not all that they stand for."""
    if type(owner) is not Parent or type(name) is not str:
        raise UnknownError
    try:
        owner.__getattr__(name)
    except AttributeError:
        return False
    return True


_BUILTINS = {"hasattr": _has, "len": len}


class EmbeddingCode(NamedTuple):
    """The code of a class of modules that may be a sum of embeddings.

    Args:
        forward: the function.
        run: its code in a world of its own, where it takes a `Parent` for `self`.
        methods: what the code calls of the class: functions in such a world, by name.
        facts: what it has read: codes, and the functions of its module.
        names: those that it looks up in the module.
    """

    forward: types.FunctionType
    run: Callable[..., Any]
    methods: tuple[tuple[str, Any], ...]
    facts: Facts
    names: tuple[str, ...]

    def attributes(self) -> tuple[str, ...]:
        """The names that it looks up in the module."""
        return self.names


def embedding_code_of(kind: type[nn.Module]) -> EmbeddingCode | None:
    """The code of a class, if nobody could notice that it is run on `Rows`.

    >>> class Embeddings(nn.Module):
    ...     def forward(self, ids):
    ...         return self.norm(self.words(ids) + self.positions(torch.arange(ids.size(1))))
    >>> embedding_code_of(Embeddings).names, embedding_code_of(nn.Embedding)
    (('norm', 'words', 'positions'), None)
    """
    known: Any = kind  # for mypy, a class of torch has no hash
    forward = forward_of(kind)
    if not isinstance(forward, types.FunctionType) or kind.__module__.startswith("torch.") or not is_usual(kind):
        return None
    return _read(known, forward, forward.__code__)


@functools.lru_cache(maxsize=1024)
def _read(kind: type[nn.Module], forward: types.FunctionType, code: types.CodeType) -> EmbeddingCode | None:
    reader = _Reader(kind)
    try:
        run = reader.apart(forward, of_self=True)
    except UnknownError:
        return None
    names = tuple(reader.names)
    return EmbeddingCode(forward, run, tuple(reader.methods.items()), reader.facts, names) if names else None


class _Reader:
    """Reads the code of a class, and of the functions that it calls."""

    def __init__(self, kind: type[nn.Module]) -> None:
        self.kind = kind
        self.facts = Facts()
        self.names: dict[str, None] = {}  # those looked up in the module, in order
        self.methods: dict[str, Any] = {}
        self._callers: list[types.CodeType] = []

    def apart(self, function: types.FunctionType, *, of_self: bool) -> Callable[..., Any]:
        """The function in a world of its own. UnknownError: it could be noticed there. `of_self`: of a method."""
        code = function.__code__
        if not _is_harmless(function) or code in self._callers:  # recursion could be endless
            raise UnknownError
        self._callers.append(code)
        self.facts.add(getattr, function, "__code__", code)
        self.facts.add(getattr, function, "__defaults__", function.__defaults__)
        for name in _own_names(function, of_self=of_self):
            if hasattr(Parent, name):  # it would be found there instead of in the module
                raise UnknownError
            self.names[name] = None
            method = getattr(self.kind, name, MISSING)
            if method is not MISSING and name not in self.methods:
                self.methods[name] = self._method(name, method)
        world = {name: self._named(function.__globals__, name) for name in _globals(function)}
        self._callers.pop()
        return apart(function, {name: value for name, value in world.items() if value is not None})

    def _method(self, name: str, method: Any) -> Any:
        held = next(vars(each)[name] for each in self.kind.__mro__ if name in vars(each))
        if isinstance(held, staticmethod) and isinstance(method, types.FunctionType):
            return staticmethod(self.apart(method, of_self=False))
        if isinstance(held, types.FunctionType):
            return self.apart(held, of_self=True)
        if is_plain_value(held):
            return held
        raise UnknownError

    def _named(self, scope: dict[str, Any], name: str) -> Any:
        """What a global name stands for; None if it may not be used."""
        value = scope.get(name, MISSING)
        if value is torch:
            usable: Any = _Torch()
        elif isinstance(value, types.FunctionType):
            usable = self.apart(value, of_self=False)
        else:
            usable = _BUILTINS.get(name) if name not in scope else None
        self.facts.add(look_up, scope, name, value)
        return usable


def _is_harmless(function: types.FunctionType) -> bool:
    """Whether a function only calls what it finds, makes nothing of it in place, and writes into nothing."""
    code = function.__code__
    defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    if code.co_freevars or code.co_cellvars or not is_plain_value(defaults) or not runs_straight(code):
        return False
    return not any(_writes(step) for step in dis.get_instructions(code))


def _writes(step: dis.Instruction) -> bool:
    if step.opname.startswith("INPLACE_") or (step.opname == "BINARY_OP" and step.argrepr.endswith("=")):
        return True
    if step.opname == "DICT_MERGE":  # f(**names), which may be "out"
        return True
    return step.opname in ("KW_NAMES", "LOAD_CONST") and "out" in (step.argval if type(step.argval) is tuple else ())


def _globals(function: types.FunctionType) -> Iterator[str]:
    loads = ("LOAD_GLOBAL", "LOAD_NAME")
    return (step.argval for step in dis.get_instructions(function) if step.opname in loads)


def _own_names(function: types.FunctionType, *, of_self: bool) -> Iterator[str]:
    """What code looks up in its first argument, that of a method. UnknownError: elsewhere it looks up what it may not.

    A method that gives its first argument another value has none: so what is looked up there counts as elsewhere.
    """
    owner: Any = None
    steps = list(dis.get_instructions(function))
    stored = {step.argval for step in steps if step.opname.startswith("STORE_FAST")}
    own = next((name for name in function.__code__.co_varnames[:1] if of_self and name not in stored), None)
    for step in steps:
        if step.is_jump_target:  # what was loaded on the other way here?
            owner = None
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            if own is not None and owner == own:
                yield step.argval
            elif step.argval not in _METHODS:
                raise UnknownError
            owner = None
        elif step.opname.startswith("LOAD_FAST"):  # of two that one instruction loads, the last
            owner = step.argval[-1] if type(step.argval) is tuple else step.argval
        elif step.opname not in ("CACHE", "EXTENDED_ARG", "PUSH_NULL", "NOP"):
            owner = None


class _Torch:
    """Stands for torch."""

    def __getattr__(self, name: str) -> Any:
        if name not in _FUNCTIONS:
            raise UnknownError
        return getattr(torch, name)


# ---- What a run meets -----------------------------------------------------------------------------------------------


class Parent:
    """Stands for a module in a run of its code.

    Args:
        module: it has the children, the buffers and the plain values that the code reads.
        code: it has the methods.
        calls: where each call of a table or a norm is noted: the term that it gives, or the norm.
    """

    __slots__ = ("_calls", "_methods", "_module")

    def __init__(self, module: nn.Module, code: EmbeddingCode, calls: list[Any]) -> None:
        self._module, self._methods, self._calls = module, code.methods, calls

    def __getattr__(self, name: str) -> Any:
        state = self._module.__dict__
        if name in state:
            return _value(state[name])
        for each, method in self._methods:
            if each == name:
                return method.__func__ if type(method) is staticmethod else self._bound(method)
        if name in state["_modules"]:
            return _stand_in(state["_modules"][name], self._calls)
        if name in state["_buffers"]:
            return _value(state["_buffers"][name])
        unknown = name in state["_parameters"] or hasattr(type(self._module), name)
        raise UnknownError if unknown else AttributeError(name)

    def _bound(self, method: Any) -> Any:
        return functools.partial(method, self) if callable(method) else method


def _value(value: Any) -> Any:
    if type(value) is Tensor or is_plain_value(value):  # a subclass may have a __torch_function__
        return value
    raise UnknownError


class _StandIn:
    """Stands for a tensor or a child, which code may not compare: what it stands for would answer otherwise."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        raise UnknownError

    def __bool__(self) -> bool:
        raise UnknownError


class Rows(_StandIn):
    """Rows of tables, to be looked up and added, in this order; and perhaps normalized.

    Args:
        terms: tables and what is looked up in them.
        sizes: of the indices, all together.
        norm: the LayerNorm; None as long as there is none.
    """

    __slots__ = ("norm", "sizes", "terms")

    def __init__(
        self, terms: tuple[tuple[nn.Embedding, Tensor], ...], sizes: tuple[int, ...], norm: LayerNorm | None = None
    ) -> None:
        self.terms, self.sizes, self.norm = terms, sizes, norm

    def __add__(self, other: Any) -> "Rows":
        if type(other) is not Rows or self.norm is not None or other.norm is not None:
            raise UnknownError
        one, more = (self, other) if len(other.terms) == 1 else (other, self)  # x + y is y + x
        if len(more.terms) != 1:  # x + (y + z) is not (x + y) + z
            raise UnknownError
        return Rows((*one.terms, *more.terms), _together(self.sizes, other.sizes))

    def made_by(self, calls: list[Any]) -> bool:
        """Whether these calls have all gone into the sum, each once: of others, an error or a hook would be missed."""
        own = self.terms if self.norm is None else (*self.terms, self.norm)
        return len(calls) == len(own) and {*map(id, calls)} == {*map(id, own)}

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the tensor."""
        return (*self.sizes, _shape(self.terms[0][0])[1])

    def size(self, *dim: int) -> Any:
        """The same, or the size of one dimension."""
        return self.shape[dim[0]] if dim else self.shape

    def dim(self) -> int:
        """How many dimensions it has."""
        return len(self.shape)

    @property
    def device(self) -> torch.device:
        """Where the indices are."""
        return self.terms[0][1].device


def _together(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    """What shapes become that are broadcast."""
    if one == other:
        return one
    if len(one) < len(other):
        one, other = other, one
    last = len(one) - len(other)
    pairs = zip(one[last:], other, strict=True)
    if not all(a == b or 1 in (a, b) for a, b in pairs):
        raise UnknownError
    return (*one[:last], *(b if a == 1 else a for a, b in zip(one[last:], other, strict=True)))


class _Table(_StandIn):
    """Stands for a table: called, it gives rows."""

    __slots__ = ("_calls", "_table")

    def __init__(self, table: nn.Embedding, calls: list[Any]) -> None:
        self._table, self._calls = table, calls

    def __call__(self, ids: Any) -> Rows:
        if type(ids) is not Tensor:
            raise UnknownError
        term = (self._table, ids)
        self._calls.append(term)
        return Rows((term,), tuple(ids.shape))

    @property
    def weight(self) -> "_Weight":
        return _Weight(_shape(self._table))


class _Weight(_StandIn):
    """Stands for the weight of a table, which code may ask for its shape and nothing else."""

    __slots__ = ("shape",)

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape = shape

    def size(self, dim: int) -> int:
        return self.shape[dim]


def _shape(table: nn.Embedding) -> tuple[int, int]:
    """That of its weight, which may have been replaced by one of more rows."""
    rows, width = table.weight.shape
    return rows, width


class _Norm(_StandIn):
    """Stands for a LayerNorm, which rows may meet once."""

    __slots__ = ("_calls", "_norm")

    def __init__(self, norm: LayerNorm, calls: list[Any]) -> None:
        self._norm, self._calls = norm, calls

    def __call__(self, x: Any) -> Rows:
        if type(x) is not Rows or x.norm is not None:
            raise UnknownError
        self._calls.append(self._norm)
        return Rows(x.terms, x.sizes, self._norm)


class _Idle(_StandIn):
    """Stands for a child that gives what it gets."""

    __slots__ = ()

    def __call__(self, x: Any) -> Rows:
        return x if type(x) is Rows else _refuse()


def _refuse() -> Any:
    raise UnknownError


def _stand_in(module: Any, calls: list[Any]) -> Any:
    kind: Any = type(module)
    if kind is QuantizedEmbedding or (kind is nn.Embedding and _is_plain_table(module)):
        return _Table(module, calls)
    if kind is LayerNorm:
        return _Norm(module, calls)
    if kind in IDLE and not module.training and _C.is_plain(module, kind) and _C.computes_as_known(kind):
        return _Idle()
    return None if module is None else _refuse()


def _is_plain_table(table: nn.Embedding) -> bool:
    """Whether a float table looks up rows of its parameter, as they lie in memory."""
    weight: Any = table._parameters.get("weight")
    own = "weight" not in vars(table) and type(weight) in (nn.Parameter, Tensor)
    return own and _C.computes_as_known(nn.Embedding) and not weight.is_neg() and not gradients.wanted(weight)


know(nn.Embedding)
