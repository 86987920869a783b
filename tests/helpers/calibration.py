"""A network of one Linear, to test its records, and what calibration must leave unchanged."""

import torch
from torch import nn

from helpers.numbers import normal
from torchq import QConfig
from torchq.calibration.calibrate import calibrate
from torchq.modules.registry import find_layers

X, Y = normal(20, 6), torch.arange(20)
BATCHES, LABELS = X.split(8), Y.split(8)  # 8, 8 and a ragged 4


class Net(nn.Module):
    """One Linear. Its record must have the inputs of all calls."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        return self.fc(x)


class Many(Net):
    """Two inputs required, one not."""

    def forward(self, a, b, c=None):
        assert c is None
        return self.fc(a + b)


def recorded(model, loader, config=None, **kwargs):
    return calibrate(model, loader, find_layers(model), config or QConfig(), **kwargs)


def state(model):
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    switches = (torch.backends.mha.get_fastpath_enabled(), torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    return hooks, [module.training for module in model.modules()], switches
