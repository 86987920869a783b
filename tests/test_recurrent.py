"""nn.LSTM, nn.GRU and nn.RNN in int8: what they compute, all their options, and what foreign code reads of them."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

from helpers.compare import assert_identical
from helpers.numbers import normal
from helpers.recurrent import Alone, assert_alike, assert_same, converted, flat, given_state, parts_called
from torchq import QConfig, apply_plan, convert, plan_of, report
from torchq.modules.recurrent import QuantizedRecurrent
from torchq.numerics.metrics import sqnr_db

pytestmark = pytest.mark.usefixtures("seeded")

KINDS = pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])


# ---- Options ----

OPTIONS = [
    {},
    {"bias": False},
    {"num_layers": 3},
    {"bidirectional": True, "num_layers": 2},
    {"batch_first": True, "bidirectional": True},
    {"nonlinearity": "relu"},
    {"proj_size": 12},
    {"proj_size": 12, "num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False},
]


def layer(kind, **options):
    if ("proj_size" in options and kind is not nn.LSTM) or ("nonlinearity" in options and kind is not nn.RNN):
        pytest.skip(f"{kind.__name__} has no such option")
    return kind(16, 40, **options).eval()


@KINDS
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(kind, options):
    """With a state and without; the op gives the bits of its parts called one by one."""
    rnn = layer(kind, **options)
    quantized, x = converted(rnn), normal(5, 3, 16)
    assert_alike(quantized(x), rnn(x))
    assert_same(parts_called(quantized)(x), quantized(x))
    state = given_state(rnn, 5 if rnn.batch_first else 3)
    assert_alike(quantized(x, state), rnn(x, state))
    assert_same(parts_called(quantized)(x, state), quantized(x, state))


@KINDS
def test_on_every_kernel(kind, kernel):
    rnn, x = kind(16, 40, num_layers=2, bidirectional=True).eval(), normal(4, 7, 16)
    quantized = converted(rnn)
    assert_alike(quantized(x), rnn(x))
    assert_same(parts_called(quantized)(x), quantized(x))


@KINDS
@pytest.mark.parametrize("batch_first", [False, True])
def test_an_input_without_a_batch(kind, batch_first):
    rnn = kind(16, 40, num_layers=2, bidirectional=True, batch_first=batch_first).eval()
    quantized, x = converted(rnn), normal(5, 16)
    assert_alike(quantized(x), rnn(x))
    assert_alike(quantized(x, given_state(rnn)), rnn(x, given_state(rnn)))
    batched = quantized(x.unsqueeze(0 if batch_first else 1))
    assert_identical(quantized(x)[0], batched[0].squeeze(0 if batch_first else 1))


@KINDS
@pytest.mark.parametrize("in_order", [False, True])
def test_packed_sequences(kind, in_order):
    """Of each structure that torch returns; and each sequence gets what it gets alone."""
    rnn = kind(16, 40, num_layers=2, bidirectional=True).eval()
    quantized, lengths = converted(rnn), [5, 4, 4, 1] if in_order else [4, 1, 5, 4]
    sequences = [normal(length, 16, seed=i) for i, length in enumerate(lengths)]
    packed, state = pack_sequence(sequences, enforce_sorted=in_order), given_state(rnn, 4)
    assert_alike(quantized(packed), rnn(packed))
    assert_alike(quantized(packed, state), rnn(packed, state))
    assert_same(parts_called(quantized)(packed, state), quantized(packed, state))
    y, last = quantized(packed)
    padded, _ = nn.utils.rnn.pad_packed_sequence(y)
    h = last[0] if kind is nn.LSTM else last
    for i, sequence in enumerate(sequences):
        alone, own = quantized(sequence)
        assert_identical(padded[: len(sequence), i], alone)
        assert_identical(h[:, i], own[0] if kind is nn.LSTM else own)


def test_a_packed_sequence_of_a_padded_batch():
    rnn = nn.LSTM(16, 40, batch_first=True).eval()
    packed = pack_padded_sequence(normal(3, 6, 16), torch.tensor([6, 2, 3]), batch_first=True, enforce_sorted=False)
    assert_alike(converted(rnn)(packed), rnn(packed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype):
    """Input and output are of the dtype, all between is in float32."""
    rnn, x = nn.LSTM(16, 40, num_layers=2).eval(), normal(5, 3, 16).to(dtype)
    quantized, state = converted(rnn), tuple(each.to(dtype) for each in given_state(rnn, 3))
    actual, exact = quantized(x, state), quantized(x.float(), tuple(each.float() for each in state))
    assert {t.dtype for t in flat(actual)} == {dtype}
    assert_same(actual, (exact[0].to(dtype), tuple(each.to(dtype) for each in exact[1])))
    assert converted(nn.LSTM(16, 40).to(dtype)).weight_hh_l0.dtype == dtype


def test_under_autocast_it_computes_in_float32():
    rnn, x = nn.GRU(16, 40).eval(), normal(5, 3, 16)
    quantized = converted(rnn)
    expected = quantized(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(quantized(x), expected)


def test_dropout_acts_between_layers_in_training_only():
    rnn, x = nn.LSTM(16, 40, num_layers=3, dropout=0.5), normal(5, 3, 16)
    quantized = converted(rnn)
    assert_alike(quantized(x), rnn.eval()(x))
    quantized.train()
    torch.manual_seed(1)
    first = quantized(x)
    assert sqnr_db(quantized(x)[0], first[0]) < 20
    torch.manual_seed(1)
    assert_same(quantized(x), first)
    quantized.dropout = 0.0
    assert_same(quantized(x), quantized.eval()(x))


# ---- Accuracy ----


@pytest.mark.parametrize(("kind", "hidden"), [(nn.LSTM, 256), (nn.GRU, 256), (nn.LSTM, 40)])
def test_errors_do_not_grow_over_many_steps(kind, hidden):
    """41 dB over 160 steps, as in the first ones."""
    rnn, x = kind(hidden, hidden).eval(), normal(160, 2, hidden)
    exact, actual = rnn(x)[0], converted(rnn)(x)[0]
    assert sqnr_db(exact, actual) > 38
    assert sqnr_db(exact[-20:], actual[-20:]) > 38


def test_where_steps_amplify_errors_the_first_input_stays_in_float():
    """Gates are saturated, and the input has a wide range: as in a speaker encoder that takes a power spectrum."""
    rnn = nn.LSTM(16, 64).eval()
    rnn.weight_ih_l0.mul_(1000)
    rnn.weight_hh_l0.mul_(2)
    *data, x = (normal(40, 4, 16, seed=i).mul(2).exp() * 0.01 for i in range(5))
    model = nn.Sequential(rnn)
    qmodel = convert(model, data)
    plan = qmodel.torchq_plan
    assert plan.layers["0.ih_l0"].kind == "float"
    assert "the steps amplify its errors" in plan.layers["0.ih_l0"].reason
    assert plan.layers["0.hh_l0"].is_int8
    assert plan.checked.chosen == "recurrent inputs in float"
    measured = plan.checked.output_db
    assert measured["as made"] < 30
    assert measured[plan.checked.chosen] > measured["as made"] + 3
    exact, others = model(x)[0], convert(model, data, config=QConfig(activation="dynamic"))
    assert sqnr_db(exact, qmodel(x)[0]) > sqnr_db(exact, others(x)[0]) + 3
    assert isinstance(qmodel[0].ih_l0, nn.Linear)


def test_without_data_a_small_first_input_stays_in_float():
    """Up to 5 % of the weights, unless int8 is asked for; no data say what its errors do."""
    model = nn.Sequential(nn.LSTM(8, 64, num_layers=2, bidirectional=True))
    plan = convert(model).torchq_plan
    assert {name for name, layer in plan.layers.items() if not layer.is_int8} == {"0.ih_l0", "0.ih_l0_reverse"}
    assert plan.layers["0.ih_l0"].reason.startswith("no data to judge it by: 3.0% of weights")
    assert convert(model, config=QConfig(activation="dynamic")).torchq_plan.layers["0.ih_l0"].is_int8
    assert convert(model, [normal(9, 8, 8)]).torchq_plan.layers["0.ih_l0"].is_int8
    assert convert(nn.Sequential(nn.LSTM(8, 64))).torchq_plan.layers["0.ih_l0"].is_int8


# ---- Calibration and plans ----


def test_calibration_sees_what_each_part_multiplies():
    """Ranges are those of the input, of h before each step, of the layer before, and of what is projected."""
    rnn = nn.LSTM(16, 40, num_layers=2, bidirectional=True, proj_size=12, batch_first=True).eval()
    data = [normal(4, 30, 16, seed=i) for i in range(2)]
    plan = convert(Alone(rnn), data, config=QConfig(activation="static", observer="minmax")).torchq_plan
    assert list(plan.layers)[:4] == ["rnn.ih_l0", "rnn.hh_l0", "rnn.hr_l0", "rnn.ih_l0_reverse"]
    assert {layer.kind for layer in plan.layers.values()} == {"int8 static"}
    first = nn.LSTM(16, 40, bidirectional=True, proj_size=12, batch_first=True).eval()
    first.load_state_dict({name: value for name, value in rnn.state_dict().items() if "l0" in name})
    h = torch.cat([first(x)[0] for x in data])
    inputs = {"ih_l0": torch.cat(data), "ih_l1": h, "ih_l1_reverse": h}
    inputs |= {"hh_l0": h[:, :-1, :12], "hh_l0_reverse": h[:, 1:, 12:]}  # the last h is multiplied by nothing
    for name, values in inputs.items():
        pair, step = plan.layers[f"rnn.{name}"].input_qparams, (values.max() - values.min().clamp(max=0)) / 255
        assert pair.scale == pytest.approx(float(step), rel=1e-5), name
        assert plan.layers[f"rnn.{name}"].stats.rows == 4 * 30


def test_rows_that_a_mask_calls_padding_are_no_data():
    """Of h too, in the order of the input."""

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(16, 40, bidirectional=True, batch_first=True)

        def forward(self, x, attention_mask):
            return self.rnn(x)[0] * attention_mask.unsqueeze(2)

    mask = torch.ones(4, 30)
    mask[:, 20:] = 0
    model, x = Masked().eval(), normal(4, 30, 16)
    x[:, 20:] = 1e6
    plan = convert(model, [{"x": x, "attention_mask": mask}] * 2).torchq_plan
    assert {layer.stats.rows for layer in plan.layers.values()} == {4 * 20}


@pytest.mark.parametrize("config", [{}, {"activation": "static"}, {"rounding": "gptq"}], ids=str)
def test_calibrated(config):
    """Static ranges and GPTQ are for each part; the op has the bits of the parts, with the ranges of each."""
    rnn, data = nn.LSTM(16, 40, num_layers=2).eval(), [normal(20, 8, 16, seed=i) for i in range(4)]
    quantized, x = converted(rnn, data, **config), normal(20, 8, 16, seed=9)
    assert_alike(quantized(x), rnn(x))
    assert_same(parts_called(quantized)(x), quantized(x))


def test_packed_and_bad_batches_are_calibrated_or_refused():
    rnn = nn.LSTM(16, 40).eval()
    packed = [pack_sequence([normal(9 - i, 16, seed=i) for i in range(8)])]
    plan = convert(Alone(rnn), packed, forward=lambda model, batch: model(batch)).torchq_plan
    assert plan.layers["rnn.hh_l0"].stats.rows == sum(range(2, 10))
    with pytest.raises(RuntimeError, match=r"input\.size"):  # torch's own words
        convert(Alone(rnn), [normal(5, 3, 15)])


def test_the_plan_makes_the_same_layer_again():
    rnn, data = nn.LSTM(16, 40, bidirectional=True).eval(), [normal(20, 8, 16, seed=i) for i in range(3)]
    model = Alone(rnn)
    qmodel = convert(model, data, config=QConfig(rounding="gptq"))
    again = apply_plan(model, plan_of(qmodel))
    assert_same(again(data[0]), qmodel(data[0]))
    inplace = convert(copy.deepcopy(model), data, config=QConfig(rounding="gptq"), inplace=True)
    assert_same(inplace(data[0]), qmodel(data[0]))


@pytest.mark.parametrize("part", ["ih_l0", "hh_l0", "hr_l0"])
def test_a_part_may_stay_in_float(part):
    rnn, x = nn.LSTM(16, 40, proj_size=12).eval(), normal(5, 3, 16)
    quantized = converted(rnn, exclude=(f"rnn.{part}",))
    assert isinstance(quantized.get_submodule(part), nn.Linear)
    assert_alike(quantized(x), rnn(x))
    half = converted(copy.deepcopy(rnn).bfloat16(), exclude=(f"rnn.{part}",))
    assert half(x.bfloat16())[0].dtype == torch.bfloat16


def test_report():
    result = report(convert(Alone(nn.LSTM(64, 128, bidirectional=True))))
    rows = {row.name: row for row in result.layers}
    assert list(rows) == ["rnn.ih_l0", "rnn.hh_l0", "rnn.ih_l0_reverse", "rnn.hh_l0_reverse"]
    assert rows["rnn.hh_l0"].bytes_before == 4 * (512 * 128 + 512)
    assert result.model.int8_weights == result.model.weights == 2 * 512 * (64 + 128)
    assert result.model.bytes_after < 0.3 * result.model.bytes_before
    assert result.model.left == ()


# ---- What stays in float ----


class Own(nn.LSTM):
    def forward(self, input, hx=None):
        return super().forward(input + 1, hx)


def parametrized():
    rnn = nn.LSTM(16, 40)
    nn.utils.parametrizations.weight_norm(rnn, "weight_hh_l0")
    return rnn


REASONS = {
    "forward": (Own(16, 40), "Own has a forward of its own"),
    "parametrization": (parametrized(), "its weights are computed by a parametrization, which it does not read"),
    "float64": (nn.LSTM(16, 40).double(), "its weight is torch.float64"),
}


@pytest.mark.parametrize(("rnn", "reason"), REASONS.values(), ids=REASONS)
def test_reasons_to_stay_in_float(rnn, reason):
    with pytest.warns(UserWarning, match="nothing became int8"):
        qmodel = convert(Alone(rnn))
    assert type(qmodel.rnn) is type(rnn)
    assert all(layer.reason.startswith(reason) for layer in qmodel.torchq_plan.layers.values())


def test_a_subclass_with_the_same_forward():
    assert isinstance(convert(Alone(type("Named", (nn.LSTM,), {})(16, 40))).rnn, QuantizedRecurrent)


# ---- Bad input ----

BAD = {
    "no tensor": (([1.0],), TypeError, "QuantizedLSTM: input must be a tensor, got list"),
    "dtype": ((torch.zeros(5, 3, 16).double(),), TypeError, "input must be float32, bfloat16 or float16, got torch.fl"),
    "features": ((torch.zeros(5, 3, 15),), ValueError, r"with 16 features; got \(5, 3, 15\)"),
    "dimensions": ((torch.zeros(2, 5, 3, 16),), ValueError, r"input must be .*got \(2, 5, 3, 16\)"),
    "no steps": ((torch.zeros(0, 3, 16),), ValueError, r"at least one step, got \(0, 3, 16\)"),
    "no tuple": (
        (torch.zeros(5, 3, 16), torch.zeros(1, 3, 40)),
        TypeError,
        r"hx must be the tuple \(h_0, c_0\), got T",
    ),
    "h": (
        (torch.zeros(5, 3, 16), (torch.zeros(1, 2, 40),) * 2),
        ValueError,
        r"hx\[0\] must have the shape \(1, 3, 40\)",
    ),
    "c": (
        (torch.zeros(5, 3, 16), (torch.zeros(1, 3, 40), torch.zeros(1, 3, 41))),
        ValueError,
        r"hx\[1\] must have the shape \(1, 3, 40\), got \(1, 3, 41\)",
    ),
    "h of no batch": ((torch.zeros(5, 16), (torch.zeros(1, 1, 40),) * 2), ValueError, r"the shape \(1, 40\)"),
    "c dtype": (
        (torch.zeros(5, 3, 16), (torch.zeros(1, 3, 40), torch.zeros(1, 3, 40).int())),
        TypeError,
        r"hx\[1\] must be float32, bfloat16 or float16, got torch.int32",
    ),
}


@pytest.mark.parametrize(("args", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(args, error, message):
    with pytest.raises(error, match=message):
        converted(nn.LSTM(16, 40))(*args)
