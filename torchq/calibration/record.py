"""Record: what calibration saw of one layer's input, in memory that does not grow with the data."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchq.config import QConfig
from torchq.observers import Histogram, Observer, make_observer, share

SAMPLE_BYTES = 2 * 2**20
"""The most one layer's sample may hold, whatever `QConfig.sample_rows` says."""


MAX_GRAM_DEPTH = {"nearest": 0, "auto": 1024, "gptq": 4096}
"""By `QConfig.rounding`: the most inputs of a layer for which XᵀX is kept. 4096 are 64 MiB and seconds of rounding."""


ROWS_PER_CHANNEL = 20
"""Rows seen for each input channel, from which on a new one seldom leaves the range of any (`Record.judged`)."""


GRAM_ROWS = 4
"""XᵀX takes in the first 4 K input rows of a layer: enough for its K x K numbers, at a cost that more batches keep."""


class Sample:
    """A uniform random sample of at most `capacity` rows of a stream: Vitter's algorithm R (ACM TOMS 1985).

    Seeded, so that the same data gives the same plan.

    >>> sample = Sample(capacity=2)
    >>> sample.add(torch.arange(12.0).reshape(4, 3))
    >>> sample.rows.shape, sample.seen
    (torch.Size([2, 3]), 4)
    >>> sample.positions.tolist()
    [0, 2]
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.seen = capacity, 0
        self._kept: Tensor | None = None
        self._positions = torch.zeros(capacity, dtype=torch.long)
        self._generator = torch.Generator().manual_seed(0)

    @property
    def rows(self) -> Tensor:
        """The sample, (rows, K)."""
        return torch.empty(0, 0) if self._kept is None else self._kept[: min(self.seen, self.capacity)]

    @property
    def positions(self) -> Tensor:
        """Where in the stream each of the rows stood."""
        return self._positions[: min(self.seen, self.capacity)]

    def add(self, rows: Tensor) -> None:
        """Offers rows (n, K); each row seen so far is kept with equal probability."""
        if self._kept is None:
            self._kept = rows.new_empty(self.capacity, rows.shape[1])
        index = torch.arange(self.seen, self.seen + rows.shape[0])
        draw = torch.rand(rows.shape[0], generator=self._generator, dtype=torch.float64)
        slot = torch.where(index < self.capacity, index, (draw * (index + 1)).long())
        hits = (slot < self.capacity).nonzero().flatten()
        last = dict(zip(slot[hits].tolist(), hits.tolist(), strict=True))  # of the rows for one slot, the last stays
        slots, chosen = torch.tensor(list(last), dtype=torch.long), torch.tensor(list(last.values()), dtype=torch.long)
        self._kept[slots] = rows[chosen]
        self._positions[slots] = index[chosen]
        self.seen += rows.shape[0]


@dataclass
class Record:
    """What calibration saw of one layer.

    Args:
        seen: all values of its input: one histogram for all observers if `config.observer` is "auto", or the one asked
            for.
        sample: some rows of its input.
        config: which observers.
        calls: how often it was called.
    """

    seen: Observer
    sample: Sample
    config: QConfig
    calls: int = 0
    extremes: Tensor | None = None
    """The smallest and the largest value of each input channel, (2, K)."""
    gram: Tensor | None = None
    """XᵀX of the first `gram_rows` rows, float32 (K, K); None unless weights are to be rounded by it."""
    gram_rows: int = 0
    half: Tensor | None = None
    """The rows that made the ranges, where they are not the sample (`judged`)."""

    @classmethod
    def empty(cls, layer: nn.Linear, config: QConfig) -> "Record":
        """A record that has seen nothing, for the observers `config` asks for."""
        rows = max(1, min(config.sample_rows, SAMPLE_BYTES // (4 * max(1, layer.in_features))))
        wanted = layer.in_features <= MAX_GRAM_DEPTH[config.rounding]
        gram = torch.zeros(layer.in_features, layer.in_features) if wanted else None
        return cls(_make_seen(config), Sample(rows), config, gram=gram)

    @property
    def observers(self) -> dict[str, Observer]:
        """The observers that `config` asks for, by name, as of now."""
        if isinstance(self.seen, Histogram) and self.config.observer == "auto":
            return share(self.seen, percentile=self.config.percentile)
        return {self.config.observer: self.seen}

    @property
    def has_data(self) -> bool:
        """Whether any value was seen; a layer may have been called with empty inputs only."""
        return self.seen.count > 0

    def observe(self, x: Tensor) -> None:
        """Takes one call's input, (..., in_features)."""
        rows = x.detach().float().reshape(math.prod(x.shape[:-1]), x.shape[-1])
        self.seen.observe(rows)
        self.sample.add(rows)
        self.calls += 1
        if self.gram is not None and self.gram_rows < GRAM_ROWS * rows.shape[1]:
            first = rows[: GRAM_ROWS * rows.shape[1] - self.gram_rows]
            self.gram.addmm_(first.T, first)
            self.gram_rows += len(first)
        if len(rows) > 0:
            lo, hi = rows.amin(dim=0), rows.amax(dim=0)  # a tenth of the time of aminmax(dim=0)
            if self.extremes is not None:
                lo, hi = torch.minimum(lo, self.extremes[0]), torch.maximum(hi, self.extremes[1])
            self.extremes = torch.stack([lo, hi])

    @property
    def peak(self) -> Tensor:
        """max|x_j| of each input channel, (K,); needs data."""
        return torch.empty(0) if self.extremes is None else self.extremes.abs().amax(dim=0)

    def judged(self) -> "Record":
        """The record itself where its rows are many; where they are few, one whose ranges saw half of the sample, to be
        measured on the other half.

        The range of each channel is what smoothing divides by, and a new row is beyond it in K / n channels on
        average, n being the rows seen: every range fits the rows that made it, and no others.
        """
        rows = self.sample.rows
        if self.sample.seen >= ROWS_PER_CHANNEL * rows.shape[1] or len(rows) < 2:
            return self
        return self._of(rows[::2], rows[1::2])

    def smoothed(self, scales: Tensor) -> "Record":
        """What calibration would have seen of inputs divided by `scales` (K,).

        Exact for the min-max range; the other observers see the sample instead of all rows.
        """
        record = self._of(self.observed / scales, self.sample.rows / scales)
        if self.config.observer in ("auto", "minmax") and self.extremes is not None:
            record.seen.observe(self.extremes / scales)
        return record

    @property
    def observed(self) -> Tensor:
        """Rows that made the ranges: the sample, or its half in a `judged` record."""
        return self.sample.rows if self.half is None else self.half

    def _of(self, observed: Tensor, sample: Tensor) -> "Record":
        """A record whose ranges have seen `observed`, to be measured on `sample`."""
        record = Record(_make_seen(self.config), Sample(max(1, len(sample))), self.config, half=observed)
        record.observe(observed)
        record.sample = Sample(max(1, len(sample)))
        record.sample.add(sample)
        return record


def _make_seen(config: QConfig) -> Observer:
    name = config.observer
    return Histogram() if name == "auto" else make_observer(name, percentile=config.percentile)
