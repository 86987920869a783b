"""Which convolutions `auto` makes static: as many as the model's output allows, measured on held-out batches."""

import dataclasses
import math

import pytest
import torch

from helpers.compare import assert_identical
from helpers.convolutional import IMAGE, IMAGES, resnet
from helpers.numbers import normal
from torchq import QConfig, apply_plan, convert, plan_of
from torchq.calibration.calibrate import calibrate
from torchq.modules.quantized_conv import QuantizedConv
from torchq.modules.registry import find_layers
from torchq.numerics.metrics import sqnr_db
from torchq.numerics.qparams import QParams
from torchq.planning import convolutions, stems
from torchq.planning.choose import choose
from torchq.planning.layers import first_plan, select_layers
from torchq.planning.rounding import corrected, round_weights
from torchq.planning.selfcheck import MARGIN_DB, WITHOUT_DATA, SelfCheck

pytestmark = [pytest.mark.usefixtures("seeded"), pytest.mark.slow(seconds=5)]

NEAREST = QConfig(rounding="nearest", smoothing="none")
STRICT = dataclasses.replace(NEAREST, margin_db=0.0)  # most layers choose dynamic for themselves
JUDGED = torch.cat([IMAGES[1], IMAGES[3]])  # the held-out batches


def convolutional(plan):
    return {name: layer.kind for name, layer in plan.layers.items() if name != "head"}


def test_smoothed_ones_that_give_no_codes_stay_dynamic():
    """Their ranges hold for new inputs least, and static would save them little."""
    outliers = torch.linspace(-4, 4, 16).exp2().reshape(16, 1, 1)
    data = [normal(2, 16, 12, 12, seed=i) * outliers for i in range(6)]
    model = torch.nn.Sequential(torch.nn.Conv2d(16, 32, 3), torch.nn.Softmax(1), torch.nn.Conv2d(32, 32, 1)).eval()
    model[0].weight.data /= outliers
    layer = convert(model, data).torchq_plan.layers["0"]
    assert layer.channel_scale is not None
    assert layer.kind == "int8 dynamic"


def read_by(model):
    """The shape of what each convolution reads."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_pre_hook(lambda _, args, name=name: found.update({name: args[0].shape}))
    model(IMAGES[0])
    return found


@pytest.mark.parametrize(("config", "feeds"), [(NEAREST, 5), (QConfig(), 4)], ids=["plain", "smoothed and rounded"])
def test_convolutions_are_static_where_the_output_allows_it(config, feeds):
    model = resnet()
    qmodel = convert(model, IMAGES, config=config)
    plan = qmodel.torchq_plan
    figures = plan.checked.output_db
    assert plan.checked.chosen == convolutions.STATIC
    assert set(convolutional(plan).values()) == {"int8 static"}
    assert figures["as made"] - convolutions.STATIC_DB <= plan.checked.model_db
    assert figures[WITHOUT_DATA] - MARGIN_DB <= plan.checked.model_db
    assert plan.checked.model_db == pytest.approx(sqnr_db(model(JUDGED), qmodel(JUDGED)), abs=1e-3)
    changed = [layer for layer in plan.layers.values() if "static convolutions" in layer.reason]
    assert changed
    assert all(layer.stats is not None and layer.input_qparams is not None for layer in changed)
    assert sum(layer.feeds is not None for layer in plan.layers.values()) == feeds  # all that may
    for name, layer in plan.layers.items():
        module = qmodel.get_submodule(name)
        qparams = None if layer.input_qparams is None else QParams(*layer.input_qparams)
        assert not isinstance(module, QuantizedConv) or module.input_qparams == qparams
    assert_identical(apply_plan(model, plan_of(qmodel))(IMAGE), qmodel(IMAGE))


@pytest.mark.parametrize("settings", [{"activation": "dynamic"}, {"activation": "static"}])
def test_what_the_user_asks_for_is_not_tried(settings):
    plan = convert(resnet(), IMAGES, config=dataclasses.replace(NEAREST, **settings)).torchq_plan
    assert plan.checked.chosen == "as made"
    assert set(convolutional(plan).values()) == {f"int8 {settings['activation']}"}


@pytest.mark.parametrize(("most", "share"), [(99, 1.0), (8, 0.75), (6, 0.5), (5, None)])
def test_as_many_as_the_output_allows(monkeypatch, most, share):
    """Where all are too many, fewer are: what reads three quarters of the values, or a half, or none."""
    model, tried = resnet(), []

    def scripted(self, converted, **settings):
        """30 dB with up to so many static convolutions, and a dB less with more."""
        count = sum(isinstance(m, QuantizedConv) and m.input_qparams is not None for m in converted.modules())
        tried.append(count)
        return 30.0 if count <= most else 29.0

    monkeypatch.setattr(SelfCheck, "compare", scripted)
    monkeypatch.setattr(stems, "SMALL_SHARE", 0)  # the first convolution is not tried in float
    plan = convert(model, IMAGES, config=STRICT).torchq_plan
    before, *tried = tried[0], *tried[2:]  # the second is the plan without data
    static = [name for name, kind in convolutional(plan).items() if kind == "int8 static"]
    changed = [name for name, layer in plan.layers.items() if "static convolutions" in layer.reason]
    assert tried == sorted(tried, reverse=True)
    assert len(tried) == {1.0: 1, 0.75: 2, 0.5: 3, None: 3}[share]
    if share is None:
        assert (plan.checked.chosen, changed, len(static)) == ("as made", [], before)
        return
    assert len(static) == tried[-1] <= most
    assert plan.checked.output_db[convolutions.STATIC] == plan.checked.model_db == 30.0
    values = {name: math.prod(size) for name, size in read_by(model).items()}
    dynamic = [name for name, kind in convolutional(plan).items() if kind == "int8 dynamic"]
    total = sum(values[name] for name in (*changed, *dynamic))
    assert share * total <= sum(values[name] for name in changed)
    assert sum(values[name] for name in changed) - max(values[name] for name in changed) < share * total
    for name, layer in plan.layers.items():
        assert layer.feeds is None or {name, layer.feeds} <= set(static)


def test_a_depthwise_one_is_static_only_where_it_gets_codes(monkeypatch):
    """A softmax gives it floats, which it multiplies as they are."""
    monkeypatch.setattr(SelfCheck, "compare", lambda *args, **kwargs: 30.0)
    relu, softmax = torch.nn.ReLU(), torch.nn.Softmax(1)
    depthwise = [torch.nn.Conv2d(32, 32, 3, padding=1, groups=32) for _ in range(2)]
    model = torch.nn.Sequential(torch.nn.Conv2d(16, 32, 3), relu, depthwise[0], softmax, depthwise[1]).eval()
    plan = convert(model, [normal(2, 16, 12, 12, seed=i) for i in range(6)], config=NEAREST).torchq_plan
    assert convolutional(plan) == {"0": "int8 static", "2": "int8 static", "4": "int8 dynamic"}
    assert (plan.layers["0"].feeds, plan.layers["2"].feeds) == ("2", None)


@pytest.mark.parametrize(
    ("static_db", "without_db", "taken"), [(29.1, 25.0, True), (28.9, 25.0, False), (29.1, 29.5, False)]
)
def test_both_limits(monkeypatch, static_db, without_db, taken):
    """A dB below the plan as made, times the share of convolutions, and 0.3 dB below the one without data."""
    model = resnet()
    monkeypatch.setattr(convolutions, "SHARES", (1.0,))

    def scripted(self, converted, **settings):
        plan = converted.torchq_plan
        if all(kind == "int8 static" for kind in convolutional(plan).values()):
            return static_db
        data_used = any(layer.kind == "int8 static" for layer in plan.layers.values())
        return 30.0 if data_used else without_db

    monkeypatch.setattr(SelfCheck, "compare", scripted)
    plan = convert(model, IMAGES, config=NEAREST).torchq_plan
    assert plan.checked.output_db["as made"] == 30.0
    assert (plan.checked.chosen == convolutions.STATIC) == taken
    assert (set(convolutional(plan).values()) == {"int8 static"}) == taken


class Mixed(torch.nn.Module):
    """A convolution reads 200 values of an image, and linear layers 800."""

    def __init__(self):
        super().__init__()
        self.conv, self.wide = torch.nn.Conv2d(2, 7, 10), torch.nn.Linear(7, 100)
        self.after, self.last = torch.nn.Linear(100, 693), torch.nn.Linear(693, 8)

    def forward(self, x):
        return self.last(self.after(self.wide(self.conv(x).flatten(1))))


@pytest.mark.parametrize(("static_db", "taken"), [(29.82, True), (29.78, False)])
def test_where_convolutions_are_a_part_they_may_cost_as_much_less(monkeypatch, static_db, taken):
    def scripted(self, converted, **settings):
        return static_db if converted.torchq_plan.layers["conv"].kind == "int8 static" else 30.0

    monkeypatch.setattr(SelfCheck, "compare", scripted)
    plan = convert(Mixed().eval(), [normal(32, 2, 10, 10, seed=i) for i in range(4)], config=STRICT).torchq_plan
    assert (plan.checked.chosen == convolutions.STATIC) == taken


def test_a_range_that_misleads_is_not_taken(monkeypatch):
    as_static = convolutions._as_static

    def too_wide(name, planned, evidence):
        static = as_static(name, planned, evidence)
        return static and dataclasses.replace(static, input_qparams=QParams(1.0, 128))

    monkeypatch.setattr(convolutions, "_as_static", too_wide)
    plan = convert(resnet(), IMAGES, config=STRICT).torchq_plan
    assert plan.checked.chosen == "as made"
    assert plan.checked.model_db > 35


@pytest.mark.parametrize("settings", [{"min_sqnr_db": 60.0}, {"exclude": ("stem", "blocks")}])
@pytest.mark.filterwarnings("ignore:torchq.convert. nothing became int8")
def test_layers_that_stay_in_float_stay_so(settings):
    plan = convert(resnet(), IMAGES, config=QConfig(**settings)).torchq_plan
    assert set(convolutional(plan).values()) == {"float"}


def test_few_rows_make_none_static():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 20)).eval()  # one patch for each image
    plan = convert(model, IMAGES, config=NEAREST).torchq_plan
    assert (plan.layers["0"].kind, plan.checked.chosen) == ("int8 dynamic", "as made")


def test_the_bias_is_corrected_for_the_new_scheme():
    """A plan made static after rounding has what rounding gives a static plan: the same codes, bias and SQNR."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3)).eval()
    plans = {}
    for activation in ("static", "dynamic"):
        config = QConfig(rounding="gptq", smoothing="none", activation=activation, observer="percentile", percentile=90)
        evidence = calibrate(model, IMAGES, find_layers(model), config)
        plan = choose(first_plan(model, select_layers(model, IMAGES, config)), evidence)
        plans[activation] = round_weights(plan, evidence).layers["0"]
    record, static = evidence.records["0"], plans["static"]
    changed = dataclasses.replace(plans["dynamic"], kind="int8 static", input_qparams=static.input_qparams)
    assert not torch.equal(changed.weights.bias, static.weights.bias)
    changed = corrected(evidence.layers["0"], changed, record)
    assert_identical(changed.weights.weight, static.weights.weight)
    assert_identical(changed.weights.bias, static.weights.bias)
    assert changed.sqnr_db["gptq"] == static.sqnr_db["gptq"]
