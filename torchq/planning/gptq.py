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

_DAMPING, _BLOCK, _PANEL = 0.01, 128, 16  # a panel of 16 channels stays in L1 or L2
_ROWS = 1024  # how many rows of a weight are rounded at a time
_DOUBLE_DEPTH = 2048  # up to this K, U is computed in float64; beyond, in float32: 256 MiB for K = 8192


def gptq(weight: Tensor, scale: Tensor, gram: Tensor) -> Tensor:
    """int8 codes of `weight` that keep `(W - W_int8) · x` small, in blocks of 128 channels.

    Time N·K² + K³/6 multiplications, and 3 temporary matrices of K x K.

    Args:
        weight: float32 (N, K).
        scale: float32 (N,), positive.
        gram: XᵀX of the inputs, (K, K). A channel that was always zero is rounded to nearest.

    Returns:
        int8 (N, K), in [-127, 127].

    >>> weight = torch.tensor([[0.4, 0.4, 127.0]])
    >>> gptq(weight, torch.ones(1), torch.eye(3))  # no correlation: to nearest
    tensor([[  0,   0, 127]], dtype=torch.int8)
    >>> gptq(weight, torch.ones(1), torch.ones(3, 3) + 0.1 * torch.eye(3))  # 0.4 x + 0.4 x is nearly 1 x
    tensor([[  0,   1, 127]], dtype=torch.int8)
    """
    order = gram.diagonal().argsort(descending=True, stable=True).flip(0)
    factor = _unit_factor(gram[order][:, order])
    codes = torch.empty(weight.shape, dtype=torch.int8, device="cpu")
    for start in range(0, len(weight), _ROWS):
        rows = slice(start, start + _ROWS)
        codes[rows, order] = _rounded(weight[rows].T[order], scale[rows], factor).T
    return codes


def _rounded(weight: Tensor, scale: Tensor, factor: Tensor) -> Tensor:
    """The codes (K, N) of a weight (K, N), float32, in which a channel is a row, the last one rounded first.

    Writes its errors into the weight.
    """
    errors, targets = weight, weight.clone()  # a row of errors is the weight until it is rounded, and then its error
    codes, code, inverse = torch.empty_like(errors, dtype=torch.int8), torch.empty_like(errors[0]), scale.reciprocal()
    for stop in range(len(errors), 0, -_BLOCK):
        start = max(0, stop - _BLOCK)
        for last in range(stop, start, -_PANEL):
            first = max(start, last - _PANEL)
            for j in range(last - 1, first - 1, -1):
                torch.mul(targets[j], inverse, out=code).round_().clamp_(-127, 127)
                errors[j].addcmul_(code, scale, value=-1)
                targets[first:j].addr_(factor[first:j, j], errors[j])
                codes[j] = code
            targets[start:first].addmm_(factor[start:first, first:last], errors[first:last])
        targets[:start].addmm_(factor[:start, start:stop], errors[start:stop])
    return codes


def _unit_factor(gram: Tensor) -> Tensor:
    """R of H = `gram` (K, K), float32: upper triangular, with ones on its diagonal."""
    damped = gram.to(torch.float64 if len(gram) <= _DOUBLE_DEPTH else torch.float32, copy=True)
    diagonal = damped.diagonal()
    damping = _DAMPING * float(diagonal.mean()) if len(gram) else 0.0
    diagonal.add_(damping or 1.0)  # 1 if H is all zero, for which R is the identity
    factor, failed = torch.linalg.cholesky_ex(damped, upper=True)
    while failed:  # float32 sums of nearly dependent channels: rounding errors larger than the damping
        diagonal.add_(damping)
        factor, failed = torch.linalg.cholesky_ex(damped, upper=True)
    unit: Tensor = factor.div_(factor.diagonal().clone().unsqueeze(1)).float()
    return unit


def mean_error(exact: Tensor, actual: Tensor) -> Tensor:
    """What bias correction adds: `mean(exact - actual)` over the rows, (R, N) -> (N,); 0 if there are no rows.

    >>> mean_error(torch.tensor([[1.0, 2.0], [3.0, 2.0]]), torch.tensor([[0.5, 2.0], [2.5, 2.0]]))
    tensor([0.5000, 0.0000])
    """
    return (exact - actual).double().sum(dim=0).div(max(1, len(exact))).float()
