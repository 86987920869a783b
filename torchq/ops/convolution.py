"""The op of convolutions: packing, a typed wrapper and a fake. Schema and checks: csrc/convolution_op.cpp.

The weight of a convolution is that of a linear layer whose rows are patches: (out, K), K = taps x in / groups, in the
order (*kernel, in). Each group is packed on its own by `ops.pack`. A scale per input channel is stored for every tap.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torchq import ops
from torchq.ops import Activation
from torchq.ops.elsewhere import check_devices

__all__ = ["Geometry", "convolve", "pack", "unpack"]

_convolution = torch.ops.torchq.convolution.default
_LINE = 64  # bytes
_MOST_TAPS = 514  # of a depthwise convolution, whose sums are exact in float32: 255 * 128 * 514 < 2^24


class Geometry(NamedTuple):
    """What a convolution over 1, 2 or 3 dimensions is, beside its weight.

    `kernel`, `stride`, `dilation` and `padding` have an entry for each dimension. That of `padding` is the number of
    zeros before and after: an even kernel with padding "same" has one more after.

    >>> Geometry(3, 8, kernel=(3,), stride=(2,), padding=((1, 1),), dilation=(1,)).out_sizes([7])
    [4]
    """

    in_channels: int
    out_channels: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int = 1

    @property
    def depth(self) -> int:
        """K: the values of a patch, which are summed."""
        depth = self.in_channels // self.groups
        for size in self.kernel:
            depth *= size
        return depth

    def out_sizes(self, sizes: Sequence[int]) -> list[int]:
        """The sizes of the output for these of the input, without batch and channels."""
        each = zip(sizes, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return [(n + sum(p) - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in each]

    def with_zeros(self, padding: Sequence[int]) -> "Geometry":
        """The same with more zeros around the input, counted as nn.functional.pad does, from the last dimension on.

        >>> Geometry(3, 8, (3, 3), (1, 1), ((0, 0), (1, 1)), (1, 1)).with_zeros((0, 2)).padding
        ((0, 0), (1, 3))
        """
        pairs = [*self.padding]
        for i, count in enumerate(padding):
            before, after = pairs[-1 - i // 2]
            pairs[-1 - i // 2] = (before, after + count) if i % 2 else (before + count, after)
        return self._replace(padding=tuple(pairs))

    def numbers(self) -> list[int]:
        """What the op takes: dimensions, in, out, groups; and of each dimension kernel, stride, padding, dilation."""
        head = [len(self.kernel), self.in_channels, self.out_channels, self.groups]
        each = zip(self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return head + [number for k, s, p, d in each for number in (k, s, *p, d)]


def pack(
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    channel_scale: Tensor | None = None,
    groups: int = 1,
) -> Tensor:
    """Arranges an int8 weight for `convolve`: a uint8 vector, or for several groups a matrix with a row for each.

    Where each channel is a group with one output (depthwise), it is a vector, too, and a channel_scale lies behind it.

    Args:
        weight: int8 (out, in / groups, *kernel).
        scale: float32 (out,).
        bias: float32 (out,), or None.
        channel_scale: float32 (in,), or None: x is multiplied by it before it is quantized, as in `ops.pack`.
        groups: as in torch.

    Raises:
        RuntimeError: wrong dtype, shape or device, or more than 65793 values in a patch.

    >>> weight, scale = torch.ones(4, 1, 3, dtype=torch.int8), torch.ones(4)
    >>> pack(weight, scale).dim(), pack(weight, scale, groups=2).dim()
    (1, 2)
    """
    taps = weight[0, 0].numel() if weight.numel() else 1
    if is_depthwise(weight.shape, groups):
        whole = ops.pack(weight.flatten(1), scale, bias)
        if channel_scale is None:
            return whole
        ops.pack(weight.new_empty(0, groups), scale[:0], None, channel_scale)  # which checks it
        return torch.cat([_in_lines(whole), channel_scale.contiguous().view(torch.uint8)])
    matrix = weight.movedim(1, -1).flatten(1)
    scales = [None] * groups if channel_scale is None else [part.repeat(taps) for part in channel_scale.chunk(groups)]
    biases = [None] * groups if bias is None else bias.chunk(groups)
    parts = zip(matrix.chunk(groups), scale.chunk(groups), biases, scales, strict=True)
    packed = [ops.pack(*part) for part in parts]
    if groups == 1:
        return packed[0]
    return torch.stack([_in_lines(part) for part in packed])


def packed_bytes(shape: Sequence[int], groups: int, *, channel_scale: bool = False) -> int:
    """How many bytes `pack` makes of a weight (out, in / groups, *kernel).

    >>> weight, scale = torch.ones(4, 1, 3, dtype=torch.int8), torch.ones(4)
    >>> [packed_bytes(weight.shape, 4, channel_scale=each is not None) == pack(weight, scale, None, each, 4).numel()
    ...  for each in (None, scale)]
    [True, True]
    """
    n, k = shape[0], math.prod(shape[1:])
    if groups == 1:
        return ops.packed_bytes(n, k, channel_scale)
    if packs_as_one(shape, groups):
        plain = ops.packed_bytes(n, k)
        return _whole(plain) + 4 * n if channel_scale else plain
    return groups * _whole(ops.packed_bytes(n // groups, k, channel_scale))


def _in_lines(packed: Tensor) -> Tensor:
    return torch.nn.functional.pad(packed, (0, -packed.numel() % _LINE))


def _whole(count: int) -> int:
    return -(-count // _LINE) * _LINE


def packs_as_one(shape: Sequence[int], groups: int) -> bool:
    """Whether a weight (out, in / groups, *kernel) is packed as one matrix: without groups, or depthwise.

    >>> packs_as_one((8, 1, 3, 3), 8), packs_as_one((8, 2, 3, 3), 4)
    (True, False)
    """
    return groups == 1 or is_depthwise(shape, groups)


def is_depthwise(shape: Sequence[int], groups: int) -> bool:
    """Whether each channel is a group with one output: without a static range such a one multiplies floats.

    >>> is_depthwise((8, 1, 3, 3), 8), is_depthwise((8, 2, 3, 3), 4), is_depthwise((1, 1, 3, 3), 1)
    (True, False, False)
    """
    return 1 < groups == shape[0] and shape[1] == 1 and math.prod(shape[2:]) <= _MOST_TAPS


def unpack(packed: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The inverse of `pack`: weight, scale, bias, channel_scale or None.

    Without a bias it is zeros, which is the same. So shapes say all, and a compiler can trace it.

    >>> geometry = Geometry(1, 4, (3,), (1,), ((0, 0),), (1,))
    >>> unpack(pack(torch.ones(4, 1, 3, dtype=torch.int8), torch.ones(4)), geometry)[0].shape
    torch.Size([4, 1, 3])
    """
    groups = geometry.groups if packed.dim() > 1 else 1
    inputs = geometry.in_channels // geometry.groups
    rows = [packed] if groups == 1 else list(packed)
    n, k = geometry.out_channels // groups, geometry.depth
    if groups < geometry.groups:  # depthwise
        size = ops.packed_bytes(n, k)
        weight, weight_scale, bias, _ = torch.ops.torchq.unpack(packed[:size].clone(), k)
        rest = packed[_whole(size) :].clone().view(torch.float32)
        weight = weight.view(n, 1, *geometry.kernel)
        return weight, weight_scale, bias, rest if packed.numel() > size else None
    sizes = [ops.packed_bytes(n, k, channel_scale) for channel_scale in (False, True)]
    size = next(size for size in reversed(sizes) if size <= rows[0].numel())
    unpacked = (torch.ops.torchq.unpack(row[:size].clone(), k) for row in rows)
    weights, scales, biases, channels = zip(*unpacked, strict=True)
    weight = torch.cat(weights).view(geometry.out_channels, *geometry.kernel, inputs).movedim(-1, 1)
    weight = weight.clone(memory_format=torch.contiguous_format)  # contiguous() would keep strides of size 1
    channel_scale = torch.cat([each[:inputs] for each in channels])
    return weight, torch.cat(scales), torch.cat(biases), channel_scale if channel_scale.numel() else None


def convolve(
    x: Tensor,
    packed: Tensor,
    geometry: Geometry,
    *,
    x_qparams: tuple[float, int] | None = None,
    y_qparams: tuple[float, int] | None = None,
    out_dtype: torch.dtype | None = None,
    channels_last: bool | None = None,
    activation: int = Activation.NONE,
    residual: Tensor | None = None,
    residual_qparams: tuple[float, int] | None = None,
) -> Tensor:
    """`y = act(dequantize(codes(x) * w) + bias + residual)`: the convolution of torch, in int8.

    Every value of x is quantized to a u8 code once, sums are exact in int32, and zeros of the padding are exact.
    `y = float(Σ (code - zero_point)·w) * (scale * w_scale[o]) + bias[o]`; then the residual is added, then comes the
    activation, then y is rounded to its dtype, each operation rounded once.

    A depthwise convolution (each channel a group with one output) without `x_qparams` multiplies x as it is:
    `y = (Σ x·w) * w_scale[o] + bias[o]`, a sum of float32, tap by tap, where each step is rounded once (fma). It has so
    few products for each value that codes would take as long as these.

    Args:
        x: float32, bfloat16 or float16 (N, in, *size), any strides; contiguous and channels last take no copy. Or uint8
            (N, *size, in): codes.
        packed: from `pack`. Its channel_scale, if any, multiplies x first; x then can't be codes.
        geometry: what was packed for, and stride, padding and dilation.
        x_qparams: scale and zero point of x. None: each sample gets its own, from the range of all its values, as by
            `choose_qparams`; a sample with NaN or infinity gives NaN. (Depthwise: see above.)
        y_qparams: scale and zero point of y; y is then uint8 codes.
        out_dtype: of y without `y_qparams`: by default that of x, or float32 where x holds codes.
        channels_last: whether the channels of y are last in memory. None: as in x; codes are channels last.
        activation: an `Activation`.
        residual: floats (N, out, *size) of the dtype of y, or with `y_qparams` of any float dtype; any strides. Or
            uint8 (N, *size, out): codes, where the channels of y are last.
        residual_qparams: scale and zero point of a residual of codes, which means `float(code - zero_point) * scale`.

    Returns:
        (N, out, *size), contiguous or channels last; with `y_qparams` uint8 (N, *size, out), contiguous.

    Raises:
        RuntimeError: wrong dtype, shape or device, or a kernel larger than the padded x.

    >>> geometry = Geometry(1, 1, kernel=(2,), stride=(1,), padding=((0, 0),), dilation=(1,))
    >>> packed = pack(torch.tensor([[[127, 127]]], dtype=torch.int8), torch.tensor([1 / 127]))
    >>> convolve(torch.tensor([[[0.0, 1.0, 2.0]]]), packed, geometry, x_qparams=(1.0, 0))
    tensor([[[1., 3.]]])
    """
    if channels_last is None:
        channels_last = x.dtype == torch.uint8 or is_channels_last(x)
    if y_qparams is not None:
        out_dtype = torch.uint8
    elif out_dtype is None:
        out_dtype = torch.float32 if x.dtype == torch.uint8 else x.dtype
    pairs = [x_qparams, y_qparams]
    if residual_qparams is not None:
        pairs = [x_qparams, y_qparams or (1.0, 0), residual_qparams]
    qparams = [float(number) for pair in pairs for number in pair or ()]
    return _convolution(  # type: ignore[no-any-return]
        x, packed, geometry.numbers(), qparams, out_dtype, channels_last, activation, residual
    )


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of (N, C, *size) are last in memory, and not first.

    >>> is_channels_last(torch.zeros(1, 2, 3)), is_channels_last(torch.zeros(1, 3, 2).mT)
    (False, True)
    """
    return x.dim() > 2 and not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


@torch.library.register_fake("torchq::convolution")
def _(
    x: Tensor,
    packed: Tensor,
    geometry: list[int],
    qparams: list[float],
    out_dtype: torch.dtype,
    channels_last: bool = False,
    activation: int = 0,
    residual: Tensor | None = None,
) -> Tensor:
    for name, other in (("the packed weight", packed), ("residual", residual)):
        if other is not None:
            check_devices("convolution", "x", x, name, other)
    _, inputs, outputs, groups = geometry[:4]
    kernel, stride, before, after, dilation = (tuple(geometry[4 + i :: 5]) for i in range(5))
    padding = tuple(zip(before, after, strict=True))
    shape = Geometry(inputs, outputs, kernel, stride, padding, dilation, groups)
    sizes = shape.out_sizes(x.shape[1:-1] if x.dtype == torch.uint8 else x.shape[2:])
    if out_dtype == torch.uint8:
        return x.new_empty((x.shape[0], *sizes, outputs), dtype=out_dtype)
    if channels_last:
        return x.new_empty((x.shape[0], *sizes, outputs), dtype=out_dtype).movedim(-1, 1)
    return x.new_empty((x.shape[0], outputs, *sizes), dtype=out_dtype)
