"""prepare_qat smooths the inputs: the layer multiplies x and divides w, and no parameter changes."""

import copy

import pytest
import torch
from torch import nn

from helpers.smoothable import DATA, Block, K, X, assert_unchanged, parameters
from torchq import QConfig, convert, fake_quantize, prepare_qat, simulate
from torchq.modules.qat_linear import QATLinear
from torchq.modules.ranges import PerToken
from torchq.numerics.metrics import sqnr_db
from torchq.ops.weights import weight_scale

pytestmark = pytest.mark.usefixtures("seeded")

NONE = QConfig(smoothing="none")


@pytest.mark.parametrize("ranges", ["learned", "observed"])
def test_training_starts_as_if_there_were_no_outliers(ranges):
    """Without smoothing, the step is 50 times as coarse for 29 of 32 channels."""
    model = Block()
    rough = prepare_qat(model, DATA, config=NONE, ranges=ranges).eval()
    smooth = prepare_qat(model, DATA, ranges=ranges).eval()
    assert sqnr_db(model(X), rough(X)) < 25
    assert sqnr_db(model(X), smooth(X)) > 35
    reasons = [layer.reason for layer in smooth.torchq_plan.layers.values()]
    assert all(reason.endswith("; input smoothed") for reason in reasons)
    for data in (None, DATA):
        qmodel = convert(smooth, data)
        assert sqnr_db(model(X), qmodel(X)) > 35
        assert torch.equal(qmodel.a.channel_scale, smooth.a.channel_scale)
        with simulate():
            torch.testing.assert_close(qmodel(X), smooth(X), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("inplace", [False, True])
def test_no_parameter_changes(inplace):
    """Neither its values nor its identity, which an optimizer may hold, nor whether it is trained."""
    model = Block()
    model.norm.requires_grad_(False)
    exact, before = model(X), parameters(model)
    smooth = prepare_qat(model, DATA, inplace=inplace)
    assert_unchanged(model, before)
    assert {name: p.requires_grad for name, p in smooth.named_parameters() if name in before} == {
        name: trainable for name, (_, trainable, _) in before.items()
    }
    assert not smooth.a.channel_scale.requires_grad
    for module in (smooth.a, smooth.b):
        module.release()
    assert torch.equal(smooth(X), exact)
    assert type(smooth.a) is nn.Linear
    assert sorted(smooth.state_dict()) == sorted(before)


def test_a_parameter_that_others_use_may_be_smoothed_too():
    model = Block()
    model.other = nn.Linear(K, 24)  # it reads x itself
    model.other.weight = model.a.weight
    model.run = lambda m, x: (lambda y: m.a(y) + m.b(y) + m.other(x))(m.norm(x))
    smooth = prepare_qat(model, DATA)
    assert smooth.other.weight is smooth.a.weight
    assert torch.equal(smooth.a.weight, model.a.weight)
    assert smooth.a.channel_scale is not None
    assert sqnr_db(model(X), smooth.eval()(X)) > 30


@pytest.mark.parametrize(("config", "data"), [(NONE, DATA), (QConfig(activation="dynamic"), None)])
def test_smoothing_is_left_out_on_request_and_without_data(config, data):
    prepared = prepare_qat(Block(), data, config=config)
    assert (prepared.a.channel_scale, prepared.b.channel_scale) == (None, None)
    assert "a.channel_scale" not in prepared.state_dict()


def test_values_and_gradients_are_those_of_the_formula():
    """`fq(x · c) · fq(w / c)`, straight through: dx = dy · ŵ · c, dw = dyᵀ · x̂ / c."""
    c = torch.rand(K) + 0.5
    layer = QATLinear(K, 8, input_range=PerToken(), channel_scale=c)
    x, dy, divided = X.flatten(0, 1), torch.randn(64, 8), layer.weight / c
    w_hat = fake_quantize(divided, weight_scale(divided, per_channel=True), axis=0)
    with torch.enable_grad():
        x = x.clone().requires_grad_()
        y = layer(x)
        y.backward(dy)
    x_hat = PerToken()(x.detach() * c)
    assert torch.equal(y.detach(), nn.functional.linear(x_hat, w_hat, layer.bias))
    torch.testing.assert_close(x.grad, dy @ w_hat * c)
    torch.testing.assert_close(layer.weight.grad, dy.T @ x_hat / c)


def test_it_is_trained_and_travels():
    model = Block()
    smooth = prepare_qat(model, DATA).train()
    optimizer = torch.optim.SGD(smooth.parameters(), lr=1e-3)
    before, scale = smooth.a.weight.clone(), smooth.a.channel_scale.clone()
    with torch.enable_grad():
        for x in DATA:
            optimizer.zero_grad()
            (smooth(x) - model(x)).square().mean().backward()
            optimizer.step()
    assert not torch.equal(smooth.a.weight, before)
    assert torch.equal(smooth.a.channel_scale, scale)
    other = prepare_qat(Block(), [x * 3 for x in DATA])
    other.load_state_dict(smooth.state_dict())
    assert torch.equal(other.eval()(X), smooth.eval()(X))
    assert torch.equal(copy.deepcopy(smooth)(X), smooth(X))
    assert smoothed_scales(convert(smooth)) == smoothed_scales(convert(other))


def smoothed_scales(qmodel):
    scales = {name: layer.channel_scale for name, layer in qmodel.torchq_plan.layers.items()}
    assert all(scales.values())
    return scales
