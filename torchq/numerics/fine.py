"""Two codes for each value: what the codes of a row leave of it is quantized as a row of its own.

    x  ~  x̂ + r̂          r = x - x̂

The range of r is one step of x, so r̂ leaves 1 in 255 of what x̂ does. With a scale c for each channel codes are of x · c
and r · c, and what they stand for is divided by c. The kernels repeat this bit for bit.
"""

import torch
from torch import Tensor

from torchq.numerics.qparams import dequantize, quantize, row_qparams


def rest_of(rows: Tensor, channel_scale: Tensor | None = None) -> Tensor:
    """What the codes of each row leave, in float32.

    Args:
        rows: float32 (R, K).
        channel_scale: float32 (K,), or None.

    >>> import torch
    >>> rest_of(torch.tensor([[0.0, 1.4, 255.0]]))
    tensor([[0.0000, 0.4000, 0.0000]])
    """
    found = rounded_rows(rows, channel_scale)
    return rows - (found if channel_scale is None else found / channel_scale)


def rounded_rows(rows: Tensor, channel_scale: Tensor | None = None) -> Tensor:
    """What the codes of each row, times its channel_scale, stand for: float32 (R, K)."""
    scaled = rows if channel_scale is None else rows * channel_scale
    scale, zero_point = row_qparams(scaled)
    codes = quantize(scaled, scale, zero_point, axis=0, dtype=torch.uint8)
    return dequantize(codes, scale, zero_point, axis=0)


def rounded_twice(rows: Tensor, channel_scale: Tensor | None = None) -> Tensor:
    """What both codes stand for.

    >>> import torch
    >>> rounded_twice(torch.tensor([[0.0, 1.4, 255.0]]))
    tensor([[  0.0000,   1.4000, 255.0000]])
    """
    return rounded_rows(rows, channel_scale) + rounded_rows(rest_of(rows, channel_scale), channel_scale)
