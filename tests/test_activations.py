"""The activations in the epilogue and on their own: the same bits in every kernel, and close to the exact functions."""

from itertools import cycle

import pytest
import torch
from torch import nn

from helpers.compare import assert_identical
from helpers.models import ACTIVATIONS
from helpers.numbers import normal
from torchq import QConfig, QuantizedLinear, convert, kernels, ops, simulate
from torchq.modules.activations import FUNCTIONS, times_slope
from torchq.modules.curve import Curve
from torchq.modules.folding import Fold
from torchq.ops import Activation

EXACT = {  # in float64, without the cancellation of torch's own GELU
    **FUNCTIONS,
    Activation.GELU: lambda x: x * 0.5 * torch.special.erfc(-x / 2**0.5),
    Activation.GELU_TANH: lambda x: x * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)),
}
MODULES = {a: module for a, module in ACTIVATIONS.items() if a > Activation.RELU}
CURVES = [a for a in Activation if a > Activation.RELU]
curves = pytest.mark.parametrize("activation", CURVES, ids=lambda activation: activation.name)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
SPECIAL = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e-45, 1e30, 3e38, torch.inf, -torch.inf, torch.nan])
BINADES = torch.cat([sign * torch.linspace(1, 2, 101) * 2.0**e for e in range(-126, 7) for sign in (1, -1)])
X = torch.cat([torch.linspace(-13, 13, 20_001), torch.linspace(-100, 100, 2_001), BINADES, SPECIAL])

# The greatest relative error for x down to these. csrc/gemm/activations.inc has the same table.
TAILS = {
    Activation.GELU: {-1: 5e-6, -3: 6e-5, -4: 3e-4, -5: 1e-2},
    Activation.GELU_TANH: {-10: 1.2e-5, -100: 1.2e-5},
}
OTHER_TAILS = {-10: 1.2e-6, -100: 5e-6}


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
def test_absolute_error(activation):
    """6.5e-7, and one rounding of y. Hardswish has two, of 6·y and of y, as in torch."""
    x = X[X.isfinite() & (X.abs() < 1e18)]  # beyond, relu2 is infinite
    exact, y = EXACT[activation](x.double()), ops.activate(x, activation).double()
    rounding = exact.abs() * 2 ** (-23 if activation == Activation.HARDSWISH else -24)
    assert ((y - exact).abs() <= 6.5e-7 + rounding).all()
    assert ((y - exact)[x.abs() < 8].abs() <= 1e-6).all() or activation == Activation.RELU2  # whose y is up to 64


@curves
def test_relative_error_where_y_is_tiny(activation):
    for low, bound in TAILS.get(activation, OTHER_TAILS).items():
        x = X[(X < 0) & (low <= X)]
        exact = EXACT[activation](x.double())
        counts = exact.abs() > 1e-35  # below, results are subnormal, or so small that 0 is as good
        error = (ops.activate(x, activation).double() - exact).abs()
        assert (error[counts] <= bound * exact.abs()[counts]).all(), low


@curves
def test_close_to_torch(activation):
    x = X[X.isfinite() & (X.abs() < 1e18)]
    expected = FUNCTIONS[activation](x)
    assert ((ops.activate(x, activation) - expected).abs() <= 1e-6 + 2**-22 * expected.abs()).all()


@curves
def test_the_ends_are_those_of_torch(activation):
    x = torch.tensor([torch.nan, torch.inf, -torch.inf])
    # torch's float32 GELU gives inf for one +inf and NaN for several; that of float64 always inf
    expected = torch.stack([FUNCTIONS[activation](value.double()) for value in x]).float()
    for rows in (applied(activation, x), ops.activate(x, activation)[None]):
        assert_identical(rows, expected.expand_as(rows))


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


@pytest.mark.parametrize("activation", MODULES, ids=lambda activation: activation.name)
@pytest.mark.parametrize("scheme", ["static", "dynamic"])
def test_convert_folds_it(activation, scheme):
    """Int8 agrees with the simulation, static layers may pass u8 codes, and folded modules stay or are torchq's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), MODULES[activation](), nn.Dropout(), nn.Linear(40, 8)).eval()
    x = torch.randn(64, 24)
    qmodel = convert(model, [x], config=QConfig(activation=scheme, observer="minmax"))
    plan = qmodel.torchq_plan.layers["0"]
    assert (plan.activation, plan.feeds) == ("1", "3" if scheme == "static" else None)
    assert type(qmodel[0]) is QuantizedLinear
    assert type(qmodel[1]) is (Curve if activation > Activation.SILU else type(model[1]))
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


# ---- On its own: ops.activate -------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("activation", Activation, ids=lambda activation: activation.name)
def test_the_op_has_the_bits_of_the_epilogue(kernel, activation, dtype):
    """The epilogue rounds its float32 once, to dtype; so does the op, whose input is a float of that dtype."""
    x = X.to(dtype) + 0.0  # not -0.0, which the bias cannot be: y is 0.0 plus the bias
    expected = applied(activation, x.float(), rows=1)[0].to(dtype)
    assert_identical(ops.activate(x, activation), expected)
    assert kernels.last_used() == kernel  # the layer of one row may leave it to another


@pytest.mark.parametrize("count", [0, 1, 7, 31, 32 * 1024 - 1, 32 * 1024 + 1, 200_003])
@pytest.mark.parametrize("threads", [1, 2, 3])
@every_dtype
def test_any_number_of_values_on_any_number_of_threads(set_threads, count, threads, dtype):
    x = normal(count).to(dtype)
    expected = torch.cat([ops.activate(part, Activation.GELU) for part in x.split(1000)])
    set_threads(threads)
    assert_identical(ops.activate(x, Activation.GELU), expected)


def test_any_shape_and_strides():
    x = normal(6, 10, 7)
    views = [x[..., 2:5], x.transpose(0, 2), x[::2], x[0, 0, 0], x[:0], x[:, :1].expand(6, 10, 7), x.flip(1)]
    views += [x.mT.contiguous().mT, normal(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)]
    for view in views:
        y = ops.activate(view, Activation.SILU)
        no_gaps = view.untyped_storage().nbytes() == 4 * view.numel() and 0 not in view.stride()
        assert y.stride() == (nn.functional.silu(view) if no_gaps else view.contiguous()).stride()
        assert_identical(y.contiguous(), ops.activate(view.contiguous(), Activation.SILU))
    assert torch.equal(x, normal(6, 10, 7))


INPUTS = [normal(3, 5), normal(5, 3).t(), normal(2, 3).bfloat16(), normal(4).requires_grad_(), torch.zeros(0)]


@pytest.mark.parametrize(("activation", "number"), list(zip(Activation, cycle(range(len(INPUTS))))))
def test_opcheck(activation, number):
    result = torch.library.opcheck(torch.ops.torchq.activate, (INPUTS[number], int(activation)))
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("activation", Activation, ids=lambda activation: activation.name)
def test_slopes_are_those_of_torch(activation):
    """Autograd of the torch function in float64: everywhere but at the kinks, and at them too."""
    x = torch.cat([torch.linspace(-9, 9, 1001), torch.tensor([-3.0, 0.0, 3.0, 6.0])]).double().requires_grad_()
    v = normal(len(x)).double()
    (expected,) = torch.autograd.grad(FUNCTIONS[activation](x), x, v)
    torch.testing.assert_close(times_slope(v, x, activation), expected, rtol=1e-12, atol=1e-12)


@every_dtype
@pytest.mark.parametrize("activation", Activation, ids=lambda activation: activation.name)
def test_gradient_of_the_op(activation, dtype):
    x = normal(40).to(dtype).requires_grad_()
    v = normal(40).to(dtype)
    (got,) = torch.autograd.grad(ops.activate(x, activation), x, v)
    (expected,) = torch.autograd.grad(FUNCTIONS[activation](x.float()), x, v.float())
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("activation", [Activation.GELU, Activation.SILU, Activation.TANH], ids=str)
def test_second_derivative_vmap_and_compile(activation):
    x = normal(4, 6).requires_grad_()
    (first,) = torch.autograd.grad(ops.activate(x, activation).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    (expected,) = torch.autograd.grad(FUNCTIONS[activation](x).sum(), x, create_graph=True)
    torch.testing.assert_close(second, torch.autograd.grad(expected.sum(), x)[0], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        y = ops.activate(x, activation)
        assert_identical(torch.vmap(lambda row: ops.activate(row, activation), in_dims=1, out_dims=1)(x), y)
        compiled = torch.compile(lambda x: ops.activate(x, activation), fullgraph=True, backend="aot_eager")
        assert_identical(compiled(x), y)


@pytest.mark.parametrize(
    ("message", "x", "activation"),
    [
        ("x must be float32, bfloat16 or float16, got float64", torch.zeros(2).double(), 1),
        ("x must be float32, bfloat16 or float16, got int8", torch.zeros(2).char(), 1),
        (r"activation must be a torchq.ops.Activation, 0 \(none\) to 10 \(relu6\), got 11", torch.zeros(2), 11),
        ("activation must be .* got -1", torch.zeros(2), -1),
    ],
)
def test_refused(message, x, activation):
    with pytest.raises(RuntimeError, match=f"^torchq::activate: {message}"):
        ops.activate(x, activation)
