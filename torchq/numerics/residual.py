"""Residuals: 4 more bits for each int8 code of a table, which look-ups read and products leave alone.

    w  ~  (q + r / 16) * scale          q = rne(w / scale), int8;  r = rne(16 * (w / scale - q)), in [-8, 7]

`16 * q + r` is exact in float32, and so is its sixteenth: the value is rounded once, by the scale. The kernels repeat
this bit for bit.
"""

from torch import Tensor


def residuals_of(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """What the codes of some rows leave, in sixteenths of a step.

    Args:
        x: float (V, D).
        codes: int8 (V, D).
        scale: float32 (V,).

    Returns:
        int8 (V, D) in [-8, 7]. A difference of 8 becomes 7.

    >>> import torch
    >>> x, codes = torch.tensor([[2.2, -0.75]]), torch.tensor([[2, -1]], dtype=torch.int8)
    >>> residuals_of(x, codes, torch.ones(1))
    tensor([[3, 4]], dtype=torch.int8)
    """
    left = x.float() * scale.reciprocal().unsqueeze(1) - codes
    return left.mul_(16).round_().clamp_(-8, 7).to(codes.dtype)


def with_residuals(codes: Tensor, residuals: Tensor, scale: Tensor) -> Tensor:
    """The values (V, D) in float32 of int8 codes and residuals (V, D), by the scale (V,) of each row.

    >>> import torch
    >>> codes, residuals = torch.tensor([[2, -1]], dtype=torch.int8), torch.tensor([[3, 4]], dtype=torch.int8)
    >>> with_residuals(codes, residuals, torch.ones(1))
    tensor([[ 2.1875, -0.7500]])
    """
    return (codes + residuals.float() / 16) * scale.unsqueeze(1)
