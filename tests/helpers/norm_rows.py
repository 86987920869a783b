"""Batch norms that go on with children, and a mobile network of them with squeeze-and-excitation, as timm has them."""

from torch import _assert, nn
from torch.nn import functional

from helpers.convolutional import shaken


class NormAct(nn.BatchNorm2d):
    """The code of torch's norm written out, with what it does in training, and two children behind."""

    def __init__(self, channels, act=nn.ReLU, drop=nn.Identity):
        super().__init__(channels)
        self.drop = drop()
        self.act = nn.Identity() if act is None else act(inplace=True)

    def forward(self, x):
        _assert(x.ndim == 4, f"expected 4D input (got {x.ndim}D input)")
        average_factor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            average_factor = self.momentum or 1.0 / float(self.num_batches_tracked)
        by_batch = True if self.training else self.running_mean is None and self.running_var is None
        x = functional.batch_norm(
            x,
            self.running_mean if not self.training or self.track_running_stats else None,
            self.running_var if not self.training or self.track_running_stats else None,
            self.weight,
            self.bias,
            by_batch,
            average_factor,
            self.eps,
        )
        x = self.drop(x)
        return self.act(x)


class Squeeze(nn.Module):
    """A squeeze-and-excitation."""

    def __init__(self, channels):
        super().__init__()
        self.reduce, self.act, self.expand = (
            nn.Conv2d(channels, 16, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(16, channels, 1),
        )
        self.gate = nn.Hardsigmoid()

    def forward(self, x):
        y = self.act(self.reduce(x.mean((2, 3), keepdim=True)))
        return x * self.gate(self.expand(y))


class Mobile(nn.Module):
    """An inverted residual."""

    def __init__(self, inputs=32, outputs=32, stride=1, act=nn.Hardswish):
        super().__init__()
        self.has_skip = inputs == outputs and stride == 1
        self.conv_s2d = None
        self.conv_pw, self.bn1 = nn.Conv2d(inputs, 64, 1, bias=False), shaken(NormAct(64, act))
        self.conv_dw = nn.Conv2d(64, 64, 3, stride, 1, groups=64, bias=False)
        self.bn2 = shaken(NormAct(64, act), seed=1)
        self.aa, self.se = nn.Identity(), Squeeze(64)
        self.conv_pwl, self.bn3 = nn.Conv2d(64, outputs, 1, bias=False), shaken(NormAct(outputs, None), seed=2)
        self.drop_path = nn.Identity()

    def forward(self, x):
        shortcut = x
        if self.conv_s2d is not None:
            x = self.conv_s2d(x)
        x = self.conv_pw(x)
        x = self.bn1(x)
        x = self.conv_dw(x)
        x = self.bn2(x)
        x = self.aa(x)
        x = self.se(x)
        x = self.conv_pwl(x)
        x = self.bn3(x)
        if self.has_skip:
            x = self.drop_path(x) + shortcut
        return x


class Row(nn.Module):
    """A convolution and its norm, behind which a module may be missing."""

    def __init__(self, inputs, outputs, kernel=3, act=nn.SiLU):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        self.bn = shaken(NormAct(outputs, act), seed=outputs)

    def forward(self, x):
        x = self.conv(x)
        x = self.bn(x)
        aa = getattr(self, "aa", None)
        if aa is not None:
            x = self.aa(x)
        return x


class Net(nn.Module):
    """A stem, blocks and a last row."""

    def __init__(self):
        super().__init__()
        self.stem, self.last = Row(3, 32), Row(32, 64, 1)
        self.blocks = nn.Sequential(Mobile(32, 48, 2), Mobile(48, 48), Mobile(48, 32))

    def forward(self, x):
        return self.last(self.blocks(self.stem(x))).mean((2, 3))
