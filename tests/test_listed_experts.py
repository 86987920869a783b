"""Experts as a list of modules: which of them become int8 though calibration data never reached them."""

import pytest
import torch
from torch import nn

from helpers.compare import assert_identical
from helpers.experts import EXPERTS, HIDDEN, INNER
from helpers.numbers import normal
from torchq import QConfig, QuantizedLinear, convert, prepare_qat, report
from torchq.modules.ranges import LearnedRange, PerToken
from torchq.numerics.metrics import sqnr_db

pytestmark = pytest.mark.usefixtures("seeded")

X = normal(256, HIDDEN, seed=1)
DATA = [normal(150, HIDDEN, seed=seed) for seed in range(2, 6)]
LAST = EXPERTS - 1


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, INNER), nn.Linear(INNER, HIDDEN)

    def forward(self, x):
        return self.down(self.up(x).relu())


class Other(Expert):
    pass


class Router(nn.Module):
    """Gives the one expert of each row, of the first `reached`."""

    def __init__(self):
        super().__init__()
        self.gate, self.reached = nn.Linear(HIDDEN, EXPERTS), EXPERTS

    def forward(self, x):
        return nn.functional.one_hot(self.gate(x)[:, : self.reached].argmax(dim=-1), EXPERTS)


class Named(nn.ModuleDict):
    """Experts under names, which their own class calls."""

    def forward(self, x, chosen):
        y = torch.zeros_like(x)
        for expert, rows in zip(self.values(), chosen.T.bool(), strict=True):
            if rows.any():
                y[rows] = expert(x[rows])
        return y


class Mixture(nn.Module):
    """As transformers' SwitchTransformersSparseMLP: a router and the experts beside each other."""

    def __init__(self, kinds=(Expert,) * EXPERTS):
        super().__init__()
        self.router, self.experts = Router(), Named({f"expert_{i}": kind() for i, kind in enumerate(kinds)})

    def forward(self, x):
        return self.experts(x, self.router(x))


class Own(nn.Module):
    """As many users write it: the module that holds the list chooses."""

    def __init__(self):
        super().__init__()
        self.gate, self.reached = nn.Linear(HIDDEN, EXPERTS), EXPERTS
        self.experts = nn.ModuleList(Expert() for _ in range(EXPERTS))

    def forward(self, x):
        weights, ids = self.gate(x)[:, : self.reached].softmax(dim=-1).topk(1)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows = (ids == i).any(dim=-1)
            if rows.any():
                y[rows] = expert(x[rows])
        return y * weights


class Unlisted(Own):
    """Chooses by code that says nothing."""

    def forward(self, x):
        return self.experts[int(x[0, 0] > 9)](x)


def chooser(model):
    return model.router if isinstance(model, Mixture) else model


def calibrated(model, make=convert, **config):
    """What `make` gives where the data never reach the last expert, and all others can."""
    chooser(model).reached = LAST
    made = make(model, DATA, config=QConfig(observer="minmax", rounding="nearest", smoothing="none", **config))
    for each in (model, made):
        chooser(each).reached = EXPERTS
    return made


def last(model):
    return next(reversed(list(model.experts.children())))


def plans_of_last(qmodel):
    name = next(name for name, module in qmodel.named_modules() if module is last(qmodel))
    return [qmodel.torchq_plan.layers[f"{name}.{part}"] for part in ("up", "down")]


@pytest.mark.parametrize("activation", ["auto", "static"])
@pytest.mark.parametrize("kind", [Mixture, Own])
def test_an_expert_that_no_row_reached_is_dynamic_and_right(kind, activation):
    model = kind().eval()
    qmodel = calibrated(model, activation=activation)
    assert [(plan.kind, plan.reason) for plan in plans_of_last(qmodel)] == [
        ("int8 dynamic", "no calibration data reached it")
    ] * 2
    assert "no calibration data reached it: experts." in " ".join(str(report(qmodel)).split())
    float_expert, expert = last(model), last(qmodel)
    for part in ("up", "down"):
        by_hand = QuantizedLinear.from_float(getattr(float_expert, part))
        assert_identical(getattr(expert, part).weight_int8, by_hand.weight_int8)
    assert sqnr_db(float_expert(X), expert(X)) > 35
    chosen = chooser(model)(X)
    assert kind is Own or chosen[:, LAST].sum() > 20
    assert all(isinstance(each.up, QuantizedLinear) for each in qmodel.experts.children())


@pytest.mark.parametrize("kind", [Unlisted, lambda: Mixture((*[Other] * LAST, Expert))], ids=["no router", "no twin"])
def test_what_is_not_known_to_run_by_calls_stays_float(kind):
    model = kind().eval()
    qmodel = calibrated(model)
    for plan in plans_of_last(qmodel):
        assert plan.kind == "float"
        assert plan.reason.startswith("calib_loader never reached it")
    assert_identical(last(qmodel)(X), last(model)(X))


class Summed(Own):
    """Experts that nobody calls: their weights are read."""

    def forward(self, x):
        ids = self.gate(x).topk(1)[1][:, 0]
        return torch.einsum("bk,bnk->bn", x, torch.stack([expert.up.weight for expert in self.experts])[ids])


@pytest.mark.filterwarnings("ignore:torchq.convert. nothing became int8")
def test_experts_of_which_none_is_called_stay_float():
    model = Summed().eval()
    qmodel = calibrated(model, exclude=("gate",))
    assert all(plan.kind == "float" for plan in plans_of_last(qmodel))
    assert_identical(qmodel(X), model(X))


@torch.enable_grad()
def test_in_training_it_has_a_range_per_token():
    trained = calibrated(Own(), prepare_qat, activation="static")
    assert isinstance(trained.experts[0].up.input_range, LearnedRange)
    assert isinstance(trained.experts[LAST].up.input_range, PerToken)
    trained.train()(X).square().mean().backward()
    qmodel = convert(trained.eval())
    assert [plan.kind for plan in plans_of_last(qmodel)] == ["int8 dynamic"] * 2
