"""Modules that transformers' `apply_chunking_to_forward` runs, which asks for a method's signature in each call.

    return apply_chunking_to_forward(self.feed_forward_chunk, self.chunk_size_feed_forward, self.seq_len_dim, x)

It counts the method's arguments by `inspect.signature`: 20 us, of the 100 that Python and calls take in a BERT layer.
In this form of the module the method brings its signature along, which `inspect` asks for first. The rest is the
user's.
"""

import dis
import functools
import inspect
import types
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

from torch import nn
from torch.compiler import is_dynamo_compiling

from torchq.modules.straight_forms import Form, become, give_back, may_become
from torchq.modules.wrappers import is_usual_layer

CHUNKING = "apply_chunking_to_forward"
"""transformers' function, and the name by which its modeling files know it."""


class ChunkedCode(NamedTuple):
    """The methods that a class gives to transformers' function."""

    methods: tuple[str, ...]

    def attributes(self) -> tuple[str, ...]:
        """The names that its code looks up in the module."""
        return self.methods


@functools.lru_cache(maxsize=256)
def chunked_code_of(kind: Any) -> ChunkedCode | None:
    """Which methods of a class transformers' function is given; None if there is none, or the class would notice."""
    if not is_usual_layer(kind):
        return None
    names = {
        name: None
        for each in kind.__mro__
        if each not in nn.Module.__mro__
        for function in vars(each).values()
        if isinstance(function, types.FunctionType)
        for name in _given_to_chunking(inspect.unwrap(function))
    }
    methods = tuple(n for n in names if isinstance(inspect.getattr_static(kind, n, None), types.FunctionType))
    return ChunkedCode(methods) if methods else None


def _given_to_chunking(function: Any) -> Iterator[str]:
    """The first attribute that code loads after this global, each time."""
    if not isinstance(function, types.FunctionType) or CHUNKING not in function.__globals__:
        return
    waits = False
    for step in dis.get_instructions(function):
        if step.opname == "LOAD_GLOBAL":
            waits = step.argval == CHUNKING
        elif waits and step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            yield step.argval
            waits = False


class Chunked(Form):
    """A module with methods whose signatures are known."""

    line: ChunkedCode  # type: ignore[assignment]
    reads = staticmethod(chunked_code_of)  # type: ignore[assignment]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """The form of a class has a property for each of its methods."""
        super().__init_subclass__(**kwargs)
        for name in cls.line.methods if "line" in vars(cls) else ():
            setattr(cls, name, _quick(name, cls))

    @staticmethod
    def adopt(module: nn.Module) -> None:
        """Makes a module a Chunked, if transformers' function gets a method of it."""
        kind: Any = type(module)  # for mypy, a class of torch has no hash
        code = chunked_code_of(kind)
        if code is not None and vars(module).keys().isdisjoint(code.methods) and may_become(Chunked, module):
            become(Chunked, module, code)


def _quick(name: str, form: type[Chunked]) -> property:
    """The method that the user's class has now under this name, with its signature if that is a plain one's."""

    def method(module: Any) -> Any:
        if is_dynamo_compiling():  # it knows no method of super(), but what inspect does in a graph costs nothing
            return getattr(module.original, name).__get__(module)
        bound = getattr(super(form, module), name)
        if type(bound) is not types.MethodType:
            return bound
        function = bound.__func__
        if type(function) is not types.FunctionType or not _has_its_own(function):
            return bound
        quick = functools.partial(bound)
        cast(Any, quick).__signature__ = _signature(function, function.__code__)
        return quick

    def replace(module: Any, value: Any) -> None:
        """Whoever gives the module another method gets the user's class back."""
        give_back(module)
        setattr(module, name, value)

    return property(method, replace)


def _has_its_own(function: types.FunctionType) -> bool:
    """Whether a function's signature is its code's: no defaults, and nothing that says otherwise."""
    return not function.__dict__ and function.__defaults__ is None and function.__kwdefaults__ is None


@functools.lru_cache(maxsize=256)
def _signature(function: types.FunctionType, code: types.CodeType) -> inspect.Signature:
    """Of a method with this code: without its first argument."""
    return inspect.signature(types.MethodType(function, code))
