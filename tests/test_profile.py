"""The report's numbers for a layer: stats against an independent computation, and times at the right shapes."""

import dataclasses
import json
import math

import pytest
import torch
from torch import nn

from helpers.numbers import normal
from torchq import QConfig, QuantizedLinear, convert, ops, profile_layers, report
from torchq.numerics.metrics import sqnr_db
from torchq.numerics.qparams import choose_qparams, fake_quantize
from torchq.planning.plan import LayerStats, Plan
from torchq.reporting import profile
from torchq.reporting.profile import LayerTime

pytestmark = pytest.mark.usefixtures("seeded")

WIDTH = 64
PLAIN = QConfig(observer="percentile", percentile=95, smoothing="none", rounding="nearest")
CONFIGS = [dataclasses.replace(PLAIN, activation=kind) for kind in ("static", "dynamic")]


DATA = [normal(5, 4, WIDTH, seed=i) for i in range(6)]  # 20 rows a batch, 120 in all: fewer than the sample holds


def model(dtype=torch.float32):
    return nn.Sequential(nn.Linear(WIDTH, 32), nn.ReLU(), nn.Linear(32, 10)).to(dtype).eval()


@pytest.mark.parametrize("weight", ["per_channel", "per_tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_sqnr(weight, dtype):
    float_model = model(dtype)
    config = QConfig(weight=weight, rounding="nearest", smoothing="none")
    qmodel = convert(float_model, [x.to(dtype) for x in DATA], config=config)
    for name, layer in qmodel.torchq_plan.layers.items():
        exact = float_model.get_submodule(name).weight
        axis = 0 if weight == "per_channel" else None
        rounded = fake_quantize(exact.float(), *choose_qparams(exact, axis=axis), axis=axis)
        assert layer.stats.weight_db == pytest.approx(sqnr_db(exact, rounded), abs=1e-6)


def test_weight_sqnr_of_large_layers():
    """It is summed over blocks of rows, which must make no difference."""
    large = nn.Linear(1024, 700)
    stats = convert(large, [normal(16, 1024)]).torchq_plan.layers[""].stats
    quantized = QuantizedLinear.from_float(large)
    rounded = quantized.weight_int8 * quantized.weight_scale[:, None]
    assert stats.weight_db == pytest.approx(sqnr_db(large.weight, rounded), abs=1e-6)


def test_a_weight_that_int8_holds_exactly():
    exact = nn.Linear(WIDTH, 4)
    exact.weight.copy_(torch.full((4, WIDTH), 0.5))
    qmodel = convert(exact, DATA, config=QConfig(smoothing="none"))
    assert qmodel.torchq_plan.layers[""].stats.weight_db == math.inf
    tree = json.loads(json.dumps(qmodel.torchq_plan.to_dict(), allow_nan=False))
    assert Plan.from_dict(tree) == qmodel.torchq_plan
    assert json.loads(json.dumps(report(qmodel).to_dict(), allow_nan=False))["layers"][0]["weight_db"] == "inf"


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.activation)
def test_input_sqnr_and_clipped_share(config):
    float_model = model()
    qmodel = convert(float_model, DATA, config=config)
    first = torch.cat(DATA).reshape(-1, WIDTH)
    for name, x in (("0", first), ("2", float_model[1](float_model[0](first)))):
        layer = qmodel.torchq_plan.layers[name]
        below = above = 0
        if config.activation == "static":
            scale, zero_point = layer.input_qparams
            seen = fake_quantize(x, scale, zero_point, dtype=torch.uint8)
            below, above = int((x / scale + zero_point < -1).sum()), int((x / scale + zero_point > 256).sum())
            assert above > 0
        else:
            codes, scale, zero_point = ops.quantize_per_token(x)
            seen = (codes.float() - zero_point) * scale
        # The sample holds every row, in this order. In smaller batches, the rows may have been rounded differently.
        assert layer.stats.input_db == pytest.approx(sqnr_db(x, seen), abs=1e-3)
        assert (layer.stats.clipped_below, layer.stats.clipped_above) == (below / x.numel(), above / x.numel())
        assert layer.stats.rows == 20


def test_rows_are_the_mean_of_the_calls():
    data = [normal(rows, WIDTH) for rows in (10, 20, 60)]
    assert convert(model(), data).torchq_plan.layers["0"].stats.rows == 30


def table(result):
    """The lines of a report below what it says of the whole model."""
    lines = str(result).splitlines()
    return lines[lines.index("") + 1 :]


@pytest.mark.filterwarnings("ignore:torchq.convert. nothing became int8")
def test_no_stats_without_data_or_in_float():
    for qmodel in (convert(model()), convert(model(), DATA, config=QConfig(min_sqnr_db=99))):
        assert [layer.stats for layer in qmodel.torchq_plan.layers.values()] == [None, None]


def test_the_report_has_what_the_plan_has():
    qmodel = convert(model(), DATA, config=CONFIGS[0])
    result = report(qmodel)
    for layer, plan in zip(result.layers, qmodel.torchq_plan.layers.values(), strict=True):
        stats = plan.stats
        expected = (stats.weight_db, stats.input_db, stats.clipped_below + stats.clipped_above, plan.measured_db)
        assert (layer.weight_db, layer.input_db, layer.clipped, layer.sqnr_db) == expected
        assert (layer.float_seconds, layer.int8_seconds, layer.drift, layer.advice) == (None,) * 4
    head = "layer scheme before after weight input output clipped static dynamic"
    assert table(result)[0].split()[:10] == head.split()


def test_stats_from_json():
    stats = LayerStats(math.inf, 40.5, 0.25, 0.0, 7)
    values = {"weight_db": "inf", "input_db": 40.5, "clipped_below": 0.25, "clipped_above": 0.0, "rows": 7}
    assert LayerStats.from_dict(values) == stats
    assert stats.clipped == 0.25


# ---- profile_layers ----


def test_times_are_taken_at_the_calibration_shape(monkeypatch):
    """The two contestants are the float layer's function and the int8 layer itself, on that number of rows."""
    seen = []

    def spy(calls, rounds):
        seen.append({name: call() for name, call in calls.items()} | {"rounds": rounds})
        return {"float": 3e-6, "int8": 1.5e-6}

    monkeypatch.setattr(profile, "interleaved", spy)
    qmodel = convert(model(torch.bfloat16), [x.bfloat16() for x in DATA], config=CONFIGS[0])
    times = profile_layers(qmodel, rounds=7)
    assert times == {name: LayerTime(20, 3e-6, 1.5e-6) for name in ("0", "2")}
    assert times["0"].speedup == 2
    first, last = seen
    assert [tuple(run["float"].shape) for run in seen] == [(20, 32), (20, 10)]
    assert [(run["float"].dtype, run["int8"].dtype) for run in seen] == [
        (torch.bfloat16, torch.uint8),  # as in the model: it passes codes
        (torch.bfloat16, torch.bfloat16),
    ]
    assert first["rounds"] == 7
    assert last["int8"].shape == (20, 10)


def test_the_float_contestant_computes_the_same(monkeypatch):
    outputs = {}

    def spy(calls, rounds):
        outputs.update({name: call() for name, call in calls.items()})
        return {"float": 1.0, "int8": 1.0}

    monkeypatch.setattr(profile, "interleaved", spy)
    profile_layers(convert(nn.Linear(WIDTH, WIDTH), DATA))
    assert sqnr_db(outputs["float"], outputs["int8"]) > 30  # the same weights; u8 input costs an error of 1 %


def test_real_times_are_shown_in_the_report():
    qmodel = convert(model(), DATA)
    times = profile_layers(qmodel, rounds=1)
    result = report(qmodel, profile=times)
    for layer in result.layers:
        time = times[layer.name]
        assert (layer.float_seconds, layer.int8_seconds) == (time.float_seconds, time.int8_seconds)
        assert layer.int8_seconds > 0
        assert layer.float_seconds > 0
    assert table(result)[0].split()[-2:] == ["float", "int8"]


def test_float_layers_and_layers_without_data_are_left_out():
    assert profile_layers(convert(model())) == {}
    qmodel = convert(model(), DATA, config=QConfig(exclude=("0",)))
    times = profile_layers(qmodel, rounds=1)
    assert list(times) == ["2"]
    assert table(report(qmodel, profile=times))[2].count(" -") >= 4


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"^torchq.profile_layers: this Sequential has no torchq_plan"):
        profile_layers(model())
    with pytest.raises(ValueError, match=r"^torchq.profile_layers: rounds must be at least 1, got 0"):
        profile_layers(convert(model()), rounds=0)
