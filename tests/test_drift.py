"""watch_drift(): its counts are right, and it reports shifted data, but not data like the calibration data."""

import dataclasses

import pytest
import torch
from torch import nn

from helpers.models import layers_of
from helpers.numbers import normal
from torchq import _C, QConfig, QuantizedLinear, convert, report, simulate, watch_drift
from torchq.numerics.metrics import count_clipped
from torchq.numerics.qparams import QParams
from torchq.reporting.drift import MIN_CLIPPED, THRESHOLD, Drift, LayerDrift

pytestmark = pytest.mark.usefixtures("seeded")

WIDTH = 48
STATIC = QConfig(activation="static", observer="minmax")


DATA = [normal(256, WIDTH, seed=i) for i in range(8)]
FRESH = normal(512, WIDTH, seed=99)


def chain(dtype=torch.float32):
    """Two layers connected by codes, and a third that gets floats."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 8))
    return model.to(dtype).eval()


def static_model():
    return convert(chain(), DATA, config=STATIC)


def scaled(layer):
    return 1.0 if layer.channel_scale is None else layer.channel_scale


def watched(qmodel, *batches, **settings):
    with watch_drift(qmodel, **settings) as drift:
        for batch in batches:
            qmodel(batch)
    return drift


@pytest.mark.parametrize("observer", ["minmax", "percentile"])
def test_no_drift_on_calibration_data_or_more_of_its_kind(observer):
    qmodel = convert(chain(), DATA, config=QConfig(activation="static", observer=observer))
    for batches in (DATA, [FRESH]):
        drift = watched(qmodel, *batches)
        assert drift.recalibrate == ()
        assert str(drift) == "no drift in 3 static layers"
    assert all(layer.calibrated == 0 for layer in drift.layers.values()) == (observer == "minmax")


@pytest.mark.parametrize("observer", ["minmax", "percentile"])
@pytest.mark.parametrize("change", [lambda x: 2 * x, lambda x: x + 1.5], ids=["scaled", "shifted"])
def test_drift_on_other_data(observer, change):
    qmodel = convert(chain(), DATA, config=QConfig(activation="static", observer=observer))
    drift = watched(qmodel, change(FRESH))
    assert "0" in drift.recalibrate
    layer = drift.layers["0"]
    below, above = (count / layer.values for count in (layer.below, layer.above))
    assert (
        drift.advice("0")
        == str(drift).splitlines()[0]
        == (
            f"recalibrate layer '0': {below + above:.2%} of {512 * WIDTH} values clipped ({below:.2%} below its range, "
            f"{above:.2%} above), {layer.calibrated:.2%} in calibration"
        )
    )


def test_the_counts_of_float_inputs():
    """Clipped is more than one step outside the values of codes 0 and 255."""
    qmodel = static_model()
    x = 2 * FRESH
    layer = watched(qmodel, x[:100], x[100:]).layers["0"]
    scale, zero_point = qmodel[0].input_qparams
    steps = (x * scaled(qmodel[0])).double() / scale + zero_point
    assert (layer.below, layer.above, layer.values) == (int((steps < -1).sum()), int((steps > 256).sum()), x.numel())
    assert layer.below > 100
    assert layer.above > 100


def test_the_counts_of_codes_are_taken_before_the_clipping():
    """Layer 2 takes codes. Its zeros, half of all values, do not count as clipped; values above its range do."""
    qmodel = convert(chain(), DATA, config=dataclasses.replace(STATIC, smoothing="none"))
    x = 2 * FRESH
    layer = watched(qmodel, x).layers["2"]
    first = QuantizedLinear(
        qmodel[0].weight_int8, qmodel[0].weight_scale, qmodel[0].bias.clone(), input_qparams=qmodel[0].input_qparams
    )
    values = first(x).relu()
    scale, zero_point = qmodel[2].input_qparams
    assert qmodel[0].fold.codes
    assert zero_point == 0
    assert (values == 0).float().mean() > 0.3
    assert (layer.below, layer.above, layer.values) == (0, int((values.double() > 256 * scale).sum()), values.numel())
    assert layer.above > 10


def test_calibration_counts_what_watching_counts():
    """The plan has the clipped share of the calibration sample. Here the sample holds all data, so both must agree."""
    data = DATA[:1]
    model = nn.Sequential(chain()[0], nn.Tanh(), chain()[2]).eval()
    qmodel = convert(model, data, config=QConfig(activation="static", observer="percentile", percentile=95))
    drift = watched(qmodel, data[0])
    layer, stats = drift.layers["0"], qmodel.torchq_plan.layers["0"].stats
    assert (layer.below / layer.values, layer.above / layer.values) == (stats.clipped_below, stats.clipped_above)
    assert layer.share == pytest.approx(0.05, abs=0.01)
    assert drift.recalibrate == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_outputs_stay_the_same_bit_for_bit(dtype):
    qmodel = convert(chain(dtype), [x.to(dtype) for x in DATA], config=STATIC)
    x = 3 * FRESH.to(dtype)
    expected = qmodel(x)
    with watch_drift(qmodel) as drift:
        assert torch.equal(qmodel(x), expected)
    assert drift.layers["0"].values == x.numel()


def test_simulated_layers_are_counted_too():
    qmodel = static_model()
    expected = watched(qmodel, 2 * FRESH)
    with simulate():
        actual = watched(qmodel, 2 * FRESH)
    for name in ("0", "2"):  # the third layer gets floats, which differ by rounding
        assert actual.layers[name] == expected.layers[name]


def test_off_it_costs_nothing():
    """Outside there are no hooks, so calls are direct (csrc/direct.cpp), also after an error inside."""
    qmodel = static_model()

    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in qmodel.modules())

    assert all(_C.is_plain(layer, QuantizedLinear) for layer in layers_of(qmodel))
    with watch_drift(qmodel):
        assert hooks() == 3
        assert not all(_C.is_plain(layer, QuantizedLinear) for layer in layers_of(qmodel))
    with pytest.raises(RuntimeError), watch_drift(qmodel):
        qmodel(torch.ones(2, 7))
    assert hooks() == 0
    assert all(_C.is_plain(layer, QuantizedLinear) for layer in layers_of(qmodel))


def test_counting_stops_with_the_block_and_two_watchers_count_for_themselves():
    qmodel = static_model()
    with watch_drift(qmodel) as outer:
        qmodel(FRESH)
        inner = watched(qmodel, FRESH)
    qmodel(FRESH)
    assert (outer.layers["0"].values, inner.layers["0"].values) == (2 * FRESH.numel(), FRESH.numel())


def test_only_static_layers_are_watched():
    qmodel = convert(chain(), DATA, config=QConfig(activation="static", observer="minmax", exclude=("0",)))
    assert list(watched(qmodel, FRESH).layers) == ["2", "4"]
    dynamic = watched(convert(chain()), FRESH)
    assert (dynamic.layers, str(dynamic)) == ({}, "no drift in 0 static layers")


def test_nan_and_empty_inputs():
    qmodel = static_model()
    drift = watched(qmodel, torch.full((4, WIDTH), torch.nan), torch.empty(0, WIDTH))
    assert drift.layers["0"] == LayerDrift(0.0, 4 * WIDTH, 0, 0)
    assert watched(qmodel, torch.empty(0, WIDTH)).layers["0"].share == 0


@pytest.mark.parametrize(
    ("counts", "drifted"),
    [
        (LayerDrift(0.0, 20000, 10, 11), True),  # 0.105 %
        (LayerDrift(0.0, 20000, 10, 10), False),  # just the threshold
        (LayerDrift(0.05, 20000, 0, 1000), False),  # as calibrated
        (LayerDrift(0.05, 20000, 0, 1030), True),
        (LayerDrift(0.0, 100, 0, MIN_CLIPPED - 1), False),  # 9 %, but of a hundred values
        (LayerDrift(0.0, 100, 0, MIN_CLIPPED), True),
        (LayerDrift(0.0), False),
    ],
)
def test_the_threshold(counts, drifted):
    assert THRESHOLD == 0.001
    assert Drift(THRESHOLD, {"a": counts}).drifted("a") == drifted


def test_a_threshold_of_ones_own():
    qmodel = static_model()
    share = watched(qmodel, 2 * FRESH).layers["0"].share
    assert "0" in watched(qmodel, 2 * FRESH, threshold=0.99 * share).recalibrate
    assert "0" not in watched(qmodel, 2 * FRESH, threshold=1.01 * share).recalibrate


def test_values_at_the_ends_of_the_range_are_not_clipped():
    """Rounding the zero point moves the range by up to half a step: [-1, 1] has step 2/255 and zero point 128."""
    (scale, zero_point), x = QParams(2 / 255, 128), torch.tensor([-1.0, 1.0])
    assert 1 / scale + zero_point == pytest.approx(255.5)
    assert count_clipped(x, QParams(scale, zero_point)) == (0, 0)
    assert count_clipped(x * 1.1, QParams(scale, zero_point)) == (1, 1)


def test_the_report_says_recalibrate():
    qmodel = static_model()
    drift = watched(qmodel, 2 * FRESH)
    result = report(qmodel, drift=drift)
    assert [layer.drift for layer in result.layers] == [layer.share for layer in drift.layers.values()]
    assert [layer.advice for layer in result.layers] == [drift.advice(name) for name in drift.layers]
    lines = str(result).splitlines()
    assert drift.advice("0") in lines
    start = lines.index("") + 1  # below the whole model
    assert "now" in lines[start].split()
    assert f"{drift.layers['0'].share:.2%}" in lines[start + 2]
    assert result.to_dict()["layers"][0]["advice"] == drift.advice("0")
    calm = report(qmodel, drift=watched(qmodel, FRESH))
    assert "recalibrate" not in str(calm)
    assert all(layer.advice is None for layer in calm.layers)


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"^torchq.watch_drift: this Sequential has no torchq_plan"):
        watch_drift(chain())
    for threshold in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"^torchq.watch_drift: threshold must be a share in \[0, 1\), got "):
            watched(convert(chain()), threshold=threshold)
