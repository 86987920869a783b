"""Unusual data: batches of many shapes, few rows, constant values, and NaN with every observer."""

import copy
import dataclasses
import warnings

import pytest
import torch
from torch import nn

from helpers.compare import snapshot
from helpers.covers import pairs_of
from helpers.numbers import normal
from torchq import QConfig, convert, prepare_qat
from torchq.calibration.calibrate import MIN_ROWS, calibrate
from torchq.modules.registry import find_layers
from torchq.numerics.metrics import sqnr_db
from torchq.observers import OBSERVERS

pytestmark = pytest.mark.usefixtures("no_grad")

K = 16
GPTQ = QConfig(rounding="gptq", smoothing="none")  # whether alpha gains 0.5 dB may hang on which rows are held out
AUTO = QConfig(rounding="auto")


ROWS = normal(96, K)


def model(outliers=50):
    """A norm whose output is worth smoothing, a fused chain, and a layer without a bias."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.LayerNorm(K), nn.Linear(K, 24), nn.ReLU(), nn.Linear(24, 8, bias=False)).eval()
    with torch.no_grad():
        made[0].weight[[3, 7]] *= outliers
        made[1].weight[:, [3, 7]] /= outliers
    return made


def same(first, second):
    """Whether the plans and all tensors are the same, bit for bit, except for `stats.rows`, the rows per call."""
    states = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    plans = [
        {
            name: dataclasses.replace(p, stats=dataclasses.replace(p.stats, rows=0))
            for name, p in q.torchq_plan.layers.items()
        }
        for q in (first, second)
    ]
    assert plans[0] == plans[1]
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in states)


# ---- batches of different shapes ----

SHAPES = {
    "a smaller last batch": ROWS.split(40),
    "one row at a time": ROWS.split(1),
    "sequences of many lengths": [
        rows.reshape(2, -1, K) if i % 2 else rows.unsqueeze(0) for i, rows in enumerate(ROWS.split((7, 20, 1, 30, 38)))
    ],
    "ranks": [ROWS[:48].reshape(2, 3, 8, K), ROWS[48:80], ROWS[80], ROWS[81:].reshape(3, 5, K)],
    "an empty batch": [ROWS[:0], ROWS[:50], ROWS[50:50].reshape(2, 0, K), ROWS[50:]],
    "labels": [(x, torch.arange(len(x))) for x in ROWS.split(40)],
    "dicts": [{"labels": torch.arange(len(x)), "input": x} for x in ROWS.split(40)],
}


@pytest.mark.parametrize("loader", SHAPES.values(), ids=SHAPES)
def test_batches_of_any_shape_give_what_their_rows_give(loader):
    """Bit for bit. The model has one layer, since torch's matmul may round differently for other batch sizes.

    Smoothing and rounding are left out, where every second batch judges. What they are made of is the same.
    """
    config = QConfig(rounding="nearest", smoothing="none")
    same(convert(model()[:2], loader, config=config), convert(model()[:2], [ROWS], config=config))
    net = model()[:2]
    ragged, whole = (calibrate(net, data, find_layers(net), config).records["1"] for data in (loader, [ROWS]))
    assert torch.equal(ragged.extremes, whole.extremes)
    assert torch.equal(ragged.whole.peak, whole.whole.peak)


def test_rounding_sees_the_same_rows_whatever_their_batches():
    """XᵀX is summed in another order, so a weight halfway between two codes may round to the other one."""
    whole, ragged = (convert(model(), loader, config=GPTQ) for loader in ([ROWS], SHAPES["sequences of many lengths"]))
    assert [layer.rounding for layer in ragged.torchq_plan.layers.values()] == ["gptq", "gptq"]
    for a, b in ((whole[1], ragged[1]), (whole[3], ragged[3])):
        assert (a.weight != b.weight).float().mean() < 0.01
        assert torch.equal(a.weight_scale, b.weight_scale)


# ---- little data ----


class Pooled(nn.Module):
    """`body` gets a row per token, the two heads a row per sample, and `rare` none."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.norm, self.rare = nn.Linear(K, K), nn.LayerNorm(K), nn.Linear(K, 2)
        self.head, self.first = nn.Linear(K, 4), nn.Linear(K, 4)

    def forward(self, x):
        y = self.body(x)
        return self.head(self.norm(y.mean(1))) + self.first(x[:5, 0]).sum()


def caught(call):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        result = call()
    return result, found


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_few_rows_are_one_warning_with_the_numbers_and_a_model_that_works(rounding):
    net, data = Pooled().eval(), [normal(6, 8, K, seed=i) for i in range(2)]
    qmodel, found = caught(lambda: convert(net, data, config=QConfig(rounding=rounding)))
    (warning,) = found
    assert warning.category is UserWarning
    assert warning.filename == __file__
    assert str(warning.message) == (
        "torchq.convert: 2 of 4 layers saw fewer than 16 rows (samples, or tokens) of calib_loader, 'first' the fewest:"
        " 10. What so few rows choose may not suit other data: 1 new row in 11, or more, is to be expected outside of "
        "their range. Pass more data, a hundred samples or more, or none at all for dynamic quantization."
    )
    assert sqnr_db(net(data[0]), qmodel(data[0])) > 25


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("activation", ["auto", "static", "dynamic"])
def test_the_bound_is_as_stated(activation, inplace):
    """One row less gives the warning. If warnings are errors, the model stays as it was, also in place."""
    config = QConfig(activation=activation, observer="minmax")
    assert MIN_ROWS == 16
    convert(model(), [ROWS[:10], ROWS[10:MIN_ROWS]], config=config)
    given = model()
    before = snapshot(given)
    with pytest.raises(UserWarning, match=r"2 of 2 layers saw fewer than 16 .* '1' the fewest: 15\."):
        convert(given, [ROWS[:10], ROWS[10 : MIN_ROWS - 1]], config=config, inplace=inplace)
    assert snapshot(given) == before


def test_one_row_is_enough_for_a_model_that_works():
    for x in (ROWS[:1], ROWS[0]):
        qmodel, found = caught(lambda x=x: convert(model(), [x], config=AUTO))
        assert len(found) == 1
        assert sqnr_db(model()(x), qmodel(x)) > 25
        assert qmodel(ROWS).isfinite().all()


def test_who_is_not_warned():
    """No warning for layers without any row, which have their own reason, nor for ranges from training."""
    caught_none = [
        caught(lambda: convert(model(), [ROWS, ROWS[:0]])),
        caught(lambda: convert(model(), [ROWS[:0]])),
        caught(lambda: convert(model())),
        caught(lambda: convert(prepare_qat(model(), [ROWS[:3]]), [ROWS[:3]])),
        caught(lambda: convert(model(), [ROWS[:3]], config=QConfig(exclude=("*",)))),
    ]
    *before, last = [[str(each.message) for each in found] for _, found in caught_none]
    assert before == [[]] * 4
    assert ["nothing became int8" in message for message in last] == [True]


# ---- NaN and infinity ----


@pytest.mark.parametrize("observer", ["auto", *OBSERVERS])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("inplace", [False, True])
def test_every_observer_names_the_layer_and_the_batch(observer, bad, inplace):
    """The norm turns a non-finite input into NaN. Layer '1' reads it first, so '1' must be named, not '3'."""
    x = ROWS.clone()
    x[5, 2] = bad
    given = model()
    before = snapshot(given)
    with pytest.raises(ValueError, match=r"^torchq.convert: layer '1' got an input that is not finite in batch 1 of "):
        convert(given, [ROWS, x], inplace=inplace, config=QConfig(observer=observer, rounding="gptq"))
    assert snapshot(given) == before


# ---- constant values ----


def with_channel(value):
    x = ROWS.clone()
    x[:, 3] = value
    return x


CONSTANT = {
    "zeros": torch.zeros(96, K),
    "equal": torch.full((96, K), 0.7),
    "negative": torch.full((96, K), -3.0),
    "denormal": torch.full((96, K), 1e-40),
    "a channel of zeros": with_channel(0),
    "a constant channel": with_channel(5),
    "equal rows": ROWS[:1].repeat(96, 1),
    "zeros but one row": torch.cat([ROWS[:1], torch.zeros(95, K)]),
}
CHOICES = {
    "-".join(choice): QConfig(activation=choice[0], observer=choice[1], smoothing=choice[2], rounding=choice[3])
    for choice in [
        *pairs_of(("auto", "static", "dynamic"), ("auto",), ("auto", "none"), ("nearest", "auto")),
        *pairs_of(("static",), OBSERVERS, ("auto",), ("gptq",)),
    ]
}


@pytest.mark.parametrize(("case", "choice", "place"), pairs_of(CONSTANT, CHOICES, ("behind the norm", "at once")))
def test_constant_inputs_give_a_finite_and_good_model(case, choice, place):
    """15 dB on the calibration data, and finite on other data. Other tests check the norm's outliers."""
    x, net = CONSTANT[case], model(outliers=1)[place == "at once" :]
    qmodel = convert(copy.deepcopy(net), [x[:50], x[50:]], config=CHOICES[choice])
    assert sqnr_db(net(x), qmodel(x)) > 15
    assert qmodel(ROWS).isfinite().all()
    assert all(value.isfinite().all() for value in qmodel.state_dict().values() if value.is_floating_point())


@pytest.mark.parametrize("config", CHOICES.values(), ids=CHOICES)
def test_zeros_are_exact(config):
    """Every range represents zero exactly, so zeros give exactly the bias."""
    layer = nn.Sequential(nn.Linear(K, 8)).eval()
    for data in (CONSTANT["zeros"], ROWS, CONSTANT["equal"], CONSTANT["negative"]):
        qmodel = convert(layer, [data], config=QConfig(**{**vars(config), "rounding": "nearest"}))
        assert torch.equal(qmodel(CONSTANT["zeros"]), layer(CONSTANT["zeros"]))
    qmodel = convert(layer, [CONSTANT["zeros"]], config=config)  # with zeros only, gptq is not tried
    assert torch.equal(qmodel(CONSTANT["zeros"]), layer(CONSTANT["zeros"]))
