"""Measures the numbers that quantization is judged by: size, error, and gain by clipping. Accuracy: test_convert.py."""

import pytest
import safetensors.torch
import torch
from torch import nn

from helpers.numbers import normal
from torchq import QConfig, QuantizedLinear, convert, dequantize, observers, simulate
from torchq.numerics.metrics import sqnr_db
from torchq.numerics.qparams import QParams, choose_qparams, fake_quantize

pytestmark = pytest.mark.usefixtures("seeded")

SCHEMES = ["auto", "static", "dynamic"]


# ---- 4x smaller ----


@pytest.fixture(scope="module")
def mlp():
    """An MLP, 1024 wide, with 8.4 MB of float32 weights."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))


@pytest.mark.parametrize("activation", SCHEMES)
def test_files_are_4_times_smaller(mlp, activation, tmp_path):
    """An output feature takes 4 K bytes in float32 and K + 4 in int8: 4 K / (K + 4) = 3.98 for K = 1024."""
    qmodel = convert(mlp, [normal(32, 1024)], config=QConfig(activation=activation, observer="minmax"))
    for name, save in [("pt", torch.save), ("safetensors", safetensors.torch.save_file)]:
        save(mlp.state_dict(), tmp_path / f"float.{name}")
        save(qmodel.state_dict(), tmp_path / f"int8.{name}")
        before, after = ((tmp_path / f"{kind}.{name}").stat().st_size for kind in ("float", "int8"))
        assert before > 8.4e6
        assert before / after >= 3.9


def resident_bytes(model):
    """The bytes of all parameters, buffers and other tensor attributes of its modules. A storage counts once."""
    held = [value for module in model.modules() for value in vars(module).values() if isinstance(value, torch.Tensor)]
    storages = {t.data_ptr(): t.untyped_storage().nbytes() for t in [*held, *model.parameters(), *model.buffers()]}
    return sum(storages.values())


@pytest.mark.parametrize("activation", SCHEMES)
def test_resident_weights_are_4_times_smaller(mlp, activation):
    """Also after a run, so no unpacked weight is kept."""
    qmodel = convert(mlp, [normal(32, 1024)], config=QConfig(activation=activation, observer="minmax"))
    qmodel(normal(3, 1024))
    with simulate():
        qmodel(normal(3, 1024))
    qmodel.state_dict()
    assert resident_bytes(mlp) == 4 * (2 * 1024 * 1025 + 10 * 1025)
    assert resident_bytes(mlp) / resident_bytes(qmodel) >= 3.9


# ---- a small error ----


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
@pytest.mark.parametrize("shift", [0, 2, -7])
def test_a_round_trip_errs_by_less_than_half_a_percent_of_the_range(dtype, shift):
    """Half a step is 1 / 510 of the range (asymmetric) or 1 / 254 of the largest magnitude (symmetric)."""
    x = normal(100, 100) + shift
    for symmetric in (True, False):
        scale, zero_point = choose_qparams(x, dtype=dtype, symmetric=symmetric)
        error = (fake_quantize(x, scale, zero_point, dtype=dtype) - x).abs().max()
        assert 0 < error < 0.005 * (x.max().clamp(min=0) - x.min().clamp(max=0))


def test_the_weights_of_a_layer_make_the_same_round_trip():
    linear = nn.Linear(256, 64)
    layer = QuantizedLinear.from_float(linear)
    error = (dequantize(layer.weight_int8, layer.weight_scale, axis=0) - linear.weight).abs().amax(dim=1)
    assert (error < 0.005 * (linear.weight.amax(dim=1) - linear.weight.amin(dim=1))).all()


@pytest.mark.parametrize("data", [False, True], ids=["without data", "calibrated"])
@pytest.mark.parametrize("features", [(64, 64), (256, 1024), (1024, 256), (768, 768)])
def test_a_linear_is_within_one_percent_of_float(features, data):
    linear, x = nn.Linear(*features), normal(128, features[0])
    layer = convert(linear, [normal(128, features[0], seed=1)] if data else None)
    expected = linear(x)
    for actual in (layer(x), simulated(layer, x)):
        assert (actual - expected).norm() / expected.norm() < 0.01


def simulated(layer, x):
    with simulate():
        return layer(x)


# ---- clipping ----


def static_db(linear, x, name, measured_on):
    """Output SQNR of the int8 layer with the static range that an observer has chosen for x."""
    observer = observers.make_observer(name)
    observer.observe(x)
    scale, zero_point = observer.qparams()
    layer = QuantizedLinear.from_float(linear, input_qparams=QParams(float(scale), int(zero_point)))
    return sqnr_db(linear(measured_on), layer(measured_on))


def test_percentile_beats_min_max_with_outliers():
    """Two values in 65,536 are 100 standard deviations out. The step is 200 / 255 with min-max and 6.6 / 255 at 99.9 %.
    That gives 20 log10(200 / 6.6) = 30 dB, minus the error of clipping 0.1 % of the values.
    """
    linear, x = nn.Linear(256, 64), normal(256, 256)
    bulk = x[2:].clone()
    x[0, 3], x[1, 200] = 100, -100
    clipped, minmax = (static_db(linear, x, name, bulk) for name in ("percentile", "minmax"))
    assert clipped > 30
    assert clipped > minmax + 15


def test_percentile_loses_where_the_outliers_carry_the_signal():
    """One feature of 256 is 60 times as large as the others, as in transformers. It makes up most of every output, but
    lies outside the range of 99.9 % of the values. With min-max the step is 2 * 60 * 3 / 255 = 1.4, so the noise is
    1.4 / sqrt(12) = 0.4 in each of 256 features, against a signal of 60: 20 log10(60 / (0.4 * 16)) = 19 dB.
    """
    linear, x = nn.Linear(256, 64), normal(256, 256)
    x[:, 7] *= 60
    clipped, minmax = (static_db(linear, x, name, x) for name in ("percentile", "minmax"))
    assert minmax > 17
    assert minmax > clipped + 10


def test_the_automatic_observer_takes_the_better_one():
    linear, x = nn.Linear(256, 64), normal(256, 256)
    wanted = x.clone()
    wanted[:, 7] *= 60
    ignoring, ignored = nn.Linear(256, 64), x.clone()
    ignoring.weight[:, 7] = 0
    ignored[::16, 7] = 100
    chosen = [
        convert(layer, [data], config=QConfig(activation="static", smoothing="none")).torchq_plan.layers[""].observer
        for layer, data in ((linear, wanted), (ignoring, ignored))
    ]
    assert chosen == ["mse", "percentile"]


def test_the_documentation_says_when_clipping_loses():
    for text in (observers.__doc__, observers.PercentileObserver.__doc__):
        assert "outlier channels" in " ".join(text.split())
