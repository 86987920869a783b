"""PendingConv: the output of an int8 convolution that waits for what follows it, wherever that is in the model.

    conv ─► norm, which the weight includes ─► (+ residual) ─► activation ─► conv, which takes u8 codes

In a block of a network these are called by name, and nothing tells a convolution what will be done with its output.
Where calibration has seen it, the convolution returns a tensor without memory. Operations that its plan names (`Fold`)
become a part of it. An activation that nothing but a convolution reads does not run before that one asks for codes.
Whatever else reads the tensor gets its values, which are then computed. So no control flow gives a wrong value.

As a `Pending`, it lives no longer than the call of the innermost module that holds all of them. It refers to its input
and to the other summand; where somebody has written to one of them before it was computed, it raises an error.
"""

import math
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from torchq.modules import gradients, writes
from torchq.modules.channels_last import ChannelsLast
from torchq.modules.coded_sum import CodedSum, Codes
from torchq.modules.convolving import Output, is_zero_padding, output_of, with_zeros
from torchq.modules.made import taken_apart
from torchq.modules.pending import Deferred
from torchq.modules.refusals import explained
from torchq.modules.writes import Private, Unwritten, is_eager, run_on_values
from torchq.numerics.qparams import QParams
from torchq.ops import Activation

MIN_VALUES = 1 << 12
"""A convolution waits if it gives at least so many values: what follows costs no more than waiting on fewer."""

_aten = torch.ops.aten
_SUMS = (_aten.add.Tensor, _aten.add_.Tensor)


class PendingConv(Deferred):
    """`act(conv(x) + residual)`, computed when it is read."""

    @staticmethod
    def __new__(cls, layer: Any, x: Any, output: Output, dtype: Any, deferred: Any, around: Any = ()) -> Any:
        """The output of this QuantizedConv for x: floats, or codes in its own `input_qparams`, channels last.

        `around` are zeros that x lacks, as nn.functional.pad takes them.
        It is made at the end of the call that it belongs to, where `deferred` is what waits for that.
        """
        return torch.Tensor._make_wrapper_subclass(
            cls, output.shape, strides=output.strides, dtype=dtype, device=x.tensor.device, storage_size=0
        )

    def __init__(
        self,
        layer: Any,
        x: Unwritten | Private,
        output: Output,
        dtype: Any,
        deferred: list[Any],
        around: tuple[int, ...] = (),
    ) -> None:
        self.layer, self._x, self.output, self._around = layer, x, output, around
        self._deferred = deferred
        deferred.append(weakref.ref(self))
        self._activation: int = Activation.NONE
        self._residual: Unwritten | Codes | None = None
        self.padding: tuple[int, ...] = ()  # zeros around the values, as nn.functional.pad takes them
        self._value: Tensor | None = None

    def make(self) -> Tensor:
        """The values. Every call gives the same tensor, so a write into it is seen by all later readers."""
        if self._value is None:
            y = self._run(None, self._activation)
            self._value = nn.functional.pad(y, self.padding) if self.padding else y
            del self._x, self._residual
        return self._value

    def end(self) -> None:
        """That call ends, or fails. If its values can't be had, only who reads it gets the error."""
        with suppress(RuntimeError, MemoryError):
            self.make()

    def followed_by(self, activation: int) -> Tensor | None:
        """What this activation makes of it, where nobody else has it yet; None if the plan names another one."""
        fold = self.layer.fold
        if activation != fold.activation or fold.adds:
            return None
        self._activation = activation
        return self if fold.codes else self.make()

    def overwritten_by(self, activation: int) -> Tensor | None:
        """As there, past the dispatcher, if nobody has its values yet and the plan names this activation."""
        y = self._activated(_Found(activation, True), (self,)) if self._value is None else None
        if y is not None and not self.is_inference():  # in inference mode nobody is told who has no values
            torch.autograd.graph.increment_version(self)
        return y

    # Sums by the operators, past the dispatcher and the mode that counts writes: with cold caches that is 20 us.

    def __add__(self, other: Any) -> Any:
        y = self._sum(_aten.add.Tensor, (self, other), {}) if self._adds_unseen(other) else None
        return super().__add__(other) if y is None else y

    def __iadd__(self, other: Any) -> Any:
        y = self._sum(_aten.add_.Tensor, (self, other), {}) if self._adds_unseen(other) else None
        if y is None:
            return super().__iadd__(other)
        if not self.is_inference():  # nobody has its values yet, who would have to be told in inference mode
            torch.autograd.graph.increment_version(self)
        return y

    def _adds_unseen(self, other: Any) -> bool:
        """Whether nobody but itself would see a sum with this tensor."""
        plain = self._value is None and type(other) in (Tensor, PendingConv, CodedSum, ChannelsLast)
        if not plain or writes.modes() or gradients.wanted(other):
            return False
        if other.is_neg() or other._is_zerotensor():  # its memory is not what it means, which the dispatcher sees to
            return False
        seen = torch._C._get_tracing_state() or torch._C._are_functorch_transforms_active()
        of_this_mode = self.is_inference() == torch.is_inference_mode_enabled()
        return of_this_mode and not seen and not torch.autograd.profiler._is_profiler_enabled

    def codes(self, qparams: QParams) -> Tensor | None:
        """u8 codes (N, *spatial, C) of the values, without their `padding`; None if they are there as floats."""
        if self._value is not None or self._residual is not None:
            return None
        codes = self._run(qparams, self._activation)
        self._x.serve()
        return codes

    def _run(self, y_qparams: QParams | None, activation: int) -> Tensor:
        residual = None if self._residual is None else self._residual.values()
        x = self._x.values()
        try:
            settings = (activation, residual, y_qparams, self._around)
            return self.layer.computed(self.dtype, self.output.last, x, *settings)  # type: ignore[no-any-return]
        except RuntimeError as error:
            known = explained(error, x, type(self.layer).__name__)
            if known is error:
                raise
            raise known from None

    def _copy(self, padding: tuple[int, ...] = ()) -> "PendingConv":
        """Another one, with zeros around its values."""
        output = with_zeros(self.output, padding) if padding else self.output
        other = PendingConv(self.layer, self._x, output, self.dtype, self._deferred, self._around)
        other._activation, other._residual, other.padding = self._activation, self._residual, padding
        return other

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Makes the operation a part of it, if the layer's plan names it; any other operation gets the values."""
        for first in args[:2]:
            if isinstance(first, PendingConv) and first._value is None:
                taken = first._taken(func, args, kwargs or {})
                if taken is not None:
                    return taken
                break
        parts = taken_apart(func, args, kwargs or {})
        if parts is not NotImplemented:
            return parts
        args, kwargs = tree_map_only(PendingConv, lambda pending: pending.make(), (args, kwargs or {}))
        return run_on_values(func, args, kwargs)

    def _taken(self, func: Any, args: Any, kwargs: Any) -> Tensor | None:
        """The operation as a part of it; None if its plan names no such operation."""
        if func in _SUMS:
            return self._sum(func, args, kwargs)
        found = _activation_of(func, args, kwargs)
        return self._padded(func, args, kwargs) if found is None else self._activated(found, args)

    def _sum(self, func: Any, args: Any, kwargs: Any) -> Tensor | None:
        """The sum with another tensor, as one pending; None if this is no such operation."""
        fold = self.layer.fold
        waits = fold.adds and self._residual is None and self._activation == Activation.NONE
        if not waits or kwargs or len(args) != 2:
            return None
        if func is _aten.add_.Tensor and args[0] is not self:
            return None
        other = args[1] if args[0] is self else args[0]
        if other is self or not isinstance(other, Tensor) or (other.shape, other.dtype) != (self.shape, self.dtype):
            return None
        residual: Unwritten | Codes | None = codes_of(other)
        if residual is None:
            values = as_it_lies(other)
            if type(values) is not Tensor or (values.is_inference() and not torch.is_inference_mode_enabled()):
                return None
            residual = Unwritten(values, other)
        result = self if func is _aten.add_.Tensor else self._copy()
        result._residual = residual
        return result._settled(in_place=result is self)

    def _activated(self, found: "_Found", args: Any) -> Tensor | None:
        """The activation of it; None if this is not the one that the plan names."""
        fold = self.layer.fold
        waits = fold.adds == (self._residual is not None) and self._activation == Activation.NONE
        alone = args[0] is self
        if found.kind != fold.activation or found.kind == Activation.NONE or not waits or not alone:
            return None
        if found.in_place:
            self._activation = found.kind
            return self._settled(in_place=True)
        if not fold.codes or self._residual is not None:  # nothing more to wait for
            return self._run(None, found.kind)
        result = self._copy()
        result._activation = found.kind
        return result

    def _padded(self, func: Any, args: Any, kwargs: Any) -> Tensor | None:
        """It with zeros around, which codes have exactly; None if this is another operation, or no codes are wanted."""
        fold = self.layer.fold
        waits = fold.codes and self._residual is None and self._activation == fold.activation and not self.padding
        if not waits or not is_zero_padding(func, args, kwargs):
            return None
        return self._copy(tuple(args[1]) if any(args[1]) else ())

    def _settled(self, *, in_place: bool) -> Tensor:
        """Itself, if more is to come; else its values, so that it need not refer to other tensors any longer."""
        fold = self.layer.fold
        if fold.activation != self._activation or (fold.codes and self._residual is None):
            return self
        y = self.make()
        return self if in_place else y


def waiting_for(
    layer: Any, x: Tensor, dtype: Any, last: bool, sizes: Sequence[int], given: Tensor | None, around: tuple[int, ...]
) -> PendingConv | None:
    """The output of this QuantizedConv for x, if it has enough values to wait for what its plan names.

    The arguments are those of `QuantizedConv._int8_or_later`.
    """
    fold, scope = layer.fold, layer.scope
    if scope is None or not (fold.codes or fold.adds or fold.activation != Activation.NONE):
        return None
    deferred = scope.deferred()
    if deferred is None or not is_eager(x):
        return None
    output = output_of(layer.geometry, x.shape[0], sizes, last)
    if math.prod(output.shape) < MIN_VALUES:
        return None
    held = Private(x) if given is None else Unwritten(x, given)
    return PendingConv(layer, held, output, dtype, deferred, around)


def may_wait(layer: Any, activation: int) -> bool:
    """Whether `act(layer(x))` may wait for what follows both."""
    return layer.fold.codes or _comes_more(layer, activation)


def _comes_more(layer: Any, activation: int) -> bool:
    """Whether its plan names something behind this activation."""
    return layer.fold.adds or layer.fold.activation != activation  # type: ignore[no-any-return]


def handed_on(
    layer: Any,
    x: Tensor,
    last: bool,
    sizes: Sequence[int],
    activation: int,
    given: Tensor | None,
    around: tuple[int, ...],
) -> Tensor:
    """`act(layer(x))` in float32, as the layer and an activation behind it give it; it may wait for what follows both.

    The other arguments are those of `waiting_for`.
    """
    more = _comes_more(layer, activation)
    waits = may_wait(layer, activation)
    waiting = waiting_for(layer, x, torch.float32, last, sizes, given, around) if waits else None
    y = waiting if waiting is None or more else waiting.followed_by(activation)
    return layer.computed(torch.float32, last, x, activation, None, None, around) if y is None else y


def as_it_lies(x: Tensor) -> Tensor:
    """The values of a tensor, in the memory format that they have."""
    x = x.make() if isinstance(x, PendingConv) else x
    x = x.make() if isinstance(x, CodedSum) else x
    return x.values() if isinstance(x, ChannelsLast) else x


def codes_of(x: Tensor) -> Codes | None:
    """The codes of a sum, if that is what there is of this tensor."""
    x = x._value if type(x) is PendingConv and x._value is not None else x
    return x.codes() if type(x) is CodedSum else None


class _Found(NamedTuple):
    """An activation, and whether it writes over its input."""

    kind: int
    in_place: bool = False


_ACTIVATIONS = {
    _aten.relu.default: _Found(Activation.RELU),
    _aten.relu_.default: _Found(Activation.RELU, True),
    _aten.relu6.default: _Found(Activation.RELU6),
    _aten.relu6_.default: _Found(Activation.RELU6, True),
    _aten.silu.default: _Found(Activation.SILU),
    _aten.silu_.default: _Found(Activation.SILU, True),
    _aten.hardswish.default: _Found(Activation.HARDSWISH),
    _aten.hardswish_.default: _Found(Activation.HARDSWISH, True),
}


def _activation_of(func: Any, args: Any, kwargs: Any) -> _Found | None:
    """The activation that an operation computes, if it is one."""
    if func is torch.ops.torchq.activate.default:
        return _Found(int(args[1]))
    if func is _aten.gelu.default:
        return _Found(Activation.GELU_TANH if kwargs.get("approximate") == "tanh" else Activation.GELU)
    if func in (_aten.hardtanh.default, _aten.hardtanh_.default) and tuple(args[1:]) == (0.0, 6.0) and not kwargs:
        return _Found(Activation.RELU6, func is _aten.hardtanh_.default)
    return _ACTIVATIONS.get(func)
