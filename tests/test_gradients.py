"""The gradient to the input of an int8 layer: the float formula on the layer's own weights, however it is called.

`formula` is that formula in float64, made of torch's own operations. The error of the float32 sums of up to 48 products
is, relative to their norm, about sqrt(48) · 2⁻²⁴ = 4e-7, that of the slope of an activation 1e-7; `CLOSE` allows 1e-5.
"""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

import torchq
from helpers.compare import assert_identical
from helpers.covers import pairs_of
from helpers.gradients import (
    BETWEEN,
    CLOSE,
    CLOSE_BF16,
    DTYPES,
    HIDDEN,
    MODES,
    SCHEMES,
    K,
    N,
    build,
    each_mode,
    error,
    expected_gradient,
    formula,
    input_gradient,
    inputs,
)
from torchq import QuantizedLinear, simulate
from torchq.modules.quantized_linear import Codes
from torchq.numerics.qparams import QParams
from torchq.ops import Activation

pytestmark = [  # torch.func and torch.compile use parts of torch that torch itself has deprecated
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


@pytest.mark.parametrize(
    ("shape", "activation", "scheme"), pairs_of([(9,), (), (2, 3), (1,), (0,)], Activation, SCHEMES)
)
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


@pytest.mark.parametrize(("mode", "scheme", "activation", "dtype"), pairs_of(MODES, SCHEMES, Activation, DTYPES))
def test_the_values_are_those_of_inference(generator, mode, scheme, activation, dtype):
    model = build(scheme, generator, activation, dtype)
    x = inputs(generator, 40, K, dtype=dtype)
    x[0, 0], x[1, 1] = torch.inf, torch.nan
    with MODES[mode]():
        with torch.no_grad():
            expected = model(x)
        y = model(x.clone().requires_grad_())
        assert y.requires_grad
        assert_identical(y.detach(), expected)
        assert_identical(vmap(model)(x), expected)


def test_a_producer_gives_the_values_of_its_codes(generator):
    producer = build("chain", generator)[0]
    x, folded = inputs(generator, 9, K), (producer.fold.activation, BETWEEN)
    y = producer.fused(x.clone().requires_grad_(), *folded).detach()
    assert_identical(y, torchq.dequantize(producer.fused(x, *folded), *BETWEEN))


def test_every_code_survives_the_float_chain():
    """The producer gives code c as a float; the consumer makes c of it, at every scale and zero point."""
    one = torch.tensor([[127]], dtype=torch.int8)
    codes = torch.arange(256, dtype=torch.uint8)[:, None]
    for scale in (1.2e-38, 1e-9, 0.1, 1 / 3, 0.0235294122248888, 1.0, 7e5, 1e30):
        for zero_point in (0, 1, 77, 128, 255):
            pair = QParams(scale, zero_point)
            consumer = QuantizedLinear(one, torch.ones(1), input_qparams=pair)
            values = torchq.dequantize(codes, *consumer.input_qparams)
            with torch.no_grad():
                expected = consumer.fused(codes, codes=Codes(torch.float32, consumer.input_qparams))
            assert_identical(consumer(values.requires_grad_()).detach(), expected, str(pair))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_inference_makes_no_graph(generator, scheme):
    model = build(scheme, generator)
    x = inputs(generator, 9, K)
    assert model(x).grad_fn is None
    if scheme == "chain":
        assert model[0].fused(x, Activation.SILU, BETWEEN).dtype == torch.uint8
    wants = x.clone().requires_grad_()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = model(wants)
            assert not y.requires_grad
            assert y.grad_fn is None
            if scheme == "chain":
                assert model[0].fused(wants, Activation.SILU, BETWEEN).dtype == torch.uint8


def test_weights_get_none(generator):
    model = build("dynamic", generator)
    x = inputs(generator, 9, K).requires_grad_()
    y = model(x)
    assert y.grad_fn.next_functions[0][0] is not None
    assert [f for f, _ in y.grad_fn.next_functions[1:] if f is not None] == []
    y.sum().backward()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())
    assert all(buffer.grad is None and not buffer.requires_grad for buffer in model.buffers())


@each_mode
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


@pytest.mark.parametrize(("name", "scheme", "activation"), pairs_of(MODES, SCHEMES, Activation))
def test_transforms(generator, name, scheme, activation):
    """Jacobians by reverse and forward mode, and gradients of single samples, whichever transform is the outer one.

    simulate() has its own float32 sums, whose rounding the formula does not see: 1e-3.
    """
    mode, model = MODES[name], build(scheme, generator, activation)
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


@each_mode
@pytest.mark.parametrize("scheme", SCHEMES)
def test_autocast(generator, mode, scheme):
    """On in the forward pass, or in both passes: values between layers are bfloat16, as nn.Linear's, and so are theirs.

    The gradient to a float32 input is float32, a few bfloat16 roundings from the one without autocast.
    """
    model = build(scheme, generator)
    x, dy = inputs(generator, 9, K), torch.randn(9, N, generator=generator).bfloat16().float()
    with mode():
        expected = input_gradient(model, x, dy)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            both = input_gradient(model, x, dy)
            y = model(wants := x.clone().requires_grad_())
        y.backward(dy.to(y.dtype))
    for got in [both, wants.grad]:
        assert got.dtype == torch.float32
        assert error(got, expected) < 4 * CLOSE_BF16


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
