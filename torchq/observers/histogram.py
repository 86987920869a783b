"""Histogram: counts how often values occur, in constant memory. Merging is exact."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torchq.observers.base import Observer
from torchq.ops.histogram import count_bins

if TYPE_CHECKING:
    from typing_extensions import Self

_NARROWEST = -126  # log2 of the narrowest bin: FLT_MIN, which is also the smallest scale (see qparams)


class Histogram(Observer):
    """Counts values in `bins` equal bins over (-2^e, 2^e), in constant memory. Merging is exact.

    e is the smallest exponent with |x| < 2^e for all x so far. When a larger value arrives, the limit 2^e doubles as
    often as needed, and each time pairs of bins become one. That is exact: |x| lies in bin k = floor(|x| / 2^e * bins /
    2), counted from zero on the side of x, and the bins 2k and 2k + 1 are precisely bin k of the doubled limit. So the
    counts depend only on the values, and not on their order, their batches, or the order of merges. A value on an edge
    belongs to the bin farther from zero; zero itself belongs to the positive side.

    Memory: 8 * bins bytes per channel. The width of a bin is 2 / bins to 4 / bins of the largest magnitude. So if one
    outlier is bins / 2 times larger than all other values, those are all in the two bins beside zero.

    Args:
        bins: a power of two, at least 2.
        channels: see `Observer`. Each channel has its own limit.

    Attributes:
        counts: int64 [bins] or [channels, bins], lowest values first.
        exponent: e, int64 ().
        zeros: how many values were 0, int64 (). Every quantization represents them exactly. Values up to FLT_MIN count
            as 0: no scale is smaller, and CPUs that flush denormals (torch.set_flush_denormal) make zeros of them.

    Raises:
        ValueError: bins is not a power of two, or is less than 2.

    >>> histogram = Histogram(bins=4)
    >>> histogram.observe(torch.tensor([-0.9, 0.0, 0.4, 1.0]))
    >>> histogram.edges().tolist(), histogram.counts.tolist()
    ([-2.0, -1.0, 0.0, 1.0, 2.0], [0, 1, 2, 1])
    >>> histogram.observe(torch.tensor([3.0]))
    >>> histogram.edges().tolist(), histogram.counts.tolist()
    ([-4.0, -2.0, 0.0, 2.0, 4.0], [0, 1, 3, 1])
    """

    def __init__(self, bins: int = 2048, *, channels: int | None = None) -> None:
        super().__init__(channels=channels)
        if bins < 2 or bins & (bins - 1):
            raise ValueError(
                f"torchq.observers.{type(self).__name__}: bins must be a power of two and at least 2, got {bins}. "
                "Try 2048."
            )
        self.bins = bins
        self.counts = torch.zeros(*self._shape, bins, dtype=torch.int64, device="cpu")
        self.zeros = torch.zeros(self._shape, dtype=torch.int64, device="cpu")
        # The smallest limit. Zeros are in the same bin at every limit, so all-zero batches need no special case.
        self.exponent = torch.full(self._shape, _NARROWEST + self._log2_half, dtype=torch.int64, device="cpu")

    def edges(self) -> Tensor:
        """The borders of the bins: float64 [bins + 1] or [channels, bins + 1]."""
        half = self.bins // 2
        return torch.arange(-half, half + 1, dtype=torch.float64, device="cpu") * self._width().unsqueeze(-1)

    def state_dict(self) -> dict[str, Tensor]:
        """All that was observed: adds counts, zeros and exponent."""
        added = {"counts": self.counts, "zeros": self.zeros, "exponent": self.exponent}
        return super().state_dict() | {key: value.clone() for key, value in added.items()}

    @property
    def _log2_half(self) -> int:
        return self.bins.bit_length() - 2

    def _settings(self) -> dict[str, float | None]:
        return super()._settings() | {"bins": self.bins}

    def _width(self) -> Tensor:
        """The width of a bin: float64 (), a power of two."""
        return _power_of_two(self.exponent - self._log2_half)

    def _update(self, x: Tensor, lo: Tensor, hi: Tensor) -> None:
        self._rescale(torch.maximum(self.exponent, _exponent(torch.maximum(-lo, hi))))
        # The product with a power of two is exact, or it underflows to 0, which is the right bin.
        per_value = _power_of_two(self._log2_half - self.exponent).float().reshape(-1)
        counts, zeros = count_bins(x, per_value, self.bins)
        # Not in place: after a batch in inference mode these are inference tensors, which can't be changed.
        self.counts = self.counts + counts.reshape(self.counts.shape)
        self.zeros = self.zeros + zeros.reshape(self._shape)

    def _merge(self, other: Self) -> None:
        self._rescale(torch.maximum(self.exponent, other.exponent))
        self.counts = self.counts + other._counts_at(self.exponent)
        self.zeros = self.zeros + other.zeros

    def _rescale(self, exponent: Tensor) -> None:
        self.counts, self.exponent = self._counts_at(exponent), exponent

    def _counts_at(self, exponent: Tensor) -> Tensor:
        """The counts for limits 2^exponent, which must not be smaller: bin k from zero moves to k >> doublings."""
        if torch.equal(exponent, self.exponent):
            return self.counts
        doublings = (exponent - self.exponent).clamp(max=62)  # shifts by 64 are undefined; 62 leaves bins 0 and -1
        half = self.bins // 2
        target = (torch.arange(-half, half, dtype=torch.int64, device="cpu") >> doublings.unsqueeze(-1)) + half
        return torch.zeros_like(self.counts).scatter_add_(-1, target, self.counts)

    def _load(self, state: Mapping[str, Tensor]) -> None:
        super()._load(state)
        self.counts, self.zeros, self.exponent = (
            state[key].to(torch.int64, copy=True) for key in ("counts", "zeros", "exponent")
        )


def _exponent(magnitude: Tensor) -> Tensor:
    """The smallest e with magnitude < 2^e, int64; for 0, less than the exponent of any histogram."""
    _, exponent = torch.frexp(magnitude)  # magnitude = m * 2^exponent, 0.5 <= m < 1
    return torch.where(magnitude > 0, exponent, _NARROWEST).long()


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent as float64, exactly; torch.pow does not guarantee that."""
    powers = [math.ldexp(1.0, e) for e in exponent.flatten().tolist()]
    return torch.tensor(powers, dtype=torch.float64, device="cpu").reshape(exponent.shape)
