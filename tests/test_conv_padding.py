"""Zeros around a convolution's output, which codes have exactly: they reach the next convolution as codes."""

import copy

import pytest
import torch
from torch import nn

from helpers.compare import assert_identical
from helpers.convolutional import ConvNorm
from helpers.numbers import normal
from torchq import QConfig, convert
from torchq.modules.quantized_conv import QuantizedConv
from torchq.ops import Activation

pytestmark = pytest.mark.usefixtures("seeded")

STATIC = QConfig(activation="static", rounding="nearest", smoothing="none")
DATA = [normal(4, 32, 20, 20, seed=i) for i in range(4)]
X = normal(2, 32, 20, 20, seed=9)
F32, U8, NONE = torch.float32, torch.uint8, Activation.NONE


def unfused(qmodel):
    """The same layers, none of which waits or hands over."""
    twin = copy.deepcopy(qmodel)
    for module in twin.modules():
        if isinstance(module, QuantizedConv):
            module.scope = module.hands = None
    return twin


@pytest.fixture
def runs(monkeypatch):
    """Lists the products: the input's dtype and the zeros around it, the activation, and whether codes came out."""
    seen = []
    usual = QuantizedConv._int8

    def spy(layer, x, activation, dtype, last, residual=None, y_qparams=None, around=()):
        seen.append((x.dtype, around, Activation(activation), y_qparams is not None))
        return usual(layer, x, activation, dtype, last, residual, y_qparams, around)

    monkeypatch.setattr(QuantizedConv, "_int8", spy)
    return seen


class Padded(nn.Module):
    """As MobileNetV2 of transformers: zeros are added outside of the convolutions. Of another kind when asked."""

    padding, value = (0, 1, 0, 1), 0.0

    def __init__(self):
        super().__init__()
        self.wide, self.deep = ConvNorm(32, 64, 1, act=nn.ReLU6()), nn.Conv2d(64, 64, 3, 2, groups=64)
        self.thin = nn.Conv2d(64, 32, 1)

    def forward(self, x):
        y = nn.functional.pad(self.wide(x), self.padding, value=self.value)
        return self.thin(nn.functional.pad(self.deep(y), (0, 0, 0, 0)))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_zeros_around_codes(mode, runs):
    qmodel = convert(Padded().eval(), DATA, config=STATIC)
    for x in (X, X.contiguous(memory_format=torch.channels_last)):
        runs.clear()
        with mode():
            y = qmodel(x)
        assert runs == [(F32, (), Activation.RELU6, True), (U8, (0, 1, 0, 1), NONE, True), (U8, (), NONE, False)]
        assert_identical(y, unfused(qmodel)(x))
        assert y.stride() == unfused(qmodel)(x).stride()


@pytest.mark.parametrize(
    ("padding", "value", "codes"),
    [((2, 0, 1, 3), 0.0, True), ((1, 1, 1, 1), 0.5, False), ((-1, 0, 0, 0), 0.0, False), ((1, 0), 0.0, True)],
    ids=str,
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_other_paddings(padding, value, codes, mode, runs):
    """What is no padding with zeros is computed on floats."""
    qmodel = convert(Padded().eval(), DATA, config=STATIC)
    qmodel.padding, qmodel.value = padding, value
    runs.clear()
    with mode():
        y = qmodel(X)
    assert (runs[1][0] is U8) == codes
    assert_identical(y, unfused(qmodel)(X))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_half_a_pair_is_refused_as_in_float(mode):
    qmodel = convert(Padded().eval(), DATA, config=STATIC)
    qmodel.padding = (1,)
    with mode(), pytest.raises(RuntimeError, match="divisible by 2"):
        qmodel(X)
