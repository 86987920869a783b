"""Derives the coefficients in csrc/gemm/activations.inc, and prints them with their errors.

    python -m benchmarks.fit_curves

Two polynomials are fitted, by weighted minimax: the greatest weighted error is as small as it can be. Lawson's method
finds it as a sequence of least squares problems, in which points of large error gain weight. Then the coefficients are
rounded to float32 one at a time, the highest power first, and the remaining ones are fitted again: they make up for
most of the rounding. The constant terms are fixed, at the curves' values at 0.

    2^f                = 1 + c1·f + ... + c5·f⁵,         |f| <= 1/2;   relative error
    Φ(-a)^1/32         = c0 + c1·a + ... + c5·a⁵,   0 <= a <= 5.4;   Φ is the normal distribution

GELU is max(x, 0) - a·Q(a)^32 for a = |x|. The error of Q may move y by LOOSE, and in the far tail, where y itself is
tiny, by TAIL times y.
"""

import math

import torch
from torch import Tensor

LIMIT = 5.4  # of a: GELU is constant below x = -5.4
POWER = 32  # of Q
LOOSE, TAIL = 1e-7, 1e-2  # the weights: errors of GELU that count alike


def minimax(target: Tensor, powers: Tensor, weight: Tensor, rounds: int = 200) -> tuple[float, Tensor]:
    """The coefficients c of the least max |weight · (powers @ c - target)|, and that error. powers: (points, terms)."""
    share = torch.full_like(target, 1 / len(target))
    best, coefficients = math.inf, powers.new_zeros(powers.shape[1])
    for _ in range(rounds):
        root = share.sqrt() * weight
        found = torch.linalg.lstsq(powers * root[:, None], (target * root)[:, None], driver="gelsd").solution[:, 0]
        error = (weight * (powers @ found - target)).abs()
        if error.max() < best:
            best, coefficients = float(error.max()), found
        share = share * error
        share = share / share.sum()
    return best, coefficients


def rounded_minimax(x: Tensor, target: Tensor, weight: Tensor, degree: int) -> list[float]:
    """float32 coefficients of x¹ to x^degree."""
    scale = x.abs().max()
    powers = torch.stack([(x / scale) ** k for k in range(1, degree + 1)], 1)
    fixed: list[float] = []  # from the highest power down
    for k in range(degree, 0, -1):
        _, free = minimax(target, powers[:, :k], weight)
        fixed.append((free[k - 1] / scale**k).float().item())
        target = target - fixed[-1] * x**k
    return fixed[::-1]


def polynomial(x: Tensor, coefficients: list[float]) -> Tensor:
    """c1·x + c2·x² + ..."""
    return sum((c * x ** (k + 1) for k, c in enumerate(coefficients)), torch.zeros_like(x))


def chebyshev(low: float, high: float, count: int = 1500) -> Tensor:
    """Points that are denser at both ends, where minimax errors are sharpest."""
    angle = torch.linspace(0, torch.pi, count, dtype=torch.float64)
    return (low + high) / 2 - (high - low) / 2 * angle.cos()


def show(name: str, coefficients: list[float]) -> None:
    """Prints coefficients as C++."""
    print(f"{name}: " + ", ".join(f"{c:.9g}f" for c in coefficients))


def fit_power() -> None:
    """2^f, for the exponentials."""
    f = chebyshev(-0.5, 0.5)
    coefficients = rounded_minimax(f, f.exp2() - 1, (-f).exp2(), degree=5)
    show("2^f - 1", coefficients)
    error = (polynomial(f, coefficients) - f.exp2() + 1) * (-f).exp2()
    print(f"  greatest relative error of 2^f: {error.abs().max():.1e}")


def fit_normal_tail() -> None:
    """Q of GELU."""
    a = chebyshev(0, LIMIT)[1:]
    tail = torch.special.log_ndtr(-a).exp()
    target = tail ** (1 / POWER)
    allowed = (LOOSE / (a * tail)).clamp(max=TAIL) * target / POWER
    first = torch.tensor(0.5 ** (1 / POWER)).item()
    coefficients = rounded_minimax(a, target - first, 1 / allowed, degree=5)
    show(f"Φ(-a) ^ 1/{POWER}", [first, *coefficients])
    relative = ((polynomial(a, coefficients) + first) ** POWER / tail - 1).abs()
    print(f"  greatest error of GELU: {(relative * a * tail).max():.1e}")
    for x in (-1, -2, -3, -4, -5, -5.4):
        print(f"  greatest relative error of GELU from {x} to 0: {relative[a <= -x].max():.1e}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    fit_power()
    fit_normal_tail()
