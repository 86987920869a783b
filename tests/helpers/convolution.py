"""Convolutions by the definition, in exact integers, and random layers to compare with."""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional

from helpers.numbers import random_int8
from torchq import ops
from torchq.numerics.qparams import choose_qparams
from torchq.ops.convolution import Geometry, convolve, pack

CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


def square(dims, inputs, outputs, kernel=1, stride=1, padding=(0, 0), dilation=1, groups=1):
    """A geometry that is the same along each dimension."""
    each = (kernel,) * dims, (stride,) * dims, (padding,) * dims, (dilation,) * dims
    return Geometry(inputs, outputs, *each, groups=groups)


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *[1] * (x.dim() - 2))


def qparams_of_samples(x: Tensor) -> tuple[Tensor, Tensor]:
    rows = x.flatten(1) if x.numel() else x.new_zeros(x.shape[0], 1)
    scale, zero_point = choose_qparams(rows, dtype=torch.uint8, symmetric=False, axis=0)
    return scale.view(-1), zero_point.view(-1)


@dataclass
class Layer:
    """A convolution with random weights."""

    geometry: Geometry
    weight: Tensor
    scale: Tensor
    bias: Tensor | None
    channel_scale: Tensor | None

    @classmethod
    def random(cls, geometry: Geometry, generator: Generator, *, bias=True, channel_scale=False) -> "Layer":
        g, n = geometry, geometry.out_channels
        shape = n, g.in_channels // g.groups, *g.kernel
        return cls(
            g,
            random_int8(*shape, generator=generator),
            (torch.rand(n, generator=generator) + 0.5) / 128,
            torch.randn(n, generator=generator) if bias else None,
            torch.rand(g.in_channels, generator=generator) + 0.5 if channel_scale else None,
        )

    def packed(self) -> Tensor:
        return pack(self.weight, self.scale, self.bias, self.channel_scale, self.geometry.groups)

    def __call__(self, x: Tensor, **options) -> Tensor:
        return convolve(x, self.packed(), self.geometry, **options)

    def sums(self, centered: Tensor) -> Tensor:
        """Of codes less their zero point, in float64, which holds them exactly."""
        g = self.geometry
        padding = [zeros for pair in reversed(g.padding) for zeros in pair]
        padded = functional.pad(centered.double(), padding)
        convolution = CONVOLUTIONS[len(g.kernel)]
        return convolution(padded, self.weight.double(), None, g.stride, 0, g.dilation, g.groups)

    def expected(self, x: Tensor, x_qparams=None, activation=0, residual=None) -> Tensor:
        """What `convolve` gives for floats, contiguous."""
        values = x.float()
        if self.channel_scale is not None:
            values = values * per_channel(self.channel_scale, x)
        if x_qparams is None:
            scale, zero_point = qparams_of_samples(values)
        else:
            scale = torch.full((x.shape[0],), x_qparams[0])
            zero_point = torch.full((x.shape[0],), x_qparams[1])
        scale, zero_point = (t.view(-1, *[1] * (x.dim() - 1)) for t in (scale, zero_point.float()))
        centered = (values * (1 / scale)).clamp(-zero_point, 255 - zero_point).round()
        return self.outputs(centered, scale, activation, residual).to(x.dtype)

    def outputs(self, centered: Tensor, scale: Tensor, activation=0, residual=None) -> Tensor:
        y = self.sums(centered).float() * (scale * per_channel(self.scale, centered))
        y = y + (0.0 if self.bias is None else per_channel(self.bias, centered))
        if residual is not None:
            y = y + residual.float()
        return ops.activate(y, activation) if activation else y
