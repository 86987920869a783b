"""SmoothQuant in the row quantizer: outliers cost no accuracy, and nothing but the layer itself changes."""

import copy
import dataclasses
import json

import pytest
import torch
from torch import nn

from helpers.models import with_own_norms
from helpers.numbers import normal
from helpers.smoothable import DATA, OUTLIERS, Block, K, X, assert_unchanged, parameters, smoothed
from torchq import QConfig, QuantizedLinear, convert, plan_of, simulate
from torchq.calibration.calibrate import calibrate
from torchq.calibration.record import Trial
from torchq.modules.base import Matrix
from torchq.modules.registry import find_layers
from torchq.numerics.metrics import sqnr_db
from torchq.numerics.qparams import dequantize
from torchq.ops.weights import quantize_weight
from torchq.planning import smoothing
from torchq.planning.apply import apply_plan
from torchq.planning.choose import Yardstick
from torchq.planning.plan import Plan
from torchq.planning.smoothing import ALPHAS, NO_STATIC, channel_scale

pytestmark = pytest.mark.usefixtures("seeded")

UNSMOOTHED = QConfig(smoothing="none")


# ---- what it is for ----


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("activation", ["auto", "dynamic", "static"])
def test_outlier_channels_cost_nothing(norm, activation):
    """Without smoothing, the step is 50 times as coarse for 29 of 32 channels. With it, outliers have no effect."""
    model = Block(norm=norm)
    plain, smooth = (convert(model, DATA, config=QConfig(activation=activation, smoothing=s)) for s in ("none", "auto"))
    assert sqnr_db(model(X), plain(X)) < 25
    assert sqnr_db(model(X), smooth(X)) > 35
    assert smoothed(smooth) == ["a", "b"]
    for layer in smooth.torchq_plan.layers.values():
        assert (layer.kind == "int8 static") == (
            activation == "static"
        )  # a new row may exceed the range in any channel
        before, after = layer.smoothing_db
        assert layer.alpha in ALPHAS
        assert after > before + 10
    assert torch.equal(smooth.a.channel_scale, torch.tensor(smooth.torchq_plan.layers["a"].channel_scale))


@pytest.mark.parametrize(
    ("activation", "schemes"), [("auto", ["dynamic"]), ("dynamic", ["dynamic"]), ("static", ["dynamic", "percentile"])]
)
def test_static_ranges_of_a_smoothed_layer_are_measured_where_they_are_asked_for(activation, schemes):
    config = QConfig(activation=activation, observer="percentile", rounding="nearest")
    plan = convert(Block(), DATA, config=config).torchq_plan
    for layer in plan.layers.values():
        assert sorted(layer.sqnr_db) == schemes
        assert (layer.reason == NO_STATIC) == (activation == "auto")


def test_a_model_without_outliers_is_left_as_it_is():
    qmodel = convert(nn.Sequential(nn.LayerNorm(K), nn.Linear(K, K)).eval(), DATA, config=QConfig(activation="dynamic"))
    assert smoothed(qmodel) == []
    assert qmodel[1].channel_scale is None


@pytest.mark.parametrize("weight", ["per_channel", "per_tensor"])
@pytest.mark.parametrize("inplace", [False, True])
def test_behind_a_linear_too(inplace, weight):
    first, last = nn.Linear(K, K), nn.Linear(K, 8)
    first.weight[[1, 2]] *= 50
    last.weight[:, [1, 2]] /= 50
    model = nn.Sequential(first, last).eval()
    expected, hidden = model(X), model[0](X)
    plain = convert(model, DATA, config=dataclasses.replace(UNSMOOTHED, weight=weight))
    smooth = convert(model, DATA, config=QConfig(weight=weight, exclude=("0",)), inplace=inplace)
    assert smoothed(smooth) == ["1"]
    assert sqnr_db(expected, smooth(X)) > sqnr_db(expected, plain(X)) + 5
    assert torch.equal(smooth[0](X), hidden)


def test_layers_that_read_one_tensor_have_each_its_own_scale():
    """The best alpha depends on the weights; the range of x is the same."""
    model = Block()
    model.b.weight[:, OUTLIERS] *= 50
    layers = convert(model, DATA, config=QConfig(activation="dynamic")).torchq_plan.layers
    assert layers["a"].channel_scale != layers["b"].channel_scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_model_is_smoothed_in_float32(dtype):
    """Neither x · c nor w / c is rounded to 16 bits, so c need not be a power of two."""
    model = Block().to(dtype)
    data = [x.to(dtype) for x in DATA]
    plain, smooth = (convert(model, data, config=QConfig(smoothing=s)) for s in ("none", "auto"))
    assert smoothed(smooth) == ["a", "b"]
    x, exact = X.to(dtype), Block.forward(copy.deepcopy(model).float(), X.to(dtype).float())
    assert sqnr_db(exact, smooth(x).float()) > sqnr_db(exact, plain(x).float()) + 8
    for layer in (smooth.a, smooth.b):
        scale = layer.channel_scale
        assert not torch.equal(scale.log2(), scale.log2().round())
    assert torch.equal(smooth.a.weight_int8, quantized(model.a.weight.float() / smooth.a.channel_scale))


def quantized(weight):
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    return (weight * (1 / scale)).round().to(torch.int8)


# ---- nothing else changes ----


@pytest.mark.parametrize("inplace", [False, True])
def test_no_other_module_changes(inplace):
    """Norms and float layers bit for bit, and no parameter becomes trainable or stops being so."""
    model = Block(other=nn.Linear(K, 24), run=lambda m, x: (lambda y: m.a(y) + m.b(y) + m.other(y))(m.norm(x)))
    model.norm.weight.requires_grad_(False)
    before = parameters(model)
    qmodel = convert(model, DATA, config=QConfig(exclude=("other",)), inplace=inplace)
    assert smoothed(qmodel) == ["a", "b"]
    assert_unchanged(model, before, ("norm", "other") if inplace else None)
    for name in ("norm.weight", "norm.bias", "other.weight", "other.bias"):
        assert torch.equal(qmodel.get_parameter(name), before[name][2])
        assert qmodel.get_parameter(name).requires_grad == before[name][1]
    assert all(not p.requires_grad for layer in (qmodel.a, qmodel.b) for p in layer.parameters())


def test_values_between_layers_are_those_of_the_float_model():
    """A branch that no batch took, a hook, a slice and a second output: all see what they see in float."""

    class Encoder(Block):
        def encode(self, x):
            return self.norm(x)

        def forward(self, x):
            y = self.norm(x)
            return self.a(y) + self.b(y)

    model, seen = Encoder(), []
    qmodel = convert(model, DATA)
    assert smoothed(qmodel) == ["a", "b"]
    model = with_own_norms(model)
    assert torch.equal(qmodel.encode(X), model.encode(X))
    qmodel.norm.register_forward_hook(lambda module, args, y: seen.append(y))
    qmodel(X)
    assert torch.equal(seen[0], model.norm(X))
    first, last = nn.Linear(K, K), nn.Linear(K, 8)
    first.weight[[1, 2]] *= 50
    last.weight[:, [1, 2]] /= 50
    chain = nn.Sequential(first, nn.ReLU(), last).eval()
    sliced = convert(chain, DATA)
    assert "2" in smoothed(sliced)
    assert sqnr_db(chain[:2](X), sliced[:2](X)) > 30


def test_the_weight_is_still_the_float_layers():
    model = Block()
    qmodel = convert(model, DATA)
    for name in ("a", "b"):
        assert sqnr_db(model.get_submodule(name).weight[:, 4:7], qmodel.get_submodule(name).weight[:, 4:7]) > 30
    with simulate():
        assert sqnr_db(qmodel(X), qmodel.forward(X)) > 100
    assert sqnr_db(model(X), nn.functional.linear(model.norm(X), qmodel.a.weight + qmodel.b.weight, qmodel.a.bias)) > 35


# ---- the arithmetic ----


def test_scales_follow_the_formula_and_leave_dead_channels():
    peak, weight = torch.tensor([8.0, 2.0, 0.0, 5.0]), torch.tensor([[0.5, -2.0, 1.0, 0.0], [0.1, 1.0, 1.0, 0.0]])
    raw = torch.tensor([0.5**0.25 / 8**0.75, 2**0.25 / 2**0.75])
    expected = raw / raw.prod().sqrt()
    torch.testing.assert_close(channel_scale(peak, weight, 0.75), torch.tensor([*expected.tolist(), 1.0, 1.0]))


@pytest.mark.parametrize("scaled", [False, True])
def test_the_noise_of_rounding_is_a_part_of_the_whole(scaled):
    """By hand: the float rows times the rounded weights."""
    weight, rows = normal(40, 64), normal(500, 64, seed=1) * normal(64, seed=2).exp()
    scale = rows.abs().amax(dim=0).rsqrt() if scaled else None
    codes, steps = quantize_weight(weight, per_channel=True, channel_scale=scale)
    rounded = dequantize(codes, steps, axis=0) * (1 if scale is None else scale)
    expected = 10 ** (-sqnr_db(rows @ weight.T, rows @ rounded.T) / 10)
    yardstick = Yardstick(Matrix(weight, None), rows)
    assert yardstick.rounding_noise(scale) == pytest.approx(expected, rel=0.1)  # rounding errors of 64 inputs
    assert yardstick.rounding_noise(scale) < 10 ** (-yardstick.measure({}, scale)["dynamic"] / 10)


def test_the_figures_of_a_scale_do_not_depend_on_those_asked_for_before():
    yardstick, scales = Yardstick(Matrix(normal(8, 64), None), normal(50, 64, seed=1)), (None, normal(64, seed=2).exp())
    for scale in (*scales, *scales, *reversed(scales)):
        fresh = Yardstick(Matrix(normal(8, 64), None), normal(50, 64, seed=1))
        assert yardstick.rounding_noise(scale) == fresh.rounding_noise(scale)
        assert yardstick.measure({}, scale) == fresh.measure({}, scale)


def test_alpha_moves_more_into_weights_that_will_be_rounded_by_gptq():
    """Their errors shrink, and those of the inputs do not."""
    mixed, (inner, outer) = normal(64, 64, seed=5) / 8, (normal(64, seed=i).div(2).exp() for i in (9, 11))
    model, data = nn.Sequential(nn.Linear(64, 48)).eval(), [normal(600, 64, seed=i) * inner for i in range(2)]
    data, found = [x @ mixed * outer for x in data], {}
    for rounding in ("nearest", "gptq"):
        config = QConfig(activation="dynamic", rounding=rounding)
        found[rounding] = convert(model, data, config=config).torchq_plan.layers["0"]
    assert found["gptq"].alpha > found["nearest"].alpha
    assert found["gptq"].measured_db == pytest.approx(found["gptq"].smoothing_db[1], abs=2)  # as was expected
    assert found["gptq"].measured_db > found["nearest"].measured_db + 1


def test_the_alpha_is_the_best_of_all_on_the_layers_own_rows():
    """Measured again by hand, with the layer as it is at inference."""
    model = Block()
    evidence = calibrate(model, DATA, find_layers(model), QConfig())
    record, linear = evidence.records["a"], model.a
    assert record.is_few  # so some rows give the peaks, and those of the second batch are measured on
    rows, judge = record.sample.rows, record.judge
    assert torch.equal(rows[judge], model.norm(DATA[1]).flatten(0, 1))
    measured = {}
    for alpha in ALPHAS:
        scale = channel_scale(rows[~judge].abs().amax(dim=0), linear.weight, alpha)
        layer = QuantizedLinear.from_float(linear, channel_scale=scale)
        measured[alpha] = sqnr_db(linear(rows[judge]), layer(rows[judge]))
    layer = convert(model, DATA, config=QConfig(activation="dynamic", rounding="nearest")).torchq_plan.layers["a"]
    assert layer.alpha == max(measured, key=lambda alpha: measured[alpha])
    assert layer.smoothing_db[1] == pytest.approx(measured[layer.alpha], abs=1e-6)
    scale = channel_scale(peak(model), linear.weight, layer.alpha)
    torch.testing.assert_close(torch.tensor(layer.channel_scale), scale)


def peak(model):
    return torch.stack([model.norm(x).flatten(0, 1).abs().amax(dim=0) for x in DATA]).amax(dim=0)


def test_ranges_that_fit_few_rows_are_not_believed():
    """After smoothing, every channel of the 128 rows reaches the end of the range. A new row is outside in K / n = 1/4
    of a channel on average. Measured on the rows that gave the ranges, a chain of five layers seemed to gain by
    smoothing, but it lost 9 dB on new rows.
    """
    layers = [module for _ in range(5) for module in (nn.Linear(K, K), nn.ReLU())][:-1]
    for layer in layers[::2]:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    model, data = nn.Sequential(*layers).eval(), [batch.flatten(0, 1)[:32] for batch in DATA]
    new = normal(2000, K, seed=1)
    config = QConfig(activation="static", rounding="nearest")
    plain, smooth = (convert(model, data, config=dataclasses.replace(config, smoothing=s)) for s in ("none", "auto"))
    assert sqnr_db(model(new), smooth(new)) > sqnr_db(model(new), plain(new)) - 1


# ---- the plan ----


def test_a_plan_with_smoothing_survives_json_and_applies():
    model = Block()
    qmodel = convert(model, DATA)
    plan = Plan.from_dict(json.loads(json.dumps(qmodel.torchq_plan.to_dict(), allow_nan=False)))
    assert plan == qmodel.torchq_plan
    assert torch.equal(apply_plan(model, plan)(X), qmodel(X))


def test_converting_twice_gives_the_same_and_takes_its_state():
    model = Block()
    first, second = (convert(model, DATA) for _ in range(2))
    assert first.torchq_plan == second.torchq_plan
    assert smoothed(first) == ["a", "b"]
    expected = first(X)
    other = convert(model, [x * 1.5 for x in DATA], config=QConfig(activation="dynamic"))
    fresh = apply_plan(Block(), first.torchq_plan)
    fresh.load_state_dict(first.state_dict())
    assert torch.equal(fresh(X), expected)
    assert not torch.equal(other(X), expected)


def edited(plan, **changes):
    return Plan({name: dataclasses.replace(layer, **changes) for name, layer in plan.layers.items()})


def test_a_smoothing_can_be_edited_away_or_its_layers_to_float():
    model = Block()
    plan = convert(model, DATA).torchq_plan
    undone = apply_plan(model, edited(plan, kind="int8 dynamic", channel_scale=None, alpha=None))
    assert torch.equal(undone(X), convert(model, DATA, config=QConfig(activation="dynamic", smoothing="none"))(X))
    assert torch.equal(apply_plan(model, edited(plan, kind="float"))(X), model(X))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channel_scale": (1.0,)}, "layer 'a' has a channel_scale of 1 numbers, expected 32"),
        ({"channel_scale": (0.0,) * K}, "layer 'a' has a channel_scale with a number that is not a positive normal"),
        ({"channel_scale": (float("nan"),) * K}, "not a positive normal float32"),
    ],
)
def test_a_scale_that_makes_no_sense_is_refused(changes, message):
    model = Block()
    with pytest.raises(ValueError, match=rf"^torchq\.apply_plan: .*{message}"):
        apply_plan(model, edited(convert(model, DATA).torchq_plan, **changes))


def test_a_smoothed_layer_takes_no_codes():
    """Behind a layer that could hand it u8 codes, it takes floats; a plan that says otherwise is refused."""
    first, last = nn.Linear(K, K), nn.Linear(K, 8)
    first.weight[[1, 2]] *= 50
    first.bias[[1, 2]] *= 50
    last.weight[:, [1, 2]] /= 50
    model = nn.Sequential(first, nn.ReLU(), last).eval()
    config = QConfig(activation="static")
    plain, smooth = (convert(model, DATA, config=dataclasses.replace(config, smoothing=s)) for s in ("none", "auto"))
    assert plain.torchq_plan.layers["0"].feeds == "2"
    assert (smooth.torchq_plan.layers["0"].activation, smooth.torchq_plan.layers["0"].feeds) == ("1", None)
    assert smoothed(smooth) == ["2"]
    assert sqnr_db(model(X), smooth(X)) > sqnr_db(model(X), plain(X)) + 8
    assert sqnr_db(model(X), smooth(X)) > 38
    plan = plan_of(smooth)
    wrong = {**plan.layers, "0": dataclasses.replace(plan.layers["0"], feeds="2")}
    with pytest.raises(ValueError, match="layer '0' feeds '2', which has a channel_scale and so takes no codes"):
        apply_plan(model, dataclasses.replace(plan, layers=wrong))


def test_in_place_gives_the_same():
    model = Block()
    expected = convert(model, DATA)(X)
    smooth = convert(model, DATA, inplace=True)
    assert smooth is model
    assert smoothed(smooth) == ["a", "b"]
    assert torch.equal(smooth(X), expected)


def test_parts_of_the_rows_get_no_ranges_where_dynamic_is_clear(monkeypatch):
    """The plan is the one with them. Where few rows chose the ranges, making them takes most of smoothing's time."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    data = [normal(100, 64) * torch.logspace(-2, 1, 100).unsqueeze(1) for _ in range(4)]  # rows of all sizes
    made, range_of = [], Trial.range_of
    monkeypatch.setattr(Trial, "range_of", lambda self, name: made.append(name) or range_of(self, name))
    plan = convert(model, data).torchq_plan
    few = len(made)
    monkeypatch.setattr(smoothing, "CLEAR_DB", float("inf"))
    assert convert(model, data).torchq_plan == plan
    assert [layer.kind for layer in plan.layers.values()] == ["int8 dynamic"] * 2
    assert len(made) - few > few > 0
