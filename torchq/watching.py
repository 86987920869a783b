"""Modes that watch torch's operations."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

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


def unwatched(x: Tensor) -> AbstractContextManager[None]:
    """Inside, no mode is told of operations on plain tensors such as x: to be told takes longer than most of them.

    On a tensor subclass, which may itself be told of operations, this does nothing.
    """
    plain = type(x) in (Tensor, nn.Parameter)
    return torch._C._DisableTorchDispatch() if plain else nullcontext()


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of an operation's arguments. (What torch has for any nested structure takes as long as the rest.)"""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from tensors_in(each)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
