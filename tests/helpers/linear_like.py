"""Modules that compute what nn.Linear does, in their own ways, and the nn.Linear that each is."""

import torch
from torch import nn

from torchq.modules.registry import find_layers


class Conv1D(nn.Module):
    """As transformers has it, for GPT-2: the weight is (in, out)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf) / nx**0.5)
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        size_out = (*x.size()[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size_out)


class FalconLinear(nn.Linear):
    """As transformers has it."""

    def forward(self, input):
        hidden = input @ self.weight.T
        if self.bias is None:
            return hidden
        return hidden + self.bias


def twin_of(module):
    """The nn.Linear with the same weight."""
    layer = find_layers(module)[""]
    linear = nn.Linear(layer.in_features, layer.out_features, layer.matrix.bias is not None)
    linear.weight.copy_(layer.weight)
    if layer.matrix.bias is not None:
        linear.bias.copy_(layer.matrix.bias)
    return linear
