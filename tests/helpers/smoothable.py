"""A norm with three outlier channels and two Linears that read it, for the tests of smoothing and of the dataflow."""

from torch import nn

from helpers.numbers import normal
from torchq import QConfig
from torchq.calibration.calibrate import calibrate
from torchq.modules.registry import find_layers
from torchq.planning.apply import apply_plan
from torchq.planning.plan import LayerPlan, Plan, Smoothing

K = 32
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
            parameter[[3, 7, 20]] *= 50
        self.a.weight[:, [3, 7, 20]] /= 50
        self.b.weight[:, [3, 7, 20]] /= 50
        self.eval()

    def forward(self, x, *args):
        return self.run(self, x, *args)


def readers(model, data=DATA):
    return calibrate(model, data, find_layers(model), QConfig()).readers


def only_smoothed(model, scales, source="norm", layers=("a", "b")):
    plans = {
        name: LayerPlan("float", "test", smoothed=source if name in layers else None) for name in find_layers(model)
    }
    smoothing = Smoothing(tuple(scales.tolist()), layers, 0.5, 0.0, 0.0)
    return apply_plan(model, Plan(plans, {source: smoothing}))
