"""First linear layers have two codes for each value they read, where one makes most of the output's error."""

import copy
import io

import pytest
import torch
from torch import nn

import torchq
from helpers.compare import assert_identical
from helpers.numbers import normal
from torchq import QConfig, apply_plan, convert, plan_of, prepare_qat, report, simulate
from torchq.modules.fine_linear import FineLinear
from torchq.numerics.metrics import sqnr_db
from torchq.ops.fine import linear_fine
from torchq.planning import fine_signals
from torchq.planning.fine_signals import GAIN_DB, GAIN_DB_A_SHARE, LARGEST_SHARE, ONE_CODE

pytestmark = pytest.mark.usefixtures("seeded")

BATCHES = [normal(64, 12, seed=i) for i in range(6)]


class Net(nn.Module):
    """A layer that reads measurements, one of which is far larger than what tells samples apart, and a head."""

    def __init__(self, inputs=12, width=256, depth=1):
        super().__init__()
        self.first = nn.Linear(inputs, width)
        self.rest = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.head = nn.Linear(width, 4)
        with torch.no_grad():
            self.first.weight[:, 0] = 0.0  # what is large says nothing, and makes the steps large

    def forward(self, x):
        x = self.first(x * x.new_tensor([30.0] + [1.0] * (x.shape[-1] - 1))).relu()
        for layer in self.rest:
            x = layer(x).relu()
        return self.head(x)


NO_SCALES = QConfig(smoothing="none")  # which would make the large channel as large as the others


def fine(qmodel):
    return [name for name, layer in qmodel.torchq_plan.layers.items() if layer.fine]


def test_a_first_layer_whose_input_makes_most_of_the_error_has_two_codes():
    model = Net()
    qmodel = convert(model, BATCHES, config=NO_SCALES)
    plan = qmodel.torchq_plan
    assert fine(qmodel) == ["first"]
    assert isinstance(qmodel.first, FineLinear)
    planned, checked = plan.layers["first"], plan.checked
    db, before = checked.model_db, checked.output_db[ONE_CODE]
    assert db > before + GAIN_DB
    assert planned.kind == "int8 dynamic"
    assert planned.input_qparams is None
    assert planned.reason.endswith(
        f"one costs {db - before:.1f} dB of the model's output, {before:.1f} instead of {db:.1f}"
    )
    assert planned.reason in str(report(qmodel))
    x = normal(16, 12, seed=9)
    with torch.no_grad():
        given = x * x.new_tensor([30.0] + [1.0] * 11)
        assert_identical(qmodel.first(given), linear_fine(given, qmodel.first.packed))
        one = copy.deepcopy(qmodel)
        one.first.__class__ = torchq.QuantizedLinear
        exact = model(x)
        assert sqnr_db(exact, qmodel(x)) > sqnr_db(exact, one(x)) + GAIN_DB


@pytest.mark.parametrize(
    ("model", "data", "config"),
    [
        (Net(), BATCHES, QConfig(smoothing="none", activation="static")),
        (Net(), None, NO_SCALES),
        (Net(depth=0), BATCHES, NO_SCALES),  # most of the weights are in it
        (nn.Sequential(nn.Linear(12, 4)), BATCHES, NO_SCALES),
    ],
    ids=["static", "without data", "too large", "alone"],
)
def test_what_keeps_one_code(model, data, config):
    assert fine(convert(model, data, config=config)) == []


def test_inplace_keeps_one_code():
    """There is no way back, so nothing is tried."""
    model = Net()
    convert(model, BATCHES, config=NO_SCALES, inplace=True)
    assert fine(model) == []


def test_a_gain_too_small_for_its_price(monkeypatch):
    monkeypatch.setattr(fine_signals, "GAIN_DB_A_SHARE", 1e4)
    assert fine(convert(Net(), BATCHES, config=NO_SCALES)) == []
    monkeypatch.setattr(fine_signals, "GAIN_DB_A_SHARE", GAIN_DB_A_SHARE)
    monkeypatch.setattr(fine_signals, "GAIN_DB", 90.0)
    assert fine(convert(Net(), BATCHES, config=NO_SCALES)) == []


class Tokens(nn.Module):
    """What tables give is read first by the same layers."""

    def __init__(self, tables):
        super().__init__()
        self.tables, self.net = tables, Net()

    def forward(self, x):
        return self.net(self.tables(x))


def test_layers_behind_tables_and_convolutions_keep_one_code(monkeypatch):
    monkeypatch.setattr(fine_signals, "GAIN_DB", -90.0)
    monkeypatch.setattr(fine_signals, "GAIN_DB_A_SHARE", 0.0)
    tokens = [torch.randint(50, (64,), generator=torch.Generator().manual_seed(i)) for i in range(6)]
    assert fine(convert(Tokens(nn.Embedding(50, 12)), tokens, config=NO_SCALES)) == []
    bags = [each.view(32, 2) for each in tokens]
    assert fine(convert(Tokens(nn.EmbeddingBag(50, 12)), bags, config=NO_SCALES)) == []
    signals = [each.view(64, 1, 12) for each in BATCHES]
    assert fine(convert(Tokens(nn.Conv1d(1, 1, 1)), signals, config=NO_SCALES)) == []
    assert fine(convert(Tokens(nn.LayerNorm(12)), BATCHES, config=NO_SCALES)) == ["net.first"]
    assert LARGEST_SHARE < 0.2  # `depth=0` above


def test_it_is_the_first_called_not_the_first_named():
    class Reversed(Net):
        def __init__(self):
            super().__init__()
            self._modules = dict(reversed(self._modules.items()))

    assert fine(convert(Reversed(), BATCHES, config=NO_SCALES)) == ["first"]


def test_a_layer_in_a_sequential_still_includes_its_activation():
    net = Net()
    model = nn.Sequential(net.first, nn.ReLU(), net.rest[0], nn.ReLU(), net.head)
    batches = [x * x.new_tensor([30.0] + [1.0] * 11) for x in BATCHES]
    qmodel = convert(model, batches, config=NO_SCALES)
    assert fine(qmodel) == ["0"]
    assert type(qmodel).__name__ == "Int8Sequential"
    assert qmodel.computes(qmodel[0])
    x = batches[0]
    with torch.no_grad():
        expected = linear_fine(x, qmodel[0].packed, 1)
        assert_identical(expected, linear_fine(x, qmodel[0].packed).relu())
        for layer in qmodel[1:]:
            expected = layer(expected)
        assert_identical(qmodel(x), expected)
        seen = []
        qmodel[1].register_forward_hook(lambda module, args, y: seen.append(y))
        assert_identical(qmodel(x), expected)
        assert len(seen) == 1
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert qmodel(x).dtype == torch.bfloat16
    inputs = x.clone().requires_grad_()
    with torch.enable_grad():
        qmodel(inputs).sum().backward()
    assert inputs.grad.abs().max() > 0


def test_a_static_layer_that_gave_codes_gives_floats(monkeypatch):
    """With one code it is static, and hands its output to the next layer as codes. With two it can't."""
    model = nn.Sequential(nn.Linear(12, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 4))
    config = QConfig(smoothing="none", margin_db=20.0)
    with monkeypatch.context() as patched:
        patched.setattr(fine_signals, "GAIN_DB", 90.0)
        before = convert(model, BATCHES, config=config).torchq_plan.layers["0"]
        assert (before.kind, before.feeds, before.fine) == ("int8 static", "2", False)
    qmodel = convert(model, BATCHES, config=config)
    first = qmodel.torchq_plan.layers["0"]
    assert (first.kind, first.feeds, first.skipped, first.fine) == ("int8 dynamic", None, (), True)
    assert sqnr_db(model(BATCHES[0]).detach(), qmodel(BATCHES[0]).detach()) > 30


def test_copies_files_plans_and_simulations(tmp_path):
    model = Net()
    qmodel, x = convert(model, BATCHES, config=NO_SCALES), BATCHES[0]
    with torch.no_grad():
        expected = qmodel(x)
        assert_identical(copy.deepcopy(qmodel)(x), expected)
        buffer = io.BytesIO()
        torch.save(qmodel, buffer)
        buffer.seek(0)
        assert_identical(torch.load(buffer, weights_only=False)(x), expected)
        torchq.save(qmodel, tmp_path / "model.safetensors")
        assert_identical(torchq.load(tmp_path / "model.safetensors", Net())(x), expected)
        again = apply_plan(model, plan_of(qmodel))
        assert_identical(again(x), expected)
        with simulate():
            assert sqnr_db(expected, qmodel(x)) > 100


def test_trained_layers_keep_what_they_were_trained_with():
    qat = prepare_qat(Net(), BATCHES, config=NO_SCALES)
    assert fine(convert(qat.eval(), BATCHES)) == []
