"""The gradient to the input of an int8 layer: the float formula on the layer's own weights, however it is called.

`formula` is that formula in float64, made of torch's own operations. The error of the float32 sums of up to 48 products
is, relative to their norm, about sqrt(48) · 2⁻²⁴ = 4e-7, that of the slope of an activation 1e-7; `CLOSE` allows 1e-5.
"""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

import torchq
from helpers.compare import assert_identical
from helpers.numbers import random_weight
from torchq import QuantizedLinear, simulate
from torchq.modules.activations import FUNCTIONS
from torchq.modules.folded import Folded
from torchq.numerics.qparams import QParams
from torchq.ops import Activation

K, HIDDEN, N = 37, 48, 21
INPUT, BETWEEN = QParams(0.03, 100), QParams(0.05, 30)
CLOSE, CLOSE_BF16 = 1e-5, 2**-8  # bfloat16 keeps 8 bits
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCHEMES = ["dynamic", "static", "chain"]
MODES = pytest.mark.parametrize("mode", [nullcontext, simulate], ids=["int8", "simulated"])
pytestmark = [  # torch.func and torch.compile use parts of torch that torch itself has deprecated
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


def build(scheme, generator, activation=Activation.SILU, dtype=torch.float32):
    """(..., K) -> (..., N). The inputs are mostly within INPUT's range, a few are clipped."""
    (w1, s1, b1), (w2, s2, b2) = random_weight(HIDDEN, K, generator), random_weight(N, HIDDEN, generator)
    s1, s2 = s1 / s1.mean() / 127 / K**0.5, s2 / s2.mean() / 127 / HIDDEN**0.5  # z is around 1, where slopes vary
    first, second = {
        "dynamic": ({}, {}),
        "static": ({"input_qparams": INPUT}, {"input_qparams": BETWEEN}),
        "chain": (
            {"input_qparams": INPUT, "output_qparams": BETWEEN},
            {"input_qparams": BETWEEN, "takes_codes": True, "dtype": dtype},
        ),
    }[scheme]
    one = QuantizedLinear(w1, s1, b1, activation=activation, **first)
    return nn.Sequential(one, Folded(), QuantizedLinear(w2, s2, b2, **second)).eval()


def inputs(generator, *shape, dtype=torch.float32):
    x = 2 * torch.randn(*shape, generator=generator)
    x.view(-1)[::17] *= 4  # beyond INPUT's range
    return x.to(dtype)


class _ValueOf(torch.autograd.Function):
    """The second argument, with the gradient of the first."""

    @staticmethod
    def forward(ctx, x, value):
        return value.to(x.dtype, copy=True)

    @staticmethod
    def backward(ctx, dy):
        return dy, None


def formula(model, x):
    """model(x), x float64: `act(x · ŵᵀ + b)`, at the very z and y that the int8 layers compute."""
    for layer in model:
        if not isinstance(layer, QuantizedLinear):
            continue
        bare = copy.deepcopy(layer)
        bare.activation, bare.output_qparams, bare.takes_codes = Activation.NONE, None, False
        with torch.no_grad():
            z_value, y_value = bare(x.float()), layer(x.float())
            if layer.output_qparams is not None:
                y_value = torchq.dequantize(y_value, *layer.output_qparams)
        weight = layer.weight_int8.double() * layer.weight_scale.double()[:, None]
        z = _ValueOf.apply(x @ weight.t(), z_value)
        x = _ValueOf.apply(FUNCTIONS[Activation(layer.activation)](z), y_value)
    return x


def error(actual, expected):
    assert actual is not None
    assert actual.shape == expected.shape
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def input_gradient(f, x, dy):
    x = x.clone().requires_grad_()
    y = f(x)
    y.backward(dy.to(y.dtype))
    return x.grad


def expected_gradient(model, x, dy):
    return input_gradient(lambda v: formula(model, v), x.double(), dy)


@pytest.mark.parametrize("shape", [(9,), (), (2, 3), (1,), (0,)], ids=str)
@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_formula(generator, scheme, activation, shape):
    model = build(scheme, generator, activation)
    x, dy = inputs(generator, *shape, K), torch.randn(*shape, N, generator=generator)
    got = input_gradient(model, x, dy)
    assert got.dtype == torch.float32
    if 0 in shape:
        assert got.shape == x.shape
    else:
        assert error(got, expected_gradient(model, x, dy)) < CLOSE


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_dtype_of_x(generator, scheme, dtype):
    model = build(scheme, generator, dtype=dtype)
    x, dy = inputs(generator, 9, K, dtype=dtype), torch.randn(9, N, generator=generator).to(dtype)
    got = input_gradient(model[0], x, torch.ones(9, HIDDEN))
    assert got.dtype == dtype
    # Rounded once, at the end: 1e-6 of float32's errors takes one of some hundred values across a tie of float16
    expected = expected_gradient(model[:1], x, torch.ones(9, HIDDEN)).to(dtype)
    assert (got == expected).double().mean() > 0.98
    got = input_gradient(model, x, dy)
    assert got.dtype == dtype
    # `formula` hands float32 to the second layer, and what is between them has the dtype in the model: 2 roundings each
    assert error(got, expected_gradient(model, x, dy)) < 4 * CLOSE_BF16


def test_beyond_the_range_the_gradient_passes(generator):
    layer = build("static", generator, Activation.NONE)[0]
    x = torch.full((1, K), 1e4)
    assert (
        error(input_gradient(layer, x, torch.ones(1, HIDDEN)), expected_gradient([layer], x, torch.ones(1, HIDDEN)))
        < CLOSE
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("scheme", SCHEMES)
@MODES
def test_the_values_are_those_of_inference(generator, mode, scheme, activation, dtype):
    model = build(scheme, generator, activation, dtype)
    x = inputs(generator, 40, K, dtype=dtype)
    x[0, 0], x[1, 1] = torch.inf, torch.nan
    with mode():
        with torch.no_grad():
            expected = model(x)
        y = model(x.clone().requires_grad_())
        assert y.requires_grad
        assert_identical(y.detach(), expected)
        assert_identical(vmap(model)(x), expected)


def test_a_producer_gives_the_values_of_its_codes(generator):
    producer = build("chain", generator)[0]
    x = inputs(generator, 9, K)
    y = producer(x.clone().requires_grad_()).detach()
    assert_identical(y, torchq.dequantize(producer(x), *BETWEEN))


def test_every_code_survives_the_float_chain():
    """The producer gives code c as a float; the consumer makes c of it, at every scale and zero point."""
    one = torch.tensor([[127]], dtype=torch.int8)
    codes = torch.arange(256, dtype=torch.uint8)[:, None]
    for scale in (1.2e-38, 1e-9, 0.1, 1 / 3, 0.0235294122248888, 1.0, 7e5, 1e30):
        for zero_point in (0, 1, 77, 128, 255):
            pair = QParams(scale, zero_point)
            consumer = QuantizedLinear(one, torch.ones(1), input_qparams=pair, takes_codes=True)
            values = torchq.dequantize(codes, *consumer.input_qparams)
            with torch.no_grad():
                expected = consumer(codes)
            assert_identical(consumer(values.requires_grad_()).detach(), expected, str(pair))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_inference_makes_no_graph(generator, scheme):
    model = build(scheme, generator)
    x = inputs(generator, 9, K)
    assert model(x).grad_fn is None
    if scheme == "chain":
        assert model[0](x).dtype == torch.uint8
    wants = x.clone().requires_grad_()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = model(wants)
            assert not y.requires_grad
            assert y.grad_fn is None
            if scheme == "chain":
                assert model[0](wants).dtype == torch.uint8


def test_weights_get_none(generator):
    model = build("dynamic", generator)
    x = inputs(generator, 9, K).requires_grad_()
    y = model(x)
    assert y.grad_fn.next_functions[0][0] is not None
    assert [f for f, _ in y.grad_fn.next_functions[1:] if f is not None] == []
    y.sum().backward()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())
    assert all(buffer.grad is None and not buffer.requires_grad for buffer in model.buffers())


@MODES
@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_double_backward(generator, mode, scheme, activation):
    """A force is trained on. Also the gradient to the first gradient's own input, dy."""
    model = build(scheme, generator, activation)
    x, dy = inputs(generator, 9, K), torch.randn(9, N, generator=generator)

    def second(f, x, dy):
        x, dy = x.clone().requires_grad_(), dy.clone().requires_grad_()
        y = f(x)
        (force,) = torch.autograd.grad(y, x, dy.to(y.dtype), create_graph=True)
        return torch.autograd.grad(force.pow(2).sum() + x.pow(3).sum(), (x, dy))

    with mode():
        got = second(model, x, dy)
    for actual, expected in zip(got, second(lambda v: formula(model, v), x.double(), dy.double()), strict=True):
        assert error(actual, expected) < (10 * CLOSE if mode is nullcontext else 1e-3)


@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("scheme", SCHEMES)
@MODES
def test_transforms(generator, mode, scheme, activation):
    """Jacobians by reverse and forward mode, and gradients of single samples, whichever transform is the outer one.

    simulate() has its own float32 sums, whose rounding the formula does not see: 1e-3.
    """
    model = build(scheme, generator, activation)
    x, tangent = inputs(generator, 6, K), torch.randn(6, K, generator=generator)
    expected = torch.stack([torch.autograd.functional.jacobian(lambda v: formula(model, v), row) for row in x.double()])
    close = CLOSE if mode is nullcontext else 1e-3
    with mode():
        values = model(x)
        for jacobian in (jacrev, jacfwd):
            assert error(torch.stack([jacobian(model)(row) for row in x]), expected) < close, jacobian
            assert error(vmap(jacobian(model))(x), expected) < close, jacobian
            full = jacobian(model)(x)
            assert error(torch.stack([full[i, :, i] for i in range(6)]), expected) < close, jacobian
        y, dy = jvp(model, (x,), (tangent,))
        assert_identical(y, values)
        assert error(dy, torch.einsum("bnk,bk->bn", expected, tangent.double())) < close
        assert error(vmap(grad(lambda v: model(v).sum()))(x), expected.sum(1)) < close
        assert error(grad(lambda v: vmap(model)(v).sum())(x), expected.sum(1)) < close
        assert (
            error(vmap(grad(lambda v: model(v).sum()), in_dims=1, out_dims=1)(x.t()).t().t(), expected.sum(1).t())
            < close
        )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_hessians(generator, scheme):
    model = build(scheme, generator)
    x = inputs(generator, K)
    expected = torch.autograd.functional.hessian(lambda v: formula(model, v).pow(2).sum(), x.double())
    assert error(hessian(lambda v: model(v).pow(2).sum())(x), expected) < 10 * CLOSE
    assert error(jacrev(jacrev(lambda v: model(v).pow(2).sum()))(x), expected) < 10 * CLOSE
    assert error(jacrev(jacfwd(lambda v: model(v).pow(2).sum()))(x), expected) < 10 * CLOSE
    with pytest.raises(NotImplementedError, match="Let one of them be of reverse mode"):
        jacfwd(jacfwd(lambda v: model(v).pow(2).sum()))(x)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_forward_mode_without_torch_func(generator, scheme):
    model = build(scheme, generator)
    x, tangent = inputs(generator, 6, K), torch.randn(6, K, generator=generator)
    with forward_ad.dual_level():
        y, dy = forward_ad.unpack_dual(model(forward_ad.make_dual(x, tangent)))
    assert_identical(y, model(x))
    assert_identical(dy, jvp(model, (x,), (tangent,))[1])


@pytest.mark.filterwarnings("ignore:.*batching rule for torchq..unpack:UserWarning")
@pytest.mark.parametrize("in_dims", [(0, 0), (0, None)])
def test_an_ensemble_of_weights(generator, in_dims):
    """Vmap over the packed weights of several layers of one shape."""
    models = [build("dynamic", generator)[0] for _ in range(3)]
    packed, x = torch.stack([m.packed for m in models]), inputs(generator, 3, 5, K)
    x = x if in_dims[1] == 0 else x[0]

    def gradient(packed, x):
        return grad(lambda v: functional_call(models[0], {"packed": packed}, (v,)).sum())(x)

    got = vmap(gradient, in_dims=in_dims)(packed, x)
    for i, model in enumerate(models):
        row = x[i] if in_dims[1] == 0 else x
        assert error(got[i], expected_gradient([model], row, torch.ones(5, HIDDEN))) < CLOSE


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_checkpoint(generator, scheme, use_reentrant):
    model = build(scheme, generator)
    x, dy = inputs(generator, 9, K), torch.randn(9, N, generator=generator)
    got = input_gradient(lambda v: checkpoint(model, v, use_reentrant=use_reentrant), x, dy)
    assert_identical(got, input_gradient(model, x, dy))


@MODES
@pytest.mark.parametrize("scheme", SCHEMES)
def test_autocast(generator, mode, scheme):
    """On in the forward pass, in the backward pass or in both: the gradient stays in float32."""
    model = build(scheme, generator)
    x, dy = inputs(generator, 9, K), torch.randn(9, N, generator=generator)
    with mode():
        expected = input_gradient(model, x, dy)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if mode is nullcontext:  # F.linear, of which simulate() is made, follows the autocast of the backward pass
                assert_identical(input_gradient(model, x, dy), expected)
            y = model(wants := x.clone().requires_grad_())
        y.backward(dy)
        assert_identical(wants.grad, expected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_simulated(generator, scheme):
    """Its z differ from the integer ones by float32 roundings, the slopes with them, and a code now and then."""
    model = build(scheme, generator)
    x, dy = inputs(generator, 9, K), torch.randn(9, N, generator=generator)
    with simulate():
        got = input_gradient(model, x, dy)
    assert error(got, expected_gradient(model, x, dy)) < 1e-3


@pytest.mark.parametrize("scheme", SCHEMES)
def test_strides(generator, scheme):
    model = build(scheme, generator)
    dy = torch.randn(5, N, generator=generator)
    for x in (
        inputs(generator, 2 * K, 5).t()[:, ::2],
        inputs(generator, 5, 2 * K)[:, :K],
        inputs(generator, 1, K).expand(5, K),
    ):
        leaf = x.detach().requires_grad_()
        model(leaf).backward(dy)
        assert error(leaf.grad, expected_gradient(model, x, dy)) < CLOSE
    got = input_gradient(model, inputs(generator, 5, K), torch.ones(1, 1).expand(5, N))
    assert got.isfinite().all()


def test_y_may_be_changed_in_place(generator):
    """As nn.ReLU(inplace=True) does behind a layer that is not fused with it."""
    model = nn.Sequential(build("dynamic", generator)[0], nn.ReLU(inplace=True))
    x = inputs(generator, 5, K)
    expected = expected_gradient([model[0]], x, (model[0](x) > 0).double())
    assert error(input_gradient(model, x, torch.ones(5, HIDDEN)), expected) < CLOSE


# ---- What people do with it -----------------------------------------------------------------------------------------


class Block(nn.Module):
    """A residual block, as of a transformer."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class LoRA(nn.Module):
    """An adapter beside a frozen layer, as PEFT puts it."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.a, self.b = nn.Linear(base.in_features, 4, bias=False), nn.Linear(4, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


def converted(model, example):
    return torchq.convert(model, [example], progress=False)


def grads_of(module, loss):
    module.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in module.parameters()]


@pytest.mark.parametrize("activation", ["auto", "static", "dynamic"])
def test_residual_blocks_and_saliency(activation):
    """Against the float model: within 10 %, which no error of quantization comes near, and a missing path exceeds."""
    torch.manual_seed(0)
    head = [nn.Linear(32, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8)]
    model, x = nn.Sequential(Block(), Block(), *head).eval(), torch.randn(256, 32)
    qmodel = torchq.convert(model, [x], config=torchq.QConfig(activation=activation), progress=False)
    assert sum(isinstance(m, QuantizedLinear) for m in qmodel.modules()) == 7
    if activation == "static":
        assert any(m.takes_codes for m in qmodel.modules() if isinstance(m, QuantizedLinear))
    dy = torch.randn(256, 8)
    assert error(input_gradient(qmodel, x, dy), input_gradient(model, x, dy)) < 0.1


class MLP(nn.Module):
    """Not an nn.Sequential, so that an adapter may sit beside each layer."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 4)

    def forward(self, x):
        return self.down(nn.functional.silu(self.up(x)))


@pytest.mark.parametrize("activation", ["static", "dynamic"])
def test_adapters_train(activation):
    """In front of the int8 layers and beside them: their gradients are those beside the float layers."""
    torch.manual_seed(0)
    model, x = MLP().eval().requires_grad_(False), torch.randn(64, 32)
    qmodel = torchq.convert(model, [x], config=torchq.QConfig(activation=activation), progress=False)
    front, up, down = nn.Linear(32, 32), LoRA(model.up), LoRA(model.down)

    def gradients(frozen):
        adapted = copy.deepcopy(frozen)
        adapted.up, adapted.down = copy.deepcopy(up), copy.deepcopy(down)
        adapted.up.base, adapted.down.base = frozen.up, frozen.down
        adapters = nn.Sequential(copy.deepcopy(front), adapted)
        adapters(x).pow(2).sum().backward()
        return {name: p.grad for name, p in adapters.named_parameters() if p.requires_grad}

    got, expected = gradients(qmodel), gradients(model)
    assert len(got) == 6
    for name, gradient in expected.items():
        assert error(got[name], gradient) < 0.1, name


def test_adapters_learn():
    """A few steps of training in front of a frozen chain of codes reach what the float model reaches."""
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)).eval(),
        torch.randn(128, 16),
    )
    qmodel = torchq.convert(model, [x], config=torchq.QConfig(activation="static"), progress=False)
    target = model(x @ torch.linalg.qr(torch.randn(16, 16))[0]).detach()
    losses = []
    for frozen in (model, qmodel):
        front = nn.Linear(16, 16)
        nn.init.eye_(front.weight), nn.init.zeros_(front.bias)
        optimizer = torch.optim.Adam(front.parameters(), 0.01)
        for _ in range(150):
            optimizer.zero_grad()
            loss = (frozen(front(x)) - target).pow(2).mean()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[1] < 1.5 * losses[0]
    assert losses[1] < 0.2 * (qmodel(x) - target).pow(2).mean().item()


# ---- torch.compile, torch.export ------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@MODES
@pytest.mark.parametrize("scheme", SCHEMES)
def test_compiled(generator, mode, scheme):
    """In one graph, and inference is compiled beside it."""
    model = build(scheme, generator)
    x, dy = inputs(generator, 9, K), torch.randn(9, N, generator=generator)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with mode():
        expected, values = input_gradient(model, x, dy), model(x)
        for _ in range(2):
            assert_identical(compiled(x), values)
            assert_identical(compiled(x.clone().requires_grad_()).detach(), values)
            assert error(input_gradient(compiled, x, dy), expected) < 1e-6


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:.*that is not a leaf Tensor:UserWarning")  # by torch.compile itself
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.slow(seconds=10)
def test_compiled_transforms(generator, scheme):
    """torch.compile leaves them to eager mode, or says so: its graph would be without these gradients."""
    model = build(scheme, generator)
    x, dy = inputs(generator, 4, K), torch.randn(4, N, generator=generator)
    for name, f in {
        "grad": grad(lambda v: model(v).pow(2).sum()),
        "vmap of grad": vmap(grad(lambda v: model(v).pow(2).sum())),
        "grad of vmap": grad(lambda v: vmap(model)(v).pow(2).sum()),
        "jacrev": jacrev(model),
        "vjp": lambda v: vjp(model, v)[1](dy)[0],
        "jvp": lambda v: jvp(model, (v,), (v,))[1],
    }.items():
        torch.compiler.reset()
        assert error(torch.compile(f, backend="aot_eager")(x), f(x)) < 1e-6, name
        torch.compiler.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported, match="would trace it without its gradient"):
            torch.compile(f, backend="aot_eager", fullgraph=True)(x)


@pytest.mark.slow(seconds=10)
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.subprocess
def test_inductor(generator):
    model = build("chain", generator)
    x, dy = inputs(generator, 9, K), torch.randn(9, N, generator=generator)
    assert error(input_gradient(torch.compile(model, fullgraph=True), x, dy), input_gradient(model, x, dy)) < 1e-6


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("strict", [False, True])
def test_exported_programs_are_for_inference(generator, strict):
    """Behind a float layer with parameters, too, they hold the ops and codes, as without gradients."""
    model = nn.Sequential(nn.Linear(K, K), *build("chain", generator))
    x = inputs(generator, 9, K)
    exported = torch.export.export(model, (x,), strict=strict)
    static = [node for node in exported.graph.nodes if node.target == torch.ops.torchq.linear_static.default]
    assert [node.meta["val"].dtype for node in static] == [torch.uint8, torch.float32]
    assert_identical(exported.module()(x).detach(), model(x).detach())
