"""First convolutions stay in float where int8 costs much of the model's output and they hold few of its weights."""

import dataclasses

import pytest
import torch
from torch import nn

from helpers.compare import assert_identical
from helpers.numbers import normal
from torchq import QConfig, apply_plan, convert, plan_of, prepare_qat, report
from torchq.modules.quantized_conv import QuantizedConv
from torchq.numerics.metrics import sqnr_db
from torchq.planning import stems
from torchq.planning.convolutions import STATIC
from torchq.planning.selfcheck import SelfCheck

pytestmark = pytest.mark.usefixtures("seeded")

NEAREST = QConfig(observer="minmax", rounding="nearest", smoothing="none")
IMAGES = [normal(4, 1, 24, 24, seed=i) for i in range(4)]
STEM = 1 * 4 * 4 * 48  # its weights


class Residual(nn.Module):
    """A patch embedding, and residual blocks of `width` that are multiplied by `scale`."""

    def __init__(self, scale=0.1, width=1024, channels=1, blocks=1):
        super().__init__()
        self.patches = nn.Conv2d(channels, 48, 4, 4)
        self.up = nn.ModuleList(nn.Linear(48, width) for _ in range(blocks))
        self.down = nn.ModuleList(nn.Linear(width, 48) for _ in range(blocks))
        self.scale = scale

    def forward(self, x):
        x = self.patches(x).flatten(2).mT
        for up, down in zip(self.up, self.down, strict=True):
            x = x + self.scale * down(up(x).relu())
        return x


def converted(model, config=NEAREST, **options):
    return convert(model, IMAGES, config=config, **options)


def test_a_stem_that_makes_most_of_the_error_stays_in_float():
    model = Residual()
    qmodel = converted(model)
    plan, judged = qmodel.torchq_plan, torch.cat([IMAGES[1], IMAGES[3]])
    figures, chosen = plan.checked.output_db, plan.checked.chosen
    assert isinstance(qmodel.patches, nn.Conv2d)
    assert plan.int8_layers() == ["up.0", "down.0"]
    gain = figures[chosen] - figures[stems.IN_INT8]
    assert gain > 10
    assert plan.layers["patches"].reason == (
        f"int8 costs {gain:.1f} dB of the model's output, {figures[stems.IN_INT8]:.1f} instead of {figures[chosen]:.1f}"
    )
    assert figures[chosen] == pytest.approx(sqnr_db(model(judged), qmodel(judged)), abs=1e-3)
    assert_identical(apply_plan(model, plan_of(qmodel))(IMAGES[0]), qmodel(IMAGES[0]))
    assert plan.layers["patches"].reason in str(report(qmodel))


@pytest.mark.parametrize(("gain", "stays"), [(1.01, True), (0.99, False)])
def test_what_it_must_cost(monkeypatch, gain, stays):
    def scripted(self, converted, **settings):
        return 30.0 if isinstance(converted.patches, QuantizedConv) else 30.0 + gain

    monkeypatch.setattr(SelfCheck, "compare", scripted)
    qmodel = converted(Residual())
    assert isinstance(qmodel.patches, nn.Conv2d) == stays
    assert (stems.IN_INT8 in qmodel.torchq_plan.checked.output_db) == stays


@pytest.mark.parametrize(("extra", "stays"), [(0, True), (-1, False)])
def test_how_much_of_the_weights_it_may_hold(extra, stays):
    """One in a hundred: 768 of 768 + 96 · 792."""
    width = 99 * STEM // 96 + extra
    assert isinstance(converted(Residual(width=width)).patches, nn.Conv2d) == stays


def test_a_model_with_as_much_error_of_its_own_has_it_in_int8():
    qmodel = converted(Residual(scale=4.0, blocks=8))
    assert isinstance(qmodel.patches, QuantizedConv)
    assert stems.IN_INT8 not in qmodel.torchq_plan.checked.output_db


class Behind(nn.Module):
    """A convolution of five channels, which a layer has made."""

    def __init__(self):
        super().__init__()
        self.first, self.body = nn.Conv2d(1, 5, 1), Residual(channels=5)

    def forward(self, x):
        return self.body(self.first(x))


def test_only_what_reads_a_signal_is_tried():
    qmodel = converted(Behind())
    assert isinstance(qmodel.body.patches, QuantizedConv)


@pytest.mark.parametrize("settings", [{"activation": "dynamic"}, {"activation": "static"}])
def test_what_the_user_asks_for_is_not_tried(settings):
    qmodel = converted(Residual(), dataclasses.replace(NEAREST, **settings))
    assert isinstance(qmodel.patches, QuantizedConv)


def test_trained_it_is_not_tried():
    prepared = prepare_qat(Residual())
    prepared(IMAGES[0])
    assert isinstance(converted(prepared.eval()).patches, QuantizedConv)
    assert isinstance(convert(prepared).patches, QuantizedConv)


UNJUDGED = {
    "no data": (None, False, "no data to judge it by"),
    "no data, in place": (None, True, "no data to judge it by"),
    "in place": (IMAGES, True, "inplace=True can't undo what costs much"),
}


@pytest.mark.parametrize("case", UNJUDGED)
def test_where_no_output_judges_it_stays_in_float(case):
    data, inplace, why = UNJUDGED[case]
    model = Residual(scale=4.0, blocks=8)
    expected = model.patches(IMAGES[0])
    qmodel = convert(model, data, config=NEAREST, inplace=inplace)
    assert isinstance(qmodel.patches, nn.Conv2d)
    assert_identical(qmodel.patches(IMAGES[0]), expected)
    weights = STEM + 8 * 2 * 48 * 1024
    reason = f"{why}: {STEM / weights:.1%} of the weights make all that the others work on"
    assert qmodel.torchq_plan.layers["patches"].reason == reason
    assert reason in " ".join(str(report(qmodel)).split())
    assert len(qmodel.torchq_plan.int8_layers()) == 16


def test_smoothing_does_not_make_it_int8_again():
    model = Residual(width=4096, channels=3)
    images = [normal(4, 3, 24, 24, seed=i) * torch.tensor([1.0, 30.0, 0.1]).view(3, 1, 1) for i in range(4)]
    expected = model.patches(images[0])
    qmodel = convert(model, images, config=dataclasses.replace(NEAREST, smoothing="auto"), inplace=True)
    assert_identical(qmodel.patches(images[0]), expected)
    assert qmodel.torchq_plan.layers["patches"].kind == "float"
    assert qmodel.torchq_plan.int8_layers() == ["up.0", "down.0"]


@pytest.mark.parametrize("settings", [{"activation": "dynamic"}, {"exclude": ("up", "down")}])
def test_without_data_it_is_in_int8_where_asked_for_or_where_it_holds_much(settings):
    assert isinstance(convert(Residual(), config=QConfig(**settings)).patches, QuantizedConv)


class Convolutions(nn.Module):
    """A first convolution of 3 · 16 · 9 weights, 20 of 16 · 16 · 9, and a head of 256 · `width`."""

    def __init__(self, width):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3)
        self.others = nn.Sequential(*(nn.Conv2d(16, 16, 3) for _ in range(20)))
        self.head = nn.Linear(256, width)


@pytest.mark.parametrize(("fewer", "stays"), [(0, True), (1, False)])
def test_without_data_it_is_in_int8_where_most_weights_are_of_convolutions(fewer, stays):
    convolutions = 3 * 16 * 9 + 20 * 16 * 9 * 16
    width = -(-convolutions // 256) - fewer
    assert isinstance(convert(Convolutions(width)).first, QuantizedConv) != stays


def test_static_convolutions_are_chosen_for_the_model_without_it():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.conv = Residual(width=2048), nn.Conv2d(48, 48, 3, padding=1)

        def forward(self, x):
            y = self.body(x).mT.unflatten(2, (6, 6))
            return y + 0.05 * self.conv(y)

    plan = converted(Two(), dataclasses.replace(NEAREST, margin_db=0.0)).torchq_plan
    assert plan.layers["body.patches"].kind == "float"
    assert plan.layers["conv"].kind.startswith("int8")
    assert plan.checked.chosen in (STATIC, "as made")
    assert stems.IN_INT8 in plan.checked.output_db
