"""prepare_qat smooths the inputs: the float function stays, ranges improve, shared parameters do not change."""

import pytest
import torch
from torch import nn

from helpers.smoothable import DATA, Block, K, X
from torchq import QConfig, convert, prepare_qat
from torchq.modules.qat_linear import QATLinear
from torchq.numerics.metrics import sqnr_db

pytestmark = pytest.mark.usefixtures("seeded")

NONE = QConfig(smoothing="none")


def as_float(prepared):
    """A copy of a prepared model without fake quantization."""
    for module in prepared.modules():
        if isinstance(module, QATLinear):
            module.release()
    return prepared


@pytest.mark.parametrize("ranges", ["learned", "observed"])
def test_training_starts_as_if_there_were_no_outliers(ranges):
    """Without smoothing, the step is 50 times as coarse for 29 of 32 channels."""
    model = Block()
    rough = prepare_qat(model, DATA, config=NONE, ranges=ranges).eval()
    smooth = prepare_qat(model, DATA, ranges=ranges).eval()
    assert sqnr_db(model(X), rough(X)) < 25
    assert sqnr_db(model(X), smooth(X)) > 35
    assert sqnr_db(model(X), convert(smooth, DATA)(X)) > 35
    reasons = [layer.reason for layer in smooth.torchq_plan.layers.values()]
    assert all(reason.endswith("; input smoothed in 'norm'") for reason in reasons)


def test_the_float_function_stays():
    """Each weight and each output of the norm is rounded twice, by 2^-24."""
    model = Block()
    smooth = as_float(prepare_qat(model, DATA).eval())
    assert not torch.allclose(smooth.norm.weight, model.norm.weight, rtol=0.1)
    torch.testing.assert_close(smooth(X), model(X), rtol=1e-4, atol=1e-4)


def test_in_place_the_parameters_are_the_same_objects():
    """An optimizer may already hold them."""
    model = Block()
    exact, before = model(X), {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    assert prepare_qat(model, DATA, inplace=True) is model
    now = dict(model.named_parameters())
    assert {name: id(now[name]) for name in before} == {name: number for name, (number, _) in before.items()}
    assert not torch.equal(model.norm.weight, before["norm.weight"][1])
    torch.testing.assert_close(as_float(model)(X), exact, rtol=1e-4, atol=1e-4)


def test_a_parameter_that_others_use_is_left_alone():
    model = Block()
    model.other = nn.Linear(K, 24)  # never smoothed: it reads x itself
    model.other.weight = model.a.weight
    model.run = lambda m, x: (lambda y: m.a(y) + m.b(y) + m.other(x))(m.norm(x))
    smooth = prepare_qat(model, DATA)
    assert torch.equal(smooth.norm.weight, model.norm.weight)
    assert smooth.other.weight is smooth.a.weight
    assert torch.equal(smooth.a.weight, model.a.weight)


@pytest.mark.parametrize(("config", "data"), [(NONE, DATA), (QConfig(activation="dynamic"), None)])
def test_smoothing_is_left_out_on_request_and_without_data(config, data):
    model = Block()
    prepared = prepare_qat(model, data, config=config)
    assert torch.equal(prepared.norm.weight, model.norm.weight)
    assert torch.equal(prepared.a.weight, model.a.weight)
