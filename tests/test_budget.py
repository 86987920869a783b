"""The accuracy budget: which layers return to float, after how many evaluations, and that the metric is kept."""

import dataclasses
import json
import math
import warnings

import pytest
import torch
from torch import nn

from helpers.budgets import DATA, STATIC, WIDTH, X, bad_at, minus_error
from helpers.models import linears
from torchq import QConfig, convert
from torchq.numerics.metrics import sqnr_db
from torchq.planning.apply import apply_plan
from torchq.planning.budget import return_to_float
from torchq.planning.plan import Plan

pytestmark = pytest.mark.usefixtures("no_grad", "brief_times")


def enough_floats(k):
    """A metric that is 1 if at least k Linear layers are in float, and 0 otherwise."""

    def evaluate(candidate):
        evaluate.calls += 1
        return 1 if len(linears(candidate)) >= k else 0

    evaluate.calls = 0
    return evaluate


# ---- which layers return to float ----


@pytest.mark.parametrize("place", [0, 2, 4])
@pytest.mark.parametrize("config", [STATIC, QConfig(min_sqnr_db=-100)], ids=["static", "auto"])
def test_the_layer_made_bad_is_the_one_returned(place, config):
    model = bad_at(place)
    bad = linears(model)[place]
    evaluate = minus_error(model)
    assert float(evaluate(convert(model, DATA, config=config))) < -0.05  # with it in int8, the model is useless

    qmodel = convert(model, DATA, config=config, evaluate=evaluate, max_drop=0.01)
    assert linears(qmodel) == [bad]
    frontier = qmodel.torchq_plan.frontier
    assert next(iter(frontier.sensitivity_db)) == bad
    assert frontier.steps[frontier.chosen].returned == 1
    assert frontier.steps[frontier.chosen].metric == float(evaluate(qmodel)) >= -0.01
    reason = qmodel.torchq_plan.layers[bad].reason
    assert reason.startswith("returned to float to keep the metric: number 1 of 5 by sensitivity, ")
    assert f", {frontier.sensitivity_db[bad]:.1f} dB with this layer alone in int8 " in reason


def test_sensitivity_is_the_error_of_the_model_with_one_layer_in_int8():
    model = bad_at(2)
    measured = convert(model, DATA, config=STATIC, evaluate=minus_error(model)).torchq_plan.frontier.sensitivity_db
    names = linears(model)
    expected = {}
    for name in names:
        others = tuple(other for other in names if other != name)
        config = dataclasses.replace(STATIC, exclude=others)
        expected[name] = sqnr_db(model(DATA[0]), convert(model, DATA, config=config)(DATA[0]))
    assert measured == expected
    assert list(measured) == sorted(names, key=expected.__getitem__)


def test_what_fits_at_once_stays_as_it_is():
    model = bad_at(None)
    evaluate = minus_error(model)
    qmodel = convert(model, DATA, evaluate=evaluate, max_drop=0.5)
    assert evaluate.calls == 2
    assert qmodel.torchq_plan.layers == convert(model, DATA).torchq_plan.layers
    frontier = qmodel.torchq_plan.frontier
    assert (frontier.sensitivity_db, [step.returned for step in frontier.steps], frontier.chosen) == ({}, [0, 5], 0)


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 5, 9])
def test_bisection_finds_the_shortest_prefix_in_so_many_evaluations(layers):
    model = bad_at(None, layers)
    for k in range(layers + 1):
        evaluate = enough_floats(k)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            qmodel = convert(model, DATA[:1], config=STATIC, evaluate=evaluate, max_drop=0.5)
        frontier = qmodel.torchq_plan.frontier
        assert linears(qmodel) == [name for name in linears(model) if name in list(frontier.sensitivity_db)[:k]]
        assert frontier.steps[frontier.chosen].returned == len(linears(qmodel)) == k
        assert evaluate.calls == len(frontier.steps) <= 2 + math.ceil(math.log2(layers))
        assert len(caught) == (k == layers)


def test_the_default_drop_is_a_hundredth():
    model = bad_at(None)
    for drop, returned in [(0.0099, 0), (0.011, 1)]:
        qmodel = convert(model, DATA, config=STATIC, evaluate=lambda m, drop=drop: 0.5 - drop * (not linears(m)))
        assert len(linears(qmodel)) == returned


def test_without_int8_layers_there_is_nothing_to_search():
    model = bad_at(None)
    evaluate = minus_error(model)
    qmodel = convert(model, DATA, config=QConfig(min_sqnr_db=99), evaluate=evaluate, max_drop=0)
    assert evaluate.calls == 1
    (step,) = qmodel.torchq_plan.frontier.steps
    assert (step.returned, step.metric, step.speedup) == (0, 0.0, 1.0)
    assert step.seconds > 0


@pytest.mark.parametrize("place", [0, 2, 4])
def test_what_is_left_is_fused_as_if_the_layer_had_been_excluded(place):
    model = bad_at(None)
    plan = convert(model, DATA, config=STATIC).torchq_plan
    assert plan.layers["0"].feeds == "2"  # so there is a fusion to undo
    name = linears(model)[place]
    config = dataclasses.replace(STATIC, exclude=(name,))
    expected = convert(model, DATA, config=config)
    actual = return_to_float(plan, {name: f"excluded by {name!r}"})
    assert {**actual.layers[name].sqnr_db} == plan.layers[name].sqnr_db
    for key, layer in expected.torchq_plan.layers.items():
        other = actual.layers[key]
        facts = [(p.kind, p.reason, p.input_qparams, p.activation, p.feeds, p.skipped) for p in (layer, other)]
        assert facts[0] == facts[1]
    assert torch.equal(apply_plan(model, actual)(X), expected(X))


# ---- budgets that no int8 layer meets ----


def test_an_impossible_budget_warns_with_the_numbers_and_keeps_its_promise():
    model = bad_at(2)
    evaluate = minus_error(model)
    with pytest.warns(UserWarning, match="^torchq.convert: no model with an int8 layer keeps the metric") as caught:
        qmodel = convert(model, DATA, config=STATIC, evaluate=evaluate, max_drop=0)
    assert caught[0].filename == __file__
    assert torch.equal(qmodel(X), model(X))
    frontier = qmodel.torchq_plan.frontier
    *tried, exact = frontier.steps
    assert (exact.returned, exact.metric, frontier.chosen) == (5, 0.0, len(tried))
    best = max(tried, key=lambda step: step.metric)
    message = str(caught[0].message)
    assert f"max_drop = 0 of float's 0. The best, with {5 - best.returned} of 5 layers in int8" in message
    assert f"has {best.metric:.6g}, a drop of {-best.metric:.3g}. So all layers are in float." in message
    assert evaluate.calls == len(frontier.steps) == 2 + 3
    assert all(layer.reason.startswith("returned to float") for layer in qmodel.torchq_plan.layers.values())


# ---- how it is measured ----


@pytest.mark.parametrize("inplace", [False, True])
def test_evaluate_sees_eval_mode_and_the_flags_come_back(inplace):
    model = nn.Sequential(bad_at(None), nn.Dropout(0.5)).train()
    exact, seen = model.eval()(X), []
    model.train()

    def evaluate(candidate):
        seen.append((candidate.training, candidate[1].training, torch.is_grad_enabled()))
        candidate.train()  # an evaluate that leaves the model in training mode
        return -len(seen) / 100

    with torch.enable_grad():
        qmodel = convert(model, DATA, config=STATIC, evaluate=evaluate, max_drop=0.015, inplace=inplace)
    assert seen == [(False, False, False)] * 2
    assert all(module.training for module in [*model.modules(), *qmodel.modules()])
    assert (qmodel is model) == inplace
    assert sqnr_db(exact, qmodel.eval()(X)) > 25


def test_the_plan_makes_the_same_model_again():
    model = bad_at(2)
    qmodel = convert(model, DATA, config=STATIC, evaluate=minus_error(model))
    plan = Plan.from_dict(json.loads(json.dumps(qmodel.torchq_plan.to_dict(), allow_nan=False)))
    assert plan == qmodel.torchq_plan
    assert plan.frontier is not None
    assert torch.equal(apply_plan(model, plan)(X), qmodel(X))


class Wrapped(nn.Module):
    def __init__(self, model, wrap):
        super().__init__()
        self.model, self.wrap = model, wrap

    def forward(self, x):
        return self.wrap(self.model(x))


OUTPUTS = {
    "dict": lambda y: {"logits": y, "labels": y.argmax(-1)},
    "nested": lambda y: (y[:, :4], [y[:, 4:], None], 3),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs_of_any_structure_tell_the_sensitivity(kind):
    model = bad_at(2)
    names = [f"model.{name}" for name in linears(model)]
    qmodel = convert(Wrapped(model, OUTPUTS[kind]), DATA, config=STATIC, evaluate=enough_floats(1))
    measured = qmodel.torchq_plan.frontier.sensitivity_db
    assert next(iter(measured)) == names[2]
    plain = convert(model, DATA, config=STATIC, evaluate=enough_floats(1)).torchq_plan.frontier.sensitivity_db
    # The same values, perhaps in another order, which rounds a float64 sum differently.
    assert [measured[name] for name in names] == pytest.approx([plain[name[6:]] for name in names], rel=1e-9)


@pytest.mark.parametrize("wrap", [lambda y: y.argmax(-1), lambda y: None], ids=["integers", "nothing"])
def test_without_floats_in_the_output_each_layer_speaks_for_itself(wrap):
    qmodel = convert(Wrapped(bad_at(2), wrap), DATA, config=STATIC, evaluate=enough_floats(1))
    plan = convert(Wrapped(bad_at(2), wrap), DATA, config=STATIC).torchq_plan
    own = {name: layer.measured_db for name, layer in plan.layers.items()}
    measured = qmodel.torchq_plan.frontier.sensitivity_db
    assert list(measured.items()) == sorted(own.items(), key=lambda item: item[1])


class Shifty(nn.Module):
    """The last bit of its first layer's output decides about the output's shape, or about a NaN in it."""

    def __init__(self, odd):
        super().__init__()
        self.a, self.b, self.odd = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), odd
        self.exact = self.a(DATA[0]).sum()

    def forward(self, x):
        y = self.a(x)
        return self.b(x) if y.sum() == self.exact or x is not DATA[0] else self.odd(self.b(x))


@pytest.mark.parametrize("odd", [lambda y: y[:3], lambda y: y * math.nan], ids=["shape", "nan"])
def test_a_layer_that_breaks_the_output_is_the_most_sensitive(odd):
    torch.manual_seed(0)
    qmodel = convert(Shifty(odd), DATA, config=STATIC, evaluate=enough_floats(1))
    assert linears(qmodel) == ["a"]
    assert qmodel.torchq_plan.frontier.sensitivity_db["a"] == -math.inf
