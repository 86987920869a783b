"""What one op must give, and how far its floats may be from that by rounding alone."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from torchq import ops
from torchq.numerics.fine import rest_of
from torchq.numerics.qparams import quantize, row_qparams
from torchq.ops import convolution
from torchq.ops.convolution import Geometry

U = 2.0**-24
"""Half a step of float32: how far one operation is from its exact result, relatively."""

_TINY = 2.0**-120  # where products underflow, relative errors say nothing
_BLOCK = 1 << 21  # outputs at a time: 16 MiB in float64


class Given(NamedTuple):
    """The input of a linear op: floats or codes x (..., K), the packed weight, and the static range, if any."""

    x: Tensor
    packed: Tensor
    scale: float | None = None
    zero_point: int = 0

    @property
    def floats(self) -> Tensor:
        """The input in float32."""
        return self.x.float()


def simulated(given: Given) -> tuple[Tensor, Tensor]:
    """`dequantize(quantize(x)) · dequantize(w)ᵀ + b`, exact to float64, and how far int8 may be from it: (..., N) both.

    It is `s_x·s_w·Σ(q_x - z_x)·q_w + b`, whose sum of integers float64 holds exactly. Int8 rounds the sum, the product
    of the scales, their product, and y: `4u · (|x̂·ŵ| + |b|)` in all, u = 2⁻²⁴. A row with NaN or infinity is NaN, and
    may be anything.
    """
    weight, weight_scale, bias, channel_scale = ops.unpack(given.packed)
    b = torch.zeros((), dtype=torch.float64, device="cpu") if bias is None else bias.double()
    rows = given.x.reshape(-1, weight.shape[1])
    exact, allowed = [], []
    w = weight.double().t()
    for part in rows.split(max(1, _BLOCK // max(1, len(weight)))):
        codes, scale = _codes(part, given, channel_scale)
        y = (codes @ w) * scale * weight_scale.double()
        exact.append(y + b)
        allowed.append(4 * U * (y.abs() + b.abs()) + _TINY)
    shape = (*given.x.shape[:-1], len(weight))
    empty = torch.empty((0, len(weight)), dtype=torch.float64, device="cpu")
    return torch.cat([empty, *exact]).reshape(shape), torch.cat([empty, *allowed]).reshape(shape)


def simulated_finely(given: Given) -> tuple[Tensor, Tensor]:
    """The same where each value has two codes (`ops.fine`): the products of x and of what its codes leave, less a bias.

    Beside what each product may be off, int8 rounds their sum, and the second product less the bias.
    """
    _, _, bias, channel_scale = ops.unpack(given.packed)
    rows = given.floats.reshape(-1, given.x.shape[-1])
    rest = rest_of(rows, channel_scale).reshape(given.x.shape)
    first, allowed = simulated(given)
    second, more = simulated(Given(rest, given.packed))
    second = second if bias is None else second - bias.double()
    y = first + second
    return y, allowed + more + U * (second.abs() + y.abs())


def convolved(given: Given, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """The same of a convolution, whose input is (N, in, *size), or codes (N, *size, in): y, and what int8 may be off.

    Without a range in `given`, each sample has one; or, if it is depthwise, is multiplied as it is. Then each of its
    sums of T products is rounded T times, relative to the sum of their magnitudes.
    """
    weight, weight_scale, bias, channel_scale = convolution.unpack(given.packed, geometry)
    x = given.x.movedim(-1, 1) if given.x.dtype == torch.uint8 else given.x
    if channel_scale is not None:
        x = x.float() * _by_channel(channel_scale, x)
    as_it_is = given.scale is None and convolution.is_depthwise(weight.shape, geometry.groups)
    codes, scale = (x.double(), 1.0) if as_it_is else _codes(x.flatten(1), given, None)
    padding = [each for pair in reversed(geometry.padding) for each in pair]
    padded = functional.pad(codes.view(x.shape), padding)
    conv = (torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d)[
        len(geometry.kernel) - 1
    ]

    def summed(values: Tensor, weight: Tensor) -> Tensor:
        return conv(values, weight.double(), None, geometry.stride, 0, geometry.dilation, geometry.groups)

    sums = summed(padded, weight)
    y = sums * (scale.view(-1, *[1] * (x.dim() - 1)) if isinstance(scale, Tensor) else scale)
    y = y * _by_channel(weight_scale.double(), y)
    b = _by_channel(bias.double(), y)
    allowed = 4 * U * (y.abs() + b.abs()) + _TINY
    if as_it_is:
        taps = weight[0].numel()
        allowed += taps * U * summed(padded.abs(), weight.abs().double()) * _by_channel(weight_scale.double(), y)
    return y + b, allowed


def _by_channel(vector: Tensor, like: Tensor) -> Tensor:
    return vector.view(-1, *[1] * (like.dim() - 2))


def _codes(rows: Tensor, given: Given, channel_scale: Tensor | None) -> tuple[Tensor, Tensor | float]:
    """The codes of rows less their zero point, and their scale, in float64."""
    if rows.dtype == torch.uint8:
        assert given.scale is not None
        return rows.double() - given.zero_point, _rounded(given.scale)
    rows = rows.float() if channel_scale is None else rows.float() * channel_scale
    wrong = ~rows.isfinite().all(dim=1)
    rows = rows.masked_fill(wrong[:, None], 0)
    if given.scale is None:
        scale, zero_point = row_qparams(rows)
        codes = quantize(rows, scale, zero_point, axis=0, dtype=torch.uint8).double() - zero_point[:, None]
        found: Tensor | float = scale.double()[:, None]
    else:
        found = _rounded(given.scale)
        codes = quantize(rows, found, given.zero_point, dtype=torch.uint8).double() - given.zero_point
    return codes.masked_fill(wrong[:, None], torch.nan), found


def _rounded(scale: float) -> float:
    return float(torch.tensor(scale, dtype=torch.float32, device="cpu"))


def share_of_allowed(y: Tensor, exact: Tensor, allowed: Tensor) -> float:
    """The largest difference, in units of what is allowed there."""
    known = exact.isfinite()
    shares = ((y.double() - exact).abs() / allowed)[known]
    return float(shares.max()) if shares.numel() else 0.0


def attention_allowance(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scheme: str,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> float:
    """How far two kernels may be apart that compute one attention: 0 where the sums are of integers.

    In float32 a score is off by `(D + 3)·u·Σ|q·k|·scale`, which moves a weight by that factor; exp and the two sums
    over S keys add `4e-7 + 4·S·u`. y is a mean of v by such weights, rounded to its dtype. In bfloat16 a weight may be
    rounded up by one kernel and down by the other. A mask that is added counts as a score.
    """
    rows, keys, depth = q.shape[2] * (q.shape[1] // max(1, k.shape[1])), k.shape[2], q.shape[3]
    if scheme == "int8" and rows > 4:
        return 0.0
    if not (q.numel() and k.numel() and v.numel()):
        return 0.0
    scale = depth**-0.5 if scale is None else scale
    largest = float(q.float().norm(dim=-1).max() * k.float().norm(dim=-1).max()) * abs(scale)
    if mask is not None and mask.is_floating_point():
        seen = mask[mask > -1e4].abs()  # what is below hides a key
        largest += float(seen.max()) if seen.numel() else 0.0
    rounding: float = {torch.float32: U, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[q.dtype]
    relative: float = 2 * (depth + 3) * U * (largest + 1) + 4e-7 + 4 * keys * U + rounding
    relative += 0.0 if scheme == "float32" or rows <= 4 else 2.0**-8
    largest_value = float(v.abs().nan_to_num(0, 0, 0).max())
    return 2 * relative * largest_value
