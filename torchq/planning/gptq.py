"""GPTQ (arXiv 2210.17323) and bias correction: the arithmetic of weight rounding beyond nearest.

Rounding each weight to the nearest code is best for the weight, not for the output. The error of an output is `e·x`
for the weight error e of its row, so what counts is `eᵀ H e` with `H = XᵀX` of the calibration inputs. GPTQ rounds one
input channel after the other, and takes each error back in the channels still to come, as far as the inputs'
correlation allows:

    e_j = (w_j - q_j) / U_jj        w_i -= e_j · U_ji for i > j        U upper triangular, UᵀU = (H + d·I)⁻¹

with d = 1 % of the mean of H's diagonal, and channels in order of falling H_jj. Bias correction then adds the mean
error that is left, `b += mean(y - y_int8)`. Both change numbers only: the layer costs at run time what it did.
"""

import torch
from torch import Tensor

_DAMPING, _BLOCK, _PANEL = 0.01, 128, 16  # a panel of channels stays in a near cache


def gptq(weight: Tensor, scale: Tensor, gram: Tensor, *, factors: "Factors | None" = None) -> Tensor:
    """int8 codes of `weight` that keep `(W - W_int8) · x` small, in blocks of 128 channels.

    Time N·K² + 4/3·K³ multiplications and 3 temporary float64 matrices of K x K.

    Args:
        weight: float32 (N, K).
        scale: float32 (N,), positive.
        gram: XᵀX of the inputs, (K, K). A channel that was always zero is rounded to nearest.
        factors: from the call before, for layers that may share its `gram`.

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
    rest = weight.detach().T.contiguous()[order].double()  # (K, N): a channel is a row
    codes = torch.empty_like(rest, dtype=torch.int8)
    errors, code = torch.empty_like(rest[:_BLOCK]), torch.empty_like(rest[0])
    scale, inverse = scale.double(), scale.reciprocal().double()
    places, pivots = order.tolist(), factor.diagonal().tolist()
    for start in range(0, len(rest), _BLOCK):
        stop = min(start + _BLOCK, len(rest))
        for first in range(start, stop, _PANEL):
            last = min(first + _PANEL, stop)
            panel, found = rest[first:last], errors[first - start : last - start]
            for j, (w, error) in enumerate(zip(panel, found, strict=True), first):
                torch.mul(w, inverse, out=code).round_().clamp_(-127, 127)
                torch.addcmul(w, code, scale, value=-1, out=error).div_(pivots[j])  # the product is exact in float64
                panel[j + 1 - first :].addr_(factor[j, j + 1 : last], error, alpha=-1)
                codes[places[j]] = code
            rest[last:stop].addmm_(factor[first:last, last:stop].T, found, alpha=-1)
        rest[stop:].addmm_(factor[start:stop, stop:].T, errors[: stop - start], alpha=-1)
    return codes.T.contiguous()


class Factors:
    """The factor U that belongs to an H, computed once while H stays the same: q, k and v share theirs."""

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
    damping = _DAMPING * float(diagonal.mean()) or 1.0  # all zero: the identity
    lower = torch.linalg.cholesky(gram + damping * torch.eye(len(gram), dtype=gram.dtype))
    factor: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    return factor


def mean_error(exact: Tensor, actual: Tensor) -> Tensor:
    """What bias correction adds: `mean(exact - actual)` over the rows, (R, N) -> (N,); 0 for no rows.

    >>> mean_error(torch.tensor([[1.0, 2.0], [3.0, 2.0]]), torch.tensor([[0.5, 2.0], [2.5, 2.0]]))
    tensor([0.5000, 0.0000])
    """
    return (exact - actual).double().sum(dim=0).div(max(1, len(exact))).float()
