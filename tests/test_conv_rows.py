"""Modules whose code is `act(norm(conv(x)))`: one call with the bits of their code, and whoever looks sees the code."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.compare import assert_identical
from helpers.convolutional import Bottleneck, ConvNorm, by_code
from helpers.numbers import normal
from torchq import QConfig, convert, simulate
from torchq.modules.conv_block import ConvBlock
from torchq.modules.pending_conv import PendingConv
from torchq.modules.straight_forms import ConvRow
from torchq.ops import Activation

pytestmark = pytest.mark.usefixtures("seeded")

STATIC = QConfig(activation="static", rounding="nearest", smoothing="none")
DATA = [normal(4, 32, 20, 20, seed=i) for i in range(4)]
X = normal(2, 32, 20, 20, seed=9)


def made(act=nn.ReLU, config=STATIC):
    return by_code(convert(Bottleneck(32, 64, act=act).eval(), DATA, config=config), ConvBlock)  # which calls no rows


def rows_of(qmodel):
    return [module for module in qmodel.modules() if isinstance(module, ConvRow)]


@pytest.fixture
def followed(monkeypatch):
    """Lists the activations that came past the dispatcher."""
    seen, usual = [], PendingConv.followed_by

    def spy(pending, activation):
        seen.append(activation)
        return usual(pending, activation)

    monkeypatch.setattr(PendingConv, "followed_by", spy)
    return seen


@pytest.mark.parametrize("scheme", ["static", "dynamic"])
@pytest.mark.parametrize("act", [nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.GELU])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_row_gives_the_bits_of_its_code(followed, mode, act, scheme):
    qmodel = made(act, QConfig(activation=scheme, rounding="nearest", smoothing="none"))
    assert len(rows_of(qmodel)) == 4
    with mode():
        y = qmodel(X + 0)
        # of static ones two, since the third is added to; a dynamic one has the scope's hooks, and runs its code
        assert len(followed) == (2 if scheme == "static" else 0)
        assert_identical(y, by_code(qmodel)(X + 0))
        last = X.contiguous(memory_format=torch.channels_last)
        assert_identical(qmodel(last), by_code(qmodel)(last))
        assert_identical(qmodel(X[0, None]), by_code(qmodel)(X[0, None]))
    assert type(y) is torch.Tensor


def test_a_row_alone_takes_what_its_code_takes():
    row = convert(ConvNorm(32, 32, act=nn.ReLU()).eval(), DATA, config=STATIC)
    assert isinstance(row, ConvRow)
    assert isinstance(row, ConvNorm)
    code = by_code(row)
    for x in (X, X[0], X.bfloat16(), X[:0]):
        with torch.no_grad():
            assert_identical(row(x), code(x))
    assert_identical(row(x=X), code(X))
    with pytest.raises(RuntimeError, match=r"x must be \(N, 32, height, width\) or without N"):
        row(X[:, :31])
    with pytest.raises(TypeError, match=r"got torch\.float64"):
        row(X.double())


def test_copies_and_pickles_are_rows_too():
    qmodel = made()
    for copied in (copy.deepcopy(qmodel), pickle.loads(pickle.dumps(qmodel))):
        assert len(rows_of(copied)) == 4
        assert_identical(copied(X), qmodel(X))


@pytest.mark.parametrize("name", ["line", "original", "_run", "_known"])
def test_a_name_that_a_row_would_hide_keeps_the_class(name):
    model = ConvNorm(32, 32, act=nn.ReLU()).eval()
    setattr(model, name, nn.Hardtanh(0.0, 2.0))
    qmodel = convert(model, DATA, config=STATIC)
    assert type(qmodel) is ConvNorm
    assert_identical(qmodel(X), by_code(qmodel)(X))
    assert getattr(qmodel, name).max_val == 2.0


def test_without_fusion_activations_stay_behind(followed):
    qmodel = made(config=QConfig(activation="static", rounding="nearest", smoothing="none", fuse=False))
    qmodel(X)
    assert not followed


CHANGES = {
    "another activation": lambda row: setattr(row, "act", nn.Tanh()),
    "another norm": lambda row: setattr(row, "norm", nn.BatchNorm2d(32).eval()),
    "a float convolution": lambda row: setattr(row, "conv", nn.Conv2d(32, 32, 1)),
    "a forward of its own": lambda row: setattr(row, "forward", lambda x: row.conv(x) * 2),
    "a forward of a child": lambda row: setattr(row.act, "forward", torch.tanh),
    "a child behind an attribute": lambda row: vars(row).update(act=torch.tanh),
    "a hook on the layer": lambda row: row.conv.register_forward_hook(lambda *_: _[2] * 2),
    "a hook on the norm": lambda row: row.norm.register_forward_hook(lambda *_: _[2] * 2),
    "a hook on the activation": lambda row: row.act.register_forward_pre_hook(lambda _, args: (-args[0],)),
    "a hook on the row": lambda row: row.register_forward_hook(lambda *_: _[2] + 1),
}


@pytest.mark.filterwarnings("ignore:torchq. this forward hook sees:UserWarning")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_changed_afterwards_counts(change):
    qmodel = made()
    before, code = qmodel(X), by_code(qmodel)
    for model in (qmodel, code):
        torch.manual_seed(0)
        change(model.layer[0])
    with torch.no_grad():
        y = qmodel(X)
        assert_identical(y, code(X))
    assert not torch.equal(y, before)


def test_another_way_of_the_same_activation_counts():
    qmodel = made(nn.GELU)
    before = qmodel(X)
    with pytest.raises(AttributeError, match="Set it in the float model before convert"):
        qmodel.layer[0].act.approximate = "tanh"
    qmodel.layer[0].act.kind = int(Activation.GELU_TANH)
    code = by_code(qmodel)
    with torch.no_grad():
        assert_identical(qmodel(X), code(X))
        assert not torch.equal(qmodel(X), before)


def test_a_hook_on_the_activation_sees_the_layers_output():
    row, seen = convert(ConvNorm(32, 32, act=nn.ReLU()).eval(), DATA, config=STATIC), []
    row.act.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    row(X)
    assert_identical(seen[0], row.conv(X))


class Noted(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_modes_gradients_autocast_and_simulation_see_the_code(followed):
    qmodel = made()
    code = by_code(qmodel)
    with torch.no_grad():
        with Noted() as one:
            y = qmodel(X)
        with Noted() as other:
            expected = code(X)
        assert_identical(y, expected)
        assert one.seen == other.seen
        with simulate():
            assert_identical(qmodel(X), code(X))
        with torch.autocast("cpu", torch.bfloat16):
            assert_identical(qmodel(X), code(X))
    x, twin = X.clone().requires_grad_(), X.clone().requires_grad_()
    with torch.enable_grad():
        qmodel(x).square().sum().backward()
        code(twin).square().sum().backward()
    assert_identical(x.grad, twin.grad)
    assert not followed


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_traced_graphs_hold_the_parts():
    qmodel = made()
    graph = torch.fx.symbolic_trace(qmodel)
    names = {node.target for node in graph.graph.nodes if node.op == "call_module"}
    assert {"layer.0.conv", "layer.0.act", "layer.2.conv"} <= names
    assert_identical(graph(X), qmodel(X))
    with torch.no_grad():
        traced = torch.jit.trace(qmodel, X)
        assert_identical(traced(X), qmodel(X))


# ---- Sums by the operators ------------------------------------------------------------------------------------------


class Sum(nn.Module):
    """A sum of a convolution and a tensor that it holds, in place or not."""

    def __init__(self, in_place):
        super().__init__()
        self.conv, self.act, self.in_place = nn.Conv2d(32, 32, 1), nn.ReLU(), in_place
        self.other, self.version = normal(2, 32, 20, 20, seed=3), None

    def forward(self, x):
        y = self.conv(x)
        if self.in_place:
            y += self.other
            self.version = None if y.is_inference() else y._version
        else:
            y = y + self.other
        return self.act(y)


@pytest.fixture
def dispatched(monkeypatch):
    """Lists the sums that came through the dispatcher."""
    seen, usual = [], PendingConv.__torch_dispatch__.__func__

    def spy(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor):
            seen.append(func)
        return usual(cls, func, types, args, kwargs)

    monkeypatch.setattr(PendingConv, "__torch_dispatch__", classmethod(spy))
    return seen


def summed(in_place):
    return convert(Sum(in_place).eval(), [X, X + 1], config=STATIC)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_sum_goes_past_the_dispatcher_with_its_bits(dispatched, monkeypatch, mode, in_place):
    qmodel = summed(in_place)
    dispatched.clear()
    with mode():
        x = X + 0
        y = qmodel(x)
        assert not dispatched
        version = qmodel.version
        monkeypatch.setattr(PendingConv, "_adds_unseen", lambda *_: False)
        assert_identical(y, qmodel(x))
    assert len(dispatched) == 1
    assert version == qmodel.version


@pytest.mark.parametrize("in_place", [True, False])
def test_a_sum_with_a_gradient_has_it(dispatched, in_place):
    qmodel = summed(in_place)
    expected = qmodel(X)
    qmodel.other.requires_grad_()
    with torch.enable_grad():
        y = qmodel(X)
        assert_identical(y.detach(), expected)
        y.sum().backward()
    assert_identical(qmodel.other.grad, (expected > 0).float())
    assert len(dispatched) == 1


@pytest.mark.parametrize("in_place", [True, False])
def test_other_sums_are_those_of_torch(in_place):
    qmodel = summed(in_place)
    for other in (2, 0.5, torch.tensor(3.0), normal(32, 1, 1, seed=5)):
        qmodel.other = other
        y = qmodel.conv(X)
        assert_identical(qmodel(X), torch.relu(y + other))
