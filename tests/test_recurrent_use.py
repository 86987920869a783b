"""Recurrent layers in use: state, copies, foreign code, gradients, compiled; and cells."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from torch import nn

from helpers.compare import assert_identical
from helpers.numbers import normal
from helpers.recurrent import Alone, assert_alike, assert_same, converted, flat, given_state
from torchq import QuantizedLinear, convert, prepare_qat, simulate
from torchq.numerics.metrics import sqnr_db

pytestmark = pytest.mark.usefixtures("seeded")

KINDS = pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])


# ---- State, copies, foreign code ----


def test_state_dict_copies_and_pickles():
    rnn, x = nn.LSTM(16, 40, num_layers=2).eval(), normal(5, 3, 16)
    qmodel, file = convert(Alone(rnn)), io.BytesIO()
    other = convert(Alone(nn.LSTM(16, 40, num_layers=2)))
    assert "rnn.hh_l1.weight_int8" in qmodel.state_dict()
    torch.save(qmodel.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for again in (other, copy.deepcopy(qmodel), pickle.loads(pickle.dumps(qmodel))):
        assert_same(again(x), qmodel(x))
        assert_same(again.rnn.weight_hh_l1.clone(), qmodel.rnn.weight_hh_l1.clone())


@KINDS
def test_foreign_code_finds_the_float_modules_attributes(kind):
    rnn = kind(16, 40, num_layers=2, bidirectional=True, **({"proj_size": 12} if kind is nn.LSTM else {}))
    quantized = converted(rnn)
    names = [name for layer in rnn._all_weights for name in layer]
    for name in names:
        exact, value = getattr(rnn, name), getattr(quantized, name)
        assert (value.shape, value.dtype, value.requires_grad) == (exact.shape, exact.dtype, False)
        assert sqnr_db(exact, value.clone()) > 35
        with pytest.raises(RuntimeError, match="can't be written"):
            setattr(quantized, name, exact)
    assert [len(each) for each in quantized.all_weights] == [len(each) for each in rnn.all_weights]
    assert len(quantized._flat_weights) == len(names)
    for name in ("mode", "input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional"):
        assert getattr(quantized, name) == getattr(rnn, name)
    assert quantized.proj_size == rnn.proj_size
    assert quantized.flatten_parameters() is None
    assert repr(quantized).startswith(f"Quantized{kind.__name__}(\n  16, 40, ")
    assert isinstance(quantized.hh_l0, QuantizedLinear)
    with pytest.raises(AttributeError, match="weight_hh_l2"):
        quantized.weight_hh_l2  # noqa: B018
    with pytest.raises(AttributeError, match="bias_ih_l0"):
        converted(kind(16, 40, bias=False)).bias_ih_l0  # noqa: B018


# ---- Other paths ----


@KINDS
def test_simulate(kind):
    """In float on fake-quantized values. A code that differs by one, at a tie, is below 60 dB in these steps."""
    rnn, x = kind(16, 40, num_layers=2, bidirectional=True).eval(), normal(5, 3, 16)
    quantized = converted(rnn)
    with simulate():
        simulated = quantized(x)
    assert_alike(quantized(x), simulated, db=50)
    assert sqnr_db(rnn(x)[0], simulated[0]) < 55


def test_a_gradient_reaches_input_and_state():
    """That of the float layer with the weights the int8 one has; the values are those without gradients."""
    rnn = nn.LSTM(16, 40, num_layers=2, bidirectional=True).eval()
    quantized, x, state = converted(rnn), normal(5, 3, 16), given_state(rnn, 3)
    for name, parameter in rnn.named_parameters():
        parameter.copy_(getattr(quantized, name).clone())
    expected = quantized(x, state)
    gradients = []
    with torch.enable_grad():
        for module in (quantized, rnn):
            inputs = [each.clone().requires_grad_() for each in (x, *state)]
            y, (h, c) = module(inputs[0], tuple(inputs[1:]))
            if module is quantized:
                assert_same((y.detach(), (h.detach(), c.detach())), expected)
            ((y * normal(5, 3, 80, seed=2)).sum() + h.sum() + c.sum()).backward()
            gradients.append([each.grad for each in inputs])
    for got, want in zip(*gradients, strict=True):
        assert sqnr_db(want, got) > 30
    assert quantized(x.requires_grad_())[0].requires_grad is False  # no_grad


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.slow(seconds=8)
def test_compile_and_export():
    rnn, x = nn.LSTM(16, 40, num_layers=2, bidirectional=True, batch_first=True).eval(), normal(3, 5, 16)
    qmodel = convert(nn.Sequential(rnn))
    torch._dynamo.reset()
    compiled = torch.compile(qmodel, fullgraph=True, backend="aot_eager")
    assert_same(compiled(x), qmodel(x))
    program = torch.export.export(qmodel, (x,))
    assert_same(program.module()(x), qmodel(x))
    targets = [str(node.target) for node in program.graph.nodes]
    assert sum("torchq.recurrent" in target for target in targets) == 2


def test_fx_takes_it_for_a_leaf():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(16, 40)

        def forward(self, x):
            return self.rnn(x)[1] * 2

    qmodel, x = convert(Last().eval()), normal(5, 3, 16)
    traced = torch.fx.symbolic_trace(qmodel)
    assert ("call_module", "rnn") in [(node.op, node.target) for node in traced.graph.nodes]
    assert_identical(traced(x), qmodel(x))


def test_a_shared_layer_is_converted_once():
    rnn = nn.GRU(16, 16)
    qmodel, x = convert(nn.ModuleDict({"a": rnn, "b": rnn})), normal(5, 3, 16)
    assert qmodel["a"] is qmodel["b"]
    assert_alike(qmodel["a"](x), rnn(x))


# ---- Cells ----

CELLS = [(nn.LSTMCell, {}), (nn.GRUCell, {}), (nn.RNNCell, {}), (nn.RNNCell, {"nonlinearity": "relu"})]


@pytest.mark.parametrize(("kind", "options"), CELLS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_cells(kind, options, bias):
    """Steps of a cell are those of the layer."""
    cell = kind(16, 40, bias=bias, **options)
    quantized = convert(nn.Sequential(cell))[0]
    x = normal(6, 3, 16)
    h = normal(3, 40, seed=5).tanh()
    state = (h, normal(3, 40, seed=6)) if kind is nn.LSTMCell else h
    assert_alike(quantized(x[0]), cell(x[0]))
    assert_alike(quantized(x[0], state), cell(x[0], state))
    alone = tuple(each[0] for each in state) if kind is nn.LSTMCell else state[0]
    assert_alike(quantized(x[0, 0], alone), cell(x[0, 0], alone))
    assert quantized(x[0].bfloat16())[0].dtype == torch.bfloat16
    names = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if bias else [])]
    assert all(sqnr_db(getattr(cell, name), getattr(quantized, name).clone()) > 35 for name in names)
    twin = getattr(nn, kind.__name__.removesuffix("Cell"))(16, 40, bias=bias, **options)
    twin.load_state_dict({f"{name}_l0": value for name, value in cell.state_dict().items()})
    steps = list(itertools.accumulate(x, lambda state, x: quantized(x, state), initial=state))[1:]
    expected = converted(twin)(x, tuple(each.unsqueeze(0) for each in state) if kind is nn.LSTMCell else h.unsqueeze(0))
    assert_identical(torch.stack([flat(step)[0] for step in steps]), expected[0])


def test_cells_are_calibrated_and_refuse_bad_input():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.GRUCell(16, 40)

        def forward(self, x):
            state = None
            for step in x:
                state = self.cell(step, state)
            return state

    model, data = Loop().eval(), [normal(10, 8, 16, seed=i) for i in range(3)]
    qmodel = convert(model, data)
    assert_alike(qmodel(data[0]), model(data[0]))
    assert qmodel.torchq_plan.layers["cell.hh"].stats.rows == 8
    assert repr(qmodel.cell).startswith("QuantizedGRUCell(\n  16, 40\n")
    with pytest.raises(ValueError, match=r"QuantizedGRUCell: input must be \(batch, features\) .*16.*got \(2, 15\)"):
        qmodel.cell(torch.zeros(2, 15))
    with pytest.raises(ValueError, match=r"hx must have the shape \(2, 40\), got \(3, 40\)"):
        qmodel.cell(torch.zeros(2, 16), torch.zeros(3, 40))


@pytest.mark.parametrize("way", ["plain", "simulated", "with a gradient", "in training form"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.LSTM(16, 40, num_layers=2, bidirectional=True),
        lambda: nn.LSTM(16, 40, proj_size=24, batch_first=True),
        lambda: nn.GRU(16, 40, batch_first=True),
        lambda: nn.RNN(16, 40),
        lambda: nn.LSTMCell(16, 40),
        lambda: nn.GRUCell(16, 40),
    ],
)
def test_a_batch_without_rows(make, way):
    float_module = make()
    is_cell = isinstance(float_module, nn.RNNCellBase)
    make_int8 = prepare_qat if way == "in training form" else convert
    module = make_int8(float_module, [normal(32, 16) if is_cell else normal(8, 8, 16)] * 2)
    shape = (0, 16) if is_cell else (0, 5, 16) if float_module.batch_first else (5, 0, 16)
    x = torch.empty(shape, requires_grad=way == "with a gradient")
    with simulate() if way == "simulated" else torch.set_grad_enabled(x.requires_grad):
        found, expected = flat(module(x)), flat(float_module(x))
    assert [y.shape for y in found] == [y.shape for y in expected]
    assert all(y.dtype == torch.float32 for y in found)
