"""Blocks of mobile networks as transformers, torchvision and timm write them: with branches, configs and padding."""

from torch import nn

from helpers.convolutional import shaken


def same_padding(x, conv):
    """As TensorFlow pads: more at the end than at the beginning, and by the size of x."""
    height, width = int(x.shape[-2]), int(x.shape[-1])
    stride, width_stride = conv.stride
    total = max(conv.kernel_size[0] - (height % stride or stride), 0)
    wide = max(conv.kernel_size[1] - (width % width_stride or width_stride), 0)
    padding = (wide // 2, wide - wide // 2, total // 2, total - total // 2)
    return nn.functional.pad(x, padding, "constant", 0.0)


class Config:
    def __init__(self):
        self.tf_padding = True


class Layer(nn.Module):
    """As that of MobileNetV1 and V2 of transformers."""

    def __init__(self, inputs, outputs, kernel, stride=1, act=nn.ReLU6, norm=True, **options):
        super().__init__()
        self.config = Config()
        self.convolution = nn.Conv2d(inputs, outputs, kernel, stride, bias=not norm, **options)
        self.normalization = shaken(nn.BatchNorm2d(outputs), seed=outputs) if norm else None
        self.activation = None if act is None else act()

    def forward(self, x):
        if self.config.tf_padding:
            x = same_padding(x, self.convolution)
        x = self.convolution(x)
        if self.normalization is not None:
            x = self.normalization(x)
        if self.activation is not None:
            x = self.activation(x)
        return x


class Inverted(nn.Module):
    """As that of MobileNetV2 of transformers."""

    def __init__(self, inputs=32, outputs=32, kernel=3, stride=1):
        super().__init__()
        self.use_residual = stride == 1 and inputs == outputs
        self.expand, self.reduce = Layer(inputs, 96, 1), Layer(96, outputs, 1, act=None)
        self.depthwise = Layer(96, 96, kernel, stride, groups=96)

    def forward(self, x):
        residual = x
        x = self.expand(x)
        x = self.depthwise(x)
        x = self.reduce(x)
        return residual + x if self.use_residual else x


class ConvNormAct(nn.Sequential):
    """As torchvision's: a subclass that only has its own __init__."""

    def __init__(self, inputs, outputs, kernel, stride=1, **options):
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False, **options)
        super().__init__(conv, shaken(nn.BatchNorm2d(outputs), seed=outputs), nn.ReLU6(inplace=True))


class Torchvision(nn.Module):
    def __init__(self, inputs=32, outputs=32, stride=1):
        super().__init__()
        self.use_res_connect = stride == 1 and inputs == outputs
        last = nn.Conv2d(96, outputs, 1, bias=False), shaken(nn.BatchNorm2d(outputs), seed=outputs)
        self.conv = nn.Sequential(ConvNormAct(inputs, 96, 1), ConvNormAct(96, 96, 3, stride, groups=96), *last)

    def forward(self, x):
        if self.use_res_connect:
            return x + self.conv(x)
        return self.conv(x)


class Timm(nn.Module):
    """The shortcut has a name of its own, and the sum an idle module."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(32, 32, 3, 1, 1, groups=32), shaken(nn.BatchNorm2d(32)), nn.ReLU6()
        self.pw, self.bn2, self.drop_path = nn.Conv2d(32, 32, 1), shaken(nn.BatchNorm2d(32), seed=1), nn.Identity()
        self.has_skip = True

    def forward(self, x):
        shortcut = x
        x = self.conv(x)
        x = self.bn(x)
        x = self.act(x)
        x = self.pw(x)
        x = self.bn2(x)
        if self.has_skip:
            x = self.drop_path(x) + shortcut
        return x


class Padded(nn.Module):
    """Zeros by a module, and by a function with constants."""

    def __init__(self, stride=2):
        super().__init__()
        self.stride, self.pad = stride, nn.ZeroPad2d((0, 1, 2, 1))
        self.one, self.act, self.two = nn.Conv2d(32, 48, 3, stride, groups=8), nn.ReLU(), nn.Conv2d(48, 32, 1)

    def forward(self, x):
        if self.stride == 2:
            x = self.pad(x)
        x = self.act(self.one(x))
        return self.two(nn.functional.pad(x, (1, 0, 0, 2)))


class Network(nn.Module):
    """Codes go from block to block, and sums have blocks before and behind."""

    def __init__(self):
        super().__init__()
        self.stem = Layer(32, 32, 3)
        self.blocks = nn.Sequential(Inverted(32, 48, stride=2), Inverted(48, 48), Inverted(48, 48), Inverted(48, 32))
        self.last = Layer(32, 64, 1)

    def forward(self, x):
        return self.last(self.blocks(self.stem(x))).mean((2, 3))


class Flags(nn.Module):
    """What a class of many networks does depends on its settings, and an activation is shared by all."""

    def __init__(self, inputs, outputs, act=None, norm=True):
        super().__init__()
        self.use_norm, self.activate = norm, act is not None
        self.conv = nn.Conv2d(inputs, outputs, 3, 1, 1, bias=not norm)
        if norm:
            self.norm = shaken(nn.BatchNorm2d(outputs), seed=outputs)
        if act is not None:
            self.act = act

    def forward(self, x):
        x = self.conv(x)
        if self.use_norm:
            x = self.norm(x)
        if self.activate:
            x = self.act(x)
        return x


class Unit(nn.Module):
    def __init__(self, inputs=32, outputs=32):
        super().__init__()
        act = nn.ReLU(inplace=True)
        self.resize = inputs != outputs
        self.body = nn.Sequential(Flags(inputs, 48, act), Flags(48, outputs))
        if self.resize:
            self.shortcut = Flags(inputs, outputs, norm=False)
        self.act = act

    def forward(self, x):
        residual = self.shortcut(x) if self.resize else x
        x = self.body(x)
        x = x + residual
        return self.act(x)
