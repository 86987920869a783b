"""QuantizedLinear: nn.Linear in int8, and simulate(), the same in fake-quantized float."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.fx import Proxy

from torchq import _C, kernels, ops
from torchq.modules import gradients
from torchq.modules.activations import FUNCTIONS
from torchq.modules.base import Matrix
from torchq.modules.packed_weights import PackedWeights
from torchq.modules.refusals import explained, not_codes, refuse_layout
from torchq.numerics.qparams import (
    QParams,
    dequantize,
    fake_quantize,
    float32_qparams,
    quantize_weight,
    row_qparams,
)
from torchq.ops import Activation
from torchq.scopes import Scoped

# The op overloads are called directly: a call through the typed wrappers of torchq.ops takes 1.2 us more.
_linear_dynamic = torch.ops.torchq.linear_dynamic.default
_linear_static = torch.ops.torchq.linear_static.default

_simulated_anywhere = False  # in any thread: where not, no thread need look into its context


def _set_simulated_anywhere(yes: bool) -> None:
    global _simulated_anywhere
    _simulated_anywhere = yes


_simulating: Scoped[bool] = Scoped("torchq.simulate", _set_simulated_anywhere)


@contextmanager
def simulate() -> Iterator[None]:
    """Inside, every QuantizedLinear computes in float on fake-quantized values: `dequantize(quantize(x)) · wᵀ + b`.

    It has the quantization error of int8, but not the speed. The integer path differs from it only by the float32
    rounding of the sums. (If a layer's output is requantized to u8, such a rounding can cross a tie and change a code
    by one.)

    It holds for its own thread and asyncio task: other threads go on in int8, also those that were started inside. A
    DataLoader's workers are processes; forked inside, they simulate as well.

    >>> layer = QuantizedLinear.from_float(nn.Linear(8, 4))
    >>> x = torch.ones(2, 8)
    >>> with simulate():
    ...     expected = layer(x)
    >>> torch.allclose(layer(x), expected, atol=1e-6)
    True
    """
    with _simulating.of(True):
        yield


@torch.fx.wrap
def _float_dtype(x: Tensor) -> torch.dtype:
    """Of an input that is no codes. It is a node of a traced graph, so that the graph refuses codes as well."""
    if x.dtype == torch.uint8:
        raise not_codes()
    return x.dtype


def _path(module: nn.Module, x: Proxy) -> str:
    """The module's name in what torch.fx traces; empty if it is all of that, or no part of it."""
    try:
        return x.tracer.path_of_module(module)  # type: ignore[attr-defined, no-any-return]
    except (AttributeError, NameError):
        return ""


class QuantizedLinear(PackedWeights):
    """`y = act(dequantize(codes(x · c) · wᵀ) + bias)`: int8 weights, u8 activations, exact int32 sums.

    Takes (..., in_features) in float32, bfloat16 or float16 and returns (..., out_features) in the same dtype, or in
    autocast's, as nn.Linear does. Without `input_qparams` the arithmetic is that of `ops.linear_dynamic`, with them
    that of `ops.linear_static`. c is the `channel_scale`: 1 without one, and else the weight is the float layer's by c.

    Args:
        weight_int8: int8 (out_features, in_features).
        weight_scale: float32 (out_features,).
        bias: float32 (out_features,), or None.
        input_qparams: static scale and zero point of the input. None is dynamic: a pair per row.
        output_qparams: if given, the output is u8 codes, for a QuantizedLinear with these `input_qparams`.
        activation: computed in the epilogue.
        takes_codes: whether the layer before passes u8 codes, in `input_qparams`. If not, uint8 input is refused.
        dtype: of the output, if the input is u8 codes.
        channel_scale: float32 (in_features,), positive: multiplies every row of the input before it is quantized.

    Raises:
        ValueError: both takes_codes and a channel_scale, which only floats can be multiplied by.

    >>> QuantizedLinear(torch.ones(4, 8, dtype=torch.int8), torch.ones(4))(torch.ones(2, 8)).shape
    torch.Size([2, 4])
    """

    def __init__(
        self,
        weight_int8: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None = None,
        *,
        input_qparams: QParams | None = None,
        output_qparams: QParams | None = None,
        activation: Activation = Activation.NONE,
        takes_codes: bool = False,
        dtype: torch.dtype = torch.float32,
        channel_scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        if takes_codes and channel_scale is not None:
            raise ValueError(
                "QuantizedLinear: a layer with a channel_scale quantizes its own input, so it can't take codes. Leave "
                "out one of takes_codes and channel_scale."
            )
        self.out_features, self.in_features = weight_int8.shape
        self.has_bias = self.had_bias = bias is not None  # bias correction may add one later
        self.input_qparams = float32_qparams(input_qparams)
        self.output_qparams = float32_qparams(output_qparams)
        self.activation = int(activation)
        self.takes_codes = takes_codes
        self.dtype = dtype
        self._set_packed(ops.pack(weight_int8, weight_scale, bias, channel_scale))

    @classmethod
    def from_float(
        cls,
        linear: nn.Linear | Matrix,
        *,
        per_channel: bool = True,
        input_qparams: QParams | None = None,
        output_qparams: QParams | None = None,
        activation: Activation = Activation.NONE,
        takes_codes: bool = False,
        channel_scale: Tensor | None = None,
    ) -> "QuantizedLinear":
        """Quantizes the weight of an nn.Linear, symmetrically: `w_int8 = rne(w / scale)`, `scale = max|w| / 127`.

        A `Matrix`, of any module, will do as well. With a `channel_scale` c (in_features,), w is the weight divided by
        c: `x · c` times `w / c` is x times w.

        Raises:
            ValueError: in_features > 65793, or a weight that is not on the CPU or not finite.
            TypeError: a weight that is not a float.

        >>> QuantizedLinear.from_float(nn.Linear(8, 4)).weight_int8.dtype
        torch.int8
        """
        weight = linear.weight.detach()
        if weight.device.type != "cpu":
            raise ValueError(
                f"QuantizedLinear.from_float: the weight is on device {weight.device}, expected cpu. "
                "Materialize the module there first (.cpu(), or load its weights)."
            )
        if weight.shape[1] > ops.MAX_DEPTH:
            raise ValueError(
                f"QuantizedLinear.from_float: in_features = {weight.shape[1]} is too deep: int32 sums of u8 x int8 "
                f"products are exact up to {ops.MAX_DEPTH}. Leave this layer in float."
            )
        codes, scale = quantize_weight(weight, per_channel=per_channel, channel_scale=channel_scale)
        return cls(
            codes,
            scale,
            None if linear.bias is None else linear.bias.detach().float(),
            input_qparams=input_qparams,
            output_qparams=output_qparams,
            activation=activation,
            takes_codes=takes_codes,
            dtype=weight.dtype,
            channel_scale=channel_scale,
        )

    @property
    def float_bytes(self) -> int:
        """The bytes of weight and bias in `dtype`, as the float layer had them."""
        return self.out_features * (self.in_features + self.had_bias) * self.dtype.itemsize

    @property
    def int8_bytes(self) -> int:
        """The bytes of the packed weight: codes, scales, bias and padding."""
        return self.packed.numel()

    def __call__(self, input: Tensor) -> Tensor:
        """forward(), skipping nn.Module's and the dispatcher's part of the call if they have nothing to do.

        That takes 1.3 us instead of 2.6 (docs/performance.md). For comparison, multiplying one row by 768 x 768 weights
        takes 3.6 us.
        """
        if is_dynamo_compiling() or _simulated_anywhere:
            return super().__call__(input)  # type: ignore[no-any-return]
        y = _C.call_linear(self, QuantizedLinear, input)
        if y is not NotImplemented:
            return y
        if isinstance(input, Proxy) and (path := _path(self, input)):  # a leaf of a traced graph, as nn.Linear is
            return input.tracer.create_proxy("call_module", path, (input,), {})
        return super().__call__(input)  # type: ignore[no-any-return]

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features).

        Raises:
            TypeError: a dtype or layout that is none of those above.
            RuntimeError: another width or device, or a storage that was freed.
            MemoryError: no memory for the output, or for what the product needs beside it.
        """
        x, dtype = input, None  # dtype: that of the output, where autocast says so
        if torch.is_autocast_enabled("cpu") if is_dynamo_compiling() else _C.is_autocast_enabled():
            dtype = torch.get_autocast_dtype("cpu")
        if _simulated_anywhere:
            if is_dynamo_compiling() and gradients.wanted(x):  # training in simulate(): the graph is of its thread
                return self._simulated(x, dtype)
            if is_dynamo_compiling():  # no graph knows which thread will run it
                return self._int8_or_simulated(x, dtype)
            if _simulating.get():
                refuse_layout(x)
                with torch.autocast("cpu", enabled=False):
                    return self._simulated(x, dtype)
        try:
            return self._int8(x, dtype)
        except RuntimeError as error:
            known = explained(error, x)
            if known is error:
                raise
            raise known from None

    def _int8(self, x: Tensor, dtype: torch.dtype | None) -> Tensor:
        packed = self._buffers["packed"]  # faster than self.packed, which finds it after three failed look-ups
        if gradients.wanted(x):
            return self._with_gradient(x, dtype)
        if self.input_qparams is None:
            if dtype is None:
                return _linear_dynamic(x, packed, self.activation)  # type: ignore[no-any-return]
            if x.dtype is not dtype and x.dtype in (torch.bfloat16, torch.float16):
                x = x.float()  # so that the output is rounded once
            return _linear_dynamic(x, packed, self.activation).to(dtype)  # type: ignore[no-any-return]
        scale, zero_point = self.input_qparams
        own = self.dtype if self.takes_codes else _float_dtype(x)
        if self.output_qparams is not None:
            y_scale, y_zero_point = self.output_qparams
            return _linear_static(  # type: ignore[no-any-return]
                x, packed, scale, zero_point, torch.uint8, y_scale, y_zero_point, self.activation
            )
        dtype = dtype or own
        return _linear_static(x, packed, scale, zero_point, dtype, 1.0, 0, self.activation)  # type: ignore[no-any-return]

    def _with_gradient(self, x: Tensor, dtype: torch.dtype | None) -> Tensor:
        """The same values, with the gradient to x; where others get codes, their values in float32."""
        if dtype is not None and x.dtype is not dtype:
            x = x.float()  # so that the output is rounded once
        own = self.dtype if self.takes_codes else x.dtype
        y = gradients.linear(x, self.packed, self.activation, self.input_qparams, self.output_qparams, own)
        return y if dtype is None or self.output_qparams is not None else y.to(dtype)

    def _int8_or_simulated(self, x: Tensor, dtype: torch.dtype | None) -> Tensor:
        dtype = dtype or (self.dtype if self.takes_codes else _float_dtype(x))
        pairs = [list(map(float, pair or ())) for pair in (self.input_qparams, self.output_qparams)]
        y: Tensor = _linear_of_context(x, self.packed, *pairs, self.activation, self.takes_codes, dtype)
        return y

    def _simulated(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        weight, weight_scale, bias, channel_scale = self._unpacked()
        if x.dtype == torch.uint8:
            if not self.takes_codes or self.input_qparams is None:
                raise not_codes()
            x = dequantize(x, *self.input_qparams)
        rows = x.float().reshape(math.prod(x.shape[:-1]), x.shape[-1])
        if channel_scale.numel():
            rows = rows * channel_scale
        if self.input_qparams is None:
            rounded = fake_quantize(rows, *row_qparams(rows), axis=0, dtype=torch.uint8)
        else:
            rounded = fake_quantize(rows, *self.input_qparams, dtype=torch.uint8)
        rows = gradients.straight_through(rows, rounded) if gradients.wanted(rows) else rounded
        y = nn.functional.linear(rows, dequantize(weight, weight_scale, axis=0), bias)
        y = y.reshape(*x.shape[:-1], self.out_features)
        y = FUNCTIONS[Activation(self.activation)](y)
        if self.output_qparams is not None:  # stays float32, so that the next layer gets exactly these codes
            rounded = fake_quantize(y, *self.output_qparams, dtype=torch.uint8)
            return gradients.straight_through(y, rounded) if gradients.wanted(y) else rounded
        return y.to(dtype or (self.dtype if self.takes_codes else x.dtype))

    def extra_repr(self) -> str:
        """Scheme and kernel, for `repr`."""
        scheme = "dynamic" if self.input_qparams is None else "static"
        parts = [f"in_features={self.in_features}", f"out_features={self.out_features}", f"bias={self.has_bias}"]
        parts += [f"scheme={scheme}", f"kernel={kernels.active()}"]
        if ops.has_channel_scale(self.packed, self.in_features):
            parts.append("channel_scale=True")
        if self.activation != Activation.NONE:
            parts.append(f"activation={Activation(self.activation).name.lower()}")
        if self.output_qparams is not None:
            parts.append("out=uint8")
        return ", ".join(parts)


@torch.library.custom_op("torchq::linear_of_context", mutates_args=())
def _linear_of_context(
    x: Tensor,
    packed: Tensor,
    input_qparams: list[float],
    output_qparams: list[float],
    activation: int,
    takes_codes: bool,
    dtype: torch.dtype,
) -> Tensor:
    """A QuantizedLinear in a compiled graph: int8, or simulated where the thread that runs it is inside simulate().

    It stands only in graphs that were compiled while some thread simulated. Compiled code looks at globals before it
    runs, and cannot look into its context; so the others hold the ops themselves.
    """
    layer = QuantizedLinear.__new__(QuantizedLinear)
    nn.Module.__init__(layer)
    layer.register_buffer("packed", packed, persistent=False)
    layer.in_features, layer.out_features = x.shape[-1], ops.out_features(packed, x.shape[-1])
    layer.input_qparams, layer.output_qparams = (
        QParams(pair[0], int(pair[1])) if pair else None for pair in (input_qparams, output_qparams)
    )
    layer.activation, layer.takes_codes, layer.dtype = activation, takes_codes, dtype
    return layer._simulated(x, dtype) if _simulating.get() else layer._int8(x, dtype)


@_linear_of_context.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    input_qparams: list[float],
    output_qparams: list[float],
    activation: int,
    takes_codes: bool,
    dtype: torch.dtype,
) -> Tensor:
    y = x.new_empty((*x.shape[:-1], ops.out_features(packed, x.shape[-1])), dtype=dtype)
    return y if not output_qparams else y.to(torch.uint8)
