"""Bad arguments of the accuracy budget: each error says what is wrong, and the model is as before."""

import json
import math

import pytest
import torch

from helpers.budgets import DATA, STATIC, bad_at, minus_error
from helpers.compare import snapshot
from helpers.models import linears
from torchq import convert
from torchq.planning.frontier import Frontier

pytestmark = pytest.mark.usefixtures("no_grad", "brief_times")


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_errors_of_evaluate_pass_through_and_the_model_stays(call, inplace):
    model = bad_at(2).train()
    before, calls = snapshot(model), []

    def evaluate(candidate):
        calls.append(candidate)
        if len(calls) == call:
            raise KeyError("mine")
        return -len(calls)

    with pytest.raises(KeyError, match=r"^'mine'$"):
        convert(model, DATA, config=STATIC, inplace=inplace, evaluate=evaluate)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("value", "error"),
    [
        *[(math.nan, ValueError), (torch.tensor(math.nan), ValueError)],
        *[(value, TypeError) for value in (None, "0.9", torch.ones(2), [0.9], 1j)],
    ],
)
@pytest.mark.parametrize("bad_call", [1, 2])
def test_what_is_no_number_is_refused(value, error, bad_call):
    calls = []

    def evaluate(candidate):
        calls.append(candidate)
        return value if len(calls) == bad_call else 0.0

    which = ["float model", "model with 0 of 5 int8 layers in float"][bad_call - 1]
    model = bad_at(None)
    before = snapshot(model)
    with pytest.raises(error, match=rf"^torchq.convert: evaluate must return a number.* for the {which} it returned"):
        convert(model, DATA, config=STATIC, evaluate=evaluate)
    assert snapshot(model) == before


def test_infinity_is_no_baseline_but_the_worst_metric():
    model = bad_at(None)
    with pytest.raises(ValueError, match=r"^torchq.convert: evaluate returned inf for the float model"):
        convert(model, DATA, config=STATIC, evaluate=lambda m: math.inf)
    qmodel = convert(model, DATA, config=STATIC, evaluate=lambda m: 0.0 if linears(m) else -math.inf)
    frontier = qmodel.torchq_plan.frontier
    assert (frontier.steps[0].metric, frontier.drop(frontier.steps[0])) == (-math.inf, math.inf)
    assert Frontier.from_dict(json.loads(json.dumps(frontier.to_dict(), allow_nan=False))) == frontier


@pytest.mark.parametrize("number", [1, True, 0.5, torch.tensor(0.5), torch.tensor(2).numpy(), torch.ones(2).numpy()[0]])
def test_numbers_of_any_kind_are_taken(number):
    frontier = convert(bad_at(None), DATA, config=STATIC, evaluate=lambda m: number).torchq_plan.frontier
    assert [step.metric for step in frontier.steps] == [float(number)] * 2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_drop": 0.1}, ValueError, "max_drop needs evaluate"),
        ({"evaluate": 0.9}, TypeError, "evaluate must be a function of a model, got float"),
        *[
            ({"evaluate": minus_error, "max_drop": drop}, ValueError, "max_drop must be a finite number >= 0, got ")
            for drop in (-0.1, math.nan, math.inf, "0.1", None.__class__)
        ],
    ],
)
def test_wrong_arguments_are_refused_before_any_work(arguments, error, message):
    def loader():
        pytest.fail("a batch was asked for")
        yield

    with pytest.raises(error, match=rf"^torchq.convert: {message}"):
        convert(bad_at(None), loader(), **arguments)


def test_evaluate_needs_data():
    with pytest.raises(ValueError, match=r"^torchq.convert: evaluate needs a calib_loader"):
        convert(bad_at(None), evaluate=lambda m: 1.0)


def test_a_model_that_cannot_be_copied_is_told_so():
    model = bad_at(None)
    model.lock = (i for i in ())
    with pytest.raises(TypeError, match=r"cannot be copied .* Pass inplace=True, and no evaluate,"):
        convert(model, DATA, config=STATIC, evaluate=lambda m: 1.0, inplace=True)
