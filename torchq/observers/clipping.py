"""Observers that clip: they choose a range from a histogram, and let the values outside it saturate.

They differ in the criterion: the share of the values that is covered (percentile), the squared error of the u8 codes
(MSE), or the information lost (entropy).
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor, nn

from torchq.observers.histogram import Histogram
from torchq.ops.histogram import squared_error

_BLOCK = 2  # channels searched at a time, so that the temporaries stay in the cache


class PercentileObserver(Histogram):
    """Covers the central `percentile` % of the values and lets the tails saturate.

    With values on both sides of zero, (100 - percentile) / 2 % of all values are cut off at each end. With
    values on one side only (after a ReLU, say), the whole (100 - percentile) % is cut off at the far end,
    since the range ends at 0 on the other side anyway. Values are assumed to be evenly spread within a bin,
    so the share is accurate to one bin of the histogram. 100 gives exactly min-max.

    The right choice where outliers are rare and contribute little to the output. The wrong one for heavy tails
    and for outlier channels that carry the signal (in the package's docstring: 6.9 dB, min-max has 18.5 dB).

    Args:
        percentile: the share of values to cover, in (0, 100].
        bins: see `Histogram`.
        channels: see `Observer`.

    Raises:
        ValueError: percentile, bins or channels is out of range.

    >>> observer = PercentileObserver(percentile=99)
    >>> observer.observe(torch.cat([torch.linspace(0, 1, 990), torch.full([10], 5.0)]))
    >>> observer.seen, observer.range()
    ((tensor(0.), tensor(5.)), (tensor(0.), tensor(1.0078)))
    """

    def __init__(self, percentile: float = 99.9, bins: int = 2048, *, channels: int | None = None) -> None:
        super().__init__(bins, channels=channels)
        if not 0 < percentile <= 100:
            raise ValueError(
                f"torchq.observers.PercentileObserver: percentile must be in (0, 100], got {percentile}. "
                "It is in percent: 99.9 covers all but one value in a thousand."
            )
        self.percentile = float(percentile)

    def range(self) -> tuple[Tensor, Tensor]:
        """The clipped range, lo <= 0 <= hi, never wider than min-max. ValueError if nothing was observed."""
        lo, hi = self.seen
        # Exactly 99.9 as written, not the nearest float: 99.9 % of 1000 values must be 999. If it came out slightly
        # larger, the range would reach into the bin of the first outlier.
        cut = self.count * (1 - Fraction(str(self.percentile)) / 100)
        two_sided, one_sided = torch.tensor([self.count - cut / 2, self.count - cut], dtype=torch.float64, device="cpu")
        keep = torch.where((lo < 0) & (hi > 0), two_sided, one_sided)
        # Positions count bins from zero.
        upper = self._upper(self.counts, keep) * self._width()
        lower = self._upper(self.counts.flip(-1), keep) * -self._width()
        return lower.float().maximum(lo).clamp(max=0), upper.float().minimum(hi).clamp(min=0)

    def _settings(self) -> dict[str, float | None]:
        return super()._settings() | {"percentile": self.percentile}

    def _upper(self, counts: Tensor, keep: Tensor) -> Tensor:
        """The position, in bins above zero, that has `keep` values below it, 0 < keep <= sum(counts)."""
        below = counts.cumsum(-1).double()
        i = torch.searchsorted(below, keep.unsqueeze(-1))  # the first bin that reaches it, so it is not empty
        excess = (below.gather(-1, i) - keep.unsqueeze(-1)) / counts.gather(-1, i)
        return (i + 1 - self.bins // 2 - excess).squeeze(-1)


class MSEObserver(Histogram):
    """The range with the least mean squared error of u8 codes: `argmin E[(x - dequantize(quantize(x)))^2]`.

    A narrower range has finer steps, so it rounds less and saturates more. The error is computed on the histogram with
    the exact arithmetic of an asymmetric uint8 quantizer, including its zero point. Values are assumed to be evenly
    spread within a bin, so the integral has a closed form (`squared_error`). Values of exactly 0 have no error.

    The rounding error is about `(hi - lo)^2 / 255^2 / 12`, which is convex in (lo, hi), and so is the saturation error.
    So one bound is searched at a time: first in steps of 41 % from min-max down to a bin, then of 9, 2 and 1 %. On the
    histogram, the result is never worse than min-max.

    This is the clip search of OMSE (Choukroun et al., 2019, arXiv:1902.06822), for an asymmetric range.

    >>> observer = MSEObserver()
    >>> observer.observe(torch.cat([torch.linspace(-1, 1, 100_000), torch.tensor([3.0, -3.0])]))
    >>> [round(bound.item(), 1) for bound in observer.range()]
    [-2.4, 2.4]
    """

    def range(self) -> tuple[Tensor, Tensor]:
        """The clipped range, lo <= 0 <= hi, never wider than min-max. ValueError if nothing was observed."""
        lo, hi = (bound.double().reshape(-1) for bound in super().range())
        extremes = [bound.double().reshape(-1, 1) for bound in self.seen]
        # The outermost bins end at the smallest and largest value, so that min-max has no saturation error.
        edges = self.edges().reshape(-1, self.bins + 1).clamp(*extremes)
        counts = _without_zeros(self)
        first, last = _filled(counts)
        counts, edges = counts[:, first:last], edges[:, first : last + 1]
        lo, hi = (bound.float().reshape(self._shape) for bound in _least_squared_error(counts, edges, lo, hi))
        return lo, hi


class EntropyObserver(Histogram):
    """The range whose codes lose the least information: the least KL divergence between the values and their codes.

    This is the calibration of TensorRT (Migacz, "8-bit inference with TensorRT", GTC 2017), in the form of ONNX Runtime
    (`calibrate.py`, get_entropy_threshold). For each window of i bins on either side of zero,

        P = the counts inside, with those outside added to the outermost bins
        Q = the counts inside, merged into 128 levels, each spread evenly over its bins that P has values in
        KL(P || Q) = sum P log(P / Q), both normalized; where Q is 0 and P is not, Q is 1e-4 of a value

    and the range is the best window, clamped to the values seen. There are three differences to ONNX Runtime:

    * Bin j belongs to level `floor(j * 128 / 2i)`. ONNX Runtime gives the remainder of 2i / 128 to the last level.
    * Only 64 windows are tried, in a geometric series from 64 bins to min-max, and not all.
    * Exact zeros are left out, since every range represents them exactly. TensorRT leaves out the whole first bin.

    A window has at least 64 bins, so the range is never clipped to less than a sixteenth of the largest value.

    The right choice for long-tailed activations whose large values matter little. It considers how frequent values are
    and not how large. So, like the percentile, it loses where the large values carry the signal.

    Args:
        bins: see `Histogram`; at least 256.
        channels: see `Observer`.

    Raises:
        ValueError: bins or channels is out of range.

    >>> observer = EntropyObserver()
    >>> observer.observe(torch.cat([torch.linspace(-1, 1, 100_000), torch.tensor([3.0, -3.0])]))
    >>> [round(bound.item(), 1) for bound in observer.range()]
    [-1.1, 1.1]
    """

    def __init__(self, bins: int = 2048, *, channels: int | None = None) -> None:
        super().__init__(bins, channels=channels)
        if bins < 2 * LEVELS:
            raise ValueError(
                f"torchq.observers.EntropyObserver: bins must be at least {2 * LEVELS}, got {bins}. Try 2048."
            )

    def range(self) -> tuple[Tensor, Tensor]:
        """The clipped range, lo <= 0 <= hi, never wider than min-max. ValueError if nothing was observed."""
        lo, hi = super().range()
        # The bins from zero to the largest magnitude: more than a quarter of all bins, so at least LEVELS / 2.
        widest = (torch.maximum(-lo, hi) / self._width()).long().reshape(-1) + 1
        windows = _windows(widest.clamp(min=LEVELS // 2))
        parts = zip(_without_zeros(self).split(_BLOCK), windows.split(_BLOCK), strict=True)
        best = torch.cat([divergence(*part).argmin(-1, keepdim=True) for part in parts])
        limit = (windows.gather(-1, best).reshape(self._shape) * self._width()).float()
        return torch.maximum(lo, -limit), torch.minimum(hi, limit)


def _without_zeros(histogram: Histogram) -> Tensor:
    """The counts without exact zeros: float64 [channels or 1, bins]."""
    counts = histogram.counts.double().reshape(-1, histogram.bins)
    counts[:, histogram.bins // 2] -= histogram.zeros.reshape(-1)
    return counts


# ---- mean squared error ------------------------------------------------------------------------------------------

_FROM_EXTREMES = 2 ** (-torch.arange(21, dtype=torch.float64, device="cpu") / 2)  # 1, 0.71, 0.5, ..., 1 / 1024
_AROUND = [
    2 ** (torch.arange(-5, 6, dtype=torch.float64, device="cpu") / steps) for steps in (8, 32, 64)
]  # 0.65 to 1.54, ...
_MERGED = 8  # bins taken as one while the steps are large


def _filled(counts: Tensor) -> tuple[int, int]:
    """From which to which bin, in blocks of `_MERGED`, there are values in any channel."""
    filled = counts.any(0).nonzero().flatten()
    first, last = (int(filled[0]), int(filled[-1])) if len(filled) else (0, 0)
    return first // _MERGED * _MERGED, min((last // _MERGED + 1) * _MERGED, counts.shape[1])


def _least_squared_error(counts: Tensor, edges: Tensor, lowest: Tensor, highest: Tensor) -> tuple[Tensor, Tensor]:
    """The bounds (lo, hi), each float64 [C], with the least `squared_error` in [lowest, highest]."""
    lowest, highest = lowest.unsqueeze(-1), highest.unsqueeze(-1)
    lo, hi = lowest, highest
    merge = _MERGED if counts.shape[1] >= _MERGED**2 and counts.shape[1] % _MERGED == 0 else 1
    merged = counts.unflatten(1, (-1, merge)).sum(-1), edges[:, ::merge]  # will do for the large steps
    for grid in (_FROM_EXTREMES, _FROM_EXTREMES, *_AROUND):
        above, below = (highest, lowest) if grid is _FROM_EXTREMES else (hi, lo)
        filled, borders = merged if grid is _FROM_EXTREMES else (counts, edges)
        tried = (above * grid).minimum(highest)
        hi = tried.gather(-1, squared_error(filled, borders, lo, tried).argmin(-1, keepdim=True))
        tried = (below * grid).maximum(lowest)
        lo = tried.gather(-1, squared_error(filled, borders, tried, hi).argmin(-1, keepdim=True))
    lo, hi = torch.cat([lo, lowest], -1), torch.cat([hi, highest], -1)
    best = squared_error(counts, edges, lo, hi).argmin(-1, keepdim=True)
    return lo.gather(-1, best).squeeze(-1), hi.gather(-1, best).squeeze(-1)


# ---- KL divergence -----------------------------------------------------------------------------------------------

LEVELS = 128
"""How many levels the entropy observer merges bins into, as TensorRT and ONNX Runtime do."""

_EMPTY = 1e-4  # the count of Q in a bin that has values in P and would have none in Q


def _windows(widest: Tensor) -> Tensor:
    """The windows to try, in bins on either side of zero, widest first: int64 [C, 64]."""
    ratio = (LEVELS / 2 / widest.double()).unsqueeze(-1)
    return (widest.unsqueeze(-1) * ratio ** torch.linspace(0, 1, 64, dtype=torch.float64, device="cpu")).round().long()


def divergence(counts: Tensor, windows: Tensor) -> Tensor:
    """KL(P || Q) of each window, as `EntropyObserver` defines them; inf where a window has no values inside.

    Args:
        counts: float64 [C, bins].
        windows: int64 [C, J], in [LEVELS / 2, bins / 2].

    Returns:
        float64 [C, J].
    """
    half, widths = counts.shape[-1] // 2, 2 * windows.unsqueeze(-1)
    levels = torch.arange(LEVELS + 1, dtype=torch.int64, device="cpu")
    borders = half - windows.unsqueeze(-1) + (levels * widths + LEVELS - 1).div(LEVELS, rounding_mode="floor")

    def below(values: Tensor) -> Tensor:
        """The sum of `values` (C, bins) before each border, (C, J, LEVELS + 1)."""
        sums = nn.functional.pad(values.cumsum(-1), (1, 0))
        return sums.unsqueeze(1).expand(-1, windows.shape[1], -1).gather(-1, borders)

    # All is said by sums over levels, but for the window's first and last bin, which also have what lies beyond.
    before = below(counts)
    inside, members, logs = before.diff(), below((counts > 0).double()).diff(), below(counts.xlogy(counts)).diff()
    beyond = torch.stack([before[..., 0], counts.sum(-1, keepdim=True) - before[..., -1]], -1)
    ends = torch.stack([borders[..., 0], borders[..., -1] - 1], -1)
    ends = counts.unsqueeze(1).expand(-1, windows.shape[1], -1).gather(-1, ends)
    at_ends = [0, LEVELS - 1]
    members[..., at_ends] += ((ends == 0) & (beyond > 0)).double()
    reference = inside.clone()
    reference[..., at_ends] += beyond
    spread = (inside / members.clamp(min=1)).clamp_(min=_EMPTY)
    total = reference.sum(-1)
    own = logs.sum(-1) + ((ends + beyond).xlogy(ends + beyond) - ends.xlogy(ends)).sum(-1)
    coded = (reference * (spread / (spread * members).sum(-1, keepdim=True)).log()).sum(-1)
    return torch.where(inside.sum(-1) > 0, (own - coded) / total - total.log(), torch.inf)
