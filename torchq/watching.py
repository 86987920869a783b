"""Modes that watch torch's operations."""

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from typing_extensions import Self


class Watch(TorchDispatchMode):
    """A TorchDispatchMode that no graph has a part of, and that does not import torch._dynamo for that.

    torch hides what a mode does from torch.compile by `torch._disable_dynamo`, whose first call imports torch._dynamo.
    That takes as long as torch itself. Where nobody has imported it, nothing is compiled.
    """

    _hidden = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # torch asks this, and then leaves the method as it is
        return False

    def __enter__(self) -> "Self":
        kind: Any = type(self)
        if "torch._dynamo" in sys.modules and not kind._hidden:
            kind.__torch_dispatch__, kind._hidden = torch.compiler.disable(kind.__torch_dispatch__), True
        super().__enter__()
        return self


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
