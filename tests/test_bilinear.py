"""nn.Bilinear in int8 and in training: its product with the second input, and the sums with the first in float."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import torchq
from helpers.compare import assert_identical
from helpers.covers import pairs_of
from helpers.numbers import normal
from torchq import QConfig, QuantizedLinear, apply_plan, convert, plan_of, prepare_qat, report, simulate
from torchq.modules.bilinear import QATBilinear, QuantizedBilinear
from torchq.numerics.metrics import sqnr_db

ONE, TWO, OUT = 24, 40, 17
X, Y = normal(33, ONE, seed=1), normal(33, TWO, seed=2)


class Pair(nn.Module):
    """Called with two inputs, the second by its name."""

    def __init__(self, bias=True, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.pair = nn.Bilinear(ONE, TWO, OUT, bias=bias, dtype=dtype)

    def forward(self, x, y):
        return self.pair(x, input2=y)


DATA = [(normal(64, ONE, seed=10 + i), normal(64, TWO, seed=20 + i)) for i in range(4)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("data", [None, DATA], ids=["without data", "calibrated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_it_is_the_sum_over_an_int8_layers_products(bias, data, dtype):
    model = Pair(bias, dtype)
    x, y = X.to(dtype), Y.to(dtype)
    data = data and [tuple(each.to(dtype) for each in batch) for batch in data]
    qmodel = convert(model, data)
    assert type(qmodel.pair) is QuantizedBilinear
    products = qmodel.pair.product(y.float()).unflatten(-1, (OUT, ONE))
    expected = torch.einsum("boi,bi->bo", products.double(), x.double())
    expected = expected if not bias else expected + model.pair.bias.double()
    actual = qmodel(x, y)
    assert (actual.dtype, actual.shape) == (dtype, (33, OUT))
    rounding = 2.0**-20 if dtype == torch.float32 else 2.0**-8  # 24 sums of numbers up to 2; and that of the dtype
    torch.testing.assert_close(actual.double(), expected, rtol=rounding, atol=8 * 2.0**-20)
    assert sqnr_db(model(x, y).float(), actual.float()) > 35


@torch.no_grad()
def test_shapes_and_what_foreign_code_reads():
    model, qmodel = Pair(), convert(Pair())
    for leading in ((), (2, 3), (0,)):
        x, y = normal(*leading, ONE), normal(*leading, TWO, seed=4)
        assert qmodel(x, y).shape == model(x, y).shape
    assert isinstance(qmodel.pair, nn.Bilinear)
    assert repr(qmodel.pair).startswith(
        "QuantizedBilinear(\n  in1_features=24, in2_features=40, out_features=17, bias=True"
    )
    assert sqnr_db(model.pair.weight, qmodel.pair.weight + 0) > 40
    assert qmodel.pair.weight.shape == model.pair.weight.shape
    with pytest.raises(RuntimeError, match="can't be written"):
        qmodel.pair.weight = model.pair.weight
    whole = report(qmodel).model
    assert (whole.int8_weights, whole.weights) == (ONE * TWO * OUT, ONE * TWO * OUT)
    assert whole.bytes_after < 0.35 * whole.bytes_before


def test_plans_states_and_copies(tmp_path):
    qmodel = convert(Pair(), DATA)
    x, y = X, Y
    expected = qmodel(x, y).detach()
    again, file = apply_plan(Pair(), plan_of(qmodel)), io.BytesIO()
    torch.save(qmodel.state_dict(), file)
    file.seek(0)
    loaded = convert(Pair(), DATA)
    loaded.pair.product.replace_weight(torch.zeros(OUT * ONE, TWO, dtype=torch.int8), torch.ones(OUT * ONE), None)
    loaded = apply_plan(Pair(), qmodel.torchq_plan) if qmodel.pair.product.has_bias else loaded
    loaded.load_state_dict(torch.load(file, weights_only=True))
    torchq.save(qmodel, tmp_path / "m.safetensors")
    mapped = torchq.load(tmp_path / "m.safetensors", Pair())
    for twin in (again, loaded, mapped, copy.deepcopy(qmodel), pickle.loads(pickle.dumps(qmodel))):
        assert_identical(twin(x, y).detach(), expected)


def test_gradients_reach_both_inputs():
    model, qmodel = Pair(), convert(Pair())
    both = []
    for each in (model, qmodel):
        x, y = X.clone().requires_grad_(), Y.clone().requires_grad_()
        each(x, y).square().sum().backward()
        both.append((x.grad, y.grad))
    assert all(sqnr_db(exact, found) > 30 for exact, found in zip(*both, strict=True))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@torch.no_grad()
def test_compiled_and_exported():
    qmodel = convert(Pair().eval())
    torch.compiler.reset()
    assert_identical(torch.compile(qmodel, backend="eager", fullgraph=True)(X, Y), qmodel(X, Y))
    assert_identical(torch.export.export(qmodel, (X, Y)).module()(X, Y), qmodel(X, Y))


# ---- In training ----


def train(model, steps=3):
    optimizer, losses = torch.optim.Adam(model.train().parameters(), lr=3e-3), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(X, Y) - normal(33, OUT, seed=5)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


SCHEMES = {"learned": (DATA, "static"), "observed": (None, "static"), "dynamic": (None, "dynamic")}


@pytest.mark.parametrize(
    ("scheme", "weight", "bias"), pairs_of(SCHEMES, ["per_channel", "per_tensor"], [True, False]), ids=str
)
def test_the_training_forward_is_the_simulated_forward_of_the_converted_model(scheme, weight, bias):
    data, activation = SCHEMES[scheme]
    model = prepare_qat(Pair(bias), data, config=QConfig(weight=weight, activation=activation))
    assert type(model.pair) is QATBilinear
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = train(model, steps=20)
    assert losses[-1] < 0.8 * losses[0]
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []
    qmodel = convert(model)
    with simulate(), torch.no_grad():
        assert_identical(qmodel(X, Y), model(X, Y))
    expected = QuantizedLinear.from_float(
        model.pair.matrix("product"),
        per_channel=weight == "per_channel",
        channel_scale=model.pair.form("product").channel_scale,
    )
    assert_identical(qmodel.pair.product.weight_int8, expected.weight_int8)
    twin = copy.deepcopy(model)
    assert_identical(twin(X, Y), model(X, Y))
    back = convert(model, config=QConfig(exclude=("pair",)))
    assert type(back.pair) is nn.Bilinear


# ---- Bad input ----


class Halved(nn.Bilinear):
    def forward(self, input1, input2):
        return super().forward(input1, input2) / 2


@pytest.mark.filterwarnings("ignore:torchq.convert. nothing became int8")
def test_what_stays_float_says_why():
    halved = convert(nn.ModuleList([Halved(ONE, TWO, OUT)]))
    assert type(halved[0]) is Halved
    assert halved.torchq_plan.layers["0.product"].reason == "Halved has a forward of its own"


@pytest.mark.parametrize("make", [lambda: convert(Pair()), lambda: prepare_qat(Pair())], ids=["int8", "training"])
def test_bad_input(make):
    model = make()
    with pytest.raises(
        ValueError, match=r"the inputs must be \(..., 24\) and \(..., 40\) .* got \(33, 40\) and \(33, 24\)"
    ):
        model(Y, X)
    with pytest.raises(ValueError, match=r"the same leading dimensions, got \(3, 24\) and \(33, 40\)"):
        model(X[:3], Y)
    with pytest.raises(TypeError, match=r"of one dtype, got torch.float64 and torch.float64"):
        model(X.double(), Y.double())
    with pytest.raises(TypeError, match=r"of one dtype, got torch.bfloat16 and torch.float32"):
        model(X.bfloat16(), Y)
