"""Routers of experts, and the layers in front of the first one, stay in float where they are few of the weights."""

import functools

import pytest
import torch
from torch import nn

from helpers.compare import assert_identical
from helpers.experts import HIDDEN, Experts
from helpers.numbers import normal
from torchq import QConfig, apply_plan, convert, plan_of, prepare_qat
from torchq.modules.quantized_linear import QuantizedLinear
from torchq.planning import stems

pytestmark = pytest.mark.usefixtures("seeded")

X = normal(256, HIDDEN, seed=1)
DATA = [normal(64, HIDDEN, seed=seed) * torch.linspace(0.1, 20, HIDDEN) for seed in range(2, 6)]
NEAREST = QConfig(observer="minmax", rounding="nearest")  # smoothed, which would take layers back from float


class Chosen(nn.Module):
    """A mixture of experts as users write it: a list of modules, and a layer that chooses two of them for each row."""

    def __init__(self, width):
        super().__init__()
        self.gate = nn.Linear(HIDDEN, 4, bias=False)
        up = [nn.Sequential(nn.Linear(HIDDEN, width), nn.ReLU(), nn.Linear(width, HIDDEN)) for _ in range(4)]
        self.experts = nn.ModuleList(up)

    def choose(self, x):
        return self.gate(x).softmax(dim=-1).topk(2)

    def forward(self, x):
        weights, ids = self.choose(x)
        every = torch.stack([expert(x) for expert in self.experts], dim=1)
        return (weights.unsqueeze(2) * every.gather(1, ids.unsqueeze(2).expand(-1, -1, HIDDEN))).sum(dim=1)


class Switched(Chosen):
    """With one expert for each row, the most likely one."""

    def choose(self, x):
        chosen = nn.functional.one_hot(self.gate(x).argmax(dim=-1), 4)
        return chosen.float().sort(descending=True)


class Stacked(nn.Module):
    """The same with stacked experts, and a router of another class, which has a parameter and no layer."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Parameter(normal(4, HIDDEN, seed=5)), Experts()

    def forward(self, x):
        return self.experts(x, *reversed((x @ self.gate.T).softmax(dim=-1).topk(2)))


class Model(nn.Module):
    """Two blocks of a layer and a mixture of experts, and a head."""

    def __init__(self, mixture):
        super().__init__()
        self.first, self.mixture = nn.Linear(HIDDEN, HIDDEN), mixture()
        self.second, self.other = nn.Linear(HIDDEN, HIDDEN), mixture()
        self.head = nn.Linear(HIDDEN, 64)

    def forward(self, x):
        x = x + 4 * self.first(x)
        x = x + self.mixture(x)
        x = x + self.second(x)
        return self.head(x + self.other(x))


def listed(width=512, kind=Chosen):
    return Model(functools.partial(kind, width))


def choices(model, x):
    """The experts that the first mixture of a model of `Chosen` chooses."""
    return model.mixture.choose(x + 4 * model.first(x))[1]


@torch.no_grad()
@pytest.mark.parametrize("data", [None, DATA], ids=["no data", "data"])
def test_the_first_router_chooses_as_in_float(data):
    model = listed()
    qmodel = convert(model, data, config=NEAREST)
    plan = qmodel.torchq_plan
    assert_identical(choices(qmodel, X), choices(model, X))
    assert [name for name, layer in plan.layers.items() if not layer.is_int8] == ["first", "mixture.gate", "other.gate"]
    total = 2 * (HIDDEN * HIDDEN + 4 * HIDDEN + 8 * HIDDEN * 512) + 64 * HIDDEN
    for name, held in {"first": HIDDEN**2, "other.gate": 2 * 4 * HIDDEN}.items():
        assert plan.layers[name].reason == f"routers choose by what it gives: {held / total:.2%} of the weights"
    assert_identical(apply_plan(model, plan_of(qmodel))(X), qmodel(X))
    asked = convert(model, data, config=QConfig(activation="dynamic"))
    assert not torch.equal(choices(asked, X), choices(model, X))


def test_what_is_asked_for_and_what_was_trained_is_in_int8():
    model = listed()
    assert len(convert(model, config=QConfig(activation="dynamic")).torchq_plan.int8_layers()) == 21
    prepared = prepare_qat(model)
    prepared(X)
    assert isinstance(convert(prepared.eval()).first, QuantizedLinear)


def test_stacked_experts_are_known_whatever_chooses(monkeypatch):
    monkeypatch.setattr(stems, "SMALL_SHARE", 0.05)
    layers = convert(Model(Stacked)).torchq_plan.layers
    assert [name for name, layer in layers.items() if not layer.is_int8] == ["first"]


@pytest.mark.parametrize(("more", "stays"), [(0, True), (-1, False)])
def test_how_much_of_the_weights_is_little(more, stays, monkeypatch):
    model, weights = listed(), HIDDEN * HIDDEN
    total = 2 * (weights + 4 * HIDDEN + 8 * HIDDEN * 512) + 64 * HIDDEN
    monkeypatch.setattr(stems, "SMALL_SHARE", (weights + more) / total)
    qmodel = convert(model)
    assert isinstance(qmodel.first, QuantizedLinear) != stays
    assert not isinstance(qmodel.mixture.gate, QuantizedLinear)


class Beam(nn.Module):
    """A model with topk of its own and in a method that its forward does not call, around another one."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x).topk(8)

    def search(self, x):
        return self.forward(x)


def test_a_model_that_chooses_at_its_end_has_nothing_in_front_of_itself():
    layers = convert(Beam(listed())).torchq_plan.layers
    assert [name for name, layer in layers.items() if not layer.is_int8][:2] == ["inner.first", "inner.mixture.gate"]


def wrapped(forward):
    @functools.wraps(forward)
    def call(*args, **kwargs):
        return forward(*args, **kwargs)

    return call


def test_code_is_read_behind_decorators_and_only_where_forward_leads(monkeypatch):
    class Idle(Chosen):
        def forward(self, x):
            return self.gate(x)[:, :1] * self.experts[0](x)

    monkeypatch.setattr(Chosen, "forward", wrapped(Chosen.forward))
    assert not isinstance(convert(listed()).first, QuantizedLinear)
    idle = convert(Model(functools.partial(Idle, 512)))
    assert isinstance(idle.first, QuantizedLinear)
    assert isinstance(idle.mixture.gate, QuantizedLinear)


def test_routers_choose_by_argmax_too():
    model = listed(kind=Switched)
    qmodel = convert(model)
    layers = qmodel.torchq_plan.layers
    assert [name for name, layer in layers.items() if not layer.is_int8] == ["first", "mixture.gate", "other.gate"]
    assert_identical(choices(qmodel, X), choices(model, X))


def test_argmax_alone_chooses_no_expert(monkeypatch):
    monkeypatch.setattr(Chosen, "choose", lambda self, x: (self.gate(x).amax(-1, True), self.gate(x).argmax(-1, True)))
    assert all(layer.is_int8 for layer in convert(listed()).torchq_plan.layers.values())


class Odd:
    """Something that answers no questions."""

    def __bool__(self):
        raise RuntimeError("neither")

    def __getattr__(self, name):
        raise RuntimeError(name)


@pytest.mark.parametrize("held", [torch.ones(HIDDEN), normal(HIDDEN).numpy(), Odd()], ids=["tensor", "array", "odd"])
def test_what_a_class_holds_beside_methods_is_not_asked(held, monkeypatch):
    monkeypatch.setattr(Chosen, "mean", held, raising=False)
    monkeypatch.setattr(Chosen, "forward", lambda self, x: (self.mean, self.choose(x))[1].values @ normal(2, HIDDEN))
    model = listed()
    kept = convert(model)
    assert not isinstance(kept.first, QuantizedLinear)
    assert_identical(kept.mixture(X), model.mixture(X))
