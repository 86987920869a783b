"""Without calibration data, what follows a convolution is read from the code of the modules that hold it."""

import copy

import pytest
import torch
from torch import nn

from helpers.compare import assert_identical
from helpers.conv_blocks import DATA, X
from helpers.convolutional import IMAGE, IMAGES, Basic, Bottleneck, ConvNorm, by_code, resnet, shaken
from helpers.mobile import Inverted, Network, Padded, Timm, Torchvision
from torchq import QConfig, apply_plan, convert, plan_of, prepare_qat
from torchq.modules.channels_last import ChannelsLast
from torchq.modules.conv_block import ConvBlock
from torchq.modules.norms import IncludedNorm
from torchq.modules.quantized_conv import QuantizedConv
from torchq.numerics.metrics import sqnr_db

pytestmark = pytest.mark.usefixtures("seeded")

DYNAMIC = QConfig(activation="dynamic", rounding="nearest", smoothing="none")


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


class Net(nn.Module):
    """A block and a row, of which other code may call single modules."""

    def __init__(self):
        super().__init__()
        self.block, self.row = Unit(), nn.Sequential(nn.Conv2d(32, 32, 1), shaken(nn.BatchNorm2d(32)), nn.ReLU())

    def forward(self, x):
        return self.row(self.block(x))


class CallsInside(Net):
    def forward(self, x):
        return self.row(self.block(x)) + self.block.body[1].conv(self.row(x).repeat(1, 48, 1, 1)[:, :48])


class CallsByName(Net):
    def forward(self, x):
        return self.row(self.block(x)) + getattr(self.row, "0")(x)


class CallsAnItem(Net):
    def forward(self, x):
        return self.row(self.block(x)) + self.row[0](x)


class CallsASlice(Net):
    def forward(self, x):
        return self.row(self.block(x)) + self.row[:-2](x)


class Collects(Net):
    def forward(self, x):
        found = []
        for layer in self.row:
            x = layer(x)
            found.append(x)
        return sum(found)


class CallsInAMethod(Net):
    def taken(self, x):
        return next(layer(x) for layer in self.row)

    def forward(self, x):
        return super().forward(x) + self.taken(x)


def first_of(module, x):
    return module[0](x)


class CallsInAFunction(Net):
    def forward(self, x):
        return super().forward(x) + first_of(self.row, x)


class OfParent(CallsAnItem):
    def forward(self, x):
        return super().forward(x)


class Outer(nn.Module):
    """Holds a network, and calls what is in its row."""

    def __init__(self):
        super().__init__()
        self.net = Net()

    def forward(self, x):
        return self.net(x) + self.net.row[0](x)


class Keeps(Net):
    """A convolution in a list that torch knows nothing of."""

    def __init__(self):
        super().__init__()
        self.firsts = [self.row[0]]

    def forward(self, x):
        return super().forward(x) + self.firsts[0](x)


class Twins(nn.Module):
    """Two of a class, one of which has a forward of its own."""

    def __init__(self):
        super().__init__()
        self.one, self.two = CallsAnItem(), CallsAnItem()
        self.one.forward = lambda x: x

    def forward(self, x):
        return self.two(self.one(x))


class InARow(nn.Module):
    """A row in a row, which has a forward of its own."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Sequential(Net().row)
        row = self.rows[0]
        self.rows.forward = lambda x: row(x) + row[0](x)

    def forward(self, x):
        return self.rows(x)


class ChildOfARow(Net):
    """It asks for its own children, and takes one out of one of them."""

    def forward(self, x):
        block, row = self.children()
        return row(block(x)) + row[0](x)


class ChildrenOfARow(Net):
    def forward(self, x):
        return self.row(self.block(x)) + next(iter(self.row.children()))(x)


class ByAVariable(Net):
    def forward(self, x):
        first = "0"
        return self.row(self.block(x)) + getattr(self.row, first)(x)


class ComparesAndTakes(Net):
    def forward(self, x):
        if self.row is not None:
            row = self.row
            x = row[0](x) + row(x)
        return x


OTHERS = [CallsByName, CallsAnItem, CallsASlice, Collects, CallsInAMethod, CallsInAFunction, OfParent, Outer, Keeps]
OTHERS += [ChildOfARow, ChildrenOfARow, ByAVariable, ComparesAndTakes]


@pytest.mark.parametrize("kind", [CallsInside, *OTHERS])
def test_a_norm_is_not_included_where_other_code_may_call_the_convolution(kind):
    model = kind().eval()
    qmodel = convert(model)
    assert sqnr_db(model(X), qmodel(X)) > 30
    path = "block.body.1.conv" if kind is CallsInside else "net.row.0" if kind is Outer else "row.0"
    assert qmodel.torchq_plan.layers[path].norm is None


@pytest.mark.parametrize(("kind", "path"), [(Twins, "two.row.0"), (InARow, "rows.0.0")])
def test_a_norm_is_not_included_near_a_forward_of_its_own(kind, path):
    assert convert(kind().eval(), inplace=True).torchq_plan.layers[path].norm is None


def test_a_norm_is_not_included_where_a_module_has_a_forward_of_its_own():
    model = Net().eval()
    model.forward = lambda x: Net.forward(model, x) + model.row[0](x)
    qmodel = convert(model, inplace=True)
    assert qmodel.torchq_plan.layers["row.0"].norm is None


def test_norms_are_included_where_the_holder_is_only_called():
    class Usual(Net):
        def forward(self, x):
            y = torch.relu(self.block(x))
            return self.row(y) if y.shape[0] else y

    norms = {name: layer.norm for name, layer in convert(Usual().eval()).torchq_plan.layers.items()}
    assert norms == {
        "block.body.0.conv": "block.body.0.norm",
        "block.body.1.conv": "block.body.1.norm",
        "row.0": "row.1",
    }


class Stage(nn.Module):
    """It calls its children in a loop, as timm's RegStage does."""

    def __init__(self):
        super().__init__()
        self.b1, self.b2 = Unit(), Unit()

    def forward(self, x):
        for block in self.children():
            x = block(x)
        return x


class Asking(Net):
    """It only asks whether there is a row, and by a name in the code whether there is more."""

    def forward(self, x):
        x = self.block(x)
        if self.row is not None:
            x = self.row(x)
        more = getattr(self, "more", None)
        return x if more is None else more(x)


@pytest.mark.parametrize(("model", "count"), [(Stage(), 4), (Asking(), 3)], ids=["children", "asks"])
def test_norms_are_included_where_code_asks_for_no_more_than_whole_children(model, count):
    model = model.eval()
    qmodel = convert(model)
    assert sum(layer.norm is not None for layer in qmodel.torchq_plan.layers.values()) == count
    assert sqnr_db(model(X), qmodel(X)) > 30


def test_a_convolution_that_is_called_in_a_loop_over_children_is_not_changed():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(32, 32, 1), shaken(nn.BatchNorm2d(32))
            self.row = nn.Sequential(nn.Conv2d(32, 32, 1), shaken(nn.BatchNorm2d(32), seed=1))

        def forward(self, x):
            return sum(child(x) for child in self.children())

    model = Loop().eval()
    qmodel = convert(model)
    norms = {name: layer.norm for name, layer in qmodel.torchq_plan.layers.items()}
    assert norms == {"conv": None, "row.0": None}
    assert sqnr_db(model(X), qmodel(X)) > 30
