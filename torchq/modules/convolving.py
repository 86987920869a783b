"""Convolutions as torch has them: the geometry of a float module, its padding, and memory formats."""

from collections.abc import Sequence
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchq.numerics.qparams import QParams, fake_quantize, row_qparams
from torchq.ops.convolution import Geometry

_CONVOLVE = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)
_CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


def geometry_of(conv: Any) -> Geometry:
    """What the op must know of a float convolution. Padding of another mode than zeros is added before (`padded`).

    As torch's function it takes one number for all dimensions.
    """
    stride, dilation = (_each(value, conv) for value in (conv.stride, conv.dilation))
    if conv.padding_mode != "zeros" or conv.padding == "valid":
        padding = [(0, 0)] * len(conv.kernel_size)
    elif conv.padding == "same":
        if any(each != 1 for each in stride):
            raise ValueError("padding='same' is not supported for strided convolutions")  # torch's words
        totals = [d * (k - 1) for d, k in zip(dilation, conv.kernel_size, strict=True)]
        padding = [(total // 2, total - total // 2) for total in totals]
    else:
        padding = [(each, each) for each in _each(conv.padding, conv)]
    channels = conv.in_channels, conv.out_channels
    return Geometry(*channels, conv.kernel_size, stride, tuple(padding), dilation, conv.groups)


def _each(value: Any, conv: Any) -> tuple[int, ...]:
    """A number for each dimension."""
    return (value,) * len(conv.kernel_size) if isinstance(value, int) else tuple(value)


class Settings(nn.Module):
    """The settings of a convolution. Those that torch's read in each call take effect when they are changed."""

    in_channels: int
    out_channels: int
    groups: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...] | int
    padding: tuple[int, ...] | int | str
    dilation: tuple[int, ...] | int
    padding_mode: str
    geometry: Geometry
    tiled: bool
    _numbers: list[int]

    def _take_settings(self, conv: Any) -> None:
        """Those of a float convolution, or of one like it."""
        names = ("in_channels", "out_channels", "groups", "kernel_size", *_IN_EACH_CALL)
        self.__dict__.update({name: getattr(conv, name) for name in names}, **_made_of(conv))
        self._reversed_padding_repeated_twice = conv._reversed_padding_repeated_twice

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _IN_EACH_CALL:
            changed = {**self.__dict__, name: value}
            self.__dict__.update({name: value}, **_made_of(SimpleNamespace(**changed)))  # one step to other threads
        else:
            super().__setattr__(name, value)

    def _check_shape(self, x: Tensor) -> None:
        dimensions = len(self.kernel_size)
        if x.dim() != dimensions + 2 or x.shape[1] != self.in_channels:
            places = ", ".join(("depth", "height", "width")[3 - dimensions :]) if dimensions > 1 else "length"
            raise RuntimeError(
                f"{type(self).__name__}: x must be (N, {self.in_channels}, {places}) or without N, got {list(x.shape)}."
            )

    def extra_repr(self) -> str:
        """Those that are not the usual ones, for `repr`."""
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"]
        parts += [f"padding={self.padding}"] if self.padding else []
        parts += [f"dilation={self.dilation}"] if any(each != 1 for each in self.geometry.dilation) else []
        parts += [f"groups={self.groups}"] if self.groups != 1 else []
        return ", ".join(parts)


_IN_EACH_CALL = ("stride", "padding", "dilation", "padding_mode")


def _made_of(conv: Any) -> dict[str, Any]:
    geometry = geometry_of(conv)
    return {"geometry": geometry, "_numbers": geometry.numbers(), "tiled": is_tiled(conv)}


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """The convolution of floats, with the padding that the geometry has."""
    padding = [before for before, _ in geometry.padding]
    if any(before != after for before, after in geometry.padding):
        x = nn.functional.pad(x, [each for pair in reversed(geometry.padding) for each in pair])
        padding = [0] * len(padding)
    convolve = _CONVOLVE[len(geometry.kernel) - 1]
    y: Tensor = convolve(x, weight, bias, geometry.stride, padding, geometry.dilation, geometry.groups)
    return y


def padded(x: Tensor, conv: Any) -> Tensor:
    """X with the padding of a convolution whose mode is another than zeros."""
    if conv.padding_mode == "zeros":
        return x
    return nn.functional.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)


def is_zero_padding(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operation adds zeros around the spatial dimensions of (N, C, *spatial).

    In torch.inference_mode that is nn.functional.pad as a whole, with the mode before the value.
    """
    rest = args[2:]
    if func is torch.ops.aten.pad.default and rest[:1] in ((), ("constant",)):
        rest = rest[1:]
    elif func is not torch.ops.aten.constant_pad_nd.default:
        return False
    if kwargs or any(rest):
        return False
    counts = args[1]
    return len(counts) % 2 == 0 and len(counts) <= 2 * (args[0].dim() - 2) and all(count >= 0 for count in counts)


def is_pointwise(conv: Any) -> bool:
    """Whether each place of the output is a linear function of one place of the input, the same place."""
    geometry = geometry_of(conv)
    ones = all(each == 1 for each in (*geometry.kernel, *geometry.stride))
    return ones and conv.groups == 1 and not any(map(any, geometry.padding))


def is_tiled(conv: Any) -> bool:
    """Whether each value of the input is in one patch at most: the kernel is as wide as the stride, nothing is added.

    So it is as a pointwise one, of tiles of the input.
    """
    geometry = geometry_of(conv)
    alone = geometry.kernel == geometry.stride and all(each == 1 for each in geometry.dilation)
    return alone and conv.groups == 1 and not any(map(any, geometry.padding)) and conv.padding_mode == "zeros"


def tiles(x: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """The patches of a tiled convolution, (N, C, *spatial) -> (N, *out, K): taps, then channels.

    >>> tiles(torch.arange(10.0).reshape(1, 2, 5), (2,))
    tensor([[[0., 5., 1., 6.],
             [2., 7., 3., 8.]]])
    """
    if all(each == 1 for each in kernel):
        return x.movedim(1, -1)
    count, shape = len(kernel), list(x.shape[:2])
    for axis, size in enumerate(kernel):
        x = x.narrow(axis + 2, 0, x.shape[axis + 2] // size * size)
        shape += [x.shape[axis + 2] // size, size]
    places, taps = range(2, 2 * count + 2, 2), range(3, 2 * count + 2, 2)
    return x.reshape(shape).permute(0, *places, *taps, 1).flatten(count + 1)


def is_channels_last(x: Tensor) -> bool:
    """Whether torch takes it for channels last: as its own operations tell it by the strides.

    >>> x = torch.zeros(2, 3, 4, 5)
    >>> is_channels_last(x), is_channels_last(x.contiguous(memory_format=torch.channels_last))
    (False, True)
    """
    if x.dim() not in (4, 5):
        return False
    sizes, strides, least = x.shape, x.stride(), 0
    for axis in (1, *range(x.dim() - 1, 1, -1), 0):
        if strides[1] == 0 or sizes[axis] == 0 or strides[axis] < least or (axis == 0 and least == strides[1]):
            return False
        least = strides[axis] * max(1, sizes[axis])
    return True


def in_format(y: Tensor, last: bool) -> Tensor:
    """The output in the memory format that is asked for; torch has none for the channels last of one dimension.

    One value of each channel lies the same way in both formats, and `contiguous()` keeps its strides. By them torch's
    operations would take it for channels last, and give that.

    >>> in_format(torch.zeros(2, 1, 1, 8).movedim(-1, 1), False).stride()
    (8, 1, 1, 1)
    """
    if last and y.dim() == 3:
        return y.mT.contiguous().mT
    y = y.contiguous(memory_format=format_of(y.dim(), last))
    return y if last or y.shape[-1] != 1 or y.shape[2:].numel() != 1 else y.flatten(1).view(y.shape)


def format_of(dimensions: int, last: bool) -> torch.memory_format:
    """Contiguous, or channels last of 4 or 5 dimensions."""
    return _CHANNELS_LAST[dimensions - 2] if last else torch.contiguous_format


def strides_of(shape: Sequence[int], last: bool) -> tuple[int, ...]:
    """The strides of a new tensor of this shape, contiguous or channels last.

    >>> strides_of((2, 3, 4, 5), last=True) == torch.empty(2, 3, 4, 5, memory_format=torch.channels_last).stride()
    True
    """
    axes = [*range(len(shape) - 1, -1, -1)]
    if last:
        axes.remove(1)
        axes.insert(0, 1)
    strides, step = [0] * len(shape), 1
    for axis in axes:
        strides[axis] = step
        step *= max(1, shape[axis])
    return tuple(strides)


class Output(NamedTuple):
    """A tensor that a convolution gives: its shape, its strides, and whether its channels are last in memory."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    last: bool


@lru_cache(maxsize=4096)
def output_of(geometry: Geometry, batch: int, sizes: Sequence[int], last: bool) -> Output:
    """What a convolution gives for a batch of these sizes. A network asks for the same ones in each call.

    >>> output_of(Geometry(3, 8, (3,), (1,), ((0, 0),), (1,)), 2, (7,), last=False)
    Output(shape=(2, 8, 5), strides=(40, 5, 1), last=False)
    """
    shape = (batch, geometry.out_channels, *geometry.out_sizes(sizes))
    return Output(shape, strides_of(shape, last), last)


@lru_cache(maxsize=4096)
def with_zeros(output: Output, padding: tuple[int, ...]) -> Output:
    """The same with zeros around it, counted as nn.functional.pad does, from the last dimension on.

    >>> with_zeros(Output((2, 8, 5), (40, 5, 1), False), (1, 2))
    Output(shape=(2, 8, 8), strides=(64, 8, 1), last=False)
    """
    shape = list(output.shape)
    for i, count in enumerate(padding):
        shape[-1 - i // 2] += count
    return Output(tuple(shape), strides_of(shape, output.last), output.last)


@lru_cache(maxsize=4096)
def numbers_of(geometry: Geometry, padding: tuple[int, ...]) -> list[int]:
    """What the op takes for an input whose zeros of that padding are left out. Nobody may change it.

    >>> numbers_of(Geometry(3, 8, (3,), (1,), ((0, 0),), (1,)), (1, 2))
    [1, 3, 8, 1, 3, 1, 1, 2, 1]
    """
    return geometry.with_zeros(padding).numbers()


def qparams_as_numbers(x: QParams | None, y: QParams | None) -> list[float]:
    """Qparams as the op takes them: none, those of x, or those of x and of codes that it gives.

    >>> qparams_as_numbers((0.5, 3), (0.25, 0))
    [0.5, 3.0, 0.25, 0.0]
    """
    return [float(number) for pair in (x, y) if pair is not None for number in pair]


def step_of(conv: Any, activation: int, y_qparams: QParams | None, around: tuple[int, ...]) -> Any:
    """What `QuantizedConv.computed` does in float32, without a residual, as a step of `_C.call_convolutions`.

    It holds as long as the convolution's dict has the same objects. None: it can't be one.
    """
    facts = {name: conv.__dict__[name] for name in ("_numbers", "input_qparams", "fold")}
    numbers, pair = numbers_of(conv.geometry, around) if around else facts["_numbers"], facts["input_qparams"]
    if conv.tiled and pair is None:  # each place has a range of its own
        alone = all(each == 1 for each in conv.geometry.kernel) and not around
        return (conv, facts, numbers, None, torch.float32, activation) if alone else None
    qparams = qparams_as_numbers(pair, y_qparams)
    return conv, facts, numbers, qparams, torch.float32 if y_qparams is None else torch.uint8, activation


def as_rows(weight: Tensor) -> Tensor:
    """A weight (out, in / groups, *kernel) as rows (out, K) in the order of a patch: taps, then channels.

    >>> as_rows(torch.tensor([[[1, 2], [3, 4]]]))
    tensor([[1, 3, 2, 4]])
    """
    return weight.movedim(1, -1).reshape(len(weight), weight.shape[1:].numel())


def along(channel_scale: Tensor, dimensions: int) -> Tensor:
    """A number for each channel, to multiply (N, C, *spatial) by."""
    return channel_scale.reshape(-1, *[1] * dimensions)


def along_weight(channel_scale: Tensor, weight: Tensor, groups: int) -> Tensor:
    """The same for a weight (out, in / groups, *kernel): with groups, each has one channel and one output."""
    scale = along(channel_scale, weight.dim() - 2)
    return scale.unsqueeze(1) if groups > 1 else scale


def rounded_by(x: Tensor, pair: QParams | None, *, by_rows: bool) -> Tensor:
    """What int8 has of x: by this pair, or by one for each sample (N, C, *spatial), or for each row (..., K)."""
    if pair is not None:
        return fake_quantize(x, *pair, dtype=torch.uint8)
    if x.numel() == 0:
        return x
    rows = x.reshape(-1, x.shape[-1]) if by_rows else x.reshape(len(x), -1)
    return fake_quantize(rows, *row_qparams(rows), axis=0, dtype=torch.uint8).reshape(x.shape)
