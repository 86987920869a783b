"""`_C.call_sums`, `call_gated`, `call_heads`, `call_together`: the bits of calls one by one, or NotImplemented."""

import pytest
import torch
from torch import nn

from helpers.compare import assert_identical
from helpers.numbers import normal
from torchq import _C, QuantizedLinear, convert
from torchq.modules.folding import Fold
from torchq.modules.layer_norm import LayerNorm
from torchq.modules.rms_norm import RMSNorm
from torchq.numerics.qparams import QParams
from torchq.ops import Activation

pytestmark = pytest.mark.usefixtures("seeded")

K, N = 64, 96


def layer(fold=None, bias=True):
    return QuantizedLinear.from_float(nn.Linear(K, N, bias=bias), **({} if fold is None else {"fold": fold}))


def norm():
    module = nn.RMSNorm(N, eps=1e-5)
    nn.init.normal_(module.weight)
    RMSNorm.adopt(module)
    return module.requires_grad_(False)


def layer_norm():
    module = convert(nn.Sequential(nn.Linear(K, N), nn.LayerNorm(N)))[1]
    assert type(module) is LayerNorm
    with torch.no_grad():
        nn.init.normal_(module.weight), nn.init.normal_(module.bias)
    return module.requires_grad_(False)


def sums(product, x, residual, norm=None):
    kind = None if norm is None else type(norm)
    numbers = norm.numbers() if isinstance(norm, RMSNorm) else None
    return _C.call_sums(product, QuantizedLinear, norm, kind, numbers, x, residual)


def gated(gate, up, x):
    return _C.call_gated(gate, up, QuantizedLinear, x, Activation.SILU, (), ())


@pytest.mark.parametrize("norm", [norm, layer_norm])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 5), (2, 300), (4, 300)])
def test_sums_are_those_of_torch(shape, norm):
    product, behind, x, residual = layer(), norm(), normal(*shape, K), normal(*shape, N, seed=2)
    total = product(x) + residual
    alone = sums(product, x, residual)
    if total.numel() < 1 << 16:
        assert_identical(alone[0], total)
    both = sums(product, x, residual, behind)
    assert_identical(both[0], total)
    assert_identical(both[1], behind(total))
    exact = residual.double() + x.double() @ product.weight.double().T + product.bias.double()
    assert 10 * torch.log10(exact.square().sum() / (total.double() - exact).square().sum()) > 30


def test_sums_of_many_values_without_a_norm_are_left_to_all_threads():
    rows = (1 << 16) // N
    assert sums(layer(), normal(rows, K), normal(rows, N)) is not NotImplemented
    assert sums(layer(), normal(rows + 1, K), normal(rows + 1, N)) is NotImplemented


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 1000)])
def test_a_gated_product_is_that_of_torch(shape):
    gate, up, x = layer(Fold(Activation.SILU)), layer(bias=False), normal(*shape, K)
    expected = gate.fused(x, Activation.SILU) * up(x)
    assert_identical(gated(gate, up, x), expected)
    exact = nn.functional.silu(x.double() @ gate.weight.double().T + gate.bias.double())
    exact = exact * (x.double() @ up.weight.double().T)
    assert 10 * torch.log10(exact.square().sum() / (expected.double() - exact).square().sum()) > 30


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (2, 5)])
def test_heads_are_turned_as_one_by_one(shape, dtype):
    layers, x = (layer(), layer(), layer()), normal(*shape, K).to(dtype)
    cos, sin = (f(normal(1, shape[1], 16, seed=4)).to(dtype) for f in (torch.cos, torch.sin))
    found = _C.call_heads(layers, QuantizedLinear, x, 16, cos, sin)
    for index, (y, each) in enumerate(zip(found, layers, strict=True)):
        heads = each(x).view(*shape, N // 16, 16)
        expected = (heads if index == 2 else _C.call_rotary(heads, cos, sin)).transpose(1, 2)
        assert_identical(y, expected)
        assert y.stride() == expected.stride()
        assert y.is_inference() == torch.is_inference_mode_enabled()


def of_scale(scale, width=N):
    return QuantizedLinear.from_float(nn.Linear(K, width), channel_scale=scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 100)])
def test_layers_give_together_what_they_give_alone(shape, dtype):
    one, other = normal(K, seed=3).abs() + 0.5, normal(K, seed=4).abs() + 0.5
    static = QuantizedLinear.from_float(nn.Linear(K, N), input_qparams=QParams(0.03, 128))
    x = normal(*shape, K).to(dtype)
    for scales in ((None,) * 3, (one, one, one.clone()), (one, other, one), (None, one, one)):
        layers = tuple(of_scale(scale, width) for scale, width in zip(scales, (N, 40, 200), strict=True))
        for each in (layers, (*layers[:2], static), (static, static, layers[0]), layers[:1], (*layers, static)):
            found = _C.call_together(each, QuantizedLinear, x)
            assert type(found) is tuple
            for y, layer in zip(found, each, strict=True):
                assert_identical(y, layer(x))


def test_only_plain_layers_are_called_together():
    x, layers = normal(2, 5, K), (layer(), layer())
    assert _C.call_together((*layers, *layers, layers[0]), QuantizedLinear, x) is NotImplemented
    assert _C.call_together((layers[0], nn.Linear(K, N)), QuantizedLinear, x) is NotImplemented
    assert _C.call_together(layers, nn.Linear, x) is NotImplemented
    assert _C.call_together([*layers], QuantizedLinear, x) is NotImplemented
    layers[1].scope = object()  # in which its output may wait
    assert _C.call_together(layers, QuantizedLinear, x) is NotImplemented


def no_shape(x):
    return x[..., :32].contiguous()


def strided(x):
    return torch.cat((x, x), -1)[..., ::2]


CHANGES = [no_shape, strided, torch.Tensor.double, lambda x: x.clone().requires_grad_(), nn.Parameter, lambda x: None]


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_no_plain_call_is_left_to_the_code(change):
    product, other, behind = layer(), layer(), norm()
    x, residual, (cos, sin) = normal(2, 5, K), normal(2, 5, N), normal(2, 1, 5, 16)
    heads = (product, other, product)
    with torch.enable_grad():
        assert sums(product, change(x), residual) is NotImplemented
        assert sums(product, x, change(residual), behind) is NotImplemented
        assert gated(product, other, change(x)) is NotImplemented
        assert _C.call_together((product, other), QuantizedLinear, change(x)) is NotImplemented
        assert _C.call_heads(heads, QuantizedLinear, change(x), 16, cos, sin) is NotImplemented
    assert _C.call_heads(heads, QuantizedLinear, x, 16, cos[..., :8], sin) is NotImplemented
    for size in (0, -1, 7, 32, None):
        assert _C.call_heads(heads, QuantizedLinear, x, size, cos, sin) is NotImplemented


def hooked(module):
    module.register_forward_hook(lambda *args: None)


def replaced(module):
    module.forward = lambda x: x


@pytest.mark.parametrize("norm", [norm, layer_norm])
@pytest.mark.parametrize("change", [hooked, replaced])
def test_modules_that_somebody_sees_are_left_to_the_code(change, norm):
    x, residual, (cos, sin) = normal(2, 5, K), normal(2, 5, N), normal(2, 1, 5, 16)
    product, other, behind = layer(), layer(), norm()
    assert sums(product, x, residual, behind) is not NotImplemented
    change(behind)
    assert sums(product, x, residual, behind) is NotImplemented
    assert gated(product, other, x) is not NotImplemented
    change(other)
    assert gated(product, other, x) is NotImplemented
    assert gated(other, product, x) is NotImplemented
    assert _C.call_together((product, other), QuantizedLinear, x) is NotImplemented
    assert sums(other, x, residual) is NotImplemented
    assert _C.call_heads((product, product, other), QuantizedLinear, x, 16, cos, sin) is NotImplemented
