"""Small networks, and data for them."""

import copy
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn

from helpers.numbers import normal
from torchq import QuantizedLinear
from torchq.modules.layer_norm import LayerNorm
from torchq.ops import Activation

# For networks with 24 inputs: batches to calibrate with, and others to test with.
DATA = [normal(16, 24, seed=i) for i in range(4)]
X = normal(33, 24, seed=9)


def with_own_norms(model: nn.Module) -> nn.Module:
    """A copy of a float model with the LayerNorms that a converted one has: they sum in another order than torch's."""
    model = copy.deepcopy(model)
    for module in model.modules():
        LayerNorm.adopt(module)
    return model


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class SquaredReLU(nn.Module):
    def forward(self, x):
        return torch.relu(x).square()


ACTIVATIONS = {
    Activation.NONE: nn.Identity,
    Activation.RELU: nn.ReLU,
    Activation.GELU: nn.GELU,
    Activation.GELU_TANH: partial(nn.GELU, approximate="tanh"),
    Activation.SILU: nn.SiLU,
    Activation.QUICK_GELU: QuickGELU,
    Activation.HARDSWISH: nn.Hardswish,
    Activation.RELU2: SquaredReLU,
    Activation.TANH: nn.Tanh,
    Activation.SIGMOID: nn.Sigmoid,
    Activation.RELU6: nn.ReLU6,
}
with_and_without_data = pytest.mark.parametrize("data", [None, DATA], ids=["without data", "calibrated"])


def mlp(*sizes):
    layers = [layer for k, n in pairwise(sizes) for layer in (nn.Linear(k, n), nn.ReLU())]
    return nn.Sequential(*layers[:-1]).eval()


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(24, 24)
        self.blocks = nn.ModuleList([mlp(24, 32, 24) for _ in range(2)])
        self.heads = nn.ModuleDict({"a": nn.Linear(24, 5), "b": nn.Sequential(nn.Linear(24, 5, bias=False))})

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.heads["a"](x) - self.heads["b"](x)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def layers_of(qmodel):
    return [module for module in qmodel.modules() if isinstance(module, QuantizedLinear)]


def linears(model):
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def load_digits():
    """Scikit-learn's digits: 1347 images and classes to train on, and the other 450."""
    from sklearn import datasets  # slow to import, and few tests want it

    x, y = datasets.load_digits(return_X_y=True)
    x, y = torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order[:1347]], y[order[:1347]], x[order[1347:]], y[order[1347:]]
