"""Attention in torch's own operations: the formula of the op, and its gradients."""

import math

import torch
from torch import Tensor

__all__ = ["float_attention", "gradients", "seen", "simulated_int8"]


def seen(rows: int, keys: int, is_causal: bool, offset: int, window: int | None) -> Tensor | None:
    """Which keys each row sees by its position, bool (rows, keys), or None for all.

    >>> seen(2, 3, True, 1, 2)
    tensor([[ True,  True, False],
            [False,  True,  True]])
    """
    if not is_causal and window is None:
        return None
    behind = _positions(rows)[:, None] + offset - _positions(keys)
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


def _positions(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.int64, device="cpu")


def _float32(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device="cpu")


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


# ---- The codes of scheme "int8" ----

_TINY = torch.finfo(torch.float32).tiny
_ROUNDER = 1.5 * 2.0**23


def simulated_int8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    offset: int = 0,
    window: int | None = None,
) -> Tensor:
    """`torchq.ops.attention(..., scheme="int8")` in torch's operations, bit for bit on finite float32 q, k and v.

    Sums of codes are taken in float64, which is exact. An fma is a float64 product and sum, rounded to float32.
    """
    heads = q.shape[1]
    q_codes, q_scale = _row_codes(q)
    k_codes, k_scale = _key_codes(k)
    v_codes, v_scale, v_middle = _value_codes(v)
    factor = _float32(_scale(q, None) if scale is None else scale)
    sums = (q_codes @ _repeated(k_codes, heads).mT).float()
    scores = sums * (q_scale * factor * _repeated(k_scale, heads).mT)
    if mask is not None:
        scores = scores + (_float32(0.0).masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else mask.float())
    visible = seen(q.shape[2], k.shape[2], is_causal, offset, window)
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    weights = _weight_codes(scores)
    total = weights.sum(dim=-1, keepdim=True)
    means = (weights @ _repeated(v_codes, heads)).float() * (1 / total.float() * _repeated(v_scale, heads))
    return (means + _repeated(v_middle, heads)).masked_fill(total == 0, 0)


def _repeated(t: Tensor, heads: int) -> Tensor:
    return t.repeat_interleave(heads // t.shape[1], dim=1)


def _row_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes less the zero point, and the scale: those of `torchq.ops.quantize_per_token`."""
    lo, hi = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = hi / 255 - lo / 255
    scale = torch.where(scale >= _TINY, scale, 1)
    zero_point = (-lo * (1 / scale)).clamp(0, 255).round()
    return ((x * (1 / scale)).round() + zero_point).clamp(0, 255).double() - zero_point.double(), scale


def _key_codes(k: Tensor) -> tuple[Tensor, Tensor]:
    total = torch.zeros_like(k[:, :, 0])
    for key in k.unbind(2):  # in order
        total = total + key
    x = k - (total * (1 / _float32(float(k.shape[2])))).unsqueeze(2)
    scale = x.abs().amax(-1, keepdim=True) / 127
    scale = torch.where(scale >= _TINY, scale, 1)
    return (x * (1 / scale)).round().double(), scale


def _value_codes(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    lo, hi = v.amin(2, keepdim=True) * 0.5, v.amax(2, keepdim=True) * 0.5
    scale = (hi - lo) / 127
    scale = torch.where(scale >= _TINY, scale, 1)
    return ((v - (lo + hi)) * (1 / scale)).round().double(), scale, lo + hi


def _fma(a: Tensor, b: Tensor | float, c: Tensor | float) -> Tensor:
    product: Tensor = a.double() * b
    return (product + c).float()


def _weight_codes(scores: Tensor) -> Tensor:
    """rne(255 · exp(score - largest)), by the polynomial of csrc/attention."""
    largest = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    t = (scores - largest).clamp(min=-88)
    n = _fma(t, float.fromhex("0x1.715476p0"), _ROUNDER + 127) - (_ROUNDER + 127)
    r = _fma(n, -float.fromhex("0x1.62e43p-1"), t)
    p = _fma(torch.full_like(r, float.fromhex("0x1.50f76ap5")), r.double(), float.fromhex("0x1.011b48p7"))
    p = _fma(_fma(p, r.double(), float.fromhex("0x1.fe1992p7")), r.double(), 255.0)
    power = torch.where(n > -127, torch.ldexp(_float32(1.0), n), 0)
    return (p.double() * power.double()).round()
