"""A network with one layer that int8 ruins, and a metric that sees it, for the tests of the accuracy budget."""

import torch
from torch import nn

from helpers.numbers import normal
from torchq import QConfig

WIDTH = 32
STATIC = QConfig(activation="static", observer="minmax", min_sqnr_db=-100, rounding="nearest")
DATA = [normal(32, WIDTH, seed=i) for i in range(4)]
X = normal(64, WIDTH, seed=9)


class Shifted(nn.Module):
    """Adds 300 to every other channel, and takes 300 from the rest."""

    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.tensor([300.0, -300.0]).repeat(WIDTH // 2))

    def forward(self, x):
        return x + self.shift


def bad_at(place, layers=5):
    """A chain of Linear layers; the one at `place` gets its input shifted, by what its weight does not see.

    The shift is gone from the output in float. But a step of 600 / 255 leaves little of an input of about 1, whether
    static or dynamic, and there is no channel whose scale could be taken to the weights.
    """
    torch.manual_seed(0)
    model = nn.Sequential()
    for i in range(layers):
        model.append(nn.Linear(WIDTH, WIDTH))
        nn.init.kaiming_normal_(model[-1].weight, nonlinearity="relu")  # so that the output depends on every layer
        if i == place:
            model.insert(-1, Shifted())
            signs = model[-2].shift / 300
            with torch.no_grad():
                model[-1].weight -= torch.outer(model[-1].weight @ signs, signs) / WIDTH
        if i + 1 < layers:
            model.append(nn.ReLU())
    return model.eval()


def minus_error(model):
    """The metric of these tests: minus the error's share of the output's energy. 0 for the float model itself."""
    exact = model(X).clone()

    def evaluate(candidate):
        evaluate.calls += 1
        return 0 - (candidate(X) - exact).square().sum() / exact.square().sum()

    evaluate.calls = 0
    return evaluate
