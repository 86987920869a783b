"""Layers whose weight code reads without calling them stay in float: an int8 weight is dequantized at each read."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from helpers.compare import assert_identical
from torchq import QConfig, convert, prepare_qat, sqnr_db
from torchq.calibration.calibrate import calibrate
from torchq.modules.registry import find_layers
from torchq.planning.choose import ONLY_READ, READ_TOO

pytestmark = pytest.mark.usefixtures("seeded")

X = torch.linspace(-2, 2, 128 * 64).reshape(128, 64).sin()


class Reads(nn.Module):
    """`proj` is there for its weight."""

    def __init__(self):
        super().__init__()
        self.proj, self.called = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        return self.called(functional.linear(x, self.proj.weight, self.proj.bias))


class Attends(nn.Module):
    """As WavLM's attention and CLIP's pooling do."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(64, 64) for _ in range(4))

    def forward(self, x):
        weights = {"q_proj_weight": self.q.weight, "k_proj_weight": self.k.weight, "v_proj_weight": self.v.weight}
        bias = torch.cat([self.q.bias, self.k.bias, self.v.bias])
        heads = (self.q.in_features, 4, torch.empty(0), bias, None, None, False, 0.0, self.out.weight, self.out.bias)
        return functional.multi_head_attention_forward(x, x, x, *heads, use_separate_proj_weight=True, **weights)[0]


class InAMethod(Reads):
    def project(self, x):
        return x @ self.proj.weight.t() + self.proj.bias

    def forward(self, x):
        return self.called(self.project(x))


class Convolves(Reads):
    def __init__(self):
        super().__init__()
        self.proj = nn.Conv1d(64, 64, 1)

    def forward(self, x):
        return self.called(functional.conv1d(x.t()[None], self.proj.weight)[0].t())


ONLY_READS = [Reads, Attends, InAMethod, Convolves]


@pytest.mark.parametrize("kind", ONLY_READS)
@pytest.mark.parametrize("activation", [None, "auto", "dynamic", "static"])
def test_a_layer_that_is_only_read_stays_in_float(kind, activation):
    model = kind().eval()
    qmodel = (
        convert(model) if activation is None else convert(model, X.split(64), config=QConfig(activation=activation))
    )
    plan = qmodel.torchq_plan.layers
    read = {name for name in plan if name != "called"}
    assert {plan[name].reason for name in read} == {ONLY_READ}
    assert not any(plan[name].is_int8 for name in read)
    assert all(type(qmodel.get_submodule(name)) is type(model.get_submodule(name)) for name in read)
    assert "called" not in plan or plan["called"].is_int8
    assert sqnr_db(model(X), qmodel(X)) > 35
    if kind is Attends:
        assert_identical(qmodel(X), model(X))


class Branches(Reads):
    """Some runs call it."""

    def forward(self, x):
        return self.called(self.proj(x) if len(x) > 1000 else functional.linear(x, self.proj.weight, self.proj.bias))


class AsksItsDtype(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj, self.called = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        return self.called(x.to(self.proj.weight.dtype))


class HandsItOn(Reads):
    def forward(self, x):
        return self.called(functional.linear(x, self.proj.weight) + call(self.proj, x))


class InAList(Reads):
    def __init__(self):
        super().__init__()
        self.all = [self.proj]

    def forward(self, x):
        return self.called(functional.linear(x, self.proj.weight) + sum(each(x) for each in self.all))


class AmongChildren(Reads):
    def forward(self, x):
        return functional.linear(x, self.proj.weight) + sum(child(x) for child in self.children())


class ByName(Reads):
    def forward(self, x):
        return self.called(functional.linear(x, self.proj.weight) + getattr(self, "proj")(x))  # noqa: B009


class FromOutside(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Reads()

    def forward(self, x):
        return self.inner(x) + self.inner.proj(x)


class InTwoPlaces(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Reads()
        self.again = nn.Sequential(self.inner.proj, nn.ReLU())

    def forward(self, x):
        return self.inner(x) + self.again(x)


def call(layer, x):
    return layer(x)


@pytest.mark.parametrize(
    "kind", [Branches, AsksItsDtype, HandsItOn, InAList, AmongChildren, ByName, FromOutside, InTwoPlaces]
)
def test_without_data_a_layer_that_code_may_call_is_int8(kind):
    model = kind().eval()
    qmodel = convert(model)
    assert all(layer.is_int8 for layer in qmodel.torchq_plan.layers.values())
    assert sqnr_db(model(X), qmodel(X)) > 30


@pytest.mark.parametrize("kind", [HandsItOn, InAList, AmongChildren, ByName, FromOutside])
def test_the_plan_says_that_a_called_layer_is_read_too(kind):
    model = kind().eval()
    qmodel = convert(model, X.split(64))
    plan = qmodel.torchq_plan.layers
    assert {name.rpartition(".")[2]: layer.reason.endswith(READ_TOO) for name, layer in plan.items()} == {
        "proj": True,
        "called": False,
    }
    assert all(layer.is_int8 for layer in plan.values())
    assert sqnr_db(model(X), qmodel(X)) > 30


def test_what_the_runs_did_counts():
    assert convert(Branches().eval(), X.split(64)).torchq_plan.layers["proj"].reason == ONLY_READ
    reason = convert(AsksItsDtype().eval(), X.split(64)).torchq_plan.layers["proj"].reason
    assert reason.startswith("calib_loader never reached it")


def reads(model, *inputs):
    return calibrate(model, inputs, find_layers(model), QConfig()).weights_read


def test_a_layers_own_calls_are_no_reads():
    def normed(layer):
        return nn.utils.parametrizations.weight_norm(layer)

    model = nn.Sequential(nn.Linear(64, 64), normed(nn.Linear(64, 64)), nn.Unflatten(1, (64, 1)), nn.Conv1d(64, 64, 1))
    assert reads(model, X) == set()
    assert reads(nn.TransformerEncoderLayer(64, 4, batch_first=True), X[None]) == set()
    assert reads(nn.LSTM(64, 64), X[None]) == set()


def test_layers_that_share_a_weight_read_it_for_each_other():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    assert reads(model, X) == set()


def test_a_call_that_fails_has_ended():
    class Tries(Reads):
        def forward(self, x):
            try:
                self.proj(x[:, :3])
            except RuntimeError:
                return self.called(functional.linear(x, self.proj.weight))
            raise AssertionError

    assert reads(Tries(), X) == {"proj"}


@pytest.mark.parametrize("data", [False, True])
def test_a_tied_head_that_is_only_read_keeps_its_table_in_float(data):
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = nn.Embedding(512, 64), nn.Linear(64, 512, bias=False)
            self.head.weight = self.words.weight

        def forward(self, ids):
            return functional.linear(self.words(ids), self.head.weight)

    model, ids = Head().eval(), torch.arange(512).reshape(8, 64)
    with pytest.warns(UserWarning, match="nothing became int8"):
        qmodel = convert(model, ids.split(2)) if data else convert(model)
    assert qmodel.torchq_plan.layers["head"].reason == ONLY_READ
    assert qmodel.torchq_plan.tables["words"].kind == "float"
    assert_identical(qmodel(ids), model(ids))


def test_a_table_that_is_looked_up_is_not_read():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head, self.fc = nn.Embedding(512, 64), nn.Linear(64, 512, bias=False), nn.Linear(64, 64)
            self.head.weight = self.words.weight

        def forward(self, ids):
            return self.fc(self.words(ids))

    assert reads(Head(), torch.arange(512).reshape(8, 64)) == set()


def test_one_that_was_trained_beside_its_reader_stays_in_float():
    model = prepare_qat(Reads(), config=QConfig(activation="dynamic"))
    qmodel = convert(model.eval())
    assert qmodel.torchq_plan.layers["proj"].reason == ONLY_READ
    assert type(qmodel.proj) is nn.Linear
    assert qmodel.torchq_plan.layers["called"].is_int8
    assert_identical(qmodel.proj.weight, model.proj.weight)
