"""Histogram: how often each value occurred, in constant memory, merging exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torchq.observers.base import Observer

if TYPE_CHECKING:
    from typing_extensions import Self

_CHUNK = 1 << 16  # values binned at a time: their temporaries stay in the cache
_NARROWEST = -126  # bins are at least FLT_MIN wide, below which no scale goes either (see qparams)


class Histogram(Observer):
    """Counts of values in `bins` equal bins over (-2^e, 2^e), in constant memory, merging exactly.

    e is the smallest exponent with |x| < 2^e for all x so far. When a larger value arrives the limit doubles, as often
    as needed, and pairs of bins become one. That is exact: magnitude |x| lies in bin k = floor(|x| / 2^e * bins / 2)
    from zero, on its own side of it, and the bins 2k and 2k + 1 are precisely bin k of the doubled limit. The counts
    thus depend on the values only: not on their order, their batches, or what was merged with what. An edge belongs to
    the bin away from zero; zero itself, to the positive side.

    Memory: 8 * bins bytes a channel. A bin is 2 / bins to 4 / bins of the largest magnitude wide, so an outlier
    bins / 2 times larger than all other values leaves those in the two bins beside zero.

    Args:
        bins: a power of two, at least 2.
        channels: see `Observer`. Each channel has its own limit.

    Attributes:
        counts: int64 [bins] or [channels, bins], lowest values first.
        exponent: e, int64 ().
        zeros: how many values were exactly 0, int64 (). Every quantization keeps them exact.

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
        self.counts = torch.zeros(*self._shape, bins, dtype=torch.int64)
        self.zeros = torch.zeros(self._shape, dtype=torch.int64)
        # The smallest limit there is. Zeros have one bin at every limit, so all-zero batches need no rule.
        self.exponent = torch.full(self._shape, _NARROWEST + self._log2_half)

    def edges(self) -> Tensor:
        """The borders of the bins: float64 [bins + 1] or [channels, bins + 1]."""
        half = self.bins // 2
        return torch.arange(-half, half + 1, dtype=torch.float64) * self._width().unsqueeze(-1)

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
        channels = x.shape[1]
        self._rescale(torch.maximum(self.exponent, _exponent(torch.maximum(-lo, hi))))
        per_value = _power_of_two(self._log2_half - self.exponent).float()
        first = self.bins // 2 + self.bins * torch.arange(channels, dtype=torch.int32)
        # A chunk has no fewer values than there are counts, so that adding up the counts is not what takes the time.
        for chunk in x.split(max(_CHUNK // channels, self.bins)):
            sign = chunk.sign()
            nonzeros = sign.square().sum(0).long().reshape(self._shape)  # exact: less than 2^24 ones
            # The product by a power of two is exact, or so small that it becomes 0, which is its bin. The conversion
            # truncates towards zero (torch.trunc would take several times as long).
            index = (chunk * per_value).to(torch.int32)
            index += sign.clamp_(max=0).to(torch.int32)
            index += first
            counts = torch.bincount(index.flatten(), minlength=channels * self.bins)
            # Not in place: what there is may be inference tensors of an earlier batch.
            self.counts = self.counts + counts.reshape(self.counts.shape)
            self.zeros = self.zeros + (len(chunk) - nonzeros)

    def _merge(self, other: Self) -> None:
        self._rescale(torch.maximum(self.exponent, other.exponent))
        self.counts = self.counts + other._counts_at(self.exponent)
        self.zeros = self.zeros + other.zeros

    def _rescale(self, exponent: Tensor) -> None:
        self.counts, self.exponent = self._counts_at(exponent), exponent

    def _counts_at(self, exponent: Tensor) -> Tensor:
        """The counts at limits 2^exponent, no smaller: bin k, counted from zero, goes to k >> doublings."""
        if torch.equal(exponent, self.exponent):
            return self.counts
        doublings = (exponent - self.exponent).clamp(max=62)  # shifts by 64 are undefined; 62 leaves bins 0 and -1
        half = self.bins // 2
        target = (torch.arange(-half, half) >> doublings.unsqueeze(-1)) + half
        return torch.zeros_like(self.counts).scatter_add_(-1, target, self.counts)

    def _load(self, state: Mapping[str, Tensor]) -> None:
        super()._load(state)
        self.counts, self.zeros, self.exponent = (
            state[key].to(torch.int64, copy=True) for key in ("counts", "zeros", "exponent")
        )


def _exponent(magnitude: Tensor) -> Tensor:
    """The least e with magnitude < 2^e, int64; for 0, less than any histogram's."""
    _, exponent = torch.frexp(magnitude)  # magnitude = m * 2^exponent, 0.5 <= m < 1
    return torch.where(magnitude > 0, exponent, _NARROWEST).long()


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent as float64, exactly, which torch.pow does not promise."""
    powers = [math.ldexp(1.0, e) for e in exponent.flatten().tolist()]
    return torch.tensor(powers, dtype=torch.float64).reshape(exponent.shape)
