"""GPTQ (arXiv 2210.17323) and bias correction: rounding weights for the smallest error of the output.

Rounding each weight to the nearest code gives the smallest error of the weight, not of the output. If e is the error of
one row of weights, the error of its output is `e·x`, and the squared error over the calibration inputs is `eᵀ H e` with
`H = XᵀX`. GPTQ rounds one input channel after the other. Each channel makes up for the errors of those before it, which
works as far as the inputs are correlated:

    e_j = w_j - q_j        q_j = round(w_j + Σ_i R_ji e_i), over all i rounded before j

R is the factor U of `UᵀU = H + d·I`, with each row divided by its diagonal. U is upper triangular, so the last channel
is rounded first. (The paper has the same rounding in terms of the factor of H⁻¹, which takes 4 times as long to
compute; arXiv 2507.18553 shows that the two are one.) d is 1 % of the mean of H's diagonal, and channels are rounded in
order of decreasing H_jj. Bias correction then adds the mean of the remaining error, `b += mean(y - y_int8)`. Both only
change numbers: the layer is as fast as before.
"""

import torch
from torch import Tensor

from torchq.ops.feedback import round_with_feedback

_DAMPING = 0.01
_BLOCK = 128  # channels rounded by one call, whose errors stay in L1 (csrc/gemm/feedback.h), and factorized at a time
_VALUES = 2**22  # of a weight, rounded at a time: with more rows, a channel costs fewer calls of torch

Factor = list[Tensor]
"""An upper triangular matrix: blocks of _BLOCK rows, each from its own first channel on.

One matrix of K x K would be mapped anew for every layer, which takes the system as long as an eighth of factorizing it.
"""


def gptq(weight: Tensor, scale: Tensor, gram: Tensor, channel_scale: Tensor | None = None) -> Tensor:
    """int8 codes of `weight` that keep `(W - W_int8) · x` small, in blocks of channels.

    Time N·K² + K³/6 multiplications, and half a temporary matrix of K x K.

    Args:
        weight: float32 (N, K).
        scale: float32 (N,), positive.
        gram: XᵀX of the inputs, (K, K). A channel that was always zero is rounded to nearest.
        channel_scale: float32 (K,), positive: the codes are of the weight divided by it, for inputs times it.

    Returns:
        int8 (N, K), in [-127, 127].

    >>> weight = torch.tensor([[0.4, 0.4, 127.0]])
    >>> gptq(weight, torch.ones(1), torch.eye(3))  # no correlation: to nearest
    tensor([[  0,   0, 127]], dtype=torch.int8)
    >>> gptq(weight, torch.ones(1), torch.ones(3, 3) + 0.1 * torch.eye(3))  # 0.4 x + 0.4 x is nearly 1 x
    tensor([[  0,   1, 127]], dtype=torch.int8)
    """
    factors = torch.ones(len(gram), dtype=torch.float32, device="cpu") if channel_scale is None else channel_scale
    order = (gram.diagonal() * factors.square()).argsort(descending=True, stable=True).flip(0)
    factors = factors[order]
    unit = _unit_factor(gram, order, factors)
    codes = torch.empty(weight.shape, dtype=torch.int8, device="cpu")
    count = max(1, _VALUES // max(1, len(gram)))
    for start in range(0, len(weight), count):
        rows = slice(start, start + count)
        channels = weight[rows].T.contiguous().index_select(0, order).div_(factors.unsqueeze(1))
        codes[rows] = _rounded(channels, scale[rows], unit, order).T
    return codes


def _rounded(weight: Tensor, scale: Tensor, unit: Factor, order: Tensor) -> Tensor:
    """The codes (K, N) of a weight (K, N), float32, in which a channel is a row, the last one rounded first.

    Writes its errors into the weight. The codes have the channels in their own order, of which the weight's is `order`.
    """
    errors = weight  # a row of errors is the weight until it is rounded, and then its error
    result = torch.empty_like(errors, dtype=torch.int8)
    stop = len(errors)
    for rows in reversed(unit):
        count = len(rows)
        some = slice(stop - count, stop)
        targets = torch.addmm(errors[some], rows[:, count:], errors[stop:])
        result[order[some]], errors[some] = round_with_feedback(targets, errors[some], rows[:, :count], scale)
        stop -= count
    return result


def _unit_factor(gram: Tensor, order: Tensor, factors: Tensor) -> Factor:
    """R of H, float32: upper triangular, with ones on its diagonal. What is below has no meaning.

    H is `gram` in this order, each row and column times one of the `factors` (K,).
    """
    damping = _DAMPING * float((gram.diagonal()[order] * factors.square()).mean()) if len(gram) else 0.0
    damping, tries = damping or 1.0, 1  # 1 if H is all zero, for which R is the identity
    while not _factorized(unit := _reordered(gram, order, factors), damping * tries):
        tries += 1  # sums of nearly dependent channels: rounding errors larger than the damping
    return unit


def _reordered(gram: Tensor, order: Tensor, factors: Tensor) -> Factor:
    """H on and above its diagonal."""
    result = []
    for start in range(0, len(gram), _BLOCK):
        some = slice(start, start + _BLOCK)
        rows = gram.index_select(0, order[some]).index_select(1, order[start:])  # twice as fast as by both at once
        result.append(rows.mul_(factors[start:]).mul_(factors[some].unsqueeze(1)))
    return result


def _factorized(h: Factor, damping: float) -> bool:
    """Replaces H by R, of the U of UᵀU = H + damping·I. False if there is no U.

    In place and by blocks: LAPACK would copy it twice, which takes as long as a third of its work.
    """
    for rows in h:
        rows.diagonal().add_(damping)
    for number, rows in enumerate(h):
        count = len(rows)
        corner, failed = torch.linalg.cholesky_ex(rows[:, :count], upper=True)
        if failed:
            return False
        identity = torch.eye(count, dtype=torch.float32, device="cpu")
        inverse = torch.linalg.solve_triangular(corner, identity, upper=True)
        right = inverse.T @ rows[:, count:]  # twice as fast as solving for it
        for below in h[number + 1 :]:
            beside = right[:, right.shape[1] - below.shape[1] :]
            below.addmm_(beside[:, : len(below)].T, beside, alpha=-1)
        rows[:, :count], rows[:, count:] = corner, right
        rows.div_(corner.diagonal().unsqueeze(1))
    return True


def mean_error(weight: Tensor, codes: Tensor, scale: Tensor, x: Tensor, x_int8: Tensor) -> Tensor:
    """What bias correction adds: the mean over the rows of `W · x - W_int8 · x_int8`, (N,); 0 if there are no rows.

    The mean of the products of rows is the product of the mean row. Weights in any memory order give the same bits.

    Args:
        weight: float32 (N, K).
        codes: int8 (N, K), what int8 has of it.
        scale: float32 (N,), of the codes.
        x: float32 (R, K).
        x_int8: float32 (R, K), what int8 has of it.

    >>> weight, x = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 1.0], [3.0, 2.0]])
    >>> mean_error(weight, torch.tensor([[2, 3]], dtype=torch.int8), torch.tensor([0.5]), x, x)
    tensor([0.7500])
    """
    mean, mean_int8 = (rows.double().sum(dim=0).div(max(1, len(rows))).float() for rows in (x, x_int8))
    return weight.contiguous() @ mean - scale * (codes.float().contiguous() @ mean_int8)
