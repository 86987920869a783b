"""Record: what calibration saw of one input, in memory that does not grow with the data.

Layers that read the same tensor in every call (q, k and v of an attention) share one record: see `sharing`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from torchq.calibration.sample import Sample
from torchq.config import QConfig
from torchq.numerics.qparams import QParams
from torchq.observers import Histogram, Observer, make_observer, share

SAMPLE_BYTES = 2 * 2**20
"""The most one record's sample may hold, whatever `QConfig.sample_rows` says."""

MAX_GRAM_DEPTH = {"nearest": 0, "auto": 1024, "gptq": 4096}
"""By `QConfig.rounding`: the most inputs of a layer for which XᵀX is kept. 4096 are 64 MiB and seconds of rounding."""

ROWS_PER_CHANNEL = 20
"""Rows seen for each input channel, from which on a new row seldom leaves the range of any channel."""

GRAM_ROWS = 4
"""XᵀX takes in the first 4 K rows: enough for its K x K numbers, at a cost that does not grow with more batches."""


@dataclass(frozen=True)
class Trial:
    """What a quantization scheme is tried on: the ranges a static input may have, and rows to measure the output on.

    Args:
        observers: what saw the values that the ranges cover, by name.
        rows: float32 (R, K).
        peak: max|x_j| of each input channel over the values that the ranges cover, (K,).
    """

    observers: Mapping[str, Observer]
    rows: Tensor
    peak: Tensor

    @cached_property
    def ranges(self) -> dict[str, QParams]:
        """The scale and zero point that each observer proposes for a static input."""
        found = {}
        for name, observer in self.observers.items():
            scale, zero_point = observer.qparams(dtype=torch.uint8, symmetric=False)
            found[name] = QParams(float(scale), int(zero_point))
        return found


@dataclass
class Record:
    """What calibration saw of one input.

    Args:
        seen: all its values: one histogram for all observers if `config.observer` is "auto", or the one asked for.
        sample: some of its rows.
        config: which observers.
        calls: how often a layer was called with it.
        extremes: the smallest and the largest value of each channel, (2, K).
        gram: XᵀX of the first `gram_rows` rows, float32 (K, K); None unless weights are to be rounded by it.
    """

    seen: Observer
    sample: Sample
    config: QConfig
    calls: int = 0
    extremes: Tensor | None = None
    gram: Tensor | None = None
    gram_rows: int = 0

    @classmethod
    def empty(cls, in_features: int, config: QConfig) -> "Record":
        """A record that has seen nothing, for the observers `config` asks for."""
        rows = max(1, min(config.sample_rows, SAMPLE_BYTES // (4 * max(1, in_features))))
        wanted = in_features <= MAX_GRAM_DEPTH[config.rounding]
        gram = torch.zeros(in_features, in_features) if wanted else None
        return cls(_new_observer(config), Sample(rows), config, gram=gram)

    @property
    def has_data(self) -> bool:
        """Whether any value was seen; a layer may have been called with empty inputs only."""
        return self.seen.count > 0

    def observe(self, x: Tensor) -> None:
        """Takes the input of one call, (..., K)."""
        rows = x.detach().float().reshape(math.prod(x.shape[:-1]), x.shape[-1])
        self.seen.observe(rows)
        self.sample.add(rows)
        self.calls += 1
        self._sum_products(rows)
        if len(rows) > 0:
            extremes = _extremes(rows)
            if self.extremes is not None:
                lo, hi = zip(self.extremes, extremes, strict=True)
                extremes = torch.stack([torch.minimum(*lo), torch.maximum(*hi)])
            self.extremes = extremes

    @cached_property
    def whole(self) -> Trial:
        """Ranges from all that was seen, the sample to measure on. For a record that takes nothing more."""
        return Trial(self._observers(self.seen), self.sample.rows, _peak(self.extremes))

    def trial(self, *, into: Tensor | None = None) -> Trial:
        """The same for inputs divided by `into` (K,).

        Exact for the min-max range; the other observers see the sample instead of all rows.
        """
        if into is None or self.extremes is None:
            return self.whole
        return self._trial(self.sample.rows, self.sample.rows, self.extremes, into)

    def held_out(self, *, into: Tensor | None = None) -> Trial:
        """A trial whose rows did not make its ranges, where the rows seen are few: half of the sample for each.

        The range of each channel is what smoothing divides by, and a new row is beyond it in K / n channels on
        average, n being the rows seen: every range fits the rows that made it, and no others. Where the rows are many
        (`ROWS_PER_CHANNEL`), this is `trial`.
        """
        if not self.is_few:
            return self.trial(into=into)
        return self._halves if into is None else self._half_trial(into)

    @cached_property
    def _halves(self) -> Trial:
        return self._half_trial(None)

    def _half_trial(self, into: Tensor | None) -> Trial:
        rows = self.sample.rows
        return self._trial(rows[::2], rows[1::2], _extremes(rows[::2]), into)

    @property
    def is_few(self) -> bool:
        """Whether new rows are likely to leave the ranges of some channels."""
        rows = self.sample.rows
        return self.sample.seen < ROWS_PER_CHANNEL * rows.shape[1] and len(rows) >= 2

    def _sum_products(self, rows: Tensor) -> None:
        """Adds rows to XᵀX, as long as it has not enough."""
        if self.gram is not None and self.gram_rows < GRAM_ROWS * rows.shape[1]:
            first = rows[: GRAM_ROWS * rows.shape[1] - self.gram_rows]
            self.gram.addmm_(first.T, first)
            self.gram_rows += len(first)

    def _trial(self, seen: Tensor, rows: Tensor, extremes: Tensor, into: Tensor | None) -> Trial:
        """A trial whose ranges cover `seen` and, for min-max, `extremes` (2, K); all of it divided by `into`."""
        observer = _new_observer(self.config)
        observer.observe(seen if into is None else seen / into)
        if into is not None and self.config.observer in ("auto", "minmax"):
            observer.observe(extremes / into)
        return Trial(self._observers(observer), rows if into is None else rows / into, _peak(extremes))

    def _observers(self, seen: Observer) -> dict[str, Observer]:
        """The observers that `config` asks for, by name."""
        if isinstance(seen, Histogram) and self.config.observer == "auto":
            return share(seen, percentile=self.config.percentile)
        return {self.config.observer: seen}


def _new_observer(config: QConfig) -> Observer:
    name = config.observer
    return Histogram() if name == "auto" else make_observer(name, percentile=config.percentile)


def _extremes(rows: Tensor) -> Tensor:
    return torch.stack([rows.amin(dim=0), rows.amax(dim=0)])  # a tenth of the time of aminmax(dim=0)


def _peak(extremes: Tensor | None) -> Tensor:
    return torch.empty(0) if extremes is None else extremes.abs().amax(dim=0)
