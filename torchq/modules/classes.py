"""Classes of modules as they were when it was proven what their modules compute.

A form (`straight_forms.py`), a row and a block leave out calls of modules whose code is known. Whoever then gives a
class another forward, or anything under a name that the code reads, must be heard. To ask a class for all these names
in each call would cost more than is saved. But CPython numbers every state of a class, for caches of its own, and a
change of the class or of one of its bases takes the number away. So C++ (`csrc/classes.cpp`) keeps the numbers of the
states that were compared here, and a call compares one number for each module.
"""

import dis
import types
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple

from torch import nn
from torch.compiler import is_dynamo_compiling

from torchq import _C
from torchq.modules.tracing import exporting

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_NAMES = (
    *("__call__", "_wrapped_call_impl", "_call_impl", "_slow_forward", "_compiled_call_impl", "forward"),
    *("__getattr__", "__getattribute__", "__class__", "_modules", "_parameters", "_buffers", "training", *_HOOKS),
)
"""What decides how a module is called, and what it finds in itself."""


class Function(NamedTuple):
    """A function of torch that code finds where it stands: `scope[name]` is `value`."""

    scope: dict[str, Any]
    name: str
    value: Any


class Known(NamedTuple):
    """What C++ compares besides the number of a class.

    Args:
        forward: the class's function, or None.
        code: its code, which may be replaced in it, as IPython's autoreload does.
        functions: those of torch that the code calls.
    """

    forward: types.FunctionType | None
    code: types.CodeType | None
    functions: tuple[Function, ...]


class _State(NamedTuple):
    bases: tuple[type, ...]
    held: dict[str, list[Callable[[], Any]]]  # by name, what each class of the MRO has
    code: types.CodeType | None
    functions: tuple[Function, ...]


_states: "weakref.WeakKeyDictionary[type, _State]" = weakref.WeakKeyDictionary()


def know(kind: type[nn.Module], names: Iterable[str] = ()) -> None:
    """Notes what a class has now under the names of a call, and under these. What is noted stays."""
    known: Any = kind  # for mypy, a class of torch has no hash
    state = _states.get(known)
    if state is None:
        forward = _forward_of(kind)
        functions = () if forward is None else functions_of(forward)
        state = _states[known] = _State(kind.__mro__[1:], {}, getattr(forward, "__code__", None), functions)
        names = (*_NAMES, *names)
    for name in names:
        if name not in state.held:
            state.held[name] = [_reference(value) for value in _held(kind, name)]


def compared(kind: type[nn.Module], but: Collection[str] = ()) -> Known | None:
    """What a class that is as it was noted has, `but` under these names; None for one that has changed.

    The first look at a class notes it, unless an export has changed it meanwhile.
    """
    known: Any = kind
    if known not in _states:
        if exporting():
            return None
        know(kind)
    state = _states[known]
    if kind.__mro__[1:] != state.bases:
        return None
    for name, references in list(state.held.items()):
        if name in but:
            continue
        pairs = zip(_held(kind, name), references, strict=True)
        if not all(reference() is value for value, reference in pairs):
            return None
    return Known(_forward_of(kind), state.code, state.functions)


def computes_as_known(kind: type[nn.Module]) -> bool:
    """Whether a class has what it had when it was noted, but for what torch.export changes while it traces."""
    if is_dynamo_compiling():
        return True
    if not exporting():
        return _C.computes_as_known(kind)
    known = compared(kind, _OF_EXPORT)
    if known is None or getattr(known.forward, "__code__", None) is not known.code:
        return False
    return all(scope.get(name) is value for scope, name, value in known.functions)


_OF_EXPORT = ("__call__", "__getattr__")
"""What export without `strict` gives nn.Module, to see its calls. It changes no values."""


_MISSING = object()


def _held(kind: type, name: str) -> Iterator[Any]:
    return (vars(each).get(name, _MISSING) for each in kind.__mro__)


def _reference(value: Any) -> Callable[[], Any]:
    """What gives a value for as long as it lives: functions refer to their class, which may go."""
    try:
        return weakref.ref(value)
    except TypeError:
        return lambda: value


# ---- What code calls ------------------------------------------------------------------------------------------------


def _forward_of(kind: type[nn.Module]) -> types.FunctionType | None:
    forward = getattr(kind, "forward", None)
    return forward if isinstance(forward, types.FunctionType) else None


def functions_of(function: types.FunctionType) -> tuple[Function, ...]:
    """The functions of torch that code names as `F.relu`; and `torch.relu`, which that names."""
    return tuple(_functions(function, deeper=True))


def _functions(function: types.FunctionType, *, deeper: bool) -> Iterator[Function]:
    owner: Any = None
    for step in dis.get_instructions(function):
        name = step.argval
        if step.opname == "LOAD_GLOBAL":
            owner = function.__globals__.get(name)
        elif step.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
            owner = None if step.opname not in _BETWEEN else owner
        elif isinstance(owner, types.ModuleType) and owner.__name__.split(".")[0] == "torch":
            scope, owner = vars(owner), vars(owner).get(name)
            if isinstance(owner, types.ModuleType) or owner is None:
                continue
            yield Function(scope, name, owner)
            if deeper and isinstance(owner, types.FunctionType):
                yield from _functions(owner, deeper=False)
        else:
            owner = None


_BETWEEN = ("CACHE", "EXTENDED_ARG", "PUSH_NULL", "NOP")


_C.set_comparison(compared)
