"""CodedSum: a tensor between int8 convolutions that is held as u8 codes: a block's sum, after its activation.

The sum of a residual network is read by the next block's convolutions and by its sum. As floats it is four times as
much memory, more than L2 holds where maps are large, and each reader quantizes it again. Where the plan says so, it
stays codes, in the `input_qparams` of its readers. Any other reader gets the values of the codes, as torch would lay
them out. It lives no longer than the call of the innermost module that holds the convolution and its readers (`Scope`).
"""

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from torchq.modules.channels_last import ChannelsLast
from torchq.modules.convolving import format_of, strides_of
from torchq.modules.made import taken_apart
from torchq.modules.pending import Deferred, Scope
from torchq.modules.writes import run_on_values
from torchq.numerics.qparams import QParams


class Codes(NamedTuple):
    """Values as u8 codes, which nobody writes to.

    Args:
        codes: uint8 (N, *spatial, C).
        qparams: their scale and zero point.
        dtype: of the values.
    """

    codes: Tensor
    qparams: QParams
    dtype: torch.dtype

    def values(self) -> "Codes":
        """Itself: nothing can have changed it."""
        return self

    def dequantized(self, last: bool) -> Tensor:
        """(code - zero_point) * scale, as (N, C, *spatial), with the channels last in memory or first.

        >>> codes = torch.tensor([[[3, 5]]], dtype=torch.uint8)
        >>> Codes(codes, QParams(0.5, 3), torch.float32).dequantized(last=False)
        tensor([[[0.],
                 [1.]]])
        """
        values = (self.codes.to(torch.int32) - self.qparams.zero_point).float() * self.qparams.scale
        values = values.to(self.dtype).movedim(-1, 1)
        if last and values.dim() == 3:
            return values
        return values.contiguous(memory_format=format_of(values.dim(), last))


class CodedSum(Deferred):
    """A tensor (N, C, *spatial) of the values of these codes, laid out as torch would have it."""

    @staticmethod
    def __new__(cls, held: Codes, last: bool, scope: Scope) -> Any:
        """In whose call it is made, and ends."""
        shape = (held.codes.shape[0], held.codes.shape[-1], *held.codes.shape[1:-1])
        return torch.Tensor._make_wrapper_subclass(
            cls, shape, strides=strides_of(shape, last), dtype=held.dtype, device=held.codes.device, storage_size=0
        )

    def __init__(self, held: Codes, last: bool, scope: Scope) -> None:
        self._held: Codes | None = held
        self._last, self._scope = last, scope
        self._value: Tensor | None = None

    def make(self) -> Tensor:
        """The values. Every call gives the same tensor, so a write into it is seen by all later readers."""
        if self._held is not None:
            self._value = self._held.dequantized(self._last)
            self._held = None
        return self._value  # type: ignore[return-value]

    def codes(self) -> Codes | None:
        """The codes, until something has read the values."""
        return self._held

    def waiting(self) -> "CodedSum":
        """Itself, to be made at the end of the call that it belongs to."""
        self._scope.deferred().append(weakref.ref(self))  # type: ignore[union-attr]
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Runs an operation on the values, unless it is a part of a convolution that waits."""
        if any(kind not in (cls, ChannelsLast) and issubclass(kind, Deferred) for kind in types):
            return NotImplemented
        parts = taken_apart(func, args, kwargs or {})
        if parts is not NotImplemented:
            return parts
        args, kwargs = tree_map_only(cls, lambda each: each.make(), (args, kwargs or {}))
        return run_on_values(func, args, kwargs)
