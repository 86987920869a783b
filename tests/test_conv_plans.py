"""Convolutions in calibration and planning: what patches are, which scheme, rounding and norms they get."""

import dataclasses
import json

import pytest
import torch
from torch import nn

from helpers.compare import assert_identical, snapshot
from helpers.convolutional import IMAGE, IMAGES, ConvNorm, resnet, shaken
from helpers.mobile import Network
from helpers.numbers import normal
from torchq import Plan, QConfig, apply_plan, convert, plan_of, report
from torchq.calibration.calibrate import calibrate
from torchq.modules.convolving import as_rows, geometry_of
from torchq.modules.norms import IncludedNorm
from torchq.modules.patches import Patches
from torchq.modules.quantized_conv import QuantizedConv
from torchq.modules.registry import find_layers
from torchq.numerics.metrics import sqnr_db
from torchq.numerics.qparams import fake_quantize

pytestmark = pytest.mark.usefixtures("seeded")

STATIC = QConfig(activation="static", observer="minmax")
GEOMETRIES = {
    "1d": (nn.Conv1d(6, 16, 3, stride=2, padding=1), (6, 11)),
    "2d": (nn.Conv2d(6, 16, (3, 2), (1, 2), (1, 0), (1, 2)), (6, 7, 8)),
    "groups": (nn.Conv2d(12, 24, 3, groups=3, padding=1), (12, 5, 6)),
    "tiles": (nn.Conv2d(6, 16, 2, stride=2), (6, 8, 8)),
    "depthwise": (nn.Conv2d(20, 20, 3, padding=1, groups=20), (20, 8, 8)),
    "3d": (nn.Conv3d(2, 16, 2, padding=1), (2, 3, 4, 3)),
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_patches_are_what_a_convolution_multiplies(name):
    conv, size = GEOMETRIES[name]
    x, patches = normal(2, *size), Patches(geometry_of(conv))
    rows = patches.rows(x, 10_000, torch.Generator())
    y = patches.multiplied(patches.values(rows), as_rows(conv.weight), conv.bias)
    torch.testing.assert_close(y, conv(x).movedim(1, -1).reshape(len(rows), -1))
    some = patches.rows(x, 9, torch.Generator().manual_seed(0))
    assert len(some) == 9
    assert all(any(torch.equal(row, other) for other in rows) for row in some)


@pytest.mark.parametrize("scheme", ["static", "dynamic"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_the_error_of_a_layer_is_that_of_its_output(name, scheme):
    """What the plan says of a layer, measured on some patches, is what the int8 layer gives for whole inputs."""
    conv, size = GEOMETRIES[name]
    data = [normal(4, *size, seed=i) * torch.tensor([0.1, 1, 1, 2]).reshape(4, *[1] * len(size)) for i in range(8)]
    config = QConfig(activation=scheme, rounding="nearest", smoothing="none", sample_rows=4096)
    qmodel = convert(nn.Sequential(conv), data, config=config)
    x = torch.cat(data)
    assert qmodel.torchq_plan.layers["0"].measured_db == pytest.approx(sqnr_db(conv(x), qmodel(x)), abs=0.5)


def test_rows_know_the_range_of_their_sample():
    x = torch.stack([normal(4, 6, 6), 10 * normal(4, 6, 6, seed=1)])
    patches = Patches(geometry_of(nn.Conv2d(4, 8, 3)))
    rows = patches.rows(x, 1000, torch.Generator())
    scale, zero_point = patches.sample_qparams(rows)
    for i, sample in enumerate(x):
        lo, hi = float(sample.min()), float(sample.max())
        assert float(scale[16 * i]) == pytest.approx((hi - lo) / 255, rel=1e-6)
        exact = fake_quantize(patches.values(rows)[16 * i], scale[16 * i], zero_point[16 * i], dtype=torch.uint8)
        assert_identical(patches.quantized(rows, None, None)[16 * i], exact)


def test_one_record_for_convolutions_with_the_same_patches():
    """Two of the same geometry on one tensor share a record; one of another geometry has its own."""

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 16, 3), nn.Conv2d(3, 32, 3), nn.Conv2d(3, 16, 5, padding=1)

        def forward(self, x):
            return self.a(x).mean() + self.b(x).mean() + self.c(x).mean()

    model = Branches().eval()
    records = calibrate(model, IMAGES, find_layers(model), QConfig()).records
    assert records["a"] is records["b"] is not records["c"]
    assert records["a"].values(records["a"].sample.rows).shape[1] == 27


def correlated(seed):
    """Images that are smooth, so that the values of a patch are alike."""
    return nn.functional.interpolate(normal(4, 8, 5, 5, seed=seed), scale_factor=4, mode="bilinear")


def test_gptq_rounds_on_patches():
    model = nn.Sequential(nn.Conv2d(8, 32, 3, padding=1)).eval()
    model[0].weight.data *= torch.logspace(0, 1.3, 32).reshape(-1, 1, 1, 1)  # with one scale, weights are coarse
    data = [correlated(i) for i in range(6)]
    qmodels = [
        convert(model, data, config=QConfig(weight="per_tensor", rounding=rounding)) for rounding in ("nearest", "gptq")
    ]
    before, after = qmodels[1].torchq_plan.layers["0"].gptq_db
    assert after > before + 1
    x = correlated(99)
    errors = [sqnr_db(model(x), qmodel(x)) for qmodel in qmodels]
    assert errors[1] > errors[0] + 1
    again = apply_plan(model, plan_of(qmodels[1]))
    assert_identical(again(x), qmodels[1](x))


@pytest.mark.parametrize("kernel", [1, 3])
def test_outlier_channels_are_smoothed(kernel):
    """One factor for each channel, whatever the number of taps."""
    outliers = torch.ones(8, 1, 1)
    outliers[3] = 60.0
    data = [normal(8, 8, 12, 12, seed=i) * outliers for i in range(6)]
    model = nn.Sequential(nn.Conv2d(8, 32, kernel, padding=kernel // 2)).eval()
    model[0].weight.data /= outliers
    smoothed, plain = (convert(model, data, config=QConfig(smoothing=s, rounding="nearest")) for s in ("auto", "none"))
    plan = smoothed.torchq_plan.layers["0"]
    assert len(plan.channel_scale) == 8
    x = normal(8, 8, 12, 12, seed=99) * outliers
    exact = model(x)
    assert sqnr_db(exact, smoothed(x)) > sqnr_db(exact, plain(x)) + 6
    assert smoothed[0].channel_scale.shape == (8,)


@pytest.mark.slow(seconds=5)
def test_a_plan_survives_json():
    model = resnet()
    qmodel = convert(model, IMAGES, config=QConfig(activation="static", observer="minmax", rounding="nearest"))
    plan = qmodel.torchq_plan
    again = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    assert_identical(apply_plan(model, again)(IMAGE), qmodel(IMAGE))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.slow(seconds=5)
def test_a_whole_network(inplace):
    model = resnet()
    exact, before = model(IMAGE), snapshot(model)
    qmodel = convert(model, IMAGES, inplace=inplace)
    assert inplace or snapshot(model) == before
    assert (qmodel is model) == inplace
    assert all(layer.is_int8 for layer in qmodel.torchq_plan.layers.values())
    assert not any(isinstance(module, (nn.BatchNorm2d, nn.Conv2d)) for module in qmodel.modules())
    assert sqnr_db(exact, qmodel(IMAGE)) > 35
    assert "blocks.0.layer.1.conv" in str(report(qmodel))
    if not inplace:
        twin = apply_plan(model, plan_of(qmodel))
        twin.load_state_dict(qmodel.state_dict())
        assert_identical(twin(IMAGE), qmodel(IMAGE))


# ---- Norms ----------------------------------------------------------------------------------------------------------


def test_a_norm_is_included_in_the_weight():
    model = nn.Sequential(nn.Conv2d(3, 32, 3), shaken(nn.BatchNorm2d(32)), nn.ReLU()).eval()
    for qmodel in (convert(model), convert(model, IMAGES)):
        assert [type(module) for module in qmodel] == [type(qmodel[0]), IncludedNorm, nn.ReLU]
        assert qmodel.torchq_plan.layers["0"].norm == "1"
        assert sqnr_db(model(IMAGE), qmodel(IMAGE)) > 35
        assert sqnr_db(model[:2](IMAGE), qmodel[0](IMAGE)) > 35


class ReadTwice(ConvNorm):
    def forward(self, x):
        y = self.conv(x)
        return self.act(self.norm(y)) + y


class Shared(nn.Module):
    """A norm behind two convolutions."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(3, 16, 3)
        self.norm = shaken(nn.BatchNorm2d(16))

    def forward(self, x):
        return self.norm(self.a(x)) + self.norm(self.b(x))


class Also(ConvNorm):
    """A norm that also reads something else."""

    def forward(self, x):
        return self.norm(self.conv(x)) + self.norm(x.repeat(1, 8, 1, 1))


class OnAView(ConvNorm):
    def forward(self, x):
        return self.norm(self.conv(x)[:, :, 1:])


class Watched(ConvNorm):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.norm.register_forward_hook(lambda *_: None)


class OfTheBatch(ConvNorm):
    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.norm = nn.BatchNorm2d(outputs, track_running_stats=False)


@pytest.mark.parametrize(
    "model",
    [ReadTwice(3, 24), Shared(), Also(3, 24), OnAView(3, 24), Watched(3, 24), OfTheBatch(3, 24)],
    ids=lambda model: type(model).__name__,
)
def test_a_norm_that_is_not_included(model):
    model = model.eval()
    for qmodel in (convert(model, IMAGES), convert(model)):
        assert type(qmodel.norm) is nn.BatchNorm2d
        assert all(layer.norm is None and layer.is_int8 for layer in qmodel.torchq_plan.layers.values())
        assert sqnr_db(model(IMAGE), qmodel(IMAGE)) > 30


def test_a_config_that_fuses_nothing_leaves_norms():
    model = ConvNorm(3, 32).eval()
    unfused = convert(nn.Sequential(model.conv, model.norm), config=QConfig(fuse=False))
    assert type(unfused[1]) is nn.BatchNorm2d


@pytest.mark.slow(seconds=5)
def test_a_layer_that_returns_to_float_gives_the_norm_back():
    model = resnet()
    plan = plan_of(convert(model, IMAGES, config=STATIC))
    name = "blocks.0.layer.1.conv"
    plan.layers[name] = dataclasses.replace(plan.layers[name], kind="float", norm=None, activation=None, feeds=None)
    plan.layers["blocks.0.layer.0.conv"] = dataclasses.replace(plan.layers["blocks.0.layer.0.conv"], feeds=None)
    qmodel = apply_plan(model, plan)
    assert type(qmodel.blocks[0].layer[1].norm) is nn.BatchNorm2d
    assert sqnr_db(model(IMAGE), qmodel(IMAGE)) > 30


@pytest.mark.slow(seconds=5)
def test_a_budget_returns_convolutions_to_float():
    model = resnet()

    def worse(m):  # worse by 1 for each int8 convolution
        return -sum(isinstance(module, QuantizedConv) for module in m.modules())

    qmodel = convert(model, IMAGES, evaluate=worse, max_drop=5)
    assert 0 < sum(isinstance(module, QuantizedConv) for module in qmodel.modules()) <= 5
    assert sqnr_db(model(IMAGE), qmodel(IMAGE)) > 35


@pytest.mark.slow(seconds=5)
def test_plans_that_do_not_fit():
    model = resnet()
    plan = plan_of(convert(model, IMAGES, config=STATIC))
    name = "stem.conv"
    edited = dataclasses.replace(plan.layers[name], norm="stem.act")
    with pytest.raises(ValueError, match=r"'stem.conv' includes 'stem.act', which is no batch norm"):
        apply_plan(model, dataclasses.replace(plan, layers={**plan.layers, name: edited}))
    edited = dataclasses.replace(plan.layers[name], channel_scale=(1.0,) * 27)
    with pytest.raises(ValueError, match=r"'stem.conv' has a channel_scale of 27 numbers, expected 3"):
        apply_plan(model, dataclasses.replace(plan, layers={**plan.layers, name: edited}))


def test_the_sum_of_a_block_belongs_to_its_last_convolution():
    plan = plan_of(convert(Network().eval(), [normal(2, 32, 20, 20)], config=QConfig(activation="static")))
    sums = {name for name, planned in plan.layers.items() if planned.adds}
    assert sums == {"blocks.1.reduce.convolution", "blocks.2.reduce.convolution"}
