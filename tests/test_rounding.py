"""GPTQ and bias correction: a smaller error on held-out rows, and no change where there is nothing to gain."""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from helpers.compare import assert_identical
from helpers.numbers import normal
from torchq import QConfig, convert, plan_of, quantize
from torchq.calibration import calibrate as calibrate_module
from torchq.calibration.record import MAX_GRAM_DEPTH, Record
from torchq.numerics.metrics import sqnr_db
from torchq.numerics.qparams import choose_qparams
from torchq.planning import gptq as gptq_module
from torchq.planning.apply import apply_plan
from torchq.planning.gptq import gptq, mean_error
from torchq.planning.plan import Plan

pytestmark = pytest.mark.usefixtures("seeded")

NEAREST, GPTQ, AUTO = (QConfig(rounding=name) for name in ("nearest", "gptq", "auto"))


def correlated(rows, k, seed):
    """Inputs with most of their energy in a few directions."""
    return normal(rows, 8, seed=seed) @ normal(8, k, seed=77) + 0.2 * normal(rows, k, seed=seed + 1)


@pytest.mark.parametrize("k", [1, 3, 255, 256, 257, 600])
def test_without_correlation_it_rounds_to_nearest(k):
    """Bit for bit, for a diagonal H too, and also with several blocks of 256 channels."""
    weight = normal(17, k)
    scale, _ = choose_qparams(weight, axis=0)
    nearest = quantize(weight, scale, axis=0)
    for gram in (torch.eye(k), torch.diag(torch.rand(k) * 100), torch.zeros(k, k)):
        assert torch.equal(gptq(weight, scale, gram), nearest)


@pytest.mark.parametrize("k", [32, 200])
def test_it_lowers_the_error_on_rows_it_has_not_seen(k):
    weight, x, held_out = normal(24, k), correlated(2000, k, 1), correlated(500, k, 3)
    scale, _ = choose_qparams(weight, axis=0)
    codes = gptq(weight, scale, x.T @ x)
    nearest = quantize(weight, scale, axis=0)
    before, after = (sqnr_db(held_out @ weight.T, held_out @ (scale[:, None] * c.float()).T) for c in (nearest, codes))
    assert after > before + 5
    assert codes.dtype == torch.int8
    assert codes.min() >= -127
    assert (codes.float() - nearest.float()).abs().max() >= 1


def test_it_is_the_textbook_algorithm():
    """It gives the same codes as GPTQ without blocks, with the permutation undone by hand."""
    k = 150
    weight, x = normal(5, k), correlated(400, k, 1)
    gram = x.T @ x
    scale, _ = choose_qparams(weight, axis=0)
    order = gram.diagonal().argsort(descending=True)
    h = gram.double()[order][:, order]
    h += 0.01 * h.diagonal().mean() * torch.eye(k)
    w, inverse, expected = weight.double()[:, order], h.inverse(), torch.empty(5, k)
    for j in range(k):
        code = (w[:, j] / scale).round().clamp(-127, 127)
        error = (w[:, j] - code * scale) / inverse[j, j]
        w = w - torch.outer(error, inverse[j]) * (torch.arange(k) > j)
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        expected[:, order[j]] = code.float()
    assert (gptq(weight, scale, gram).float() != expected).float().mean() < 0.01  # ties, by rounding of the inverse


@pytest.mark.parametrize("k", [1, 5, 130])
def test_dependent_channels_give_a_factor(monkeypatch, k):
    """H of rank 1, in float32: without more damping than 1 % its factor may not exist."""
    weight, x = normal(7, k), normal(1, k) * 1e3
    scale, _ = choose_qparams(weight, axis=0)
    codes = gptq(weight, scale, x.T @ x)
    exact, error = x @ weight.T, x @ (scale[:, None] * codes - weight).T
    nearest = x @ (scale[:, None] * quantize(weight, scale, axis=0) - weight).T
    assert error.square().mean() <= nearest.square().mean()
    assert error.abs().max() < exact.abs().max()
    monkeypatch.setattr(gptq_module, "_DAMPING", 0.0)  # then it must find a damping by itself
    assert torch.equal(gptq(weight, scale, torch.zeros(k, k)), quantize(weight, scale, axis=0))


@pytest.mark.parametrize("k", [1, 40, 600])
def test_a_scale_of_the_inputs_is_that_of_a_scaled_problem(k):
    """Codes of w / c for inputs x · c, with c powers of two, so that nothing else is rounded."""
    weight, x, factors = normal(9, k), correlated(400, k, 1), torch.arange(k).remainder(5).sub(2).exp2()
    scale, _ = choose_qparams(weight / factors, axis=0)
    gram = x.T @ x
    whole = gram * factors * factors.unsqueeze(1)
    assert torch.equal(gptq(weight, scale, gram, factors), gptq(weight / factors, scale, whole))
    assert torch.equal(gram, x.T @ x)


@pytest.mark.parametrize("k", [3, 256, 600])
def test_only_the_upper_half_of_the_factor_is_read(monkeypatch, k):
    """What lies below has no meaning."""
    weight, x = normal(9, k), correlated(400, k, 1)
    scale, _ = choose_qparams(weight, axis=0)
    expected, factorized = gptq(weight, scale, x.T @ x), gptq_module._factorized

    def with_noise_below(h, damping):
        done = factorized(h, damping)
        for rows in h:
            rows.masked_fill_(torch.ones_like(rows).tril(-1).bool(), 77.0)
        return done

    monkeypatch.setattr(gptq_module, "_factorized", with_noise_below)
    assert torch.equal(gptq(weight, scale, x.T @ x), expected)


def test_a_factor_is_that_of_the_whole_matrix():
    """It is computed in blocks, of which the last may be smaller."""
    k = 300
    x, order, factors = correlated(900, k, 1), torch.randperm(k), torch.rand(k) + 0.5
    blocks = gptq_module._unit_factor(x.T @ x, order, factors)
    assert [tuple(rows.shape) for rows in blocks] == [(128, 300), (128, 172), (44, 44)]
    rows = x[:, order].double() * factors
    h = rows.T @ rows
    h.diagonal().add_(0.01 * h.diagonal().mean())
    factor = torch.linalg.cholesky(h, upper=True)
    exact = factor / factor.diagonal().unsqueeze(1)
    found = torch.cat([torch.nn.functional.pad(rows, (k - rows.shape[1], 0)) for rows in blocks])
    torch.testing.assert_close(found.triu().double(), exact, rtol=1e-3, atol=1e-4)


def test_rows_are_rounded_each_for_itself(monkeypatch):
    """Also where there are more than are rounded at a time."""
    monkeypatch.setattr(gptq_module, "_VALUES", 1024 * 20)
    weight, x = normal(1030, 20), correlated(400, 20, 1)
    scale, _ = choose_qparams(weight, axis=0)
    codes = gptq(weight, scale, x.T @ x)
    some = torch.tensor([0, 1, 1023, 1024, 1029])
    assert torch.equal(gptq(weight[some], scale[some], x.T @ x), codes[some])


def test_bias_correction_leaves_no_mean_error():
    """In float32 the mean of 400 rows is exact to 2^-24 of the values' magnitude, about 10."""
    weight, x = normal(8, 20), normal(400, 20, seed=1) + 0.7
    codes, scale, x_int8 = normal(8, 20, seed=2).mul(30).to(torch.int8), normal(8, seed=3).exp() / 30, x.round()
    exact, actual = (x.double() @ weight.double().T), x_int8.double() @ (codes * scale.unsqueeze(1)).double().T
    corrected = actual + mean_error(weight, codes, scale, x, x_int8)
    assert (actual - exact).mean(dim=0).abs().min() > 0.3
    assert (corrected - exact).mean(dim=0).abs().max() < 1e-5
    assert_identical(mean_error(weight, codes, scale, x[:0], x[:0]), torch.zeros(8))


# ---- in convert ----


def to_nearest(plan):
    """The same plan with all weights rounded to nearest."""
    layers = {name: dataclasses.replace(layer, rounding="nearest") for name, layer in plan.layers.items()}
    return dataclasses.replace(plan, layers=layers)


def layer_and_data(k=64, n=32, rows=400):
    return nn.Linear(k, n), [correlated(rows, k, seed) for seed in (1, 3, 5)]


@pytest.mark.parametrize(
    ("activation", "weight"),
    [("auto", "per_channel"), ("dynamic", "per_channel"), ("static", "per_tensor"), ("dynamic", "per_tensor")],
)
@pytest.mark.parametrize("rounding", ["gptq", "auto"])
def test_convert_gains_on_new_data(activation, weight, rounding):
    """The weights must cause a good part of the error. With static ranges the inputs cause a larger part."""
    linear, data = layer_and_data()
    linear.weight[0] *= 8
    x, config = (
        correlated(300, 64, 99),
        QConfig(activation=activation, weight=weight, rounding="nearest", smoothing="none"),
    )
    before = convert(linear, data, config=config)
    after = convert(linear, data, config=dataclasses.replace(config, rounding=rounding))
    plan = after.torchq_plan.layers[""]
    assert plan.rounding == "gptq"
    held_out_before, held_out_after = plan.gptq_db
    assert plan.sqnr_db["gptq"] == held_out_after > held_out_before
    assert torch.equal(after.weight_scale, before.weight_scale)
    assert not torch.equal(after.weight_int8, before.weight_int8)
    assert sqnr_db(linear(x), after(x)) > sqnr_db(linear(x), before(x)) + 0.5


def test_auto_leaves_weights_that_gain_nothing():
    """For independent inputs, H is a multiple of the identity, up to noise."""
    linear, data = nn.Linear(64, 32), [normal(4000, 64)]
    nearest, auto = convert(linear, data, config=NEAREST), convert(linear, data, config=AUTO)
    plan = auto.torchq_plan.layers[""]
    assert plan.rounding == "nearest"
    assert plan.gptq_db[1] < plan.gptq_db[0] + 0.5
    assert plan.weights is None
    assert torch.equal(auto.weight_int8, nearest.weight_int8)
    assert torch.equal(auto.bias, nearest.bias)


@pytest.mark.parametrize("config", [GPTQ, AUTO], ids=lambda config: config.rounding)
def test_too_few_rows_are_refused(config):
    linear, data = nn.Linear(64, 32), [correlated(30, 64, 1)]
    qmodel = convert(linear, data, config=config)
    plan = qmodel.torchq_plan.layers[""]
    assert plan.rounding == "nearest"
    assert "15 calibration rows beside the held-out ones, gptq needs 16 for 64 inputs" in plan.no_gptq
    assert torch.equal(qmodel.weight_int8, convert(linear, data, config=NEAREST).weight_int8)


def test_too_deep_a_layer_is_refused(monkeypatch):
    monkeypatch.setitem(MAX_GRAM_DEPTH, "gptq", 32)
    linear, data = layer_and_data()
    plan = convert(linear, data, config=GPTQ).torchq_plan.layers[""]
    assert plan.rounding == "nearest"
    assert "64 inputs, rounding='gptq' takes gptq up to 32" in plan.no_gptq


def spikes(rows, size):
    """200 rows of zeros, except for these rows."""
    x = torch.zeros(200, 16)
    x[rows] = normal(len(rows), 16) * torch.tensor(size).unsqueeze(1)
    return x


@pytest.mark.parametrize("config", [GPTQ, AUTO], ids=lambda config: config.rounding)
@pytest.mark.parametrize(
    "x",
    [
        spikes([0, 2], [1.0, 1e3]),  # both are held out, so without them H is only rounding errors
        normal(200, 16) + spikes([0], [1e6]),
        normal(200, 16) * 1e20,  # the squares overflow
        normal(200, 16) * 1e-22,  # and underflow
        torch.zeros(200, 16),
    ],
    ids=["spikes", "outlier", "huge", "tiny", "zeros"],
)
def test_inputs_whose_squares_say_nothing_are_rounded_to_nearest(x, config):
    linear = nn.Linear(16, 8)
    qmodel, nearest = convert(linear, [x], config=config), convert(linear, [x])
    plan = qmodel.torchq_plan.layers[""]
    assert (plan.kind, plan.rounding) == (nearest.torchq_plan.layers[""].kind, "nearest")
    assert plan.no_gptq.startswith("the squares of its inputs sum to ")
    assert torch.equal(qmodel(x), nearest(x))


def test_the_gram_takes_in_the_first_rows_and_no_more():
    """XᵀX stops growing after the first rows. Only those held-out rows that it contains are subtracted from it."""
    data = [correlated(100, 8, seed=i) for i in range(9)]
    record = Record.empty(8, dataclasses.replace(GPTQ, sample_rows=50))
    for batch in data:
        record.observe(batch)
    stream = torch.cat(data)
    torch.testing.assert_close(record.gram, stream[: 4 * 8].T @ stream[: 4 * 8])
    assert record.gram_rows == 32
    assert torch.equal(stream[record.sample.positions], record.sample.rows)


def test_it_is_deterministic_and_leaves_the_model():
    linear, data = layer_and_data()
    before = linear.weight.clone()
    first, second = (convert(linear, data, config=GPTQ) for _ in range(2))
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    assert first.torchq_plan == second.torchq_plan
    assert torch.equal(linear.weight, before)


def test_it_works_on_smoothed_inputs():
    """H must be that of x · c, and the weight w / c. With the H of x, the SQNR is far lower."""
    model, data = smoothed_model()
    x = correlated(300, 64, 99)
    after = convert(model, data, config=GPTQ)
    before = apply_plan(model, to_nearest(after.torchq_plan))
    plan = after.torchq_plan.layers["2"]
    assert plan.channel_scale is not None
    assert plan.rounding == "gptq"
    assert torch.equal(after[2].channel_scale, before[2].channel_scale)
    assert sqnr_db(model(x), after(x)) > sqnr_db(model(x), before(x)) + 0.5
    again = apply_plan(model, plan_of(after))
    assert torch.equal(again(x), after(x))


@pytest.mark.slow(seconds=20)
@pytest.mark.parametrize("k", [1025, 1536])
def test_auto_takes_deep_layers_too(k):
    linear = nn.Linear(k, 16)
    data, x = [correlated(600, k, seed) for seed in (1, 3)], correlated(200, k, 99)
    before, after = convert(linear, data, config=NEAREST), convert(linear, data, config=AUTO)
    assert after.torchq_plan.layers[""].rounding == "gptq"
    assert sqnr_db(linear(x), after(x)) > sqnr_db(linear(x), before(x)) + 0.5


def test_products_of_deep_inputs_are_summed_in_blocks_and_of_bounded_rows():
    record, rows = Record.empty(1100, GPTQ), normal(4000, 1100)
    record.observe(rows[:2000])
    record.observe(rows[2000:])
    assert record.gram_rows == 3072  # not 4 K
    exact = (rows[:3072].double().T @ rows[:3072].double()).float()
    torch.testing.assert_close(record.products(), exact, rtol=1e-4, atol=0.05)
    assert torch.equal(record.products(), record.products().T)


def test_the_memory_of_all_products_is_bounded(monkeypatch):
    """The first inputs to come have theirs; the others say why they have none."""
    layers = [nn.Linear(64, 64) for _ in range(4)]
    data = [correlated(400, 64, seed) for seed in (1, 3)]
    monkeypatch.setattr(calibrate_module, "GRAM_BYTES", 0)
    monkeypatch.setattr(calibrate_module, "GRAM_SHARE", 0.5)  # of four layers, room for two
    plan = convert(nn.Sequential(*layers), data, config=GPTQ).torchq_plan
    assert [layer.rounding for layer in plan.layers.values()] == ["gptq", "gptq", "nearest", "nearest"]
    assert plan.layers["2"].no_gptq == "XᵀX of the layers before it takes 2 times the memory of the weights"


def test_a_plan_does_not_hold_the_weights():
    linear, data = layer_and_data()
    model = nn.Sequential(linear)
    qmodel = convert(model, data, config=dataclasses.replace(GPTQ, smoothing="none"))
    nearest = convert(model, data, config=dataclasses.replace(NEAREST, smoothing="none"))
    x, plan = data[0], Plan.from_dict(qmodel.torchq_plan.to_dict())
    assert not torch.equal(qmodel(x), nearest(x))
    with pytest.warns(UserWarning, match=r"torchq.apply_plan: 1 layers \('0'\) have weights rounded .*torchq.plan_of"):
        again = apply_plan(model, plan)
    assert torch.equal(again(x), nearest(x))
    again.load_state_dict(qmodel.state_dict(), strict=True)
    assert torch.equal(again(x), qmodel(x))

    assert torch.equal(apply_plan(model, to_nearest(plan))(x), nearest(x))


@pytest.mark.parametrize("bias", [True, False])
def test_a_plan_and_the_weights_make_the_same_model(bias):
    model = nn.Sequential(nn.Linear(64, 32, bias=bias), nn.ReLU(), nn.Linear(32, 8, bias=bias)).eval()
    data = [correlated(400, 64, seed) for seed in (1, 3)]
    qmodel = convert(model, data, config=GPTQ)
    plan = plan_of(qmodel)
    assert plan == qmodel.torchq_plan  # equality ignores the weights
    assert [name for name, layer in plan.layers.items() if layer.weights is not None] == ["0", "2"]
    again = apply_plan(model, plan)
    assert torch.equal(again(data[0]), qmodel(data[0]))
    with pytest.raises(ValueError, match=r"^torchq.plan_of: this Sequential has no torchq_plan"):
        plan_of(model)


def test_a_converted_model_keeps_no_second_copy_of_its_weights():
    linear, data = layer_and_data()
    for inplace in (False, True):
        model = nn.Sequential(copy.deepcopy(linear))
        qmodel = convert(model, data, config=GPTQ, inplace=inplace)
        layer = qmodel.torchq_plan.layers["0"]
        assert (layer.rounding, layer.weights) == ("gptq", None)
    assert "weights" not in layer.to_dict()


def test_a_parametrized_weight_is_rounded_as_it_is():
    linear, data = layer_and_data()
    plain = convert(linear, data, config=GPTQ)
    normed = convert(parametrizations.weight_norm(linear), data, config=GPTQ)
    assert (normed.weight_int8 - plain.weight_int8).abs().max() <= 1  # weight_norm's own float32 rounding


def smoothed_model():
    norm, linear, extra = nn.LayerNorm(64), nn.Linear(64, 32), nn.Linear(64, 64)
    norm.weight[[3, 9]] *= 50
    linear.weight[:, [3, 9]] /= 50
    return nn.Sequential(extra, norm, linear).eval(), [correlated(400, 64, seed) for seed in (1, 3)]


def test_rounded_weights_of_another_smoothing_are_refused():
    model, data = smoothed_model()
    plan = plan_of(convert(model, data, config=dataclasses.replace(GPTQ, activation="dynamic")))
    unsmoothed = {**plan.layers, "2": dataclasses.replace(plan.layers["2"], channel_scale=None)}
    with pytest.raises(ValueError, match=r"^torchq.apply_plan: the weights of layer '2' in the plan are not this"):
        apply_plan(model, dataclasses.replace(plan, layers=unsmoothed))
    other = dataclasses.replace(plan.layers["0"], weights=plan.layers["2"].weights)
    with pytest.raises(ValueError, match="the weights of layer '0' in the plan are not this layer's weights"):
        apply_plan(model, dataclasses.replace(plan, layers={**plan.layers, "0": other}))


def test_it_shows_progress(capsys):
    linear, data = layer_and_data()
    convert(linear, data, config=GPTQ, progress=True)
    assert "torchq: rounding" in capsys.readouterr().err


@pytest.mark.parametrize("factor", [0.0, 1e-44, 1e-40, 1e-37, 3e-36, 1e-35])
def test_weights_that_are_next_to_nothing(factor):
    """Below 127 · FLT_MIN a weight has code 0; such a layer gives its bias, as weight decay may leave it."""
    model, x = (
        nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 48)),
        normal(256, 48),
    )
    with torch.no_grad():
        model[2].weight.mul_(factor)
    qmodel = convert(model, x.split(64))
    assert qmodel.torchq_plan.layers["2"].is_int8
    torch.testing.assert_close(qmodel[:4](x), model[2].bias.relu().expand(256, 64), atol=1e-30, rtol=0)
    assert sqnr_db(model(x), qmodel(x)) > 40
