"""Quantization-aware training of nn.LSTM, nn.GRU, nn.RNN and their cells: every step multiplies by int8's values."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import torchq
from helpers.compare import assert_identical
from helpers.covers import pairs_of
from helpers.numbers import normal
from helpers.recurrent import Alone, flat, given_state
from torchq import QConfig, QuantizedLinear, convert, prepare_qat, simulate
from torchq.modules.qat_recurrent import QAT_OF_KIND
from torchq.modules.recurrent import QuantizedCell, QuantizedRecurrent

IN, HIDDEN, STEPS, BATCH = 16, 24, 5, 3
OPTIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "both ways, layers": {"bidirectional": True, "num_layers": 2, "dropout": 0.3},
    "batch first": {"batch_first": True},
    "projections": {"proj_size": 20, "num_layers": 2},
}
SCHEMES = {"learned": ("static", "learned"), "observed": ("static", "observed"), "dynamic": ("dynamic", "auto")}
KINDS = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}
CELLS = {"LSTM": nn.LSTMCell, "GRU": nn.GRUCell, "RNN": nn.RNNCell}
X = normal(STEPS, BATCH, IN)


def alone(kind, **options):
    torch.manual_seed(0)
    return Alone(kind(IN, HIDDEN, **options))


def prepared(model, scheme="learned", data=(X,), **config):
    activation, ranges = SCHEMES[scheme]
    data = None if activation == "dynamic" else list(data)
    return prepare_qat(model, data, config=QConfig(activation=activation, **config), ranges=ranges)


def train(model, *xs, steps=3):
    """Trains for a few steps on arbitrary targets; gives the losses."""
    optimizer, losses = torch.optim.Adam(model.train().parameters(), lr=5e-3), []
    for _ in range(steps):
        optimizer.zero_grad()
        ys = [y for y in flat(model(*xs)) if y.is_floating_point()]
        loss = sum((y - normal(*y.shape, seed=5).tanh()).square().mean() for y in ys)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def assert_simulated(qmodel, model, *xs):
    with simulate(), torch.no_grad():
        for actual, expected in zip(flat(qmodel(*xs)), flat(model(*xs)), strict=True):
            assert_identical(actual, expected)


@pytest.mark.parametrize(
    ("kind", "options", "scheme", "weight"), pairs_of(KINDS, OPTIONS, SCHEMES, ["per_channel", "per_tensor"]), ids=str
)
def test_the_training_forward_is_the_simulated_forward_of_the_converted_model(kind, options, scheme, weight):
    if options == "projections":
        kind = "LSTM"
    model = prepared(alone(KINDS[kind], **OPTIONS[options]), scheme, weight=weight)
    assert type(model.rnn) is QAT_OF_KIND[KINDS[kind]]
    train(model, X)
    qmodel = convert(model)
    assert type(qmodel.rnn) is QuantizedRecurrent
    assert_simulated(qmodel, model, X)
    assert_simulated(qmodel, model, X, given_state(model.rnn, STEPS if model.rnn.batch_first else BATCH))
    assert_simulated(qmodel, model, X[0])
    for name, part in qmodel.rnn.named_children():
        trained = model.rnn.form(name)
        expected = QuantizedLinear.from_float(
            model.rnn.matrix(name), per_channel=weight == "per_channel", channel_scale=trained.channel_scale
        )
        assert_identical(part.weight_int8, expected.weight_int8)
        assert part.input_qparams == trained.input_range.qparams()
        assert (part.input_qparams is None) == (scheme == "dynamic")


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_cells(kind, scheme):
    model = prepared(alone(CELLS[kind]), scheme, data=(X[0],))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, X[0])
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] in (
        [],
        ["rnn.weight_hh", "rnn.qat_parts.hh.input_range.ends"],  # h is zero, and so is its product
        ["rnn.weight_hh"],
    )
    qmodel = convert(model)
    assert type(qmodel.rnn) is QuantizedCell
    h = normal(BATCH, HIDDEN, seed=2)
    state = (h, normal(BATCH, HIDDEN, seed=3)) if kind == "LSTM" else h
    for call in ((X[0],), (X[1], state), (X[0, 0],)):
        assert_simulated(qmodel, model, *call)


def test_packed_sequences_and_16_bits():
    packed = pack_sequence([normal(length, IN, seed=length) for length in (2, 5, 3)], enforce_sorted=False)
    model = prepared(alone(nn.GRU, bidirectional=True), data=(packed,))
    train(model, packed)
    assert_simulated(convert(model), model, packed)
    model = prepared(alone(nn.LSTM).bfloat16(), data=(X.bfloat16(),), exclude=("rnn.hh_l0",))
    train(model, X.bfloat16())
    assert model.rnn.form("hh_l0") is None
    assert_simulated(convert(model), model, X.bfloat16())


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_reach_all_that_trains_and_names_stay(options):
    model = prepared(alone(nn.LSTM, **OPTIONS[options]))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    weights = {name for name, _ in alone(nn.LSTM, **OPTIONS[options]).named_parameters()}
    parts = [name.removeprefix("rnn.weight_") for name in weights if ".weight_" in name]
    assert set(before) == weights | {f"rnn.qat_parts.{part}.input_range.ends" for part in parts}
    train(model, X, steps=2)
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []


@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_loss(kind):
    losses = train(prepared(alone(KINDS[kind])), X, steps=60)
    assert losses[-1] < 0.7 * losses[0]


def test_the_gradient_is_that_of_the_float_module_at_rounded_weights():
    """With inputs in float: what rounding passes straight through is the identity."""
    model = alone(nn.LSTM)
    parts = ("ih_l0", "hh_l0")
    model = prepare_qat(model, config=QConfig(activation="dynamic"))
    for part in parts:
        model.rnn.form(part).input_range = nn.Identity()
    twin = alone(nn.LSTM)
    with torch.no_grad():
        for part in parts:
            getattr(twin.rnn, f"weight_{part}").copy_(model.rnn.form(part).rounded(model.rnn.matrix(part).weight))
    for each in (model, twin):
        each(X)[0].square().sum().backward()
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-5)


def test_states_and_copies():
    model = prepared(alone(nn.LSTM), "observed")
    train(model, X)
    other = prepared(alone(nn.LSTM), "observed").eval()
    other.load_state_dict(model.state_dict(), strict=True)
    for twin in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_identical(twin(X)[0], model(X)[0])
        train(twin, X)
        assert not torch.equal(twin(X)[0], model(X)[0])


@pytest.mark.parametrize("inplace", [False, True])
def test_what_is_left_out_is_float_again(inplace):
    model = nn.ModuleDict({"rnn": nn.GRU(IN, HIDDEN), "head": nn.Linear(HIDDEN, HIDDEN)})
    names = set(model.state_dict())
    model = prepare_qat(model)
    back = convert(model, config=QConfig(exclude=("rnn",)), inplace=inplace)
    assert type(back["rnn"]) is nn.GRU
    assert set(back.state_dict()) == names  # nothing was trained, so no layer is ready
    reason = torchq.plan_of(back).layers["head"].reason
    assert reason.startswith("its trained range is not finite: no training batch reached it")
    assert_identical(back["rnn"](X)[0].detach(), back["rnn"].forward(X)[0].detach())


def test_data_never_moves_a_trained_part_to_float():
    """Untrained, the first input product of such a layer returns to float, for the output is bad with it in int8."""
    data = [X.clone(), X.flip(0)]
    for x in data:
        x[..., 0] = 200  # beside which the other inputs have few codes
    plain, config = alone(nn.RNN), {"smoothing": "none"}
    with torch.no_grad():
        plain.rnn.weight_ih_l0[:, 0] = 0
    model = prepared(plain, data=data, **config)

    def kinds(model):
        plan = convert(model.eval(), data, config=QConfig(**config, min_sqnr_db=-100)).torchq_plan
        return [layer.kind.partition(" ")[0] for layer in plan.layers.values()]

    assert kinds(plain) == ["float", "int8"]
    assert kinds(model) == ["int8", "int8"]


def test_bad_input():
    model = prepared(alone(nn.LSTM))
    with pytest.raises(ValueError, match=r"QATLSTM: input must be \(steps, batch, features\).* got \(5, 3, 4\)"):
        model(X[..., :4])
    with pytest.raises(TypeError, match=r"QATLSTM: hx must be the tuple \(h_0, c_0\), got Tensor"):
        model(X, X)
    with pytest.raises(TypeError, match=r"QATLSTM: input must be float32, bfloat16 or float16, got torch.float64"):
        model(X.double())
    with pytest.raises(ValueError, match=r"the model is already prepared \('rnn.ih_l0' is a QATLSTM\)"):
        prepare_qat(model)
