"""Layers and formulas for the tests of gradients: the float formula on the weights that a layer really has."""

from contextlib import nullcontext

import pytest
import torch

import torchq
from helpers.models import ACTIVATIONS
from helpers.numbers import random_weight
from torchq import QuantizedLinear, simulate
from torchq.modules.activations import FUNCTIONS
from torchq.modules.folding import Fold
from torchq.modules.int8_sequential import Int8Sequential, steps_of
from torchq.numerics.qparams import QParams
from torchq.ops import Activation

K, HIDDEN, N = 37, 48, 21
INPUT, BETWEEN = QParams(0.03, 100), QParams(0.05, 30)
CLOSE, CLOSE_BF16 = 1e-5, 2**-8  # bfloat16 keeps 8 bits
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCHEMES = ["dynamic", "static", "chain"]
MODES = {"int8": nullcontext, "simulated": simulate}
each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


def build(scheme, generator, activation=Activation.SILU, dtype=torch.float32):
    """(..., K) -> (..., N). The inputs are mostly within INPUT's range, a few are clipped."""
    (w1, s1, b1), (w2, s2, b2) = random_weight(HIDDEN, K, generator), random_weight(N, HIDDEN, generator)
    s1, s2 = s1 / s1.mean() / 127 / K**0.5, s2 / s2.mean() / 127 / HIDDEN**0.5  # z is around 1, where slopes vary
    first, second = {
        "dynamic": ({}, {}),
        "static": ({"input_qparams": INPUT}, {"input_qparams": BETWEEN}),
        "chain": ({"input_qparams": INPUT}, {"input_qparams": BETWEEN}),
    }[scheme]
    one = QuantizedLinear(w1, s1, b1, fold=Fold(activation, codes=scheme == "chain"), dtype=dtype, **first)
    return Int8Sequential(one, ACTIVATIONS[activation](), QuantizedLinear(w2, s2, b2, dtype=dtype, **second)).eval()


def inputs(generator, *shape, dtype=torch.float32):
    x = 2 * torch.randn(*shape, generator=generator)
    x.view(-1)[::17] *= 4  # beyond INPUT's range
    return x.to(dtype)


class ValueOf(torch.autograd.Function):
    """The second argument, with the gradient of the first."""

    @staticmethod
    def forward(ctx, x, value):
        return value.to(x.dtype, copy=True)

    @staticmethod
    def backward(ctx, dy):
        return dy, None


def formula(model, x):
    """model(x), x float64: `act(x · ŵᵀ + b)`, at the very z and y that the int8 layers compute."""
    for layer, between, _, activation, reader in steps_of(list(model)):
        if between is None:  # nn.Identity
            continue
        with torch.no_grad():
            z_value = layer(x.float())
            if reader is None:
                y_value = layer.fused(x.float(), activation)
            else:
                y_value = torchq.dequantize(layer.fused(x.float(), activation, reader.input_qparams), *BETWEEN)
        weight = layer.weight_int8.double() * layer.weight_scale.double()[:, None]
        z = ValueOf.apply(x @ weight.t(), z_value)
        x = ValueOf.apply(FUNCTIONS[Activation(activation)](z), y_value)
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
