"""Patches: the rows that a convolution multiplies, in torch's operations; for calibration and planning.

A convolution multiplies each patch of its input by one matrix, of K = taps · in/groups columns in the order (kh, kw,
in). With groups, a patch has a part for each group, which only the outputs of that group multiply:

    y[r, g·n] = Σ_k row[r, g, k] · weight[g·n, k]

All patches of an input would take `taps` times its memory. So only some are gathered, at random places.

Beside its values a row carries the smallest and the largest value of each channel in the sample that it comes from. For
the dynamic scheme has a range for each sample, and not for each row as a linear layer has. Only where patches do not
overlap (`convolving.is_tiled`) each row has its own; and a depthwise convolution multiplies floats (`takes_floats`).
"""

import math
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from torchq.numerics.qparams import QParams, fake_quantize, qparams_from_range, row_qparams
from torchq.ops.convolution import Geometry


class Patches(NamedTuple):
    """How rows are made of a convolution's input (N, C, *spatial), and multiplied.

    >>> patches = Patches(Geometry(2, 4, (3,), (1,), ((1, 1),), (1,)))
    >>> patches.depth, patches.width, patches.channels
    (6, 10, 2)
    """

    geometry: Geometry
    tiled: bool = False
    takes_floats: bool = False

    @property
    def channels(self) -> int:
        """C, the channels of the input."""
        return self.geometry.in_channels

    @property
    def depth(self) -> int:
        """How many values a patch has, of all groups."""
        return math.prod(self.geometry.kernel) * self.channels

    @property
    def width(self) -> int:
        """How many numbers a row has: the values, and the smallest and largest of each channel in the sample."""
        return self.depth + 2 * self.channels

    def fits(self, x: Tensor) -> bool:
        """Whether x is an input of such a convolution, with a batch dimension."""
        return x.dim() == len(self.geometry.kernel) + 2 and x.shape[1] == self.channels

    def rows(self, x: Tensor, most: int, generator: Generator) -> Tensor:
        """Some of the patches of x (N, C, *spatial), at most so many, float32 (R, width), in their order.

        >>> x = torch.tensor([[[1.0, 2.0, 3.0]]])
        >>> Patches(Geometry(1, 1, (2,), (1,), ((0, 0),), (1,))).rows(x, 9, torch.Generator())
        tensor([[1., 2., 1., 3.],
                [2., 3., 1., 3.]])
        """
        g = self.geometry
        x = x.detach()
        padding = [each for pair in reversed(g.padding) for each in pair]
        values = nn.functional.pad(x, padding).movedim(1, -1)  # (N, *spatial, C)
        out = [max(0, size) for size in g.out_sizes(x.shape[2:])]
        total = len(x) * math.prod(out)
        if total == 0 or x.numel() == 0:
            return x.new_empty(0, self.width, dtype=torch.float32)
        places = torch.arange(total, dtype=torch.long, device="cpu")
        if total > most:
            places = torch.randperm(total, generator=generator, dtype=torch.long, device="cpu")[:most].sort().values
        index: list[Tensor] = []
        rest = places
        for axis in reversed(range(len(out))):
            start = (rest % out[axis]) * g.stride[axis]
            taps = torch.arange(g.kernel[axis], dtype=torch.long, device="cpu") * g.dilation[axis]
            shape = [1] * len(out)
            shape[axis] = -1
            index.insert(0, start.reshape(-1, *[1] * len(out)) + taps.reshape(shape))
            rest = rest // out[axis]
        samples = rest.reshape(-1, *[1] * len(out))
        patches = values[(samples, *index)].float().reshape(len(places), -1, g.groups, self.channels // g.groups)
        flat = x.reshape(len(x), self.channels, math.prod(x.shape[2:])).float()
        ends = torch.cat([flat.amin(dim=2), flat.amax(dim=2)], dim=1)
        return torch.cat([patches.transpose(1, 2).reshape(len(places), self.depth), ends[rest]], dim=1)

    def values(self, rows: Tensor) -> Tensor:
        """The values of the patches, (R, depth)."""
        return rows[:, : self.depth]

    @property
    def is_depthwise(self) -> bool:
        """Whether each channel of the input is a group of its own."""
        return self.geometry.groups == self.channels > 1

    def tiled_scale(self, channel_scale: Tensor | None) -> Tensor | None:
        """A scale for each channel (C,) as one for each value of a patch (depth,). Without groups, or depthwise."""
        taps = math.prod(self.geometry.kernel)
        if channel_scale is None:
            return None
        return channel_scale.repeat_interleave(taps) if self.is_depthwise else channel_scale.repeat(taps)

    def weight_scale(self, channel_scale: Tensor | None) -> Tensor | None:
        """By what the weight (N, K) is divided: (K,), or for a depthwise one (N, 1)."""
        if channel_scale is None or not self.is_depthwise:
            return self.tiled_scale(channel_scale)
        return channel_scale.unsqueeze(1)

    def by_channel(self, values: Tensor) -> Tensor:
        """The values (R, depth) of patches as rows of one for each channel of the input, (R · taps, C)."""
        if not self.is_depthwise:
            return values.reshape(-1, self.channels)
        return values.reshape(len(values), self.channels, -1).transpose(1, 2).reshape(-1, self.channels)

    def sample_qparams(self, rows: Tensor, channel_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scale and zero point of the sample that each row comes from, (R,) each; of tiles, those of each itself."""
        if self.tiled:
            values, scales = self.values(rows), self.tiled_scale(channel_scale)
            return row_qparams(values if scales is None else values * scales)
        ends = rows[:, self.depth :].reshape(len(rows), 2, self.channels)
        if channel_scale is not None:
            ends = ends * channel_scale
        lo, hi = ends[:, 0].amin(dim=1), ends[:, 1].amax(dim=1)
        return qparams_from_range(lo, hi, dtype=torch.uint8, symmetric=False)

    def quantized(self, rows: Tensor, channel_scale: Tensor | None, qparams: QParams | None) -> Tensor:
        """The values of the patches, times the scale of each channel, that int8 has of them."""
        values, tiled = self.values(rows), self.tiled_scale(channel_scale)
        values = values if tiled is None else values * tiled
        if qparams is not None:
            return fake_quantize(values, *qparams, dtype=torch.uint8)
        if self.takes_floats:
            return values
        return fake_quantize(values, *self.sample_qparams(rows, channel_scale), axis=0, dtype=torch.uint8)

    def multiplied(self, values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Y (R, N) of the values (R, depth) of patches, by a weight (N, taps · C / groups), in float32."""
        groups = self.geometry.groups
        if groups == 1:
            return nn.functional.linear(values, weight, bias)
        n, k = weight.shape
        parts = values.reshape(len(values), groups, k).transpose(0, 1)
        y = torch.bmm(parts, weight.reshape(groups, n // groups, k).transpose(1, 2))
        y = y.transpose(0, 1).reshape(len(values), n)
        return y if bias is None else y + bias
