"""Residual blocks whose code is `act(convs(x) + shortcut(x))`: one loop with the bits of their code, whoever looks."""

import copy
import pickle

import pytest
import torch
from torch import nn

from helpers.compare import assert_identical
from helpers.conv_blocks import DATA, STATIC, X
from helpers.convolutional import IMAGES, Bottleneck, ConvNorm, by_code, resnet
from torchq import QConfig, convert, kernels, simulate
from torchq.modules.coded_sum import CodedSum
from torchq.modules.conv_block import ConvBlock
from torchq.modules.flow import flow_of
from torchq.modules.straight_forms import Form
from torchq.planning import coded_sums

pytestmark = pytest.mark.usefixtures("seeded")

KERNELS = [kernel for kernel in kernels.names() if kernel in kernels.runnable()]


class Outer(Bottleneck):
    """The sum is not in place, and the shortcut on its left."""

    def forward(self, x):
        return self.activation(self.shortcut(x) + self.layer(x))


class Named(nn.Module):
    """Convolutions by name, and no shortcut."""

    def __init__(self):
        super().__init__()
        self.one, self.two = ConvNorm(32, 32, 3, act=nn.ReLU6()), ConvNorm(32, 32, 1)
        self.act = nn.ReLU()

    def forward(self, x):
        y = self.two(self.one(x))
        return self.act(y + x)


def made(block=None, config=STATIC):
    return convert((Bottleneck(32, 64) if block is None else block).eval(), DATA, config=config)


@pytest.mark.parametrize("scheme", ["static", "dynamic", "auto"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "block",
    [
        Bottleneck(32, 64),
        Bottleneck(32, 32),
        Bottleneck(32, 64, 2, nn.ReLU6),
        Outer(32, 64),
        Outer(32, 32),
        Named(),
    ],
    ids=["shortcut", "identity", "stride", "left", "left identity", "named"],
)
def test_a_block_gives_the_bits_of_its_code(ran, block, mode, scheme):
    qmodel = made(block, QConfig(activation=scheme, rounding="nearest", smoothing="none"))
    assert isinstance(qmodel, ConvBlock)
    code = by_code(qmodel)
    with mode():
        for x in (X + 0, X.contiguous(memory_format=torch.channels_last), X[:1, :, :9, :7]):
            before = x.clone()
            ran.clear()
            y = qmodel(x)
            assert ran == [qmodel]
            assert_identical(y, code(x))
            assert y.stride() == code(x).stride()
            assert_identical(x, before)
    assert type(y) is torch.Tensor


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_gives_the_bits_of_the_code(ran, kernel):
    with kernels.use(kernel):
        qmodel = made()
        ran.clear()
        y = qmodel(X)
        assert ran == [qmodel]
        assert_identical(y, by_code(qmodel)(X))


def test_what_has_other_activations_or_no_plan_is_no_block():
    assert not isinstance(made(Bottleneck(32, 64, act=nn.ELU)), ConvBlock)
    assert not isinstance(made(config=QConfig(activation="static", fuse=False)), ConvBlock)


class Writes(Named):
    def forward(self, x):
        x += self.two(self.one(x))
        return self.act(x)


class Again(Named):
    def forward(self, x):
        y = z = self.two(self.one(x))
        y += x
        return self.act(z)


class Early(Named):
    def forward(self, x):
        y = self.one(x)
        z = self.two(y)
        y += x
        return self.act(y + z)


def test_code_that_writes_elsewhere_is_no_block():
    assert flow_of(Again(), Again) is None  # what was written into is used under its old name
    assert flow_of(Early(), Early) is None
    assert flow_of(Writes(), Writes)[:4] == ((), ("one", "two"), True, ("act",))
    qmodel = made(Writes())
    assert not isinstance(qmodel, ConvBlock)  # it writes into its input
    x = X.clone()
    with torch.no_grad():
        y = qmodel(x)
    assert not torch.equal(x, X)
    assert y.shape == X.shape


def test_blocks_hand_over_sums_in_codes(ran, monkeypatch):
    monkeypatch.setattr(coded_sums, "LARGE", 1 << 12)
    monkeypatch.setattr(coded_sums, "ENOUGH_DB", 0.0)
    monkeypatch.setattr(coded_sums, "SUMS_DB", 60.0)
    given, usual = [], CodedSum.waiting
    monkeypatch.setattr(CodedSum, "waiting", lambda made: given.append(made) or usual(made))
    model = nn.Sequential(Bottleneck(32, 64), Bottleneck(64, 64), Bottleneck(64, 64))
    qmodel = convert(model.eval(), DATA, config=QConfig(activation="static"))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            ran.clear(), given.clear()
            y = qmodel(X)
            assert len(ran) == 3
            assert len(given) == 2
            assert_identical(y, by_code(qmodel)(X))
            few = X[:1, :, :3, :3]  # too few values to wait
            assert_identical(qmodel(few), by_code(qmodel)(few))


def test_copies_and_pickles_are_blocks_too(ran):
    qmodel = made()
    y = qmodel(X)
    ran.clear()
    for copied in (copy.deepcopy(qmodel), pickle.loads(pickle.dumps(qmodel))):
        assert isinstance(copied, ConvBlock)
        assert type(copied).__name__ == "Bottleneck"
        assert_identical(copied(X), y)
    assert len(ran) == 2


CHANGES = {
    "another activation": lambda block: setattr(block, "activation", nn.Tanh()),
    "another shortcut": lambda block: setattr(block, "shortcut", nn.Conv2d(32, 64, 1)),
    "a child behind an attribute": lambda block: vars(block).update(activation=torch.tanh),
    "a forward of its own": lambda block: setattr(block, "forward", lambda x: block.layer(x) * 2),
    "a layer more": lambda block: block.layer.append(nn.Tanh()),
    "another convolution": lambda block: setattr(block.layer[1], "conv", nn.Conv2d(32, 32, 3, 1, 1)),
    "another norm": lambda block: setattr(block.layer[1], "norm", nn.BatchNorm2d(32).eval()),
    "a forward of a child": lambda block: setattr(block.layer[1].act, "forward", torch.tanh),
    "a hook on the block": lambda block: block.register_forward_hook(lambda *_: _[2] + 1),
    "a pre-hook on the block": lambda block: block.register_forward_pre_hook(lambda _, args: (-args[0],)),
    "a hook on the layers": lambda block: block.layer.register_forward_hook(lambda *_: _[2] + 1),
    "a hook on a row": lambda block: block.layer[1].register_forward_hook(lambda *_: _[2] + 1),
    "a hook on a convolution": lambda block: block.layer[1].conv.register_forward_hook(lambda *_: _[2] * 2),
    "a hook on a norm": lambda block: block.layer[1].norm.register_forward_hook(lambda *_: _[2] * 2),
    "a hook on the activation": lambda block: block.activation.register_forward_pre_hook(lambda _, args: (-args[0],)),
}


@pytest.mark.filterwarnings("ignore:torchq. this forward hook sees:UserWarning")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_changed_afterwards_counts(ran, change):
    qmodel = made()
    with torch.no_grad():
        before, code = qmodel(X), by_code(qmodel)
        ran.clear()
        for model in (qmodel, code):
            torch.manual_seed(0)
            change(model)
        y = qmodel(X)
        assert_identical(y, code(X))
    assert not ran
    assert not torch.equal(y, before)


@pytest.mark.parametrize("value", [3, nn.Tanh()], ids=["attribute", "child"])
@pytest.mark.parametrize("name", ["line", "original", "form", "_run", "_known"])
def test_a_name_of_the_form_that_is_given_later_is_the_users(ran, name, value):
    qmodel = made()
    expected = qmodel(X)
    for module in (qmodel, qmodel.layer[0]):
        setattr(module, name, value)
        assert getattr(module, name) is value
    ran.clear()
    assert_identical(qmodel(X), expected)
    assert not ran
    assert (type(qmodel), type(qmodel.layer[0]), type(qmodel.layer[1])) == (Bottleneck, ConvNorm, type(qmodel.layer[2]))
    assert type(qmodel.layer[1]) is not ConvNorm
    qmodel.layer[1].extra = value  # any other name changes nothing
    assert isinstance(qmodel.layer[1], Form)


def test_another_range_or_weight_counts(ran):
    qmodel, other = made(), convert(Bottleneck(32, 64).eval(), [3 * x for x in DATA], config=STATIC)
    before = qmodel(X)
    qmodel.load_state_dict(other.state_dict())
    ran.clear()
    y = qmodel(X)
    assert ran == [qmodel]
    assert_identical(y, by_code(other)(X))
    assert not torch.equal(y, before)


def test_code_that_is_replaced_counts(ran, monkeypatch):
    class Mine(Bottleneck):
        def forward(self, x):
            y = self.layer(x)
            y += self.shortcut(x)
            return self.activation(y)

    qmodel = made(Mine(32, 64))
    before = qmodel(X)
    ran.clear()
    monkeypatch.setattr(Mine, "forward", lambda block, x: block.layer(x))
    y = qmodel(X)
    assert not ran
    assert_identical(y, by_code(qmodel)(X))
    assert not torch.equal(y, before)


def test_modes_gradients_autocast_simulation_and_odd_inputs_see_the_code(ran):
    qmodel = made()
    code = by_code(qmodel)
    ran.clear()
    with torch.no_grad():
        with simulate():
            assert_identical(qmodel(X), code(X))
        with torch.autocast("cpu", torch.bfloat16):
            assert_identical(qmodel(X), code(X))
        assert_identical(qmodel(X.bfloat16()), code(X.bfloat16()))
        assert_identical(qmodel(X[:0]), code(X[:0]))
        assert_identical(qmodel(x=X), code(X))
        with torch.profiler.profile() as profile:
            qmodel(X)
        assert "torchq::convolution" in {event.name for event in profile.events()}
    x, twin = X.clone().requires_grad_(), X.clone().requires_grad_()
    with torch.enable_grad():
        qmodel(x).square().sum().backward()
        code(twin).square().sum().backward()
    assert_identical(x.grad, twin.grad)
    for wrong, error in ((X[:, :31], r"x must be \(N, 32, height, width\)"), (X.double(), r"got torch\.float64")):
        with pytest.raises((RuntimeError, TypeError), match=error):
            qmodel(wrong)
    assert not ran


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_traced_graphs_hold_the_parts():
    qmodel = made()
    names = {node.target for node in torch.fx.symbolic_trace(qmodel).graph.nodes if node.op == "call_module"}
    assert {"layer.0.conv", "shortcut.conv", "activation"} <= names
    with torch.no_grad():
        traced = torch.jit.trace(qmodel, X)
        assert_identical(traced(X), qmodel(X))
        assert "torchq::convolution" in str(traced.inlined_graph)


def test_a_whole_network_gives_the_bits_of_its_code(ran):
    qmodel = convert(resnet(), IMAGES, config=STATIC)
    ran.clear()
    with torch.inference_mode():
        y = qmodel(IMAGES[0])
        assert [type(block).__name__ for block in ran] == ["Bottleneck", "Bottleneck", "Basic"]
        assert_identical(y, by_code(qmodel)(IMAGES[0]))
