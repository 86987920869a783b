"""Small convolutional networks whose blocks call their parts by name, as those of transformers and torchvision do."""

import copy

import torch
from torch import nn

from helpers.numbers import normal
from torchq.modules.quantized_conv import QuantizedConv
from torchq.modules.straight_forms import Form

IMAGES = [normal(4, 3, 20, 20, seed=i) for i in range(4)]
IMAGE = normal(3, 3, 20, 20, seed=9)


def shaken(norm: nn.Module, seed: int = 0) -> nn.Module:
    """A batch norm with statistics, gains and offsets of a trained one."""
    generator = torch.Generator().manual_seed(seed)
    norm.running_mean.copy_(torch.randn(norm.running_mean.shape, generator=generator))
    norm.running_var.copy_(torch.rand(norm.running_var.shape, generator=generator) + 0.5)
    norm.weight.data = torch.randn(norm.weight.shape, generator=generator)
    norm.bias.data = torch.randn(norm.bias.shape, generator=generator)
    return norm


class ConvNorm(nn.Module):
    """A convolution, a norm and an activation."""

    def __init__(self, inputs, outputs, kernel=3, stride=1, act=None, **options):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False, **options)
        self.norm = shaken(nn.BatchNorm2d(outputs), seed=outputs)
        self.act = nn.Identity() if act is None else act

    def forward(self, x):
        return self.act(self.norm(self.conv(x)))


class Bottleneck(nn.Module):
    """As a ResNet's of transformers: the sum is in place, and the activation behind it a module."""

    def __init__(self, inputs, outputs, stride=1, act=nn.ReLU):
        super().__init__()
        first = ConvNorm(inputs, 32, 1, act=act())
        self.layer = nn.Sequential(first, ConvNorm(32, 32, 3, stride, act=act()), ConvNorm(32, outputs, 1))
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else ConvNorm(inputs, outputs, 1, stride)
        self.activation = act()

    def forward(self, x):
        y = self.layer(x)
        y += self.shortcut(x)
        return self.activation(y)


class Basic(nn.Module):
    """As a ResNet's of torchvision: one activation module, in place, called twice."""

    def __init__(self, channels):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False), shaken(nn.BatchNorm2d(channels))
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False), shaken(nn.BatchNorm2d(channels))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out = out + x
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self, act=nn.ReLU):
        super().__init__()
        self.stem = ConvNorm(3, 32, 3, act=act())
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.blocks = nn.Sequential(Bottleneck(32, 64, act=act), Bottleneck(64, 64, act=act), Basic(64))
        self.head = nn.Linear(64, 32)

    def forward(self, x):
        return self.head(self.blocks(self.pool(self.stem(x))).mean((2, 3)))


def resnet(act=nn.ReLU) -> nn.Module:
    torch.manual_seed(0)
    return ResNet(act).eval()


def by_code(qmodel: nn.Module, form: type[Form] = Form) -> nn.Module:
    """The same int8 layers, with the modules that are such forms under the code of their classes."""
    twin = copy.deepcopy(qmodel)
    for module in twin.modules():
        if isinstance(module, form):
            module.__class__ = module.original
    return twin


def unfused(qmodel: nn.Module) -> nn.Module:
    """The same layers, none of which waits."""
    twin = copy.deepcopy(qmodel)
    for module in twin.modules():
        if isinstance(module, QuantizedConv):
            module.scope = None
    return twin


def by_itself(qmodel):
    """The same layers, which all give torch's format."""
    twin = copy.deepcopy(qmodel)
    for module in twin.modules():
        if isinstance(module, QuantizedConv):
            module.hands = None
    return twin
