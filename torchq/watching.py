"""Modes that watch torch's operations."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from torchq.imports import when_imported


class Watch(TorchDispatchMode):
    """A TorchDispatchMode that no graph has a part of, and that does not import torch._dynamo for that.

    torch hides what a mode does from torch.compile by `torch._disable_dynamo`, whose first call imports torch._dynamo.
    That takes as long as torch itself. Until somebody imports it, nothing is compiled. Code that runs under a mode may
    be the first to: flex_attention is.

    Operators of functions, such as flex_attention and cond, are operations as others: `name_of` and `may_write`.
    """

    supports_higher_order_operators = True  # else torch raises NotImplementedError for them

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        when_imported("torch._dynamo", cls._hide)

    @classmethod
    def _hide(cls, dynamo: Any) -> None:
        cls.__torch_dispatch__ = dynamo.disable(cls.__torch_dispatch__)  # type: ignore[method-assign]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # torch asks this, and then leaves the method as it is
        return False


class Watcher(Protocol):
    """What is told of operations by `Watchers`."""

    def sees(self, func: Any, args: Any, kwargs: Any, keys: list[int | None]) -> Callable[[Any], None] | None:
        """Notes an operation that is about to run; what it returns is called with the result.

        `keys` are the `storage_key` of its tensors.
        """


class Watchers(Watch):
    """One mode that tells several: to be told takes longer than most operations, and each mode would pay for it."""

    def __init__(self, watchers: Sequence[Watcher]) -> None:
        super().__init__()
        self._watchers = watchers

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation, and tells everyone."""
        kwargs = kwargs or {}
        keys = [storage_key(tensor) for tensor in tensors_in(args, kwargs)]
        waiting = [watcher.sees(func, args, kwargs, keys) for watcher in self._watchers]
        y = func(*args, **kwargs)
        for note in waiting:
            if note is not None:
                note(y)
        return y


def name_of(func: Any) -> str:
    """The name of an operation that a mode is told of.

    >>> name_of(torch.ops.aten.add.Tensor), name_of(torch.ops.higher_order.cond)
    ('aten::add', 'cond')
    """
    return func._schema.name if hasattr(func, "_schema") else func.name()  # type: ignore[no-any-return]


def may_write(func: Any) -> bool:
    """Whether an operation may write to its arguments. One that runs functions might: what these do, no mode is told.

    >>> ops = torch.ops
    >>> may_write(ops.aten.add.Tensor), may_write(ops.aten.add_.Tensor), may_write(ops.higher_order.cond)
    (False, True, True)
    """
    return not hasattr(func, "_schema") or func._schema.is_mutable


def gives_views(func: Any) -> bool:
    """Whether an operation gives nothing but other views of its arguments, and reads no values.

    >>> ops = torch.ops
    >>> gives_views(ops.aten.t.default), gives_views(ops.aten.mm.default), gives_views(ops.aten.add_.Tensor)
    (True, False, False)
    """
    return not may_write(func) and any(each.alias_info for each in func._schema.returns)


def unwatched(x: Tensor) -> AbstractContextManager[None]:
    """Inside, no mode is told of operations on plain tensors such as x: to be told takes longer than most of them.

    On a tensor subclass, which may itself be told of operations, this does nothing.
    """
    plain = type(x) in (Tensor, nn.Parameter)
    return torch._C._DisableTorchDispatch() if plain else nullcontext()


def storage_key(value: Any) -> int | None:
    """A key that identifies a tensor's storage; None for values without one."""
    if not isinstance(value, Tensor):
        return None
    try:
        return int(value.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse, meta-like and other tensors without a storage
        return None


def tensors_in(*values: Any) -> list[Tensor]:
    """The tensors of an operation's arguments. (What torch has for any nested structure takes as long as the rest.)

    >>> len(tensors_in((torch.ones(1), [2, torch.ones(1)]), {"out": torch.ones(1)}))
    3
    """
    found: list[Tensor] = []
    for value in values:
        if type(value) in _ATOMS:  # the sizes of a view, say: asking whether they are tensors takes longer
            continue
        if isinstance(value, (tuple, list)):
            found += tensors_in(*value)
        elif isinstance(value, dict):
            found += tensors_in(*value.values())
        elif isinstance(value, Tensor):
            found.append(value)
    return found


_ATOMS = {int, float, bool, type(None), torch.dtype, torch.device}
