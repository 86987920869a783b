"""Convolutions hand their outputs over with the channels last, where only convolutions read them. It is never seen."""

import copy
import dataclasses
import pickle

import pytest
import torch
from torch import nn

from helpers.compare import assert_identical
from helpers.convolutional import IMAGE, IMAGES, Bottleneck, ConvNorm, by_itself, resnet
from helpers.numbers import normal
from torchq import _C, Plan, QConfig, apply_plan, convert, plan_of
from torchq.modules.channels_last import ChannelsLast
from torchq.modules.convolving import is_channels_last
from torchq.modules.pending import Scope
from torchq.modules.quantized_conv import QuantizedConv
from torchq.numerics.metrics import sqnr_db

pytestmark = pytest.mark.usefixtures("seeded")

STATIC = QConfig(activation="static", rounding="nearest", smoothing="none")
DYNAMIC = QConfig(activation="dynamic", rounding="nearest", smoothing="none")
DATA = [normal(4, 32, 20, 20, seed=i) for i in range(4)]
X = normal(2, 32, 20, 20, seed=9)


@pytest.fixture
def turned(monkeypatch):
    """Lists the shapes of what had to be turned for a reader that is no convolution."""
    seen = []
    usual = ChannelsLast.make

    def spy(self):
        if self._last is not None:
            seen.append(tuple(self.shape))
        return usual(self)

    monkeypatch.setattr(ChannelsLast, "make", spy)
    return seen


@pytest.fixture
def formats(monkeypatch):
    """Lists for each product with floats whether its input, residual and output have the channels last."""
    seen = []
    usual = QuantizedConv._int8

    def spy(layer, x, activation, dtype, last, residual=None, y_qparams=None, around=()):
        floats = [each for each in (x, residual) if each is not None and each.is_floating_point()]
        seen.append(([is_channels_last(each) for each in floats], last or y_qparams is not None))
        return usual(layer, x, activation, dtype, last, residual, y_qparams, around)

    monkeypatch.setattr(QuantizedConv, "_int8", spy)
    monkeypatch.setattr(_C, "call_convolutions", lambda *_: NotImplemented)  # each by itself, so that all are seen
    return seen


class Chain(nn.Module):
    """Two blocks, and what reads their sums: convolutions only, or somebody else when it is asked to."""

    ask = ""

    def __init__(self):
        super().__init__()
        self.one, self.two = Bottleneck(32, 64), Bottleneck(64, 64)
        self.last = nn.Conv2d(64, 32, 3)

    def forward(self, x):
        y = self.one(x)
        if self.ask == "sum":
            self.seen = float(y.sum())
        elif self.ask == "view":
            self.seen = y.view(len(y), -1) + 0
        elif self.ask == "write":
            y[:, 0] = 0.0
        elif self.ask == "write through a view":
            y.flatten(1).mul_(2.0)
        elif self.ask == "strides":
            self.seen = (y.stride(), y.is_contiguous(), (y + 0).stride(), y[0].stride())
        elif self.ask == "array":
            self.seen = torch.from_numpy(y.numpy().copy())
        elif self.ask == "keep":
            self.seen = y
        elif self.ask == "return":
            return y, self.last(self.two(y))
        elif self.ask == "other sum":
            y = y + x.mean()
        return self.last(self.two(y))


@pytest.fixture(scope="module")
def chains():
    torch.manual_seed(0)
    model = Chain().eval()
    with torch.no_grad():
        return {scheme: convert(model, DATA, config=config) for scheme, config in (("s", STATIC), ("d", DYNAMIC))}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("scheme", ["s", "d"])
def test_only_the_ends_have_torchs_format(scheme, mode, chains, formats, turned):
    qmodel = chains[scheme]
    plans = qmodel.torchq_plan.layers
    assert plans["one.layer.2.conv"].hands
    assert plans["two.layer.2.conv"].hands == ("last",)
    assert plans["last"].hands == ()
    formats.clear()
    with mode():
        y = qmodel(X)
    assert type(y) is torch.Tensor
    assert y.is_contiguous()
    ends = [False, False]  # x of the first layer and of the shortcut
    assert [last for floats, _ in formats for last in floats if not last] == ends
    assert [out for _, out in formats].count(False) == 1
    assert formats[-1][1] is False
    assert turned == []
    assert_identical(y, by_itself(qmodel)(X))


WAYS = ["sum", "view", "write", "write through a view", "strides", "array", "keep", "return", "other sum"]


@pytest.mark.parametrize("way", WAYS)
def test_other_readers_see_torchs_format(way, chains):
    qmodel, twin = copy.deepcopy(chains["s"]), by_itself(chains["s"])
    qmodel.ask = twin.ask = way
    y, expected = qmodel(X), twin(X)
    for one, other in zip(*((each if isinstance(each, tuple) else (each,)) for each in (y, expected)), strict=True):
        assert type(one) is torch.Tensor
        assert one.stride() == other.stride()
        assert_identical(one, other)
    if hasattr(twin, "seen"):
        seen = qmodel.seen
        assert_identical(seen + 0, twin.seen) if isinstance(twin.seen, torch.Tensor) else None
        if way == "strides":
            assert seen == twin.seen
        if way == "sum":
            assert seen == twin.seen


def test_modes_gradients_and_compilers(chains):
    qmodel, twin = chains["d"], by_itself(chains["d"])
    y = twin(X)
    with torch.inference_mode():
        assert_identical(qmodel(X), y)
    with torch.enable_grad():
        x = X.clone().requires_grad_()
        assert_identical(*(torch.autograd.grad(model(x).sum(), x)[0] for model in (qmodel, twin)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_identical(qmodel(X), twin(X))
    last = X.contiguous(memory_format=torch.channels_last)
    assert qmodel(last).is_contiguous(memory_format=torch.channels_last)
    assert_identical(qmodel(last).contiguous(), y)
    assert_identical(qmodel(X.bfloat16()), twin(X.bfloat16()))
    for other in (copy.deepcopy(qmodel), pickle.loads(pickle.dumps(qmodel))):
        assert_identical(other(X), y)


def test_a_part_called_alone_gives_tensors(chains):
    block = chains["s"].two
    y = block(normal(2, 64, 20, 20, seed=3))
    assert type(y) is torch.Tensor
    assert y.is_contiguous()


def test_plans_keep_it(chains):
    model, qmodel = Chain().eval(), chains["s"]
    plan = Plan.from_dict(plan_of(qmodel).to_dict())
    assert plan.layers["one.layer.2.conv"].hands == qmodel.torchq_plan.layers["one.layer.2.conv"].hands
    old = plan.to_dict()
    for layer in old["layers"].values():
        del layer["hands"]  # as the version before saved it
    assert Plan.from_dict(old).layers["last"].hands == ()
    plan.layers["last"] = dataclasses.replace(plan.layers["last"], hands=("nowhere",))
    with pytest.raises(ValueError, match="hands its output"):
        apply_plan(model, plan)


class Speech(nn.Module):
    """The convolution module of a conformer, as transformers has it, and a stem with max pooling over two branches."""

    def __init__(self):
        super().__init__()
        self.first, self.glu = nn.Conv1d(32, 128, 1, bias=False), nn.GLU(dim=1)
        self.deep = nn.Conv1d(64, 64, 7, padding=3, groups=64, bias=False)
        self.norm, self.act = nn.BatchNorm1d(64), nn.SiLU()
        self.second = nn.Conv1d(64, 32, 1)

    def forward(self, x):
        y = self.glu(self.first(x.transpose(1, 2)))
        return self.second(self.act(self.norm(self.deep(y)))).transpose(1, 2) + x


@pytest.mark.parametrize("config", [STATIC, DYNAMIC], ids=["static", "dynamic"])
def test_a_conformers_convolutions(config, turned):
    model = Speech().eval()
    data = [normal(2, 200, 32, seed=i) for i in range(4)]
    qmodel = convert(model, data, config=config)
    assert qmodel.torchq_plan.layers["first"].hands == ("deep",)
    y = qmodel(data[0])
    assert turned == []
    torch.testing.assert_close(y, by_itself(qmodel)(data[0]), rtol=1e-5, atol=1e-5)


class Branches(nn.Module):
    """Two branches that are joined, as in an Inception; and a norm that is no part of a convolution."""

    def __init__(self, norm):
        super().__init__()
        self.stem, self.pool = ConvNorm(3, 32, act=nn.ReLU()), nn.MaxPool2d(3, 2, 1)
        self.left, self.right = nn.Conv2d(32, 32, 1), nn.Conv2d(32, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(64) if norm else nn.Identity()
        self.join = nn.Conv2d(64, 32, 1)

    def forward(self, x):
        x = self.pool(self.stem(x))
        return self.join(self.norm(torch.cat([self.left(x), self.right(x)], 1)))


@pytest.mark.parametrize("norm", [False, True])
def test_branches(norm, turned):
    qmodel = convert(Branches(norm).eval(), IMAGES, config=DYNAMIC)
    plans = qmodel.torchq_plan.layers
    assert plans["stem.conv"].hands == ("left", "right")
    assert plans["left"].hands == plans["right"].hands == (() if norm else ("join",))
    y = qmodel(IMAGE)
    assert turned == []
    assert_identical(y, by_itself(qmodel)(IMAGE))


def test_a_whole_network(turned):
    qmodel = convert(resnet(), IMAGES, config=STATIC)
    y = qmodel(IMAGE)
    assert turned == []
    assert_identical(y, by_itself(qmodel)(IMAGE))


class Between(nn.Module):
    def __init__(self, between):
        super().__init__()
        self.one, self.between, self.two = ConvNorm(3, 32), between, nn.Conv2d(32, 32, 3)

    def forward(self, x):
        return self.two(self.between(self.one(x)))


class Computes(nn.Module):
    def __init__(self, compute):
        super().__init__()
        self.compute = compute

    def forward(self, x):
        return self.compute(x)


OPERATIONS = {
    "leaky": nn.LeakyReLU(0.1),
    "leaky in place": nn.LeakyReLU(0.1, inplace=True),
    "hardsigmoid": nn.Hardsigmoid(),
    "hardsigmoid in place": nn.Hardsigmoid(inplace=True),
    "pool": nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    "upsample": nn.Upsample(scale_factor=2),
    "size": nn.Upsample(size=(13, 31)),
    "by hand": Computes(lambda x: x * (x + 3.0).clamp(0, 6) / 6 - 0.5),
    "two": Computes(lambda x: x / (x * x + 1.0) - x),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_that_keep_the_format(name, turned):
    model = Between(OPERATIONS[name]).eval()
    qmodel = convert(model, IMAGES, config=DYNAMIC)
    assert qmodel.torchq_plan.layers["one.conv"].hands == ("two",)
    y = qmodel(IMAGE)
    assert turned == []
    assert y.is_contiguous()
    assert_identical(y, by_itself(qmodel)(IMAGE))
    assert sqnr_db(model(IMAGE), y) > 30


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_indices_of_a_pooling_are_turned_for_who_reads_them(turned, mode):
    scope, pool = Scope(), nn.MaxPool2d(3, 2, 1, return_indices=True)
    with mode(), scope.entered(nn.Identity()):
        expected, places = pool(X + 0)
        held = ChannelsLast(X.contiguous(memory_format=torch.channels_last), scope).held()
        y = nn.functional.max_pool2d(held, 3, 2, 1)
        assert type(y) is ChannelsLast
        assert not turned
        assert_identical(y.make(), expected)
        y, found = pool(held)
        turned.clear()
        assert found.stride() == places.stride()
        assert_identical(found + 0, places + 0)
        assert turned
