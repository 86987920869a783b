"""Loaders of every kind: each is understood, or the error says which batch it was and what to pass instead."""

import sys
from collections import UserDict, namedtuple

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import DataLoader, TensorDataset

from helpers.calibration import BATCHES, LABELS, Net, X, Y, recorded
from helpers.calibration import state as state_of
from helpers.numbers import normal
from torchq import QuantizedLinear, convert, prepare_qat


class Features(Net):
    def forward(self, features):
        return self.fc(features["x"]) * features["mask"]


class Tokens(Net):
    """As models of transformers are: everything by keyword, nothing required."""

    def forward(self, ids=None, mask=None, labels=None):
        assert labels is None or mask is not None
        return self.fc(ids)


class KeywordOnly(Net):
    def forward(self, *, x):
        return self.fc(x)


class Star(Net):
    def forward(self, *args):
        return self.fc(args[0]) + args[1]


class PositionalOnly(Net):
    def forward(self, x, /):
        return self.fc(x["x"] if isinstance(x, dict) else x)


class Graph:
    def __init__(self, nodes):
        self.nodes = nodes


class Graphs(Net):
    def forward(self, graphs):
        return self.fc(torch.cat([graph.nodes for graph in graphs]))


class Listed(Net):
    def forward(self, xs: list[torch.Tensor]):
        return self.fc(torch.cat(xs))


class Packed(Net):
    def forward(self, packed):
        assert isinstance(packed, PackedSequence)
        return self.fc(packed.data)


Pair = namedtuple("Pair", "x y")
MASK = torch.ones(20, 1)


@pytest.mark.parametrize(
    ("model", "loader"),
    [
        (Features(), [{"x": X, "mask": MASK}]),
        (Features(), [({"x": X, "mask": MASK}, Y)]),
        (Features(), [UserDict(x=X, mask=MASK)]),
        (Net(), [{"x": X, "label": Y}]),
        (Net(), [({"x": X}, Y)]),
        (Net(), [Pair(X, Y)]),
        (Net(), zip(BATCHES, LABELS, strict=True)),
        (Net(), DataLoader(TensorDataset(X, Y), batch_size=7)),
        (Net(), list(X)),
        (Tokens(), [{"ids": X, "mask": MASK, "unknown": 3}]),
        (Tokens(), [({"ids": X}, Y)]),
        (Tokens(), [[{"ids": X}, Y]]),
        (Tokens(), [(X, Y)]),
        (KeywordOnly(), [{"x": X, "y": Y}]),
        (Star(), [(X, torch.ones(20, 3))]),
        (PositionalOnly(), [{"x": X}]),
        (Graphs(), [[Graph(part) for part in BATCHES]]),
        (Listed(), [list(BATCHES)]),
        (Packed(), [pack_sequence([X])]),
        (nn.DataParallel(Net()), [{"x": X, "label": Y}]),
        (torch.compile(Net(), backend="eager"), [{"x": X, "label": Y}]),
        (torch.compile(Net(), backend="eager"), [(X, Y)]),
    ],
)
def test_batches_that_are_understood(model, loader):
    """The layer saw every row once."""
    (record,) = recorded(model.eval(), loader).records.values()
    assert record.sample.rows_seen == 20
    assert torch.equal(record.extremes, torch.stack([X.amin(0), X.amax(0)]))


def test_a_compiled_model_is_calibrated_without_compiling():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = torch.compile(Net().eval(), backend=backend)
    qmodel = convert(model, [X], progress=False)
    assert graphs == []
    assert qmodel(X).shape == (20, 3)
    assert len(graphs) == 1


def test_a_distributed_model_can_be_converted_in_place(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(64, 32)))
        with pytest.raises(
            TypeError, match=r"torchq.convert: this Distr.* Pass model.module, the model within, or inpl"
        ):
            convert(model, [(normal(20, 64), Y)], progress=False)
        qmodel = convert(model, [(normal(20, 64), Y)], progress=False, inplace=True)
        assert isinstance(qmodel.module[0], QuantizedLinear)
    finally:
        torch.distributed.destroy_process_group()


def error_of(model, loader, kind=Exception, **kwargs):
    before = state_of(model)
    with pytest.raises(kind) as caught:
        convert(model, loader, progress=False, **kwargs)
    assert state_of(model) == before
    return caught.value


@pytest.mark.parametrize(
    ("loader", "words"),
    [
        (
            {"x": X},
            r"calib_loader is a dict, which looks like one batch: .* keys \('x'\)\. Wrap it in a list: \[calib_l",
        ),
        (UserDict(a=X, b=Y), r"calib_loader is a UserDict, which looks like one batch: .*\('a', 'b'\)\."),
        (
            X,
            r"calib_loader is a Tensor of shape \[20, 6\]: iterating .* wrap it in a list: \[calib_loader\]. If",
        ),
        (X.numpy(), r"calib_loader is a ndarray of shape \[20, 6\]: "),
        (
            TensorDataset(X, Y),
            r"got TensorDataset\. Wrap a dataset: torch.utils.data.DataLoader\(dataset, batch_size=32\)",
        ),
        (b"abc", r"must be an iterable of batches, got bytes\.$"),
    ],
)
@pytest.mark.parametrize("door", [convert, prepare_qat])
def test_what_is_no_loader(door, loader, words):
    with pytest.raises(
        TypeError, match=rf"^torchq.{door.__name__}: calib_loader .*{words.removeprefix('calib_loader ')}"
    ):
        door(Net(), loader, progress=False)


@pytest.mark.parametrize(
    ("model", "batch", "words"),
    [
        (KeywordOnly(), X, "KeywordOnly.forward takes its inputs by keyword only, (x); batch 1 of calib_loader is one"),
        (
            Features(),
            {"y": X},
            "Features.forward can't be called with batch 1 of calib_loader, a dict with the keys y, as",
        ),
        (
            Tokens(),
            {"a": X, "b": Y},
            "Tokens.forward takes (ids, mask, labels), batch 1 of calib_loader is a dict with",
        ),
        (KeywordOnly(), {"y": X}, "KeywordOnly.forward takes (x), batch 1 of calib_loader is a dict with the keys 'y'"),
        (
            Features(),
            X,
            "Features.forward can't be called with batch 1 of calib_loader, a float32 tensor [20, 6], as it",
        ),
        (
            Star(),
            (X,),
            "Star.forward can't be called with batch 1 of calib_loader, a tuple of (a float32 tensor [20, 6])",
        ),
        (
            Graphs(),
            (Graph(X), Y),
            "Graphs.forward can't be called with batch 1 of calib_loader, a tuple of (Graph, an int6",
        ),
    ],
)
def test_batches_that_are_not_understood(model, batch, words):
    first = {"x": X, "mask": MASK}
    good = {KeywordOnly: first, Features: first, Tokens: (X,), Star: (X, 1), Graphs: [Graph(X)]}[type(model)]
    error = error_of(model, [good, batch], (TypeError, ValueError, LookupError))
    assert str(error).strip('"').startswith("torchq")
    assert words in str(error)
    assert "forward=lambda model, batch: ..." in str(error)


def test_a_model_without_forward():
    class Scored(Net):
        forward = nn.Module.forward

        def score(self, x):
            return self.fc(x)

    for model in (Scored(), nn.ModuleDict({"a": nn.Linear(6, 3)})):
        message = str(error_of(model, [X], TypeError))
        assert message.startswith(
            f"torchq.convert: this {type(model).__name__} has no forward(), so a batch of calib_l"
        )
        assert "forward=lambda model, batch: ..." in message
    assert recorded(Scored(), [X], forward=lambda model, x: model.score(x)).records["fc"].sample.rows_seen == 20


class OwnError(Exception):
    """An error with arguments that nobody else can fill in."""

    def __init__(self, code, text):
        super().__init__(code, text)


class Fails(Net):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x):
        if len(x) == 4:
            raise self.error
        return self.fc(x)


@pytest.mark.parametrize("kind", [IndexError, KeyError, AttributeError, TypeError, ValueError])
def test_errors_in_the_lines_of_forward_keep_their_type(kind):
    error = error_of(Fails(kind("my words")), BATCHES, kind)
    assert type(error) is kind
    assert "my words" in str(error)
    assert "batch 2 of calib_loader, a float32 tensor [4, 6], as it is" in str(error)
    assert "forward=lambda" in str(error)


def notes(error):
    return error.__notes__ if sys.version_info >= (3, 11) else [str(error.__cause__)]


@pytest.mark.parametrize("own", [OwnError(3, "my words"), RuntimeError("my words"), StopIteration("my words")])
def test_other_errors_of_the_model_are_its_own_with_a_note(own):
    error = error_of(Fails(own), BATCHES, type(own))
    assert error is own
    assert notes(error) == [
        "torchq: raised by batch 2 of calib_loader, a float32 tensor [4, 6]. Pass forward=lambda model, batch: ... to "
        "say how to call the model, if not so."
    ]


def test_errors_below_forward_get_a_note():
    error = error_of(Net(), [X, X[:, :5]], RuntimeError)
    assert "batch 1 of calib_loader, a float32 tensor [20, 5]" in notes(error)[0]
    error = error_of(nn.Sequential(Fails(KeyError("my words"))), BATCHES, KeyError)
    assert error.args == ("my words",)
    assert "batch 2 of calib_loader" in notes(error)[0]


def test_errors_of_the_users_forward_get_a_note():
    error = error_of(Net(), [X, Y], ZeroDivisionError, forward=lambda model, batch: model(X) if batch is X else 1 / 0)
    assert notes(error) == [
        "torchq: raised by forward(model, batch) for batch 1 of calib_loader, an int64 tensor [20]."
    ]
