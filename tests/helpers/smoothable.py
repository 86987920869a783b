"""A norm with three outlier channels and two Linears that read it, for the tests of smoothing."""

import torch
from torch import nn

from helpers.numbers import normal

K = 32
OUTLIERS = [3, 7, 20]
DATA = [normal(4, 16, K, seed=i) for i in range(3)]
X = normal(4, 16, K, seed=9)


def read(m, x):
    y = m.norm(x)
    return m.a(y) + m.b(y)


class Block(nn.Module):
    """A norm, with 3 channels 50 times as large as the others, and two Linears. `run(self, x)` is its forward."""

    def __init__(self, run=read, norm=nn.LayerNorm, **modules):
        super().__init__()
        self.run = run
        self.norm, self.a, self.b = norm(K), nn.Linear(K, 24), nn.Linear(K, 24, bias=False)
        for name, module in modules.items():
            self.add_module(name, module)
        self.norm.weight.uniform_(0.5, 2)
        for parameter in self.norm.parameters():
            parameter[OUTLIERS] *= 50
        self.a.weight[:, OUTLIERS] /= 50
        self.b.weight[:, OUTLIERS] /= 50
        self.eval()

    def forward(self, x, *args):
        return self.run(self, x, *args)


def smoothed(model):
    """The names of the layers of a converted model whose inputs are smoothed."""
    layers = model.torchq_plan.layers
    for layer in layers.values():
        assert (layer.channel_scale is None) == (layer.alpha is None) == (layer.smoothing_db is None)
    return [name for name, layer in layers.items() if layer.channel_scale is not None]


def parameters(model):
    """Of a model: every parameter, whether it is trainable, and its values."""
    return {name: (id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}


def assert_unchanged(model, before, names=None):
    """All parameters of `before`, or those of these modules, are the same objects, flags and bits."""
    now = dict(model.named_parameters())
    for name, (number, trainable, values) in before.items():
        if names is None or name.rpartition(".")[0] in names:
            assert (id(now[name]), now[name].requires_grad) == (number, trainable), name
            assert torch.equal(now[name], values), name
