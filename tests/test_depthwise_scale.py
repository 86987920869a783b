"""A scale for each channel of a depthwise convolution: each has a row of the weight of its own, so it costs nothing."""

import copy
import dataclasses
import json
import math

import pytest
import torch
from torch import nn

from helpers.compare import assert_identical
from helpers.numbers import normal
from torchq import QConfig, apply_plan, convert, load, plan_of, prepare_qat, save, simulate
from torchq.numerics.metrics import sqnr_db
from torchq.ops.convolution import Geometry, convolve, pack, packed_bytes
from torchq.planning.plan import Plan
from torchq.planning.smoothing import NO_CODES

pytestmark = pytest.mark.usefixtures("seeded")

C = 24
SIZES = torch.linspace(-3, 3, C).exp2().reshape(C, 1, 1)  # of the channels: 1/8 to 8
DATA = [normal(4, C, 10, 10, seed=i) * SIZES for i in range(8)]
X = normal(2, C, 10, 10, seed=99) * SIZES


def depthwise() -> nn.Module:
    return nn.Sequential(nn.Conv2d(C, C, 3, padding=1, groups=C)).eval()


def error_db(model: nn.Module, qmodel: nn.Module) -> list[float]:
    """Of each channel, for small ones count less in the whole."""
    return [sqnr_db(x, y) for x, y in zip(model(X).unbind(1), qmodel(X).unbind(1), strict=True)]


STATIC = QConfig(activation="static")


def test_every_channel_has_all_codes():
    model = depthwise()
    configs = (QConfig(activation="static", smoothing=each) for each in ("none", "auto"))
    plain, scaled = (convert(model, DATA, config=config) for config in configs)
    before, after = error_db(model, plain), error_db(model, scaled)
    assert min(before) < 20
    assert min(after) > 30
    layer = scaled.torchq_plan.layers["0"]
    assert (layer.alpha, len(layer.channel_scale)) == (1.0, C)
    peaks = torch.cat(DATA).abs().amax((0, 2, 3)) * torch.tensor(layer.channel_scale)
    assert torch.allclose(peaks, peaks[:1].expand(C), rtol=1e-5)
    assert layer.kind == "int8 static"
    assert torch.equal(scaled[0].channel_scale, torch.tensor(layer.channel_scale))


@pytest.mark.parametrize("activation", ["auto", "dynamic"])
def test_floats_are_multiplied_as_they_are(activation):
    """Without a range there are no codes to scale, and only the weight is rounded: to half a step in 127."""
    model = depthwise()
    qmodel = convert(model, DATA, config=QConfig(activation=activation))
    layer = qmodel.torchq_plan.layers["0"]
    assert (layer.kind, layer.channel_scale, layer.no_smoothing) == ("int8 dynamic", None, NO_CODES)
    exact = nn.functional.conv2d(X.double(), (qmodel[0].weight + 0).double(), model[0].bias.double(), 1, 1, 1, C)
    assert sqnr_db(exact.float(), qmodel(X)) > 120
    assert min(error_db(model, qmodel)) > 40
    assert torch.equal(qmodel(torch.zeros_like(X)), model[0].bias.reshape(1, C, 1, 1).expand_as(X))


def test_nan_and_infinity_stay_where_they_are():
    qmodel, x = convert(depthwise(), DATA), X.clone()
    expected = qmodel(X)
    x[0, 3, 5, 5], x[1, 2, 0, 0] = math.nan, math.inf
    y = qmodel(x)
    off = torch.zeros_like(X, dtype=torch.bool)
    off[0, 3, 4:7, 4:7] = off[1, 2, :2, :2] = True
    assert not y[off].isfinite().any()
    assert torch.equal(y[~off], expected[~off])


def test_codes_of_the_weight_are_those_without_it():
    """A row of the weight is divided by one number, and so is its scale."""
    model = depthwise()
    configs = (dataclasses.replace(STATIC, smoothing=each) for each in ("none", "auto"))
    plain, scaled = (convert(model, DATA, config=config) for config in configs)
    off = (plain[0].weight_int8.int() - scaled[0].weight_int8.int()).abs()
    assert off.max() <= 1  # where float32 rounds the quotient to another side
    assert (off > 0).sum() <= 2
    assert torch.allclose(scaled[0].weight_scale * scaled[0].channel_scale, plain[0].weight_scale, rtol=1e-6)
    assert sqnr_db(model[0].weight, scaled[0].weight + 0) > 40


def test_plans_states_and_copies_have_it():
    model = depthwise()
    qmodel = convert(model, DATA, config=STATIC)
    expected = qmodel(X)
    plan = Plan.from_dict(json.loads(json.dumps(plan_of(qmodel).to_dict())))
    again = apply_plan(model, plan)
    assert_identical(again(X), expected)
    assert qmodel.state_dict()["0.channel_scale"].shape == (C,)
    again[0].replace_weight(torch.zeros_like(again[0].weight_int8).flatten(1), *again[0].rows()[1:3])
    again.load_state_dict(qmodel.state_dict())
    assert_identical(again(X), expected)
    assert_identical(copy.deepcopy(qmodel)(X), expected)
    without = dataclasses.replace(plan.layers["0"], channel_scale=None)
    assert not torch.equal(apply_plan(model, Plan({"0": without}))(X), expected)


def loaded_of(qmodel: nn.Module, path) -> nn.Module:
    """The model from a file, after checks that it and an exported program give what qmodel does."""
    save(qmodel, path / "m.safetensors")
    with torch.device("meta"):
        empty = depthwise()
    loaded = load(path / "m.safetensors", empty)
    assert loaded.torchq_plan == qmodel.torchq_plan
    assert_identical(loaded(X), qmodel(X))
    torch.export.save(torch.export.export(qmodel, (X,)), path / "m.pt2")
    assert_identical(torch.export.load(path / "m.pt2").module()(X), qmodel(X))
    return loaded


def test_files_and_exported_programs_have_it(tmp_path):
    qmodel = convert(depthwise(), DATA, config=STATIC)
    loaded = loaded_of(qmodel, tmp_path)
    assert torch.equal(loaded[0].channel_scale, qmodel[0].channel_scale)
    without = convert(depthwise(), DATA, config=dataclasses.replace(STATIC, smoothing="none"))
    assert sqnr_db(without(X), qmodel(X)) < 60  # so it counts


def test_files_and_exported_programs_multiply_floats(tmp_path):
    model = depthwise()
    loaded = loaded_of(convert(model, DATA, config=QConfig(activation="dynamic")), tmp_path)
    assert loaded[0].channel_scale is None
    assert min(error_db(model, loaded)) > 40


@pytest.mark.parametrize("activation", ["dynamic", "static"])
def test_the_simulated_path_rounds_alike(activation):
    qmodel = convert(depthwise(), DATA, config=QConfig(activation=activation))
    with simulate():
        simulated = qmodel(X)
    assert sqnr_db(simulated, qmodel(X)) > 100


def test_the_training_form_rounds_alike():
    trained = prepare_qat(depthwise(), DATA, config=STATIC)
    assert trained[0].channel_scale.shape == (C,)
    converted = convert(trained.eval())
    assert torch.equal(converted[0].channel_scale, trained[0].channel_scale)
    with simulate():
        assert_identical(converted(X), trained(X))


def test_the_training_form_multiplies_floats_too():
    trained = prepare_qat(depthwise(), DATA, config=QConfig(activation="dynamic"))
    assert trained[0].channel_scale is None
    converted = convert(trained.eval())
    with simulate():
        assert_identical(converted(X), trained(X))


def test_gradients_are_those_of_the_weights_that_int8_has():
    qmodel, x = convert(depthwise(), DATA), X.clone()
    with torch.enable_grad():
        x.requires_grad_(True)
        qmodel(x).sum().backward()
        exact = X.clone().requires_grad_(True)
        nn.functional.conv2d(exact, qmodel[0].weight + 0, None, padding=1, groups=C).sum().backward()
    assert torch.allclose(x.grad, exact.grad, rtol=1e-5, atol=1e-6)


def test_what_a_packed_weight_may_be():
    weight, scale, c = torch.ones(C, 1, 3, dtype=torch.int8), torch.ones(C), SIZES.flatten()
    geometry = Geometry(C, C, (3,), (1,), ((1, 1),), (1,), C)
    packed = pack(weight, scale, None, c, C)
    assert packed.numel() == packed_bytes(weight.shape, C, channel_scale=True)
    with pytest.raises(RuntimeError, match="was packed with a channel_scale, which multiplies floats"):
        convolve(torch.zeros(1, 7, C, dtype=torch.uint8), packed, geometry, x_qparams=(1.0, 0))
    for wrong in (packed[:-4], packed[:-64], torch.cat([packed, packed[:4]])):
        with pytest.raises(RuntimeError, match=r"packed weights of 24 x 3 channels x taps have \d+ bytes, or"):
            convolve(torch.zeros(1, C, 7), wrong, geometry)
    for bad in (c.double(), c[:-1], c * 0):
        with pytest.raises(RuntimeError, match="channel_scale must"):
            pack(weight, scale, None, bad, C)
