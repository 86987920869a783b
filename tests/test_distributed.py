"""Merging observers of several processes: with torch.distributed and gloo, and by hand on their state tensors."""

import pytest
import torch
from torch import distributed

from helpers.numbers import normal
from helpers.processes import together
from torchq.observers import (
    EntropyObserver,
    Histogram,
    MinMaxObserver,
    MovingAverageObserver,
    MSEObserver,
    PercentileObserver,
)

MAKERS = [
    MinMaxObserver,
    MovingAverageObserver,
    Histogram,
    PercentileObserver,
    MSEObserver,
    EntropyObserver,
    lambda: MinMaxObserver(channels=4),
    lambda: Histogram(256, channels=4),
]
RANKS = 2


def batch(rank):
    """A batch whose magnitude depends on the rank, so that the histograms' limits differ."""
    return 10.0 ** (3 * rank) * normal(50, 4, seed=rank)


def merged():
    observers = [make() for make in MAKERS]
    for observer, make in zip(observers, MAKERS, strict=True):
        for rank in range(RANKS):
            part = make()
            part.observe(batch(rank))
            observer.merge(part)
    return [observer.state_dict() for observer in observers]


def reduced(rank):
    states = []
    for make in MAKERS:
        observer = make()
        observer.observe(batch(rank))
        observer.all_reduce()
        states.append(observer.state_dict())
    idle = MinMaxObserver()  # the data of one process may never reach a layer
    if rank == 1:
        idle.observe(batch(rank))
    idle.all_reduce()
    return [*states, idle.state_dict()]


@pytest.mark.subprocess
@pytest.mark.skipif(not distributed.is_gloo_available(), reason="this torch was built without gloo")
def test_all_reduce_over_two_processes(tmp_path):
    """Every rank ends with the state that one process would get by merging."""
    expected = merged()
    only = MinMaxObserver()
    only.observe(batch(1))
    expected.append(only.state_dict())
    for states in together(reduced, RANKS, tmp_path):
        for actual, wanted in zip(states, expected, strict=True):
            assert actual.keys() == wanted.keys()
            assert all(torch.equal(actual[key], wanted[key]) for key in wanted)


def test_states_add_up_by_hand():
    """Users may reduce states themselves: MIN of lo, MAX of hi, SUM of count, in tensors of equal shapes."""
    parts, whole = [], MinMaxObserver(channels=4)
    for rank in range(RANKS):
        part = MinMaxObserver(channels=4)
        part.observe(batch(rank))
        parts.append(part.state_dict())
        whole.observe(batch(rank))
    reduced = {
        "count": sum(part["count"] for part in parts),
        "lo": torch.stack([part["lo"] for part in parts]).amin(0),
        "hi": torch.stack([part["hi"] for part in parts]).amax(0),
    }
    loaded = MinMaxObserver(channels=4)
    loaded.load_state_dict(reduced)
    assert loaded.count == whole.count
    assert all(torch.equal(a, b) for a, b in zip(loaded.range(), whole.range(), strict=True))
