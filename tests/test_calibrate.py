"""Calibration: every kind of loader gives the layers the same rows, in constant memory, and leaves no trace."""

import sys
from collections import UserDict, namedtuple
from io import StringIO

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from helpers.calibration import BATCHES, LABELS, Many, Net, X, Y, recorded, state
from helpers.numbers import normal
from torchq import QConfig
from torchq.calibration.record import Record
from torchq.calibration.sample import Sample
from torchq.observers import OBSERVERS, Histogram, make_observer

Pair = namedtuple("Pair", "image label")


def assert_saw(record, rows, calls):
    """Checks that the record saw `rows`. They fit into the sample, so it has all of them, in order."""
    assert torch.equal(record.sample.rows, rows)
    assert record.sample.rows_seen == len(rows)
    assert record.calls == calls
    for observer in record.whole.observers.values():
        assert observer.count == rows.numel()
        assert observer.seen == (rows.min(), rows.max())


# ---- loaders ----


@pytest.mark.parametrize(
    "loader",
    [
        BATCHES,
        list(zip(BATCHES, LABELS, strict=True)),
        [[x, y] for x, y in zip(BATCHES, LABELS, strict=True)],
        [(x,) for x in BATCHES],
        [Pair(x, y) for x, y in zip(BATCHES, LABELS, strict=True)],
        [{"labels": y, "x": x, "idx": 0} for x, y in zip(BATCHES, LABELS, strict=True)],
        [UserDict(x=x, labels=y) for x, y in zip(BATCHES, LABELS, strict=True)],
        DataLoader(TensorDataset(X, Y), batch_size=8),
        {"a": BATCHES[0], "b": BATCHES[1], "c": BATCHES[2]}.values(),
    ],
    ids=["tensors", "pairs", "lists", "singles", "namedtuples", "dicts", "user_dicts", "data_loader", "view"],
)
def test_every_kind_of_batch_reaches_the_layer_whole(loader):
    calibration = recorded(Net(), loader)
    assert calibration.batches == 3
    assert_saw(calibration.records["fc"], X, calls=3)


def test_a_generator_is_read_one_batch_at_a_time():
    model, events = Net(), []
    model.register_forward_hook(lambda *_: events.append("run"))

    def loader():
        for batch in BATCHES:
            events.append("pull")
            yield batch

    assert_saw(recorded(model, loader()).records["fc"], X, calls=3)
    assert events == ["pull", "run"] * 3


class Keywords(Net):
    def forward(self, **inputs):
        assert sorted(inputs) == ["labels", "x"]
        return self.fc(inputs["x"])


class CallsByKeyword(Net):
    def forward(self, x):
        return self.fc(input=x)


class Twice(Net):
    def forward(self, x):
        return self.fc(x[:4]) + self.fc(x[4:])


def test_forwards_of_every_shape():
    def check(model, batches, rows, calls):
        assert_saw(recorded(model, batches).records["fc"], rows, calls)

    pairs = list(zip(BATCHES, LABELS, strict=True))
    check(Many(), [(x, 2 * x, y) for x, y in pairs], 3 * X, calls=3)
    check(Many(), [{"b": x, "a": x, "labels": y} for x, y in pairs], 2 * X, calls=3)
    check(Keywords(), [{"x": x, "labels": y} for x, y in pairs], X, calls=3)
    check(CallsByKeyword(), BATCHES, X, calls=3)
    check(Twice(), BATCHES[:2], X[:16], calls=4)


def test_forward_decides_if_given():
    seen = []

    def forward(model, batch):
        seen.append(batch)
        return model(X[batch])

    calibration = recorded(Net(), [slice(0, 7), slice(7, 20)], forward=forward)
    assert seen == [slice(0, 7), slice(7, 20)]
    assert_saw(calibration.records["fc"], X, calls=2)


@pytest.mark.parametrize("shape", [(6,), (2, 6), (2, 5, 6), (3, 2, 2, 6), (0, 6), (2, 0, 6)])
def test_any_leading_dimensions(shape):
    x = normal(*shape)
    record = recorded(Net(), [X, x]).records["fc"]
    assert_saw(record, torch.cat([X, x.reshape(-1, 6) if x.numel() else x.new_empty(0, 6)]), calls=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_floats_are_recorded_as_float32(dtype):
    record = recorded(Net().to(dtype), [X.to(dtype)]).records["fc"]
    assert record.sample.rows.dtype == torch.float32
    assert_saw(record, X.to(dtype).float(), calls=1)


def test_a_layer_without_input_features():
    """With K = 0 the result is the bias, and there is nothing to record."""
    model = nn.Sequential(nn.Linear(6, 3))
    model[0].weight, model[0].in_features = nn.Parameter(torch.empty(3, 0)), 0
    record = recorded(model, [torch.empty(4, 0)]).records["0"]
    assert (record.calls, record.whole.observers["minmax"].count) == (1, 0)


def test_the_config_chooses_the_observers():
    def names(observer):
        return list(recorded(Net(), BATCHES, QConfig(observer=observer)).records["fc"].whole.observers)

    assert names("auto") == ["minmax", "percentile", "mse", "entropy"]
    assert [names(name) for name in OBSERVERS] == [[name] for name in OBSERVERS]
    observers = recorded(Net(), BATCHES, QConfig(percentile=42)).records["fc"].whole.observers
    assert observers["percentile"].percentile == 42


def test_automatic_observers_share_one_histogram(monkeypatch):
    """Each batch is binned once, and every observer is as if it had observed the batches itself."""
    updates = []
    update = Histogram._update
    monkeypatch.setattr(Histogram, "_update", lambda self, *args: updates.append(self) or update(self, *args))
    observers = recorded(Net(), BATCHES).records["fc"].whole.observers
    assert len(updates) == len(BATCHES)
    for name, observer in observers.items():
        alone = make_observer(name)
        for batch in BATCHES:
            alone.observe(batch)
        assert observer.range() == alone.range()


# ---- no trace ----


class Mixed(nn.Module):
    """Everything that behaves differently in training."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5))
        self.head = nn.Linear(6, 2)
        self.frozen = nn.BatchNorm1d(2)
        self.fail_at, self.calls, self.inside = None, 0, set()

    def forward(self, x):
        _, training, switches = state(self)
        self.inside.add((any(training), *switches))
        if self.calls == self.fail_at:
            raise ArithmeticError("the model's own")
        self.calls += 1
        return self.frozen(self.head(self.body(x)))


@pytest.mark.parametrize("fast_path", [True, False])
@pytest.mark.parametrize("fail_at", [None, 0, 2])
def test_the_model_is_left_as_it_was(fast_path, fail_at):
    model = Mixed().train()
    model.frozen.eval()
    model.body[2].eval()
    model.fail_at = fail_at
    model.head.register_forward_hook(lambda *_: None)
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fast_path)
    try:
        before = state(model)
        if fail_at is None:
            recorded(model, BATCHES)
        else:
            with pytest.raises(ArithmeticError, match="the model's own"):
                recorded(model, BATCHES)
        assert state(model) == before
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
    assert model.inside == {(False, False, False, False)}  # training, fast path, gradients, inference mode
    assert torch.equal(torch.get_rng_state(), random)
    after = model.state_dict()  # includes BatchNorm's statistics
    assert after.keys() == values.keys()
    assert all(torch.equal(after[name], values[name]) for name in values)


def test_a_loader_that_fails_midway_leaves_no_trace():
    def loader():
        yield X
        raise OSError("disk")

    model = Mixed()
    before = state(model)
    with pytest.raises(OSError, match="disk"):
        recorded(model, loader())
    assert state(model) == before


# ---- constant memory ----


def test_a_sample_keeps_every_row_with_equal_probability():
    """The sample has 2000 of 20,000 rows. The number from each tenth of the stream is hypergeometric: its mean is 200,
    its standard deviation sqrt(2000 * 0.1 * 0.9 * 18000 / 19999) = 12.7, and the test allows 5 of those, 64.
    """
    sample = Sample(2000)
    for rows in torch.arange(20_000.0).unsqueeze(1).split(171):
        sample.add(rows)
    kept = sample.rows.flatten().long()
    assert sample.rows_seen == 20_000
    assert len(kept.unique()) == 2000
    tenths = torch.bincount(kept // 2000, minlength=10)
    assert (tenths - 200).abs().max() <= 64


def test_a_sample_depends_on_the_stream_and_not_on_its_batches():
    def sampled(*sizes):
        sample = Sample(10)
        for rows in normal(300, 4).split(sizes):
            sample.add(rows)
        return sample.rows

    assert torch.equal(sampled(300), sampled(1, 9, 40, 0, 250))
    assert not torch.equal(sampled(300), normal(300, 4)[:10])


def test_a_sample_copies_its_rows():
    sample, rows = Sample(4), torch.ones(2, 3)
    sample.add(rows)
    rows.zero_()
    assert torch.equal(sample.rows, torch.ones(2, 3))
    assert Sample(4).rows.shape == (0, 0)


def test_a_sample_is_bounded_in_bytes():
    def capacity(features, rows=256):
        return Record.empty(features, QConfig(sample_rows=rows)).sample.capacity

    assert (capacity(64), capacity(64, rows=3)) == (256, 3)
    assert capacity(2**16) == 8  # 2 MiB of float32
    assert capacity(2**20 + 1) == 1


def tensor_bytes(value, seen):
    """The bytes of all tensors that can be reached from `value`, each counted once."""
    if id(value) in seen:
        return 0
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        return value.untyped_storage().nbytes()
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    inside = [*inside, *vars(value).values()] if hasattr(value, "__dict__") else inside
    return sum(tensor_bytes(item, seen) for item in inside)


def test_memory_does_not_grow_with_the_number_of_batches():
    def total(batches):
        loader = (normal(50, 6, seed=i) * 10.0 ** (i % 9) for i in range(batches))
        return tensor_bytes(recorded(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2)), loader).records, set())

    # Two layers: a sample of 256 rows of 6 floats, their positions and whether their batch is held out, the extremes of
    # 6 channels, 6 x 6 products, 2048 counts of 8 bytes, and lo, hi, exponent and zeros.
    layer = 256 * (6 * 4 + 8 + 1) + 2 * 6 * 4 + 6 * 6 * 4 + 2048 * 8 + 2 * 4 + 2 * 8
    assert total(3) == total(30) == 2 * layer


# ---- the progress bar ----


def test_the_progress_bar_is_for_terminals(capsys, monkeypatch):
    def shown(progress):
        recorded(Net(), list(BATCHES), progress=progress)
        return capsys.readouterr()

    assert shown(None) == shown(False) == ("", "")
    out, err = shown(True)
    assert out == ""
    assert "torchq: calibrating" in err
    assert "3/3" in err

    terminal = StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    assert shown(None) == ("", "")
    assert "3/3" in terminal.getvalue()
