"""QuantizedConv1d, QuantizedConv2d, QuantizedConv3d: nn.Conv1d, nn.Conv2d and nn.Conv3d in int8."""

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.nn.modules.module import _has_any_global_hook

from torchq import _C, kernels
from torchq.modules import gradients, simulation, writes
from torchq.modules.activations import FUNCTIONS
from torchq.modules.channels_last import ChannelsLast
from torchq.modules.coded_sum import CodedSum, Codes
from torchq.modules.convolving import (
    Settings,
    along,
    along_weight,
    as_rows,
    convolved,
    in_format,
    is_channels_last,
    numbers_of,
    padded,
    qparams_as_numbers,
    rounded_by,
    tiles,
)
from torchq.modules.float_view import FloatView
from torchq.modules.folding import NOTHING, Fold
from torchq.modules.packed_weights import PackedWeights
from torchq.modules.pending import Scope
from torchq.modules.pending_conv import MIN_VALUES, PendingConv, as_it_lies, codes_of, waiting_for
from torchq.modules.quantized_linear import autocast_dtype
from torchq.modules.refusals import explained, not_codes, refuse_layout
from torchq.modules.tracing import Leaf
from torchq.modules.writes import is_eager
from torchq.numerics.qparams import QParams, dequantize, float32_qparams
from torchq.ops import Activation, activate
from torchq.ops.convolution import is_depthwise, pack, packed_bytes, unpack

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_convolution = torch.ops.torchq.convolution.default
_linear_dynamic = torch.ops.torchq.linear_dynamic.default


class QuantizedConv(Settings, PackedWeights, Leaf):
    """`y = conv(dequantize(codes(x · c)), w) + bias`: int8 weights, u8 activations, exact int32 sums.

    Takes (N, in_channels, *spatial), or without N, in float32, bfloat16 or float16, and returns what the float module
    does: the same shape, dtype (or autocast's) and memory format. Without `input_qparams` each sample has a scale and
    zero point of its own; where patches do not overlap (kernel 1, or as wide as the stride), each patch has, as a row
    of a linear layer; and a depthwise one multiplies floats as they are. c is the `channel_scale`: 1 without one, and
    else the weight is the float layer's by c.

    Args:
        weight_int8: int8 (out_channels, in_channels / groups, *kernel).
        weight_scale: float32 (out_channels,).
        bias: float32 (out_channels,), or None.
        like: an nn.Conv1d, nn.Conv2d or nn.Conv3d, for its geometry, padding mode and memory format.
        input_qparams: static scale and zero point of the input. None is dynamic.
        fold: what may be computed together with this layer.
        dtype: of `weight` and `bias`, as other code reads them.
        channel_scale: float32 (in_channels,), positive; without groups, or with one for each channel.
    """

    dimensions: ClassVar[int]
    fixed = (*PackedWeights.fixed, "in_channels", "out_channels", "kernel_size", "groups")
    scope: Scope | None = None  # in whose calls the output may wait for what follows
    includes: str | None = None  # the name of the norm behind it whose part is in the weight and the bias
    hands: Scope | None = None  # in whose calls only convolutions read the output, so that its channels may lie last

    def __init__(
        self,
        weight_int8: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None = None,
        *,
        like: nn.Module,
        input_qparams: QParams | None = None,
        fold: Fold = NOTHING,
        dtype: torch.dtype = torch.float32,
        channel_scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        conv = cast(Any, like)
        self._take_settings(conv)
        self.out_features, self.in_features = weight_int8.shape[0], weight_int8.shape[1:].numel()
        self.has_bias = self.had_bias = bias is not None
        self.input_qparams = float32_qparams(input_qparams)
        self.fold, self.dtype = fold, dtype
        self._weight_last = is_channels_last(conv.weight)
        self._set_packed(self._pack(weight_int8, weight_scale, bias, channel_scale))

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> Any:
        """As nn.Module's. A hook of a layer that includes a norm sees what the norm gives, and a warning says so."""
        if self.includes is not None:
            warnings.warn(
                "torchq: this forward hook sees the output of a convolution behind the norm that is in its int8 weight "
                "(repr() names it). Register it before convert(), and the norm stays a module of its own.",
                stacklevel=2,
            )
        return super().register_forward_hook(*args, **kwargs)

    @property
    def takes_codes(self) -> bool:
        """Whether codes could be handed to it: it is static, pads with zeros and has no channel_scale."""
        reads = self.input_qparams is not None and self.padding_mode == "zeros"
        return reads and not self._scales_channels(cast(Tensor, self._buffers["packed"]))

    @property
    def float_bytes(self) -> int:
        """The bytes of weight and bias in `dtype`, as the float layer had them."""
        return self.out_features * (self.in_features + self.had_bias) * self.dtype.itemsize

    @property
    def int8_bytes(self) -> int:
        """The bytes of the packed weight: codes, scales, bias and padding."""
        return int(self.packed.numel())

    # ---- What PackedWeights asks for ---------------------------------------------------------------------------------

    @property
    def _weight_shape(self) -> tuple[int, ...]:
        return self.out_channels, self.in_channels // self.groups, *self.geometry.kernel

    @property
    def _channels(self) -> int:
        return self.in_channels

    def _pack(self, weight_int8: Tensor, scale: Tensor, bias: Tensor | None, channel_scale: Tensor | None) -> Tensor:
        return pack(weight_int8, scale, bias, channel_scale, self.groups)

    def _unpacked(self, packed: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        weight, scale, bias, channel_scale = unpack(self.packed if packed is None else packed, self.geometry)
        return weight, scale, bias, scale[:0] if channel_scale is None else channel_scale

    def _scales_channels(self, packed: Tensor) -> bool:
        if self.groups > 1 and packed.dim() > 1:  # that form may have a place for one, but no plan gives one
            return False
        return packed.numel() >= _bytes_with_scale(self._weight_shape, self.groups)

    def _float_weight(self, packed: Tensor) -> Tensor:
        weight, scale, _, channel_scale = self._unpacked(packed)
        values = dequantize(weight, scale, axis=0)
        return values * along_weight(channel_scale, values, self.groups) if channel_scale.numel() else values

    def _weight_view(self, packed: Tensor) -> FloatView:
        like = torch.empty(self._weight_shape, dtype=self.dtype, device="meta")
        return FloatView(lambda: self._float_weight(packed).to(self.dtype), like, packed.device)

    def rows(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Codes (N, K) in the order of a patch, scales (N,), bias (N,), and the channel_scale (C,) or None."""
        weight, *others = super().rows()
        return as_rows(weight), *others  # type: ignore[return-value]

    def replace_weight(self, weight_int8: Tensor, weight_scale: Tensor, bias: Tensor | None) -> None:
        """Takes other codes (N, K), in the order of a patch, scales (N,) and bias (N,), for the same channel_scale."""
        shape = self._weight_shape
        weight_int8 = weight_int8.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
        super().replace_weight(weight_int8, weight_scale, bias)

    # ---- The call ----------------------------------------------------------------------------------------------------

    def forward(self, input: Tensor) -> Tensor:
        """(N, in_channels, *spatial), or without N, -> (N, out_channels, *out).

        Raises:
            TypeError: a dtype or layout that is none of those above.
            RuntimeError: another number of channels or dimensions, or an image smaller than the kernel.
        """
        if input.dim() == self.dimensions + 1:
            return self.fused(input.unsqueeze(0)).squeeze(0).contiguous()
        return self.fused(input)

    def fused(self, x: Tensor, activation: int = Activation.NONE) -> Tensor:
        """`act(forward(x))` of a batch; or what computes it later, where the plan says what follows."""
        writes.go_on()
        given = x
        if type(x) is PendingConv:
            codes = x.codes(self.input_qparams) if self.input_qparams and self._takes_codes_of(x.layer) else None
            if codes is not None:
                sizes = x.output.shape[2:]
                return self._int8_or_later(codes, x.dtype, self.gives_last(x), sizes, activation, around=x.padding)
        held = codes_of(x)
        if held is not None and held.qparams == self.input_qparams and self._takes_codes_now():
            self._check_shape(x)
            dtype, last = autocast_dtype() or x.dtype, self.gives_last(x)
            return self._int8_or_later(held.codes, dtype, last, x.shape[2:], activation)
        x = as_it_lies(x)
        if x.dtype not in _FLOATS:
            raise (
                not_codes(type(self).__name__)
                if x.dtype == torch.uint8
                else TypeError(f"{type(self).__name__}: x must be float32, bfloat16 or float16, got {x.dtype}.")
            )
        refuse_layout(x, type(self).__name__)
        self._check_shape(x)
        dtype, last = autocast_dtype() or x.dtype, self.gives_last(given)
        x = padded(x, self)
        try:
            if simulation.anywhere and simulation.simulating.get():
                with torch.autocast("cpu", enabled=False):
                    return in_format(FUNCTIONS[Activation(activation)](self._simulated(x)).to(dtype), last)
            if gradients.wanted(x):
                with torch.autocast("cpu", enabled=False):
                    return in_format(self._differentiable(x, activation).to(dtype), last)
            return self._int8_or_later(x, dtype, last, x.shape[2:], activation, given)
        except RuntimeError as error:
            known = explained(error, x, type(self).__name__)
            if known is error:
                raise
            raise known from None

    def gives_last(self, x: Tensor) -> bool:
        """Whether torch would give the output for x channels last."""
        return self.gives_last_after(x.output.last if type(x) is PendingConv else is_channels_last(x))

    def gives_last_after(self, last: bool) -> bool:
        """The same for an input that has them so, or not. Circular padding loses its format."""
        return self.dimensions > 1 and (self._weight_last or (last and self.padding_mode != "circular"))

    def _takes_codes_of(self, layer: "QuantizedConv") -> bool:
        return layer.fold.codes and self._takes_codes_now()

    def _takes_codes_now(self) -> bool:
        return self.takes_codes and _has_no_hooks(self)

    def _int8_or_later(
        self,
        x: Tensor,
        dtype: torch.dtype,
        last: bool,
        sizes: Sequence[int],
        activation: int,
        given: Tensor | None = None,
        around: tuple[int, ...] = (),
    ) -> Tensor:
        """The output for x, floats given as `given`, or codes in the layer's qparams, channels last, which none writes.

        `sizes` are those of x with the zeros `around` it, which codes lack.
        """
        alone = activation == Activation.NONE and not is_dynamo_compiling()
        waiting = waiting_for(self, x, dtype, last, sizes, given, around) if alone else None
        return self._floats(x, activation, dtype, last, around=around) if waiting is None else waiting

    def computed(
        self,
        dtype: torch.dtype,
        last: bool,
        x: Tensor,
        activation: int,
        residual: Tensor | Codes | None,
        y_qparams: QParams | None,
        around: tuple[int, ...] = (),
    ) -> Tensor:
        """`act(conv(x) + residual)` in this dtype, channels last or first, or as codes, channels last.

        `around` are zeros that x lacks, as nn.functional.pad takes them.
        """
        if y_qparams is None:
            return self._floats(x, activation, dtype, last, residual, around)
        return self._int8(x, activation, dtype, last, residual, y_qparams, around)

    def _floats(
        self,
        x: Tensor,
        activation: int,
        dtype: torch.dtype,
        last: bool,
        residual: Tensor | Codes | None = None,
        around: tuple[int, ...] = (),
    ) -> Tensor:
        """The output as torch lays it out; or as it is computed, behind a tensor that torch's readers see so."""
        over, qparams = self.hands_over(x), self.fold.sum_qparams
        if over and qparams is not None and residual is not None and activation == self.fold.activation:
            codes = self._int8(x, activation, dtype, True, residual, qparams, around)
            return CodedSum(Codes(codes, qparams, dtype), last, cast(Scope, self.hands)).waiting()
        y = self._int8(x, activation, dtype, last or over, residual, None, around)
        return self.handed(y) if over and not last else y

    def hands_over(self, x: Tensor) -> bool:
        """Whether only convolutions will read the output for x."""
        hands = None if is_dynamo_compiling() else self.hands
        return hands is not None and hands.deferred() is not None and is_eager(x)

    def handed(self, y: Tensor) -> Tensor:
        """A new output whose channels lie last, behind a tensor whose readers see them first."""
        return y.contiguous() if y.numel() < MIN_VALUES else ChannelsLast(y, cast(Scope, self.hands)).held()

    def _int8(
        self,
        x: Tensor,
        activation: int,
        dtype: torch.dtype,
        last: bool,
        residual: Tensor | Codes | None = None,
        y_qparams: QParams | None = None,
        around: tuple[int, ...] = (),
    ) -> Tensor:
        packed, pair = self._moment()
        of_residual: QParams | None = None
        if isinstance(residual, Codes):
            keeps = pair is not None and (last or y_qparams is not None)
            of_residual = residual.qparams if keeps else None
            residual = residual.codes if keeps else residual.dequantized(last)
        if self.tiled and pair is None:
            return self._by_places(x, packed, activation, dtype, last, residual)
        qparams, dtype = qparams_as_numbers(pair, y_qparams), dtype if y_qparams is None else torch.uint8
        if of_residual is not None:
            qparams += (*(() if y_qparams else (1.0, 0.0)), *map(float, of_residual))
        numbers = numbers_of(self.geometry, around) if around else self._numbers
        settings = (x, packed, numbers, qparams, dtype, last, activation, residual)
        if not is_dynamo_compiling():
            y = _C.call_convolution(writes.own_modes(), *settings)
            if y is not NotImplemented:
                return y
        return writes.unseen(_convolution, *settings)  # type: ignore[no-any-return]

    def _by_places(
        self, x: Tensor, packed: Tensor, activation: int, dtype: torch.dtype, last: bool, residual: Tensor | None
    ) -> Tensor:
        """With a scale and zero point for each tile, as a linear layer has for each row."""
        if not is_dynamo_compiling():  # pixels that lie as rows
            settings = (self._numbers, None, dtype, True, activation, residual)
            y = _C.call_convolution(writes.own_modes(), x, packed, *settings)
            if y is not NotImplemented:
                return in_format(y, last)
        rows = tiles(x, self.geometry.kernel)
        if residual is None:
            y = _linear_dynamic(rows if x.dtype is dtype else rows.float(), packed, activation).movedim(-1, 1)
        else:
            y = _linear_dynamic(rows.float(), packed, Activation.NONE).movedim(-1, 1) + residual.float()
            y = y if activation == Activation.NONE else activate(y, activation)
        return in_format(y.to(dtype), last)

    def _simulated(self, x: Tensor) -> Tensor:
        """Before the activation, in float32."""
        packed, pair = self._moment()
        weight, scale, bias, channel_scale = self._unpacked(packed)
        values = x.float()
        if channel_scale.numel():
            values = values * along(channel_scale, self.dimensions)
        by_tiles = self.tiled and pair is None
        values = tiles(values, self.geometry.kernel) if by_tiles else values
        if pair is not None or not is_depthwise(weight.shape, self.groups):
            rounded = rounded_by(values.detach(), pair, by_rows=by_tiles)
            values = gradients.straight_through(values, rounded) if gradients.wanted(values) else rounded
        exact = dequantize(weight, scale, axis=0)
        if by_tiles:
            return nn.functional.linear(values, as_rows(exact), bias).movedim(-1, 1)
        return self._convolve(values, exact, bias)

    def _differentiable(self, x: Tensor, activation: int) -> Tensor:
        """The values of int8, with the gradient of a float convolution by the weights that int8 has."""
        exact = self._convolve(x.float(), self._float_weight(self.packed), None)
        z = gradients.straight_through(exact, self._int8(x.detach().float(), Activation.NONE, torch.float32, False))
        return z if activation == Activation.NONE else activate(z, activation)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return convolved(x, weight, bias, self.geometry)

    def extra_repr(self) -> str:
        """Shape, scheme and kernel, for `repr`."""
        parts = [super().extra_repr(), f"bias={self.has_bias}"]
        parts += [f"scheme={'dynamic' if self.input_qparams is None else 'static'}"]
        parts += [f"kernel={kernels.active()}"]
        parts += [f"includes={self.includes}"] if self.includes is not None else []
        if self.fold.activation != Activation.NONE:
            parts.append(f"fuses={Activation(self.fold.activation).name.lower()}")
        return ", ".join(parts)


class QuantizedConv1d(QuantizedConv):
    """nn.Conv1d in int8: see `QuantizedConv`."""

    dimensions = 1


class QuantizedConv2d(QuantizedConv):
    """nn.Conv2d in int8: see `QuantizedConv`."""

    dimensions = 2


class QuantizedConv3d(QuantizedConv):
    """nn.Conv3d in int8: see `QuantizedConv`."""

    dimensions = 3


OF_DIMENSIONS: tuple[type[QuantizedConv], ...] = (QuantizedConv1d, QuantizedConv2d, QuantizedConv3d)


@cache
def _bytes_with_scale(shape: tuple[int, ...], groups: int) -> int:
    return packed_bytes(shape, groups, channel_scale=True)


def _has_no_hooks(module: nn.Module) -> bool:
    return not (module._forward_hooks or module._forward_pre_hooks or _has_any_global_hook())
