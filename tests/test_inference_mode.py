"""Convolutions that wait, in torch.inference_mode: no mode stays behind, no memory is taken for what it means."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.compare import assert_identical
from helpers.convolutional import Basic
from helpers.numbers import normal
from torchq import QConfig, convert

pytestmark = pytest.mark.usefixtures("seeded")

MODES = pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
STATIC = QConfig(activation="static", rounding="nearest", smoothing="none")
DATA = [normal(4, 32, 20, 20, seed=i) for i in range(4)]
X = normal(2, 32, 20, 20, seed=9)


class Fails(Basic):
    def forward(self, x):
        self.conv1(x)
        raise KeyError("of the model")


class Outer(nn.Module):
    """Another mode, or no_grad, in the middle of inference mode."""

    def __init__(self, mode):
        super().__init__()
        self.one, self.other, self.mode = Basic(32), Basic(32), mode

    def forward(self, x):
        with self.mode():
            y = self.one(x)
        return self.other(y)


class Sees(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Sees, torch.no_grad, partial(torch.inference_mode, False)])
def test_inference_mode_leaves_nothing_behind(mode):
    failing = convert(Basic(32).eval(), DATA, config=STATIC)
    failing.__class__ = Fails
    qmodel = convert(Outer(torch.no_grad).eval(), DATA, config=STATIC)
    y = qmodel(X)
    qmodel.mode = mode
    with torch.inference_mode():
        with pytest.raises(KeyError, match="of the model"):
            failing(X)
        assert torch._C._len_torch_dispatch_stack() == 0
        assert_identical(qmodel(X), y)
        assert torch._C._len_torch_dispatch_stack() == 0
        assert y.clone().add_(1).is_inference()


class Sums(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.act = nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()

    def forward(self, x, y):
        return self.act(self.conv(x) + y)


@MODES
def test_tensors_whose_memory_is_not_what_they_mean(mode):
    """A negated view, and zeros that have no memory."""
    qmodel = convert(Sums().eval(), [(x, x.roll(1)) for x in DATA], config=STATIC)
    assert qmodel.torchq_plan.layers["conv"].adds
    with mode():
        x, zeros = X + 0, torch.zeros_like(X)
        assert_identical(qmodel(torch._neg_view(x), x), qmodel(-x, x))
        assert_identical(qmodel(x, torch._neg_view(x)), qmodel(x, -x))
        nothing = torch._efficientzerotensor(X.shape)
        assert_identical(qmodel(nothing, x), qmodel(zeros, x))
        assert_identical(qmodel(x, nothing), qmodel(x, zeros))
