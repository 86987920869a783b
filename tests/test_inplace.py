"""convert(inplace=True): when it frees float layers, and the model after a failure. Results: test_convert.py."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from helpers.compare import assert_close_to_float
from helpers.models import Nested, with_and_without_data
from torchq import QConfig, QuantizedLinear, convert
from torchq.numerics.metrics import sqnr_db
from torchq.planning.apply import apply_plan
from torchq.planning.making import FromFloat

pytestmark = pytest.mark.usefixtures("seeded")


@with_and_without_data
def test_inplace_swaps_and_frees_the_float_weights(data):
    model = Nested().eval()
    before = copy.deepcopy(model)
    weights = [weakref.ref(parameter) for parameter in model.parameters()]
    assert convert(model, data, inplace=True) is model
    gc.collect()
    assert not [weight for weight in weights if weight() is not None]
    assert_close_to_float(before, model)


@pytest.mark.parametrize("failing", [1, 4, 7])
def test_inplace_stays_right_when_memory_runs_out(monkeypatch, failing):
    """It runs out at the first, the fourth or the last of seven layers. Earlier failures: test_bad_input.py."""
    from_float, calls = QuantizedLinear.from_float, []

    def fails(*args, **kwargs):
        calls.append(args)
        if len(calls) == failing:
            raise MemoryError
        return from_float(*args, **kwargs)

    model = Nested().eval()
    before = copy.deepcopy(model)
    monkeypatch.setattr(QuantizedLinear, "from_float", fails)
    with pytest.raises(MemoryError):
        convert(model, inplace=True)
    assert sum(type(module) is QuantizedLinear for module in model.modules()) == failing - 1
    assert_close_to_float(before, model)


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_inplace_stays_right_between_the_layers_of_a_chain(monkeypatch, failing):
    """A layer that passes codes, or has an activation folded in, is never followed by a module that can't take that."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 40), nn.SiLU(), nn.Linear(40, 8)).eval()
    before, x = copy.deepcopy(model), torch.randn(64, 24)
    from_float, calls = QuantizedLinear.from_float, []
    config = QConfig(activation="static", observer="minmax")
    plan = convert(model, [x], config=config).torchq_plan
    assert plan.layers["0"].feeds == "2"

    def fails(*args, **kwargs):
        calls.append(args)
        if len(calls) == failing:
            raise MemoryError
        return from_float(*args, **kwargs)

    monkeypatch.setattr(QuantizedLinear, "from_float", fails)
    with pytest.raises(MemoryError):
        apply_plan(model, plan, inplace=True)
    assert sqnr_db(before(x), model(x)) > 30


@pytest.mark.parametrize("loader", [None, [torch.ones(16, 8)]], ids=["no loader", "loader"])
def test_inplace_frees_each_float_layer_before_the_next(monkeypatch, loader):
    """So the peak memory is that of the float model and one more layer."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    floats, alive = [weakref.ref(layer) for layer in model], []
    original = FromFloat.layer

    def counting(*arguments):
        alive.append(sum(layer() is not None for layer in floats))
        return original(*arguments)

    monkeypatch.setattr(FromFloat, "layer", counting)
    convert(model, loader, inplace=True)
    assert alive == [3, 2, 1]
