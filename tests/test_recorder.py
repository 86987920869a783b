"""Layers that read the same tensor share a record, and every record is as if nothing were shared."""

import random

import pytest
import torch
from torch import nn

from helpers.numbers import normal
from torchq import QConfig, convert
from torchq.calibration import sharing
from torchq.calibration.calibrate import calibrate
from torchq.calibration.readers import Readers
from torchq.calibration.record import Record
from torchq.calibration.sharing import Recorder
from torchq.modules.registry import find_layers
from torchq.observers import Histogram
from torchq.watching import Watchers, storage_key

CONFIG = QConfig(sample_rows=8)


def test_recording_is_not_watched(monkeypatch):
    """What looks for the readers of outputs is told of the model's operations, not of those that record its inputs."""
    watched, sees = [], Readers.sees
    monkeypatch.setattr(Readers, "sees", lambda self, func, *args: watched.append(func) or sees(self, func, *args))
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    records = records_of(model, [normal(20, 16)])
    assert all(record.observer.count == 320 for record in records.values())
    names = {func.name() for func in watched}
    assert "aten::relu" in names
    assert not names & {"aten::bincount", "aten::amin", "aten::addmm_"}


class Attention(nn.Module):
    """q, k and v read one tensor. `between` may change the tensor before k reads it."""

    def __init__(self, between=lambda x: x):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.between = between

    def forward(self, x):
        q, k = self.q(x), self.k(self.between(x))
        return self.o(q + self.v(x)) + k.mean()


def records_of(model, data, config=CONFIG):
    return calibrate(model, data, find_layers(model), config).records


def alone(calls, config=CONFIG, *, batches=False):
    """The record of these calls (tensors) of a single layer: in a batch each, or all in one."""
    record = Record.empty(calls[0].shape[-1], config)
    for batch, x in enumerate(calls):
        record.observe(x, batch if batches else 0)
    return record


def assert_same(record, other):
    assert (record.calls, record.sample.rows_seen) == (other.calls, other.sample.rows_seen)
    assert record.gram_rows == other.gram_rows
    assert torch.equal(record.sample.rows, other.sample.rows)
    assert torch.equal(record.sample.positions, other.sample.positions)
    assert torch.equal(record.extremes, other.extremes)
    states = record.observer.state_dict(), other.observer.state_dict()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[1])


def test_q_k_and_v_share_one_record(monkeypatch):
    """The tensor is binned, sampled and multiplied once."""
    updates, update = [], Histogram._update
    monkeypatch.setattr(Histogram, "_update", lambda self, *args: updates.append(self) or update(self, *args))
    records = records_of(Attention(), [normal(20, 16, seed=i) for i in range(3)])
    assert records["q"] is records["k"] is records["v"]
    assert records["o"] is not records["q"]
    assert len(updates) == 2 * 3
    assert_same(records["q"], alone([normal(20, 16, seed=i) for i in range(3)], batches=True))
    assert torch.equal(records["q"].gram, alone([normal(20, 16, seed=i) for i in range(3)], batches=True).gram)


@pytest.mark.parametrize(
    "between",
    [torch.clone, torch.relu, lambda x: x.view(2, 10, 16), lambda x: x[:19], lambda x: x.mul_(2)],
    ids=["copy", "function", "another view", "a part", "written in place"],
)
def test_another_tensor_is_another_record(between):
    model = Attention(between)
    records = records_of(model, [normal(20, 16, seed=i) for i in range(3)])
    assert records["k"] is not records["q"]
    assert_same(records["k"], alone([between(normal(20, 16, seed=i)).reshape(-1, 16) for i in range(3)], batches=True))


def test_a_tensor_in_the_place_of_a_freed_one_is_another():
    """A new tensor often gets the memory that was freed last. Its values may be the same or not."""
    recorder = Recorder(CONFIG)
    for name in "abcdefgh":
        recorder.observe(name, torch.full((4, 16), float(ord(name))))
    records = recorder.records()
    assert len({id(record) for record in records.values()}) == 8
    assert all((record.extremes == ord(name)).all() for name, record in records.items())


def test_tensors_without_versions_are_not_shared():
    with torch.inference_mode():
        x = normal(4, 16)
    recorder = Recorder(CONFIG)
    for name in "ab":
        recorder.observe(name, x)
    records = recorder.records()
    assert records["a"] is not records["b"]


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("observer", ["auto", "moving_average"])
def test_any_order_of_calls_gives_each_layer_its_own_record(seed, observer):
    """Layers share tensors, miss calls, are called twice, and split off; each record is as if it were alone."""
    config = QConfig(sample_rows=8, observer=observer)
    draw, recorder, calls = random.Random(seed), Recorder(config), {name: [] for name in "abcd"}
    likely = draw.choice([0.5, 0.9, 0.99])  # the probability that a layer reads the common tensor
    for step in range(draw.randrange(1, 30)):
        common = normal(draw.choice([0, 1, 3, 20]), 4, seed=1000 * seed + step)
        for name in draw.sample("abcd", 4):
            if draw.random() < likely:
                x = common
            elif draw.random() < 0.5:
                x = normal(5, 4, seed=draw.randrange(10**6))
            else:
                continue
            for _ in range(1 if draw.random() < 0.97 else 2):
                calls[name].append(x)
                recorder.observe(name, x)
    records = recorder.records()
    assert set(records) == {name for name in calls if calls[name]}
    for name, record in records.items():
        if any(len(x) for x in calls[name]):
            assert_same(record, alone(calls[name], config))
        assert record.calls == len(calls[name])


def test_a_layer_that_leaves_while_products_are_summed_keeps_the_rows_of_that_call():
    """That is the one difference to a record of its own. It only influences how weights are rounded."""
    recorder, first, second, other = Recorder(CONFIG), normal(20, 16), normal(20, 16, seed=1), normal(20, 16, seed=2)
    for x in (first, second):
        recorder.observe("q", x)
        recorder.observe("k", x if x is first else other)
    records = recorder.records()
    assert torch.equal(records["q"].gram, alone([first, second]).gram)
    assert records["k"].gram_rows == 40
    expected = first.T @ first + second.T @ second + other.T @ other
    assert torch.allclose(records["k"].gram, expected, rtol=1e-5, atol=1e-4)


def test_plans_and_weights_are_those_without_sharing(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(Attention(), nn.LayerNorm(16), Attention()).eval()
    data = [normal(40, 16, seed=i) for i in range(4)]
    shared = convert(model, data)
    monkeypatch.setattr(sharing._Stream, "is_latest", lambda self, x: False)
    assert len({id(record) for record in records_of(model, data).values()}) == 8
    separate = convert(model, data)
    assert shared.torchq_plan == separate.torchq_plan
    states = shared.state_dict(), separate.state_dict()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[1])


def test_watchers_are_told_of_each_operation_once_and_of_its_result():
    told, results = [], []

    class Seeing:
        def sees(self, func, args, kwargs, keys):
            told.append((func.name(), [key == storage_key(x) for key in keys]))
            return results.append if func.name() == "aten::mul.Tensor" else None

    x = normal(2, 3)
    with Watchers([Seeing(), Seeing()]):
        y = x * x
        y.relu_()
    assert told == 2 * [("aten::mul.Tensor", [True, True])] + 2 * [("aten::relu_", [False])]
    assert [each is y for each in results] == [True, True]


def test_an_output_that_others_read_is_not_followed_again():
    """To look for its readers takes time with every operation, and can't change what was found."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Softsign(), nn.Linear(4, 4), nn.ReLU())
    readers, followed = Readers(model, find_layers(model)), []
    with readers.watching() as wanted, Watchers([readers]):
        for _ in range(3):
            model(normal(2, 4))
            followed.append({output.chain for output in readers._outputs.values()})
            readers.end_batch()
    assert wanted
    assert [("0",) in chains for chains in followed] == [True, False, False]
    assert all(("2",) in chains for chains in followed)
    assert readers.activations == {"2": "3"}
