"""For the tests of the accuracy budget: a network with one layer that int8 ruins, and a metric that shows it."""

import torch
from torch import nn

from helpers.numbers import normal
from torchq import QConfig

WIDTH = 32
STATIC = QConfig(activation="static", observer="minmax", min_sqnr_db=-100, smoothing="none", rounding="nearest")
DATA = [normal(32, WIDTH, seed=i) for i in range(4)]
X = normal(64, WIDTH, seed=9)


class Shifted(nn.Module):
    """Adds 300 to every other channel, and subtracts 300 from the others."""

    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.tensor([300.0, -300.0]).repeat(WIDTH // 2))

    def forward(self, x):
        return x + self.shift


def bad_at(place, layers=5):
    """A chain of Linear layers. The input of the one at `place` is shifted by a vector that its weight maps to 0.

    In float, the shift does not change the output. In int8, the step becomes 600 / 255, too coarse for inputs of about
    1, both static and dynamic. Smoothing can't help, since all channels are equally large.
    """
    torch.manual_seed(0)
    model = nn.Sequential()
    for i in range(layers):
        model.append(nn.Linear(WIDTH, WIDTH))
        nn.init.kaiming_normal_(model[-1].weight, nonlinearity="relu")  # so every layer affects the output
        if i == place:
            model.insert(-1, Shifted())
            signs = model[-2].shift / 300
            with torch.no_grad():
                model[-1].weight -= torch.outer(model[-1].weight @ signs, signs) / WIDTH
        if i + 1 < layers:
            model.append(nn.ReLU())
    return model.eval()


def minus_error(model):
    """The metric of these tests: minus the error energy divided by the output energy. The float model has 0."""
    exact = model(X).clone()

    def evaluate(candidate):
        evaluate.calls += 1
        return 0 - (candidate(X) - exact).square().sum() / exact.square().sum()

    evaluate.calls = 0
    return evaluate
