"""Convolutions in what is reported: their times, their drift, and why some are not smoothed or rounded by GPTQ."""

import json

import pytest
import torch
from torch import nn

from helpers.compare import assert_identical
from helpers.convolutional import IMAGE, IMAGES, Bottleneck, ConvNorm, resnet
from helpers.numbers import normal
from torchq import QConfig, convert, profile_layers, report, watch_drift
from torchq.numerics.metrics import count_clipped, sqnr_db
from torchq.planning.plan import Plan
from torchq.planning.smoothing import NO_CODES
from torchq.reporting import profile
from torchq.reporting.profile import LayerTime

pytestmark = [pytest.mark.usefixtures("seeded"), pytest.mark.slow(seconds=5)]

STATIC = QConfig(activation="static", rounding="nearest", smoothing="none")
DATA = [normal(4, 32, 20, 18, seed=i) for i in range(4)]

# ---- Times ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def contestants(monkeypatch):
    """What each contestant gives, layer by layer, in place of its time."""
    seen = []

    def spy(calls, rounds):
        seen.append({name: call() for name, call in calls.items()})
        return {"float": 3e-6, "int8": 1.5e-6}

    monkeypatch.setattr(profile, "interleaved", spy)
    return seen


def test_times_are_taken_at_the_calibration_shape(contestants):
    """As planned: with codes in and out, activations and sums."""
    qmodel = convert(Bottleneck(32, 64, stride=2).eval(), DATA, config=STATIC)
    times = profile_layers(qmodel)
    assert times == {
        "layer.0.conv": LayerTime(4 * 20 * 18, 3e-6, 1.5e-6),
        "layer.1.conv": LayerTime(4 * 10 * 9, 3e-6, 1.5e-6),
        "layer.2.conv": LayerTime(4 * 10 * 9, 3e-6, 1.5e-6),
        "shortcut.conv": LayerTime(4 * 10 * 9, 3e-6, 1.5e-6),
    }
    first, second, third, shortcut = contestants
    assert first["int8"].shape == (1, 4 * 20 * 18, 1, 32)  # a pointwise one: its places in a row
    assert second["int8"].shape == (4, 10, 9, 32)
    assert first["int8"].dtype == second["int8"].dtype == torch.uint8
    assert third["int8"].shape == (1, 64, 4 * 10 * 9, 1)
    assert shortcut["int8"].shape == (4, 64, 10, 9)
    assert third["int8"].dtype == torch.float32
    assert float(third["int8"].min()) == 0 > float(shortcut["int8"].min())  # with the sum and what is behind it
    assert all(each["float"].dtype == torch.float32 for each in contestants)


def test_the_float_contestant_computes_the_same(contestants):
    layers = [
        nn.Conv1d(4, 16, 5, padding="same"),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, groups=2),
        nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect", bias=False),
        nn.Conv3d(2, 16, 2),
    ]
    sizes = [(4, 30), (16, 12, 11), (16, 12, 11), (2, 5, 6, 4)]
    for layer, size in zip(layers, sizes, strict=True):
        data = [normal(3, *size, seed=i) for i in range(4)]
        for config in (STATIC, QConfig(activation="dynamic", smoothing="none")):
            contestants.clear()
            profile_layers(convert(nn.Sequential(layer).eval(), data, config=config))
            assert sqnr_db(contestants[0]["float"], contestants[0]["int8"]) > 25


def test_real_times_are_in_the_report():
    qmodel = convert(resnet(), IMAGES, config=STATIC)
    times = profile_layers(qmodel, rounds=1)
    assert list(times) == list(qmodel.torchq_plan.layers)
    for layer in report(qmodel, profile=times).layers:
        assert layer.int8_seconds == times[layer.name].int8_seconds > 0
        assert layer.float_seconds == times[layer.name].float_seconds > 0


def test_a_plan_keeps_the_shape():
    plan = convert(resnet(), IMAGES, config=STATIC).torchq_plan
    assert plan.layers["stem.conv"].stats.input_shape == (4, 3, 20, 20)
    assert plan.layers["blocks.0.layer.0.conv"].stats.input_shape == (1, 32, 400, 1)
    assert plan.layers["head"].stats.input_shape is None
    tree = json.loads(json.dumps(plan.to_dict(), allow_nan=False))
    assert Plan.from_dict(tree) == plan
    for layer in tree["layers"].values():
        layer["stats"].pop("input_shape")  # as of a version before
    assert Plan.from_dict(tree).layers["stem.conv"].stats.input_shape is None


# ---- Drift ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", ["none", "auto"])
def test_drift_counts_what_every_static_convolution_clips(smoothing):
    model = resnet()
    config = QConfig(activation="static", observer="percentile", percentile=99, rounding="nearest", smoothing=smoothing)
    qmodel = convert(model, IMAGES, config=config)
    y, inputs = qmodel(3 * IMAGE), {}
    with watch_drift(qmodel) as drift:
        assert_identical(qmodel(3 * IMAGE), y)
    assert list(drift.layers) == list(qmodel.torchq_plan.layers)
    assert_identical(qmodel(3 * IMAGE), y)

    def note(layer, args, name):
        scale = layer.channel_scale
        along = (-1, *[1] * (args[0].dim() - 2)) if args[0].dim() > 2 else (-1,)
        inputs[name] = args[0] + 0 if scale is None else args[0] * scale.reshape(along)

    for name in drift.layers:
        layer = qmodel.get_submodule(name)
        layer.register_forward_pre_hook(lambda layer, args, name=name: note(layer, args, name))
    qmodel(3 * IMAGE)
    for name, counted in drift.layers.items():
        layer = qmodel.get_submodule(name)
        assert (counted.below, counted.above) == count_clipped(inputs[name], layer.input_qparams)
        assert counted.values == inputs[name].numel()
        assert counted.calibrated == qmodel.torchq_plan.layers[name].stats.clipped
    scaled = [layer.channel_scale is not None for layer in qmodel.torchq_plan.layers.values()]
    assert any(scaled) == (smoothing == "auto")
    assert "stem.conv" in drift.recalibrate
    with watch_drift(qmodel) as calm:
        for images in IMAGES:
            qmodel(images)
    assert "stem.conv" not in calm.recalibrate


# ---- What groups have not --------------------------------------------------------------------------------------------


def test_the_report_says_what_convolutions_with_groups_lack():
    model = nn.Sequential(ConvNorm(32, 32, groups=32), nn.ReLU(), ConvNorm(32, 32, groups=4)).eval()
    qmodel = convert(model, DATA, config=QConfig(rounding="auto"))
    why_not = "a convolution with groups of several channels takes no channel_scale"
    for name in ("0.conv", "2.conv"):
        layer = qmodel.torchq_plan.layers[name]
        assert layer.is_int8
        assert layer.no_smoothing == (NO_CODES if name == "0.conv" else why_not)
        assert layer.no_gptq == "a convolution with groups, which gptq is not written for"
    text = str(report(qmodel))
    assert f"not smoothed: {why_not}" in text
    assert "rounded to nearest, no gptq: a convolution with groups" in text
    assert report(qmodel).to_dict()["layers"][1]["no_smoothing"] == layer.no_smoothing
    plain = convert(model, DATA, config=QConfig(rounding="nearest", smoothing="none")).torchq_plan.layers["0.conv"]
    assert (plain.no_smoothing, plain.no_gptq) == (None, None)
