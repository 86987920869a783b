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
_BLOCK = 128  # channels rounded by one call, whose errors stay in L1 (csrc/gemm/feedback.h)
_CORNER = 128  # rows of H factorized at a time
_GATHERED = 256  # rows of H gathered at a time
_VALUES = 2**22  # of a weight, rounded at a time: with more rows, a channel costs fewer calls of torch


def gptq(weight: Tensor, scale: Tensor, gram: Tensor, channel_scale: Tensor | None = None) -> Tensor:
    """int8 codes of `weight` that keep `(W - W_int8) · x` small, in blocks of channels.

    Time N·K² + K³/6 multiplications, and one temporary matrix of K x K, of which half is touched.

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
        channels = weight[rows].T.contiguous()[order].div_(factors.unsqueeze(1))
        codes[rows, order] = _rounded(channels, scale[rows], unit).T
    return codes


def _rounded(weight: Tensor, scale: Tensor, unit: Tensor) -> Tensor:
    """The codes (K, N) of a weight (K, N), float32, in which a channel is a row, the last one rounded first.

    Writes its errors into the weight.
    """
    errors = weight  # a row of errors is the weight until it is rounded, and then its error
    result = torch.empty_like(errors, dtype=torch.int8)
    for stop in range(len(errors), 0, -_BLOCK):
        some = slice(max(0, stop - _BLOCK), stop)
        targets = torch.addmm(errors[some], unit[some, stop:], errors[stop:])
        result[some], errors[some] = round_with_feedback(targets, errors[some], unit[some, some], scale)
    return result


def _unit_factor(gram: Tensor, order: Tensor, factors: Tensor) -> Tensor:
    """R of H, float32 (K, K): upper triangular, with ones on its diagonal. What is below has no meaning.

    H is `gram` in this order, each row and column times one of the `factors` (K,).
    """
    damping = _DAMPING * float((gram.diagonal()[order] * factors.square()).mean()) if len(gram) else 0.0
    damping, tries = damping or 1.0, 1  # 1 if H is all zero, for which R is the identity
    while not _factorized(unit := _reordered(gram, order, factors), damping * tries):
        tries += 1  # sums of nearly dependent channels: rounding errors larger than the damping
    return unit


def _reordered(gram: Tensor, order: Tensor, factors: Tensor) -> Tensor:
    """H on and above its diagonal."""
    result = torch.empty_like(gram)
    for start in range(0, len(gram), _GATHERED):
        rows, columns = order[start : start + _GATHERED], order[start:]
        values = gram[rows].gather(1, columns.expand(len(rows), -1))  # several times as fast as by both indices at once
        some = slice(start, start + _GATHERED)
        torch.mul(values.mul_(factors[start:]), factors[some].unsqueeze(1), out=result[some, start:])
    return result


def _factorized(h: Tensor, damping: float) -> bool:
    """Replaces H (K, K), on and above its diagonal, by R, of the U of UᵀU = H + damping·I. False if there is no U.

    In place and by blocks: LAPACK would copy it twice, which takes as long as a third of its work.
    """
    h.diagonal().add_(damping)
    for start in range(0, len(h), _CORNER):
        stop = min(start + _CORNER, len(h))
        corner, failed = torch.linalg.cholesky_ex(h[start:stop, start:stop], upper=True)
        if failed:
            return False
        h[start:stop, start:stop] = corner
        identity = torch.eye(stop - start, dtype=torch.float32, device="cpu")
        inverse = torch.linalg.solve_triangular(corner, identity, upper=True)
        right = inverse.T @ h[start:stop, stop:]  # twice as fast as solving for it
        for first in range(0, right.shape[1], _CORNER):
            some, below = right[:, first : first + _CORNER], h[stop + first : stop + first + _CORNER, stop + first :]
            below.addmm_(some.T, right[:, first:], alpha=-1)
        h[start:stop, stop:] = right
        h[start:stop, start:].div_(corner.diagonal().unsqueeze(1))
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
