"""Layers and formulas for the tests of gradients: the float formula on the weights that a layer really has."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import torchq
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
        z = ValueOf.apply(x @ weight.t(), z_value)
        x = ValueOf.apply(FUNCTIONS[Activation(layer.activation)](z), y_value)
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
