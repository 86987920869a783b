"""Without calibration data, what follows a convolution is read from the code of the modules that hold it."""

import copy

import pytest
import torch
from torch import nn

from helpers.compare import assert_identical
from helpers.conv_blocks import DATA, X
from helpers.convolutional import IMAGE, IMAGES, Basic, Bottleneck, ConvNorm, by_code, resnet, shaken
from helpers.mobile import Inverted, Network, Padded, Timm, Torchvision, Unit
from torchq import QConfig, apply_plan, convert, plan_of, prepare_qat
from torchq.modules.channels_last import ChannelsLast
from torchq.modules.conv_block import ConvBlock
from torchq.modules.norms import IncludedNorm
from torchq.modules.quantized_conv import QuantizedConv
from torchq.numerics.metrics import sqnr_db

pytestmark = pytest.mark.usefixtures("seeded")

DYNAMIC = QConfig(activation="dynamic", rounding="nearest", smoothing="none")


@pytest.mark.parametrize(
    ("model", "images", "x"),
    [
        (Unit(), DATA, X),
        (Unit(32, 64), DATA, X),
        (Basic(32), DATA, X),
        (Bottleneck(32, 64), DATA, X),
        (Inverted(), DATA, X),
        (Torchvision(), DATA, X),
        (Timm(), DATA, X),
        (Padded(), DATA, X),
        (Network(), DATA, X),
        (ConvNorm(3, 32, act=nn.SiLU()), IMAGES, IMAGE),
        (resnet(), IMAGES, IMAGE),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_code_says_what_runs_would_show(model, images, x):
    model = model.eval()
    qmodel, seen = convert(model), convert(model, images, config=DYNAMIC)
    told, shown = ({n: (r.norm, r.adds, r.activation) for n, r in m.torchq_plan.layers.items()} for m in (qmodel, seen))
    assert told == shown
    assert any(map(any, told.values()))
    for name, layer in qmodel.torchq_plan.layers.items():
        assert layer.hands in ((), seen.torchq_plan.layers[name].hands)
    assert_identical(qmodel(x), seen(x))
    assert sqnr_db(model(x), qmodel(x)) > 30
    assert not any(isinstance(module, nn.BatchNorm2d) for module in qmodel.modules())
    assert_identical(by_code(qmodel)(x), qmodel(x))
    assert_identical(apply_plan(model, plan_of(qmodel))(x), qmodel(x))


def test_a_block_is_one_loop():
    assert isinstance(convert(Unit(32, 64).eval()), ConvBlock)
    assert not isinstance(convert(Unit(32, 64).eval(), config=QConfig(fuse=False)), ConvBlock)


def test_a_row_of_convolutions_hands_on_with_the_channels_last(monkeypatch):
    """Nothing but the code that was read can see what lies between them."""
    turned, usual = [], ChannelsLast.make
    monkeypatch.setattr(ChannelsLast, "make", lambda self: turned.append(self) or usual(self))
    blocks = ConvNorm(32, 48, act=nn.SiLU()), nn.Sequential(ConvNorm(48, 64, 1, act=nn.SiLU()), Unit(64, 32))
    model = nn.Sequential(*blocks, ConvNorm(32, 32), nn.BatchNorm2d(32), ConvNorm(32, 32)).eval()
    qmodel = convert(model)
    hands = {name: layer.hands for name, layer in qmodel.torchq_plan.layers.items() if layer.hands}
    assert hands == {"0.conv": ("1.0.conv",), "1.1.body.0.conv": ("1.1.body.1.conv",)}
    twin = copy.deepcopy(qmodel)
    for module in twin.modules():
        if isinstance(module, QuantizedConv):
            module.hands = None
    with torch.no_grad():
        y = qmodel(X)
        assert turned == []
        assert y.is_contiguous()
        assert_identical(y, twin(X))
        assert sqnr_db(model(X), y) > 25


class Twice(ConvNorm):
    def forward(self, x):
        return self.norm(self.norm(self.conv(x)))


class Again(ConvNorm):
    """The same convolution in front of the norm and behind it."""

    def forward(self, x):
        return self.conv(self.act(self.norm(self.conv(x))))


class Around(nn.Module):
    """A shared block, with a norm behind one of its calls."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(32, 32, 1))
        self.one, self.two = nn.Sequential(self.block, shaken(nn.BatchNorm2d(32))), nn.Sequential(self.block, nn.ReLU())

    def forward(self, x):
        return self.one(x) + self.two(x)


class Reads(ConvNorm):
    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y


class Patched(ConvNorm):
    """An instance with a forward of its own."""

    def __init__(self):
        super().__init__(32, 32)
        self.forward = lambda x: self.norm(self.conv(x) * 2)


class Watched(nn.Module):
    """Somebody looks at what lies between the convolution and its norm."""

    def __init__(self):
        super().__init__()
        self.body, self.norm, self.seen = nn.Sequential(nn.Conv2d(32, 32, 1)), shaken(nn.BatchNorm2d(32)), []
        self.body.register_forward_hook(lambda module, args, y: self.seen.append(y.clone()))

    def forward(self, x):
        return self.norm(self.body(x))


class Depends(ConvNorm):
    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) if x.mean() > 0 else y


@pytest.mark.parametrize(
    "model",
    [Twice(32, 32), Again(32, 32), Around(), Reads(32, 32), Patched(), Watched(), Depends(32, 32)],
    ids=lambda model: type(model).__name__,
)
def test_what_code_does_not_prove_stays(model):
    model = model.eval()
    qmodel = convert(model)
    assert not any(isinstance(module, IncludedNorm) for module in qmodel.modules())
    for x in (X, X - 1, X + 1):
        assert sqnr_db(model(x), qmodel(x)) > 30
    for one, other in zip(getattr(model, "seen", ()), getattr(qmodel, "seen", ()), strict=False):
        assert sqnr_db(one, other) > 30


def test_a_trained_model_needs_no_data_either():
    model = nn.Sequential(Unit(32, 64), Unit(64, 32)).eval()
    trained = prepare_qat(model, DATA).eval()
    qmodel = convert(trained)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in qmodel.modules())
    assert sum(layer.adds for layer in qmodel.torchq_plan.layers.values()) == 2
    assert any(layer.feeds for layer in qmodel.torchq_plan.layers.values())
    assert sqnr_db(trained(X), qmodel(X)) > 35
    with torch.no_grad():
        assert sqnr_db(model(X), qmodel(X)) > 25
