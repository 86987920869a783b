"""Layers in graphs of torch.compile: what several tests ask of them."""

import copy
import pickle

import torch
from torch import nn

from helpers.compare import assert_identical
from helpers.numbers import normal
from torchq import convert

X = normal(2, 5, 64)


class Graphs:
    """A backend that keeps the graphs that it gets."""

    def __init__(self):
        self.graphs = []

    def __call__(self, module, example):
        self.graphs.append(module.graph)
        return module

    def count(self, *targets):
        return sum(node.target in targets for graph in self.graphs for node in graph.nodes)


def call(layer, *args, **kwargs):
    """One code object, so all layers share its graphs."""
    return layer(*args, **kwargs)


def compiled(graphs=None, **more):
    return torch.compile(call, fullgraph=True, backend=graphs or Graphs(), **more)


def encoder_layer(**more):
    torch.manual_seed(0)
    return convert(nn.TransformerEncoderLayer(64, 4, 96, activation="gelu", batch_first=True, **more).eval())


def same(one, other):
    """Whether they are the same bits, of tensors and of pairs with None."""
    ours, theirs = (y[0] if isinstance(y, tuple) else y for y in (one, other))
    assert type(one) is type(other)
    assert_identical(ours, theirs)


class Stack(nn.Module):
    """Layers one after the other."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x, all_states=False):
        states = []
        for layer in self.layers:
            states.append(x := layer(x))
        return states if all_states else x


def with_other_weights(layer):
    dense = layer.linear2 if isinstance(layer, nn.TransformerEncoderLayer) else layer.output.dense
    dense.replace_weight(dense.weight_int8.flip(0), dense.weight_scale, dense.rows()[2])
    return layer


def by_its_dict(layer):
    other = type(layer).__new__(type(layer))
    other.__dict__.update(layer.__dict__)
    other.__dict__["_modules"] = copy.deepcopy(layer._modules)
    return other


COPIES = {
    "copy": lambda layer: copy.copy(layer),
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "its __dict__": by_its_dict,
    "a copy of that": lambda layer: copy.deepcopy(by_its_dict(layer)),
}
