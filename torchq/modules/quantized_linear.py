"""QuantizedLinear: nn.Linear in int8."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.fx import Proxy

from torchq import _C, kernels, ops
from torchq.modules import gradients, simulation
from torchq.modules.activations import FUNCTIONS
from torchq.modules.base import Matrix
from torchq.modules.folding import NOTHING, Fold
from torchq.modules.packed_weights import PackedWeights
from torchq.modules.pending import Scope
from torchq.modules.refusals import explained, not_codes, refuse_layout
from torchq.modules.tracing import is_watched, path_in_graph
from torchq.numerics.fine import rounded_rows
from torchq.numerics.qparams import QParams, dequantize, fake_quantize, float32_qparams
from torchq.ops import Activation
from torchq.ops.elsewhere import check_devices
from torchq.ops.weights import quantize_weight

# The op overloads are called directly: a call through the typed wrappers of torchq.ops takes 1.2 us more.
_linear_dynamic = torch.ops.torchq.linear_dynamic.default
_linear_static = torch.ops.torchq.linear_static.default


class Codes(NamedTuple):
    """What u8 codes stand for: floats of this dtype, quantized by these qparams."""

    dtype: torch.dtype
    qparams: QParams


@torch.fx.wrap
def _float_dtype(x: Tensor) -> torch.dtype:
    """Of an input that is no codes. It is a node of a traced graph, so that the graph refuses codes as well."""
    if x.dtype == torch.uint8:
        raise not_codes()
    return x.dtype


class QuantizedLinear(PackedWeights):
    """`y = dequantize(codes(x · c) · wᵀ) + bias`: int8 weights, u8 activations, exact int32 sums.

    Takes (..., in_features) in float32, bfloat16 or float16 and returns (..., out_features) in the same dtype, or in
    autocast's, as nn.Linear does. Without `input_qparams` the arithmetic is that of `ops.linear_dynamic`, with them
    that of `ops.linear_static`. c is the `channel_scale`: 1 without one, and else the weight is the float layer's by c.
    Whatever it may be fused with, a call gives floats, before any activation.

    Args:
        weight_int8: int8 (out_features, in_features).
        weight_scale: float32 (out_features,).
        bias: float32 (out_features,), or None.
        input_qparams: static scale and zero point of the input. None is dynamic: a pair per row.
        fold: what an `Int8Sequential` may run together with this layer.
        dtype: of `weight` and `bias`, as other code reads them.
        channel_scale: float32 (in_features,), positive: multiplies every row of the input before it is quantized. Such
            a layer takes no codes.

    >>> QuantizedLinear(torch.ones(4, 8, dtype=torch.int8), torch.ones(4))(torch.ones(2, 8)).shape
    torch.Size([2, 4])
    """

    codes_a_value = 1
    scope: Scope | None = None  # in whose calls the output may wait for its reader

    def __init__(
        self,
        weight_int8: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None = None,
        *,
        input_qparams: QParams | None = None,
        fold: Fold = NOTHING,
        dtype: torch.dtype = torch.float32,
        channel_scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_int8.shape
        self.has_bias = self.had_bias = bias is not None  # bias correction may add one later
        self.input_qparams = float32_qparams(input_qparams)
        self.fold = fold
        self.dtype = dtype
        self._set_packed(ops.pack(weight_int8, weight_scale, bias, channel_scale))

    @classmethod
    def from_float(
        cls,
        linear: nn.Linear | Matrix,
        *,
        per_channel: bool = True,
        input_qparams: QParams | None = None,
        fold: Fold = NOTHING,
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
            fold=fold,
            dtype=weight.dtype,
            channel_scale=channel_scale,
        )

    @property
    def takes_codes(self) -> bool:
        """Whether codes could be handed to it: it is static, and has no channel_scale, which multiplies floats."""
        return self.input_qparams is not None and not ops.has_channel_scale(self.packed, self.in_features)

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
        if is_dynamo_compiling():
            plain = type(self) is QuantizedLinear
            return _in_graph(self, input) if plain else super().__call__(input)
        y = _C.call_linear(self, QuantizedLinear, input)
        if y is not NotImplemented:
            return y
        if isinstance(input, Proxy) and (path := path_in_graph(self, input)):  # a leaf, as nn.Linear is
            return input.tracer.create_proxy("call_module", path, (input,), {})
        return super().__call__(input)  # type: ignore[no-any-return]

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features).

        Raises:
            TypeError: a dtype or layout that is none of those above.
            RuntimeError: another width or device, or a storage that was freed.
            MemoryError: no memory for the output, or for what the product needs beside it.
        """
        if not is_dynamo_compiling():
            try:
                y = _C.call_op(self, input, _linear_dynamic, _linear_static)
                if y is not NotImplemented:
                    return y
            except RuntimeError:  # it will come again, and be explained
                pass
        return self.fused(input)

    def fused(
        self,
        x: Tensor,
        activation: int = Activation.NONE,
        y_qparams: QParams | None = None,
        *,
        codes: Codes | None = None,
    ) -> Tensor:
        """`act(forward(x))`, from and to codes where these are asked for: by whom they are known to reach.

        Where a gradient is wanted, and inside simulate(), there are no codes, but the values that they stand for, in
        float32.

        Args:
            x: floats, or u8 codes.
            activation: an `Activation`, computed in the epilogue.
            y_qparams: if given, y is u8 codes in them. Only if the layer is static.
            codes: what the codes x stand for; y is floats of the same dtype. None if x is floats.
        """
        dtype = autocast_dtype()
        if simulation.anywhere:
            simulated = self._where_some_simulate(x, activation, y_qparams, codes, dtype)
            if simulated is not None:
                return simulated
        try:
            return self._int8(x, activation, y_qparams, codes, dtype)
        except RuntimeError as error:
            known = explained(error, x)
            if known is error:
                raise
            raise known from None

    def _where_some_simulate(
        self,
        x: Tensor,
        activation: int,
        y_qparams: QParams | None,
        codes: Codes | None,
        dtype: torch.dtype | None,
    ) -> Tensor | None:
        """`fused` in this thread if it simulates, else None. A graph has both, and looks when it runs."""
        dtype = dtype or _stood_for(x, codes)
        if is_dynamo_compiling() and not gradients.wanted(x):  # no graph knows which thread will run it
            assert y_qparams is None
            packed, pair = self._moment()
            numbers = list(map(float, pair or ()))
            y: Tensor = _linear_of_context(x, packed, numbers, activation, dtype, self.codes_a_value)
            return y
        if not is_dynamo_compiling() and not simulation.simulating.get():
            return None
        refuse_layout(x)
        with torch.autocast("cpu", enabled=False):  # in training, the graph is of its thread
            return self._simulated(x, activation, y_qparams, codes, dtype)

    def _int8(
        self,
        x: Tensor,
        activation: int,
        y_qparams: QParams | None,
        codes: Codes | None,
        dtype: torch.dtype | None,
    ) -> Tensor:
        """`fused`; `dtype` is that of autocast, if any."""
        packed, pair = self._moment()
        if codes is not None:  # another thread may have given the layer another pair since they were made
            pair = codes.qparams
        if gradients.wanted(x):
            if dtype is not None and x.dtype is not dtype:
                x = x.float()  # so that the output is rounded once
            y = gradients.linear(x, packed, activation, pair, y_qparams, x.dtype if codes is None else codes.dtype)
            return y if dtype is None or y_qparams is not None else y.to(dtype)
        if pair is None:
            if dtype is None:
                return _linear_dynamic(x, packed, activation)  # type: ignore[no-any-return]
            if x.dtype is not dtype and x.dtype in (torch.bfloat16, torch.float16):
                x = x.float()  # so that the output is rounded once
            return _linear_dynamic(x, packed, activation).to(dtype)  # type: ignore[no-any-return]
        own = _stood_for(x, codes)
        if y_qparams is not None:
            return _linear_static(x, packed, *pair, torch.uint8, *y_qparams, activation)  # type: ignore[no-any-return]
        return _linear_static(x, packed, *pair, dtype or own, 1.0, 0, activation)  # type: ignore[no-any-return]

    def _simulated(
        self, x: Tensor, activation: int, y_qparams: QParams | None, codes: Codes | None, dtype: torch.dtype
    ) -> Tensor:
        packed, pair = self._moment()
        pair = pair if codes is None else codes.qparams
        weight, weight_scale, bias, channel_scale = self._unpacked(packed)
        rows = x.float().reshape(math.prod(x.shape[:-1]), x.shape[-1])
        scale = channel_scale if channel_scale.numel() else None
        rounded = self._rounded(rows, scale, pair)
        rows = rows if scale is None else rows * scale
        rows = gradients.straight_through(rows, rounded) if gradients.wanted(rows) else rounded
        y = nn.functional.linear(rows, dequantize(weight, weight_scale, axis=0), bias)
        y = y.reshape(*x.shape[:-1], self.out_features)
        y = FUNCTIONS[Activation(activation)](y)
        if y_qparams is None:
            return y.to(dtype)
        rounded = fake_quantize(y, *y_qparams, dtype=torch.uint8)  # float32, so the next layer gets exactly these codes
        return gradients.straight_through(y, rounded) if gradients.wanted(y) else rounded

    def _rounded(self, rows: Tensor, channel_scale: Tensor | None, pair: QParams | None) -> Tensor:
        """What the codes of rows (R, K), times their channel_scale, stand for."""
        if pair is None:
            return rounded_rows(rows, channel_scale)
        return fake_quantize(rows if channel_scale is None else rows * channel_scale, *pair, dtype=torch.uint8)

    def extra_repr(self) -> str:
        """Scheme and kernel, for `repr`."""
        scheme = "dynamic" if self.input_qparams is None else "static"
        parts = [f"in_features={self.in_features}", f"out_features={self.out_features}", f"bias={self.has_bias}"]
        parts += [f"scheme={scheme}", f"kernel={kernels.active()}"]
        if ops.has_channel_scale(self.packed, self.in_features):
            parts.append("channel_scale=True")
        if self.fold.activation != Activation.NONE:
            parts.append(f"fuses={Activation(self.fold.activation).name.lower()}")
        if self.fold.codes:
            parts.append("passes=uint8")
        return ", ".join(parts)


def _in_graph(layer: QuantizedLinear, x: Tensor) -> Tensor:
    """A call in a graph of torch.compile.

    Whatever is read of the layer becomes a guard, which every call of the graph passes. So where it comes to the op
    alone, it is found with the fewest looks: 15 guards a layer instead of 26.
    """
    if is_watched(layer) or simulation.anywhere or gradients.wanted(x) or torch.is_autocast_enabled("cpu"):
        return nn.Module.__call__(layer, x)  # type: ignore[no-any-return]
    state = layer.__dict__
    packed, pair = state["_buffers"]["packed"], state["input_qparams"]
    if pair is None:
        return _linear_dynamic(x, packed, Activation.NONE)  # type: ignore[no-any-return]
    return _linear_static(x, packed, *pair, _float_dtype(x), 1.0, 0, Activation.NONE)  # type: ignore[no-any-return]


def products(layers: tuple[nn.Module, ...], x: Tensor) -> tuple[Tensor, ...]:
    """What each of these layers gives for x. In a plain eager call, layers that make the same codes of it share them.

    >>> q, k = torch.nn.Linear(8, 4), torch.nn.Linear(8, 2)
    >>> [y.shape[1] for y in products((QuantizedLinear.from_float(q), QuantizedLinear.from_float(k)), torch.ones(3, 8))]
    [4, 2]
    """
    if not is_dynamo_compiling():
        y = _C.call_together(layers, QuantizedLinear, x)
        if y is not NotImplemented:
            return y
    return tuple([layer(x) for layer in layers])


def _stood_for(x: Tensor, codes: Codes | None) -> torch.dtype:
    """The dtype of x, or of the floats that it stands for."""
    return _float_dtype(x) if codes is None else codes.dtype


def autocast_dtype() -> torch.dtype | None:
    """The dtype that autocast gives y; None without autocast."""
    enabled = torch.is_autocast_enabled("cpu") if is_dynamo_compiling() else _C.is_autocast_enabled()
    return torch.get_autocast_dtype("cpu") if enabled else None


BY_CODES: dict[int, type[QuantizedLinear]] = {1: QuantizedLinear}
"""The classes by how many codes each value of their input has."""


@torch.library.custom_op("torchq::linear_of_context", mutates_args=())
def _linear_of_context(
    x: Tensor, packed: Tensor, input_qparams: list[float], activation: int, dtype: torch.dtype, codes: int
) -> Tensor:
    """A QuantizedLinear in a compiled graph: int8, or simulated where the thread that runs it is inside simulate().

    It stands only in graphs that were compiled while some thread simulated. Compiled code looks at globals before it
    runs, and cannot look into its context; so the others hold the ops themselves.
    """
    kind = BY_CODES[codes]
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    layer.register_buffer("packed", packed, persistent=False)
    layer.in_features, layer.out_features = x.shape[-1], ops.out_features(packed, x.shape[-1])
    layer.input_qparams = QParams(input_qparams[0], int(input_qparams[1])) if input_qparams else None
    if simulation.simulating.get():
        return layer._simulated(x, activation, None, None, dtype)
    return layer._int8(x, activation, None, None, dtype)


@_linear_of_context.register_fake
def _(x: Tensor, packed: Tensor, input_qparams: list[float], activation: int, dtype: torch.dtype, codes: int) -> Tensor:
    check_devices("linear_of_context", "x", x, "the packed weight", packed)
    return x.new_empty((*x.shape[:-1], ops.out_features(packed, x.shape[-1])), dtype=dtype)
