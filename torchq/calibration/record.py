"""Record: what calibration keeps about one input, in memory that does not grow with the data.

Layers that read the same tensor in every call (q, k and v of an attention) share one record: see `sharing`.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from torchq.calibration.sample import Sample, is_held_out
from torchq.config import QConfig
from torchq.modules.patches import Patches
from torchq.numerics.qparams import QParams
from torchq.observers import Histogram, Observer, make_observer, share

SAMPLE_BYTES = 2 * 2**20
"""The maximum size of one record's sample, whatever `QConfig.sample_rows` says."""

MAX_GRAM_DEPTH = {"nearest": 0, "auto": 4096, "gptq": 8192}
"""For each `QConfig.rounding`, the largest K for which XᵀX is kept: 64 MiB for K = 4096, 256 MiB for 8192."""

GRAM_SHARE, GRAM_BYTES = 2.0, 2**28
"""All XᵀX together take no more than this share of the layers' float32 weights, or this many bytes if that is more."""

ROWS_PER_CHANNEL = 20
"""With at least this many rows for each input channel, a new row seldom lies outside the range of any channel."""

MIN_STATIC_ROWS = 64
"""Rows of a layer from which on a static range is chosen unasked: of rows three in a hundred of which are unlike the
others, 64 have one with probability 0.86, and 16 with 0.39."""

GRAM_ROWS, DEEP_ROWS = 4, 3072
"""XᵀX is summed over the first 4 K rows, but no more than 3072: more gain little, and cost K² each."""

PATCHES = 1024
"""How many patches of a convolution's input one call adds. They overlap: all would be many times the input."""

INPUTS_PER_ROW = 4
"""A layer of K inputs needs at least K/4 rows. With fewer than K rows H is singular, and only the damping makes it
invertible.
"""

_GRAM_COLUMNS = 256  # computed at a time


@dataclass(frozen=True)
class Trial:
    """The data to try quantization schemes with: candidate ranges for a static input, and rows to measure on.

    Args:
        observers: the observers that propose the ranges, by name.
        rows: float32 (R, K), the rows to measure on, as the layer gets them.
            (Of a convolution: as `Patches` gives them.)
        peak: max|x_j| of each input channel over the values that the ranges cover, (K,).
    """

    observers: Mapping[str, Observer]
    rows: Tensor
    peak: Tensor

    @cached_property
    def ranges(self) -> dict[str, QParams]:
        """The scale and zero point that each observer proposes for a static input."""
        return {name: self.range_of(name) for name in self.observers}

    def range_of(self, name: str) -> QParams:
        """The scale and zero point that the observer of this name proposes."""
        scale, zero_point = self.observers[name].qparams(dtype=torch.uint8, symmetric=False)
        return QParams(float(scale), int(zero_point))


@dataclass
class Record:
    """What calibration keeps about one input.

    Args:
        observer: the observer of all its values. If `config.observer` is "auto", a histogram from which all observers
            are derived.
        sample: a random sample of its rows.
        config: which observers.
        calls: how many calls were recorded.
        extremes: the smallest and the largest value of each channel, (2, K).
        gram: XᵀX of the first `gram_rows` rows, float32 (K, K), on and above its diagonal; None if no weights will be
            rounded with it. Without rows it has no values yet, and below the diagonal none: memory that nobody touches
            costs nothing. If `config.rounding` is "auto", only rows of batches that are not held out count.
        held_rows: how many rows were held out of it.
        patches: how rows are made of the input of a convolution; None where its last dimension is a row already.
        shape: of the last such input, (N, C, *spatial).
    """

    observer: Observer
    sample: Sample
    config: QConfig
    calls: int = 0
    extremes: Tensor | None = None
    gram: Tensor | None = None
    gram_rows: int = 0
    held_rows: int = 0
    patches: Patches | None = None
    shape: tuple[int, ...] | None = None

    @classmethod
    def empty(
        cls, in_features: int, config: QConfig, *, room: float = math.inf, patches: Patches | None = None
    ) -> "Record":
        """A record without data, for the observers `config` asks for. `room`: the bytes that XᵀX may take."""
        width = in_features if patches is None else patches.width
        rows = max(1, min(config.sample_rows, SAMPLE_BYTES // (4 * max(1, width))))
        wanted = in_features <= MAX_GRAM_DEPTH[config.rounding] and 4 * in_features**2 <= room
        wanted &= patches is None or patches.geometry.groups == 1
        gram = torch.empty(in_features, in_features, dtype=torch.float32, device="cpu") if wanted else None
        return cls(_new_observer(config), Sample(rows), config, gram=gram, patches=patches)

    @property
    def has_data(self) -> bool:
        """Whether any value was recorded. False after calls with empty inputs only."""
        return self.observer.count > 0

    def observe(self, x: Tensor, batch: int = 0) -> None:
        """Records the input of one call in this batch, (..., K) or, of a convolution, (N, C, *spatial)."""
        if self.patches is None:
            values = rows = x.detach().float().reshape(math.prod(x.shape[:-1]), x.shape[-1])
        else:
            values = x.detach().float().movedim(1, -1).reshape(-1, x.shape[1])
            random = torch.Generator(device="cpu").manual_seed(self.calls)
            rows = self.patches.rows(x, PATCHES, random)
            self.shape = tuple(x.shape)
        self.observer.observe(values)
        self.sample.add(rows, batch)
        self.calls += 1
        if self.config.rounding == "auto" and is_held_out(batch):
            self.held_rows += len(rows)
        else:
            self._sum_products(self.values(rows))
        if len(values) > 0:
            extremes = _extremes(values)
            if self.extremes is not None:
                extremes = _joined(self.extremes, extremes)
            self.extremes = extremes

    def merge(self, other: "Record") -> None:
        """Adds what another process recorded with the same config; its sample, as a fair share of one sample of both.

        Everything else is what one process would have, but for the float rounding of XᵀX, which has the first rows of
        either. To be called before `whole` is.
        """
        self.observer.merge(other.observer)
        self.sample.merge(other.sample, self.gram_rows, other.gram_rows)
        self.calls += other.calls
        self.held_rows += other.held_rows
        self.shape = self.shape or other.shape
        if self.gram is None or other.gram is None:
            self.gram, self.gram_rows = None, 0
        elif self.gram_rows == 0:
            self.gram, self.gram_rows = other.gram, other.gram_rows
        elif other.gram_rows:
            self.gram += other.gram
            self.gram_rows += other.gram_rows
        if self.extremes is None or other.extremes is None:
            self.extremes = other.extremes if self.extremes is None else self.extremes
        else:
            self.extremes = _joined(self.extremes, other.extremes)

    @cached_property
    def whole(self) -> Trial:
        """A trial with ranges from all values, measured on the sample. Cached, so only for a finished record."""
        return Trial(self._observers(self.observer), self.sample.rows, _peak(self.extremes))

    def trial(self, channel_scale: Tensor | None = None) -> Trial:
        """The same with ranges for inputs times `channel_scale` (K,).

        The min-max range is exact. The other observers get only the sample, since a histogram of all channels together
        can't be multiplied channel by channel.
        """
        if channel_scale is None or self.extremes is None:
            return self.whole
        return self._trial(self.sample.rows, self.sample.rows, self.extremes, channel_scale)

    def trials(self, channel_scale: Tensor | None = None) -> list[Trial]:
        """`trial`; but if rows are few, two trials, in which a part of the sample gives the ranges for the other.

        Those that `judge` are measured on in the first, and the others in the second. Smoothing scales each channel by
        its range. After n rows, a new row lies outside the range of K / n channels on average. If that is often,
        measuring on the rows that gave the ranges would be too optimistic. With many rows (`ROWS_PER_CHANNEL`) it
        hardly happens.
        """
        if not self.is_few:
            return [self.trial(channel_scale)]
        return self._parts if channel_scale is None else self._part_trials(channel_scale)

    @cached_property
    def _parts(self) -> list[Trial]:
        return self._part_trials(None)

    def _part_trials(self, channel_scale: Tensor | None) -> list[Trial]:
        rows, judge = self.sample.rows, self.judge
        parts = ((rows[~judge], rows[judge]), (rows[judge], rows[~judge]))
        return [self._trial(some, others, self._extremes_of(some), channel_scale) for some, others in parts]

    def _extremes_of(self, rows: Tensor) -> Tensor:
        values = self.values(rows)
        return _extremes(values if self.patches is None else self.patches.by_channel(values))

    def values(self, rows: Tensor) -> Tensor:
        """What the weight multiplies of rows of the sample, (R, K)."""
        return rows if self.patches is None else self.patches.values(rows)

    def scaled(self, rows: Tensor, channel_scale: Tensor | None) -> Tensor:
        """The same, times `channel_scale`: one for each channel of the input."""
        values = self.values(rows)
        if self.patches is not None:
            channel_scale = self.patches.tiled_scale(channel_scale)
        return values if channel_scale is None else values * channel_scale

    @property
    def judge(self) -> Tensor:
        """Which rows of the sample judge what the others chose, bool (R,).

        Those of batches held out, since rows of one batch are often alike; without such, every second row.
        """
        held_out = self.sample.held_out
        if held_out.any() and not held_out.all():
            return held_out
        return torch.arange(len(held_out), dtype=torch.long, device="cpu") % 2 == 1

    @property
    def values_per_call(self) -> float:
        """How many values this input has in a call."""
        return self.observer.count / max(1, self.calls)

    @property
    def is_too_few(self) -> bool:
        """Whether the rows are too few for a range that will hold."""
        return self.sample.rows_seen < MIN_STATIC_ROWS

    @property
    def is_few(self) -> bool:
        """Whether new rows are likely to lie outside the ranges of some channels."""
        rows = self.sample.rows
        channels = rows.shape[1] if self.patches is None else self.patches.channels
        return self.sample.rows_seen < ROWS_PER_CHANNEL * channels and len(rows) >= 2

    @property
    def may_round(self) -> bool:
        """Whether there is enough to round weights by."""
        return self.gram is not None and INPUTS_PER_ROW * self.gram_rows >= len(self.gram)

    def products(self) -> Tensor:
        """XᵀX, (K, K), below the diagonal too: `gram` itself, which is not to be changed."""
        assert self.gram is not None
        for some, _ in _column_blocks(len(self.gram)):
            self.gram[some.stop :, some] = self.gram[some, some.stop :].T
        return self.gram

    def _sum_products(self, rows: Tensor) -> None:
        """Adds rows to XᵀX, until it has as many as it wants."""
        depth = rows.shape[1]
        wanted = min(GRAM_ROWS * depth, DEEP_ROWS)
        if self.gram is None or self.gram_rows >= wanted:
            return
        first = rows[: wanted - self.gram_rows]
        beta = 1 if self.gram_rows else 0
        for some, start in _column_blocks(depth):
            self.gram[some, start:].addmm_(first[:, some].T, first[:, start:], beta=beta)
        self.gram_rows += len(first)

    def _trial(self, range_rows: Tensor, rows: Tensor, extremes: Tensor, channel_scale: Tensor | None) -> Trial:
        """A trial measured on `rows`, with ranges from `range_rows` and, for min-max, `extremes` (2, K).

        The ranges are those of both times `channel_scale` (K,).
        """
        observer = _new_observer(self.config)
        observer.observe(self.scaled(range_rows, channel_scale))
        if channel_scale is not None and self.config.observer in ("auto", "minmax"):
            observer.observe(extremes * channel_scale)
        return Trial(self._observers(observer), rows, _peak(extremes))

    def _observers(self, observer: Observer) -> dict[str, Observer]:
        """The observers that `config` asks for, by name: all those a histogram can give, or just this one."""
        if isinstance(observer, Histogram) and self.config.observer == "auto":
            return share(observer, percentile=self.config.percentile)
        return {self.config.observer: observer}


def _new_observer(config: QConfig) -> Observer:
    name = config.observer
    return Histogram() if name == "auto" else make_observer(name, percentile=config.percentile)


def _column_blocks(depth: int) -> Iterator[tuple[slice, int]]:
    """Some columns at a time, and where they start."""
    for start in range(0, depth, _GRAM_COLUMNS):
        yield slice(start, start + _GRAM_COLUMNS), start


def _extremes(rows: Tensor) -> Tensor:
    return torch.stack([rows.amin(dim=0), rows.amax(dim=0)])  # a tenth of the time of aminmax(dim=0)


def _joined(extremes: Tensor, others: Tensor) -> Tensor:
    lo, hi = zip(extremes, others, strict=True)
    return torch.stack([torch.minimum(*lo), torch.maximum(*hi)])


def _peak(extremes: Tensor | None) -> Tensor:
    return torch.empty(0, dtype=torch.float32, device="cpu") if extremes is None else extremes.abs().amax(dim=0)
