"""The base class of all observers, and the two observers that need no histogram: min-max and moving average."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, distributed

from torchq.numerics.qparams import qparams_from_range

if TYPE_CHECKING:
    from typing_extensions import Self


class Observer:
    """The base class: keeps the exact smallest and largest value, and the count of all values.

    Subclasses that keep more add it in `_update` and `_merge`, and override `range`.

    Args:
        channels: None observes the tensor as one set of values. C observes each index of the last dimension, which has
            size C, as a set of its own. The shapes () below then become [C]: entry c is what an observer without
            channels would have for `x[..., c]`.

    Attributes:
        count: how many values were observed, per channel.

    Raises:
        ValueError: channels is less than 1.
    """

    def __init__(self, *, channels: int | None = None) -> None:
        if channels is not None and channels < 1:
            raise ValueError(
                f"torchq.observers.{type(self).__name__}: channels must be None or at least 1, got {channels}. "
                "Pass the size of the last dimension."
            )
        self.channels = channels
        self.count = 0
        self._lo = torch.full(self._shape, math.inf, dtype=torch.float32, device="cpu")
        self._hi = torch.full(self._shape, -math.inf, dtype=torch.float32, device="cpu")

    def observe(self, x: Tensor) -> None:
        """Observes all values of x, of any float dtype and shape, as float32. An empty x changes nothing.

        Raises:
            TypeError: x is not floating point.
            ValueError: x has NaN or Inf as float32, or its last dimension is not of size `channels`. The observer does
                not change.
        """
        name = type(self).__name__
        if not x.is_floating_point():
            raise TypeError(
                f"torchq.observers.{name}.observe: x must be floating point, got {x.dtype}. Pass x.float()."
            )
        if self.channels is not None and x.shape[-1:] != (self.channels,):
            raise ValueError(
                f"torchq.observers.{name}.observe: the last dimension of x must be the {self.channels} channels, got "
                f"shape {list(x.shape)}. Move the channels there with x.movedim(axis, -1)."
            )
        if x.numel() == 0:
            return
        x = x.detach().to("cpu", torch.float32).reshape(-1, self.channels or 1)
        lo, hi = (extremes.reshape(self._shape) for extremes in _extremes(x))
        if not (lo.isfinite() & hi.isfinite()).all():
            bad = x.numel() - int(x.isfinite().sum())
            raise ValueError(
                f"torchq.observers.{name}.observe: expected finite float32 values, got {bad} NaN or Inf among the "
                f"{x.numel()} of x. Find the layer that makes them, or leave this batch out."
            )
        self._merge_extremes(x.shape[0], lo, hi)
        self._update(x, lo, hi)

    def merge(self, other: Self) -> None:
        """Adds all that `other` has observed; `other` does not change.

        Raises:
            TypeError: other is of another class.
            ValueError: other has other settings.
        """
        name = type(self).__name__
        if type(other) is not type(self):
            raise TypeError(f"torchq.observers.{name}.merge: other must be a {name}, got {type(other).__name__}.")
        if self._settings() != other._settings():
            raise ValueError(
                f"torchq.observers.{name}.merge: expected the settings {self._settings()}, got {other._settings()}. "
                "Make both observers with the same arguments."
            )
        if other.count:
            self._merge_extremes(other.count, other._lo, other._hi)
            self._merge(other)

    def all_reduce(self, group: distributed.ProcessGroup | None = None) -> None:
        """Merges the observers of all processes, in the order of their ranks. Afterwards all have the same state.

        Every process must call it, on an observer with the same settings. It gathers all states on the CPU, which takes
        `world_size` times the bytes of `state_dict()`. The group needs a backend for CPU tensors, such as gloo.

        Args:
            group: of torch.distributed; None is the default group.
        """
        states: list[dict[str, Tensor]] = [{} for _ in range(distributed.get_world_size(group))]
        for key, value in self.state_dict().items():
            gathered = [torch.empty_like(value) for _ in states]
            distributed.all_gather(gathered, value, group=group)
            for state, part in zip(states, gathered, strict=True):
                state[key] = part
        self.load_state_dict(states[0])
        other = copy.deepcopy(self)
        for state in states[1:]:
            other.load_state_dict(state)
            self.merge(other)

    @property
    def seen(self) -> tuple[Tensor, Tensor]:
        """The exact smallest and largest value observed, float32 (). ValueError if there was none."""
        if not self.count:
            raise ValueError(
                f"torchq.observers.{type(self).__name__}: expected at least one observed value, got none. "
                "Call observe() first; if you did, the calibration data never reached this layer."
            )
        return self._lo.clone(), self._hi.clone()

    def range(self) -> tuple[Tensor, Tensor]:
        """The range to quantize with, lo <= 0 <= hi, float32 (): here, of all values. ValueError if there are none."""
        lo, hi = self.seen
        return lo.clamp(max=0), hi.clamp(min=0)

    def qparams(self, *, dtype: torch.dtype = torch.uint8, symmetric: bool = False) -> tuple[Tensor, Tensor]:
        """`qparams_from_range(*range())`: scale float32 and zero_point int32, both of shape ()."""
        return qparams_from_range(*self.range(), dtype=dtype, symmetric=symmetric)

    def state_dict(self) -> dict[str, Tensor]:
        """All that was observed, as plain tensors of a fixed size. The settings are not included."""
        return {
            "count": torch.tensor(self.count, dtype=torch.int64, device="cpu"),
            "lo": self._lo.clone(),
            "hi": self._hi.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replaces what was observed by a `state_dict()`. ValueError if its names or shapes do not fit."""
        expected = {key: tuple(value.shape) for key, value in self.state_dict().items()}
        got = {key: tuple(value.shape) for key, value in state.items()}
        if got != expected:
            raise ValueError(
                f"torchq.observers.{type(self).__name__}.load_state_dict: expected the shapes {expected}, got {got}. "
                "Load it into an observer made with the same arguments."
            )
        self._load(state)

    @property
    def _shape(self) -> tuple[int, ...]:
        return () if self.channels is None else (self.channels,)

    def _merge_extremes(self, count: int, lo: Tensor, hi: Tensor) -> None:
        self.count += count
        self._lo, self._hi = torch.minimum(self._lo, lo), torch.maximum(self._hi, hi)

    def _settings(self) -> dict[str, float | None]:
        return {"channels": self.channels}

    def _update(self, x: Tensor, lo: Tensor, hi: Tensor) -> None:
        """Adds finite float32 values x, (n, channels or 1) with n > 0; lo and hi are their extremes."""

    def _merge(self, other: Self) -> None:
        """Adds what `other`, which is not empty, has kept."""

    def _load(self, state: Mapping[str, Tensor]) -> None:
        self.count = int(state["count"])
        self._lo, self._hi = (state[key].to(torch.float32, copy=True) for key in ("lo", "hi"))


def _extremes(x: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest value of each column of x (n, C); NaN if a column has one."""
    # aminmax of a single column as a whole is four times as fast as a reduction along a dimension.
    if x.shape[1] > 1:
        return x.amin(0), x.amax(0)
    lo, hi = torch.aminmax(x)
    return lo, hi


class MinMaxObserver(Observer):
    """Covers every value seen: `[min(x, 0), max(x, 0)]`. Merging and the order of batches make no difference.

    The right choice where the largest values carry the signal (in the package's docstring: 18.5 dB, 6.9 dB clipped).

    >>> observer = MinMaxObserver()
    >>> observer.observe(torch.tensor([-1.0, 0.5]))
    >>> observer.observe(torch.tensor([4.0]))
    >>> observer.range(), observer.count
    ((tensor(-1.), tensor(4.)), 3)
    >>> columns = MinMaxObserver(channels=2)
    >>> columns.observe(torch.tensor([[-1.0, 5.0], [4.0, 6.0]]))
    >>> columns.range()
    (tensor([-1.,  0.]), tensor([4., 6.]))
    """


class MovingAverageObserver(Observer):
    """Covers a typical batch: `lo = momentum * lo + (1 - momentum) * min(x)`, and hi likewise.

    The first batch sets both. Later batches weigh more, so the result depends on their order. A merge weighs
    both averages by their numbers of batches: a fair mean, but not what one stream would have given.

    Args:
        momentum: the weight of the old average when a batch arrives, in [0, 1). 0 keeps the last batch only.
        channels: see `Observer`.

    Raises:
        ValueError: momentum is not in [0, 1).

    >>> observer = MovingAverageObserver(momentum=0.75)
    >>> observer.observe(torch.tensor([-1.0, 1.0]))
    >>> observer.observe(torch.tensor([-1.0, 9.0]))
    >>> observer.range()
    (tensor(-1.), tensor(3.))
    """

    def __init__(self, momentum: float = 0.9, *, channels: int | None = None) -> None:
        super().__init__(channels=channels)
        if not 0 <= momentum < 1:
            raise ValueError(
                f"torchq.observers.MovingAverageObserver: momentum must be in [0, 1), got {momentum}. Try 0.9."
            )
        self.momentum = momentum
        self.batches = 0
        self._average = torch.zeros(2, *self._shape, dtype=torch.float64, device="cpu")

    def range(self) -> tuple[Tensor, Tensor]:
        """The averaged range, widened to contain 0. ValueError if nothing was observed."""
        _ = self.seen  # raises if empty
        lo, hi = self._average.float()
        return lo.clamp(max=0), hi.clamp(min=0)

    def state_dict(self) -> dict[str, Tensor]:
        """All that was observed: adds the average of lo and hi, and the number of batches."""
        return super().state_dict() | {
            "batches": torch.tensor(self.batches, dtype=torch.int64, device="cpu"),
            "average": self._average.clone(),
        }

    def _settings(self) -> dict[str, float | None]:
        return super()._settings() | {"momentum": self.momentum}

    def _update(self, x: Tensor, lo: Tensor, hi: Tensor) -> None:
        self._mix(torch.stack([lo, hi]).double(), 1 - self.momentum if self.batches else 1.0)
        self.batches += 1

    def _merge(self, other: Self) -> None:
        self._mix(other._average, other.batches / (self.batches + other.batches))
        self.batches += other.batches

    def _mix(self, average: Tensor, weight: float) -> None:
        self._average = (1 - weight) * self._average + weight * average

    def _load(self, state: Mapping[str, Tensor]) -> None:
        super()._load(state)
        self.batches = int(state["batches"])
        self._average = state["average"].to(torch.float64, copy=True)
