"""Convolutions by the definition, in exact integers, and random layers to compare with."""

import itertools
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional

from helpers.numbers import random_int8
from torchq import ops
from torchq.numerics.qparams import choose_qparams
from torchq.ops.convolution import Geometry, convolve, is_depthwise, pack

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


def fused(product: Tensor, summand: Tensor) -> Tensor:
    """float32(product + summand) of float64, rounded once, as an fma does where the product is exact.

    The sum is rounded to odd first: to one of its two neighbours in float64, the one whose last bit is set. From there
    float32 rounds as from the exact sum, since float64 has more than two bits more (Boldo and Melquiond, 2008).

    >>> tie = torch.tensor([1.0], dtype=torch.float64), torch.tensor([2.0**-24 + 2.0**-60], dtype=torch.float64)
    >>> fused(*tie) == 1 + 2.0**-23, (tie[0] + tie[1]).float() == 1
    (tensor([True]), tensor([True]))
    """
    total = product + summand
    rest = total - product
    error = (product - (total - rest)) + (summand - rest)
    even = (total.view(torch.int64) & 1) == 0
    inexact = error.isfinite() & (error != 0)
    return torch.where(inexact & even, total.nextafter(error * torch.inf), total).float()


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

    def sums_of_floats(self, values: Tensor) -> Tensor:
        """Of a depthwise convolution: values by codes / 128, tap by tap, by fma. float64 holds each product."""
        g = self.geometry
        padded = functional.pad(values, [zeros for pair in reversed(g.padding) for zeros in pair])
        out = g.out_sizes(values.shape[2:])
        sums = torch.zeros(*values.shape[:2], *out)
        for tap in itertools.product(*map(range, g.kernel)):
            starts = [i * d for i, d in zip(tap, g.dilation, strict=True)]
            ends = [start + (n - 1) * s + 1 for start, n, s in zip(starts, out, g.stride, strict=True)]
            part = padded[(..., *map(slice, starts, ends, g.stride))].double()
            sums = fused(part * per_channel(self.weight[(slice(None), 0, *tap)] / 128, values), sums.double())
        return sums

    def expected(self, x: Tensor, x_qparams=None, activation=0, residual=None) -> Tensor:
        """What `convolve` gives for floats, contiguous."""
        values = x.float()
        if self.channel_scale is not None:
            values = values * per_channel(self.channel_scale, x)
        if x_qparams is None and is_depthwise(self.weight.shape, self.geometry.groups):
            return self.finished(
                self.sums_of_floats(values) * per_channel(self.scale * 128, x), activation, residual
            ).to(x.dtype)
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
        return self.finished(y, activation, residual)

    def finished(self, y: Tensor, activation: int, residual: Tensor | None) -> Tensor:
        y = y + (0.0 if self.bias is None else per_channel(self.bias, y))
        if residual is not None:
            y = y + residual.float()
        return ops.activate(y, activation) if activation else y
