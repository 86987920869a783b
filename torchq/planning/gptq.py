"""GPTQ (arXiv 2210.17323) and bias correction: rounding weights for the smallest error of the output.

Rounding each weight to the nearest code gives the smallest error of the weight, not of the output. If e is the error of
one row of weights, the error of its output is `e·x`, and the squared error over the calibration inputs is `eᵀ H e` with
`H = XᵀX`. GPTQ rounds one input channel after the other. It compensates each channel's error by changing the weights of
the channels not yet rounded, which works as far as the inputs are correlated:

    e_j = (w_j - q_j) / U_jj        w_i -= e_j · U_ji for i > j        U upper triangular, UᵀU = (H + d·I)⁻¹

with d = 1 % of the mean of H's diagonal, and channels in order of decreasing H_jj. Bias correction then adds the mean
of the remaining error, `b += mean(y - y_int8)`. Both only change numbers: the layer is as fast as before.
"""

import torch
from torch import Tensor

_DAMPING, _BLOCK, _PANEL = 0.01, 128, 16  # a panel of 16 channels stays in L1 or L2


def gptq(weight: Tensor, scale: Tensor, gram: Tensor, *, factors: "Factors | None" = None) -> Tensor:
    """int8 codes of `weight` that keep `(W - W_int8) · x` small, in blocks of 128 channels.

    Time N·K² + 4/3·K³ multiplications and 3 temporary float64 matrices of K x K.

    Args:
        weight: float32 (N, K).
        scale: float32 (N,), positive.
        gram: XᵀX of the inputs, (K, K). A channel that was always zero is rounded to nearest.
        factors: keeps the factor of the latest `gram`; pass the same object for layers that may share one.

    Returns:
        int8 (N, K), in [-127, 127].

    >>> weight = torch.tensor([[0.4, 0.4, 127.0]])
    >>> gptq(weight, torch.ones(1), torch.eye(3))  # no correlation: to nearest
    tensor([[  0,   0, 127]], dtype=torch.int8)
    >>> gptq(weight, torch.ones(1), torch.ones(3, 3) + 0.1 * torch.eye(3))  # 0.4 x + 0.4 x is nearly 1 x
    tensor([[  0,   1, 127]], dtype=torch.int8)
    """
    order = gram.diagonal().argsort(descending=True, stable=True)
    factor = (factors or Factors()).of(gram.double()[order][:, order])
    remaining = weight.detach().T.contiguous()[order].double()  # the compensated weights, (K, N): a channel is a row
    codes = torch.empty_like(remaining, dtype=torch.int8)
    errors, code = torch.empty_like(remaining[:_BLOCK]), torch.empty_like(remaining[0])
    scale, inverse = scale.double(), scale.reciprocal().double()
    channels, pivots = order.tolist(), factor.diagonal().tolist()
    for start in range(0, len(remaining), _BLOCK):
        stop = min(start + _BLOCK, len(remaining))
        for first in range(start, stop, _PANEL):
            last = min(first + _PANEL, stop)
            panel, panel_errors = remaining[first:last], errors[first - start : last - start]
            for j, (w, error) in enumerate(zip(panel, panel_errors, strict=True), first):
                torch.mul(w, inverse, out=code).round_().clamp_(-127, 127)
                torch.addcmul(w, code, scale, value=-1, out=error).div_(pivots[j])  # the product is exact in float64
                panel[j + 1 - first :].addr_(factor[j, j + 1 : last], error, alpha=-1)
                codes[channels[j]] = code
            remaining[last:stop].addmm_(factor[first:last, last:stop].T, panel_errors, alpha=-1)
        remaining[stop:].addmm_(factor[start:stop, stop:].T, errors[: stop - start], alpha=-1)
    return codes.T.contiguous()


class Factors:
    """Caches the factor U of the latest H: q, k and v have the same H, so U is computed once for the three."""

    def __init__(self) -> None:
        self._last: tuple[Tensor, Tensor] | None = None

    def of(self, gram: Tensor) -> Tensor:
        """U of H = `gram`, float64 (K, K)."""
        if self._last is None or not torch.equal(self._last[0], gram):
            self._last = gram, _inverse_factor(gram)
        return self._last[1]


def _inverse_factor(gram: Tensor) -> Tensor:
    """U, upper triangular, with UᵀU = (H + d·I)⁻¹."""
    diagonal = gram.diagonal()
    damping = _DAMPING * float(diagonal.mean()) or 1.0  # 1 if H is all zero, for which U is the identity
    lower = torch.linalg.cholesky(gram + damping * torch.eye(len(gram), dtype=gram.dtype, device="cpu"))
    factor: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    return factor


def mean_error(exact: Tensor, actual: Tensor) -> Tensor:
    """What bias correction adds: `mean(exact - actual)` over the rows, (R, N) -> (N,); 0 if there are no rows.

    >>> mean_error(torch.tensor([[1.0, 2.0], [3.0, 2.0]]), torch.tensor([[0.5, 2.0], [2.5, 2.0]]))
    tensor([0.5000, 0.0000])
    """
    return (exact - actual).double().sum(dim=0).div(max(1, len(exact))).float()
