"""Sample: a uniform random sample of a stream of rows, of bounded size."""

from typing import NamedTuple

import torch
from torch import Tensor


def is_held_out(batch: int) -> bool:
    """Whether this batch judges what the others chose: every second one, so that it can be told as they come.

    >>> [is_held_out(batch) for batch in range(4)]
    [False, True, False, True]
    """
    return batch % 2 == 1


class Sample:
    """A uniform random sample of at most `capacity` rows of a stream: Vitter's algorithm R (ACM TOMS 1985).

    The seed is fixed, so that the same data gives the same plan. `rows_seen` counts all rows of the stream so far.

    >>> sample = Sample(capacity=2)
    >>> sample.add(torch.arange(12.0).reshape(4, 3))
    >>> sample.rows.shape, sample.rows_seen
    (torch.Size([2, 3]), 4)
    >>> sample.positions.tolist()
    [0, 2]
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.rows_seen = capacity, 0
        self._kept: Tensor | None = None
        self._positions = torch.zeros(capacity, dtype=torch.long, device="cpu")
        self._held_out = torch.zeros(capacity, dtype=torch.bool, device="cpu")
        self._generator = torch.Generator(device="cpu").manual_seed(0)
        self._last: _Overwritten | None = None

    @property
    def rows(self) -> Tensor:
        """The sample, (rows, K)."""
        if self._kept is None:
            return torch.empty(0, 0, dtype=torch.float32, device="cpu")
        return self._kept[: min(self.rows_seen, self.capacity)]

    @property
    def positions(self) -> Tensor:
        """The position in the stream of each of the `rows`."""
        return self._positions[: min(self.rows_seen, self.capacity)]

    @property
    def held_out(self) -> Tensor:
        """Which of the rows are of a batch that is held out, as bool (rows,)."""
        return self._held_out[: min(self.rows_seen, self.capacity)]

    def add(self, rows: Tensor, batch: int = 0) -> None:
        """Offers rows (n, K) of this batch; each row seen so far is kept with equal probability."""
        if self._kept is None:
            self._kept = rows.new_empty(self.capacity, rows.shape[1])
        generator = self._generator.get_state()
        index = torch.arange(self.rows_seen, self.rows_seen + rows.shape[0], dtype=torch.long, device="cpu")
        draw = torch.rand(rows.shape[0], generator=self._generator, dtype=torch.float64, device="cpu")
        slot = torch.where(index < self.capacity, index, (draw * (index + 1)).long())
        hits = (slot < self.capacity).nonzero().flatten()
        last = dict(zip(slot[hits].tolist(), hits.tolist(), strict=True))  # the last row for a slot wins
        slots, chosen = (torch.tensor(list(each), dtype=torch.long, device="cpu") for each in (last, last.values()))
        old = slots[slots < self.rows_seen]  # slots in use before this call; the others were empty
        self._last = _Overwritten(
            self.rows_seen, old, self._kept[old], self._positions[old], self._held_out[old], generator
        )
        self._kept[slots] = rows[chosen]
        self._positions[slots], self._held_out[slots] = index[chosen], is_held_out(batch)
        self.rows_seen += rows.shape[0]

    def merge(self, other: "Sample", first: int = 0, others_first: int = 0) -> None:
        """Makes this a uniform sample of both streams. `other` does not change.

        The stream of both has, in this order, the `first` rows of this one, the `others_first` rows of the other, the
        rest of this one, and the rest of the other.

        >>> one, other = Sample(capacity=4), Sample(capacity=4)
        >>> one.add(torch.ones(2, 1))
        >>> other.add(torch.zeros(2, 1))
        >>> one.merge(other, first=1)
        >>> one.rows.flatten().tolist(), one.positions.tolist(), one.rows_seen
        ([1.0, 1.0, 0.0, 0.0], [0, 1, 2, 3], 4)
        """
        seen, others_seen = self.rows_seen, other.rows_seen
        if other._kept is None or others_seen == 0:
            return
        mine, size = 0, min(self.capacity, seen + others_seen)
        draws = torch.rand(size, generator=self._generator, dtype=torch.float64, device="cpu")
        for row, draw in enumerate(draws.tolist()):  # whose row is next, if all that are left are equally likely
            mine += draw * (seen + others_seen - row) < seen - mine
        chosen, others = self._some(mine), other._some(size - mine)
        positions, others_positions = self.positions[chosen], other.positions[others]
        positions = torch.where(positions < first, positions, positions + others_first)
        others_positions += torch.where(others_positions < others_first, first, seen)
        kept = other._kept.new_empty(self.capacity, other._kept.shape[1])
        torch.cat([self.rows[chosen].reshape(mine, kept.shape[1]), other.rows[others]], out=kept[:size])
        held_out = torch.cat([self.held_out[chosen], other.held_out[others]])
        self._kept, self._last = kept, None
        self._positions[:size], self._held_out[:size] = torch.cat([positions, others_positions]), held_out
        self.rows_seen = seen + others_seen

    def _some(self, count: int) -> Tensor:
        """So many rows, drawn at random, in their order."""
        return (
            torch.randperm(len(self.rows), generator=self._generator, dtype=torch.int64, device="cpu")[:count]
            .sort()
            .values
        )

    def before_last_add(self) -> "Sample":
        """A copy of the sample as it was before the latest `add`. This sample does not change.

        >>> sample = Sample(capacity=4)
        >>> sample.add(torch.zeros(8, 1))
        >>> sample.add(torch.ones(100, 1))
        >>> before = sample.before_last_add()
        >>> before.rows.flatten().tolist(), before.rows_seen
        ([0.0, 0.0, 0.0, 0.0], 8)
        """
        sample, last = Sample(self.capacity), self._last
        if last is not None and self._kept is not None:
            sample._kept, sample._positions = self._kept.clone(), self._positions.clone()
            sample.rows_seen = last.rows_seen
            sample._kept[last.slots], sample._positions[last.slots] = last.rows, last.positions
            sample._held_out = self._held_out.clone()
            sample._held_out[last.slots] = last.held_out
            sample._generator.set_state(last.generator)
        return sample

    def forget(self) -> None:
        """Frees what `before_last_add` needs."""
        self._last = None


class _Overwritten(NamedTuple):
    """What the latest `Sample.add` overwrote, and the state it started from."""

    rows_seen: int
    slots: Tensor
    rows: Tensor
    positions: Tensor
    held_out: Tensor
    generator: Tensor
