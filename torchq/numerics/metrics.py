"""Measures of error: SQNR in decibels, and the number of values that a range clips."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchq.numerics.qparams import QParams

_PIECE = 1 << 18  # values converted at a time: 2 MiB in float64


def sqnr_db(reference: Tensor, approximation: Tensor) -> float:
    """How far the signal stands above the error, in decibels: `10 log10(sum(ref^2) / sum((ref - approx)^2))`.

    Computed in float64. 20 dB is an error of 10 % of the signal, 40 dB of 1 %.

    Args:
        reference: any dtype and shape.
        approximation: the same shape.

    Returns:
        inf if the error is zero (also for two all-zero or empty tensors), -inf if the reference is all zero and
        the approximation is not, nan if either has NaN.

    Raises:
        ValueError: the shapes differ. Broadcasting would measure something else than intended.

    >>> sqnr_db(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5]))
    20.0
    """
    if reference.shape != approximation.shape:
        raise ValueError(
            f"torchq.sqnr_db: expected tensors of one shape, got reference {list(reference.shape)} and "
            f"approximation {list(approximation.shape)}. Reshape one of them."
        )
    return decibels(energies(reference, approximation))


def energies(reference: Tensor, approximation: Tensor) -> Tensor:
    """`sum(ref^2)` and `sum((ref - approx)^2)`, float64 (2,). Their sums over parts give `sqnr_db` of the whole."""
    # One piece at a time: in float64, the temporaries of a whole output would be larger than its layer.
    pieces = zip(*(x.detach().reshape(-1).split(_PIECE) for x in (reference, approximation)), strict=True)
    sums = torch.zeros(2, dtype=torch.float64, device="cpu")
    for ref, approx in pieces:
        if not ref.dtype == approx.dtype == torch.float32:  # in float32, a difference is rounded by 2^-24 of itself
            ref, approx = ref.double(), approx.double()
        norms = torch.stack([torch.linalg.vector_norm(x, dtype=torch.float64) for x in (ref, ref - approx)])
        sums += norms.square().cpu()
    return sums


def decibels(energies: Tensor) -> float:
    """`10 log10` of signal over noise; `sqnr_db` says what zero and NaN give.

    >>> parts = [(torch.tensor([3.0]), torch.tensor([3.0])), (torch.tensor([4.0]), torch.tensor([4.5]))]
    >>> decibels(sum(energies(*part) for part in parts))
    20.0
    """
    signal, noise = energies
    return math.inf if noise == 0 else 10 * float(torch.log10(signal / noise))


def count_clipped(x: Tensor, qparams: QParams) -> tuple[int, int]:
    """How many values lie more than one step s below and above the range of u8 codes, `[-z·s, (255 - z)·s]`.

    Up to one step outside counts as a rounding error. The rounding of the zero point alone moves the range by up to
    half a step, so the largest value of the calibration data may lie just outside. NaN is in neither count.

    >>> count_clipped(torch.tensor([-0.2, 0.0, 25.5, 25.55, 26.0]), QParams(scale=0.1, zero_point=0))
    (1, 1)
    """
    scale, zero_point = qparams
    below, above = x < -(zero_point + 1) * scale, x > (256 - zero_point) * scale
    return int(below.sum()), int(above.sum())
