"""GELU and SiLU in the epilogue: the same bits in every kernel, and closer to the exact function than torch's own."""

import pytest
import torch
from torch import nn

from helpers.compare import assert_identical
from helpers.numbers import normal
from torchq import QConfig, QuantizedLinear, convert, kernels, ops, simulate
from torchq.modules.folding import Fold
from torchq.ops import Activation

EXACT = {
    Activation.GELU: lambda x: x * 0.5 * torch.special.erfc(-x / 2**0.5),
    Activation.GELU_TANH: lambda x: x * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)),
    Activation.SILU: lambda x: x * torch.sigmoid(x),
}
TORCH = {
    Activation.GELU: nn.functional.gelu,
    Activation.GELU_TANH: lambda x: nn.functional.gelu(x, approximate="tanh"),
    Activation.SILU: nn.functional.silu,
}
MODULES = {
    Activation.GELU: nn.GELU,
    Activation.GELU_TANH: lambda: nn.GELU(approximate="tanh"),
    Activation.SILU: nn.SiLU,
}
curves = pytest.mark.parametrize("activation", EXACT, ids=lambda activation: activation.name)
SPECIAL = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e-45, 1e30, 3e38, torch.inf, torch.nan])
X = torch.cat([torch.linspace(-13, 13, 20_001), torch.linspace(-100, 100, 2_001), SPECIAL])


def applied(activation, x, out_dtype=torch.float32, rows=7, **kwargs):
    """Runs only the epilogue: without input features, y is the bias."""
    packed = ops.pack(torch.zeros(len(x), 0, dtype=torch.int8), torch.ones(len(x)), x)
    return ops.linear_static(torch.zeros(rows, 0), packed, 1.0, 0, out_dtype, activation=activation, **kwargs)


@curves
@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16, torch.float16, torch.uint8], ids=str)
def test_every_kernel_gives_the_bits_of_the_reference(kernel, activation, out):
    pair = {"y_scale": 0.05, "y_zero_point": 13} if out == torch.uint8 else {}
    with kernels.use("reference"):
        expected = applied(activation, X, out, rows=1, **pair)
    actual = applied(activation, X, out, **pair)
    assert_identical(actual, expected.expand_as(actual))


@curves
def test_relative_error(activation):
    """The relative error is below 5e-7 for normal numbers. gelu_tanh adds |2u|·2^-22, the rounding of its exponent."""
    x = X[(X > -9) & X.isfinite() & (X.abs() > 1e-20)]
    exact = EXACT[activation](x.double())
    exponent = 2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3).abs() if activation == Activation.GELU_TANH else 0 * x
    bound = 5e-7 + torch.where(x < 0, exponent, 0).double() * 2**-22
    assert ((applied(activation, x)[0].double() - exact).abs() <= bound * exact.abs()).all()


@curves
def test_close_to_torch(activation):
    """Torch's own GELU rounds 1 + erf, with an error of about 2^-22 of x, so the comparison can't be tighter."""
    x = X[X.isfinite()]
    expected = TORCH[activation](x)
    assert ((applied(activation, x)[0] - expected).abs() <= 1e-6 * expected.abs() + 2**-21 * x.abs() + 1e-37).all()


@curves
def test_the_ends(activation):
    y = applied(activation, torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0]))[0]
    assert y[0].isnan()
    assert y[1] == torch.inf
    assert -1e-35 < y[2] <= 0
    assert y[3] == 0


@curves
def test_acts_on_what_the_layer_computed(kernel, activation, generator):
    """With many tiles and a partial panel, y is the activation of the plain layer's output (tested in test_ops.py)."""
    weight = torch.randint(-128, 128, (83, 37), dtype=torch.int8, generator=generator)
    packed = ops.pack(weight, torch.full((83,), 0.01), torch.randn(83, generator=generator))
    x = torch.randn(29, 37, generator=generator)
    plain = ops.linear_dynamic(x, packed)
    assert_identical(ops.linear_dynamic(x, packed, activation), applied_each(activation, plain))


def applied_each(activation, y):
    return applied(activation, y.flatten(), rows=1).reshape(y.shape)


@curves
@pytest.mark.parametrize("scheme", ["static", "dynamic"])
def test_convert_folds_it(activation, scheme):
    """Int8 agrees with the simulation, static layers may pass u8 codes, and the folded modules stay."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), MODULES[activation](), nn.Dropout(), nn.Linear(40, 8)).eval()
    x = torch.randn(64, 24)
    qmodel = convert(model, [x], config=QConfig(activation=scheme))
    plan = qmodel.torchq_plan.layers["0"]
    assert (plan.activation, plan.feeds) == ("1", "3" if scheme == "static" else None)
    assert type(qmodel[0]) is QuantizedLinear
    assert type(qmodel[1]) is MODULES[activation]().__class__
    assert qmodel[0].fold == Fold(activation, codes=scheme == "static")
    with simulate(), torch.no_grad():
        simulated = qmodel(x)
    # A code may differ by one where roundings cross a tie. That moves y by weight · scale, for 40 codes at most.
    step = 0 if scheme == "dynamic" else qmodel[3].input_qparams.scale * model[3].weight.abs().max().item()
    assert (qmodel(x) - simulated).abs().max() <= step + 1e-5


def test_two_curves_are_not_one():
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.GELU(), nn.SiLU(), nn.Linear(8, 8)).eval()
    qmodel = convert(model, [normal(16, 8)])
    assert qmodel.torchq_plan.layers["0"].activation == "1"
    assert [type(module) for module in qmodel[1:4]] == [nn.GELU, nn.GELU, nn.SiLU]
