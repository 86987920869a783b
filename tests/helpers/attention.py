"""Attention in float64, and how far float32 may be from it."""

import torch
from torch import Tensor

from torchq.numerics.attention import seen

ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def operands(
    generator: torch.Generator,
    batch=2,
    heads=3,
    rows=5,
    keys=7,
    depth=8,
    columns=None,
    kv_heads=None,
    dtype=torch.float32,
) -> list[Tensor]:
    """Gives random q, k and v as a model has them: (B, L, H, D) in memory, seen as (B, H, L, D)."""
    kv_heads = heads if kv_heads is None else kv_heads
    shapes = [(batch, rows, heads, depth), (batch, keys, kv_heads, depth), (batch, keys, kv_heads, columns or depth)]
    return [torch.randn(shape, generator=generator).to(dtype).transpose(1, 2) for shape in shapes]


def oracle(q, k, v, mask=None, is_causal=False, scale=None, *, offset=0, window=None) -> Tensor:
    """The formula in float64. A row without any key gives zeros."""
    group = q.shape[1] // max(k.shape[1], 1)
    k, v = (t.double().repeat_interleave(group, 1) for t in (k, v))
    scores = q.double() @ k.mT * (max(q.shape[3], 1) ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores + (torch.where(mask, 0.0, -torch.inf) if mask.dtype == torch.bool else mask)
    visible = seen(q.shape[2], k.shape[2], is_causal, offset, window)
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    keyless = (scores == -torch.inf).all(-1, keepdim=True)
    return scores.masked_fill(keyless, 0).softmax(-1).masked_fill(keyless, 0) @ v


def assert_exact_to_rounding(actual, q, k, v, *args, case="", **kwargs) -> None:
    """Asserts that float32 arithmetic gives this, u = 2^-24.

    A score is off by (D + 3)·u·Σ|q·k|·scale, which moves a weight by that factor; exp and the two sums over S keys add
    2e-7 and 2·S·u. The masks here are no larger than the scores. The result is a mean of v by such weights, and is
    rounded to its dtype.
    """
    expected = oracle(q, k, v, *args, **kwargs)
    assert (actual.dtype, actual.shape) == (q.dtype, expected.shape), case
    if actual.numel() == 0:
        return
    group, scale = q.shape[1] // k.shape[1], kwargs.get("scale") or max(q.shape[3], 1) ** -0.5
    sizes = q.double().abs() @ k.double().abs().repeat_interleave(group, 1).mT * scale
    largest_score = sizes.max() if sizes.numel() else 0.0
    largest = v.double().abs().max() if v.numel() else 0.0
    u = 2.0**-24
    relative = 2 * (q.shape[3] + 3) * u * (largest_score + 1) + 4e-7 + 4 * k.shape[2] * u + ROUNDING[q.dtype]
    error = (actual.double() - expected).abs().max()
    assert error <= relative * largest, f"{case}: off by {error:.3g}, allowed {relative * largest:.3g}"
