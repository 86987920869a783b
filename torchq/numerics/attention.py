"""Attention in torch's own operations: the formula of the op, and its gradients."""

import math

import torch
from torch import Tensor

__all__ = ["float_attention", "gradients", "seen"]


def seen(rows: int, keys: int, is_causal: bool, offset: int, window: int | None) -> Tensor | None:
    """Which keys each row sees by its position, bool (rows, keys), or None for all.

    >>> seen(2, 3, True, 1, 2)
    tensor([[ True,  True, False],
            [False,  True,  True]])
    """
    if not is_causal and window is None:
        return None
    behind = torch.arange(rows)[:, None] + offset - torch.arange(keys)
    visible = behind >= 0 if is_causal else torch.ones_like(behind, dtype=torch.bool)
    return visible if window is None else visible & (behind.abs() < window)


def float_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    offset: int = 0,
    window: int | None = None,
) -> Tensor:
    """`softmax(scale · q · kᵀ + mask) · v` in float32; the arguments are those of `torchq.ops.attention`.

    >>> float_attention(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 2, 1), torch.tensor([[[[1.0], [2.0]]]]))
    tensor([[[[1.5000]]]])
    """
    weights = _weights(q, k, mask, is_causal, scale, offset, window)
    return (weights @ _per_head(v, q.shape[1])).to(q.dtype)


def gradients(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    offset: int,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of `float_attention` to q, k, v, and to a mask that is added, given the one to y.

    With weights w = softmax(s) and y = w · v: `∂v = wᵀ · ∂y`, and `∂s = w ∘ (∂w - Σ w ∘ ∂w)` with `∂w = ∂y · vᵀ`.
    """
    heads, dy, factor = q.shape[1], dy.float(), _scale(q, scale)
    weights = _weights(q, k, mask, is_causal, scale, offset, window)
    dw = dy @ _per_head(v, heads).mT
    ds = weights * (dw - (weights * dw).sum(dim=-1, keepdim=True))
    dq, dk = ds @ _per_head(k, heads) * factor, _of_groups(ds.mT @ q.float() * factor, k.shape[1])
    dv = _of_groups(weights.mT @ dy, v.shape[1])
    dmask = None if mask is None or mask.dtype == torch.bool else ds.sum_to_size(mask.shape).to(mask.dtype)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dmask


def _scale(q: Tensor, scale: float | None) -> float:
    return 1 / math.sqrt(max(q.shape[3], 1)) if scale is None else scale


def _per_head(t: Tensor, heads: int) -> Tensor:
    """K or v with a head for each head of q."""
    return t.float().repeat_interleave(heads // max(t.shape[1], 1), dim=1)


def _of_groups(t: Tensor, kv_heads: int) -> Tensor:
    """The sums over the heads of q that share a head of k and v."""
    groups: Tensor = t.unflatten(1, (kv_heads, t.shape[1] // max(kv_heads, 1)))
    return groups.sum(dim=2)


def _weights(
    q: Tensor, k: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None, offset: int, window: int | None
) -> Tensor:
    """Softmax of the masked scores. A row without any key has weights 0."""
    scores = (q.float() * _scale(q, scale)) @ _per_head(k, q.shape[1]).mT
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    visible = seen(q.shape[2], k.shape[2], is_causal, offset, window)
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    keyless = (scores == -torch.inf).all(dim=-1, keepdim=True)
    return scores.masked_fill(keyless, 0).softmax(dim=-1).masked_fill(keyless, 0)
