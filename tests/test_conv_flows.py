"""Blocks whose code reads what they are, adds zeros and has branches: one loop with the bits of their code."""

import copy
import pickle
import types

import pytest
import torch
from torch import nn

from helpers import mobile
from helpers.compare import assert_identical
from helpers.conv_blocks import DATA, STATIC, X
from helpers.convolutional import by_code
from helpers.mobile import ConvNormAct, Inverted, Layer, Network, Padded, Timm, Torchvision
from helpers.numbers import normal
from torchq import QConfig, convert, simulate
from torchq.modules.conv_block import ConvBlock
from torchq.modules.pending_conv import PendingConv

pytestmark = pytest.mark.usefixtures("seeded")


def made(block, config=STATIC, data=DATA):
    return convert(block.eval(), data, config=config)


BLOCKS = {
    "residual": Inverted,
    "stride": lambda: Inverted(stride=2),
    "wide": lambda: Inverted(32, 48, kernel=5),
    "wide stride": lambda: Inverted(32, 48, kernel=5, stride=2),
    "stride over kernel": lambda: Inverted(32, 48, kernel=1, stride=2),
    "torchvision": Torchvision,
    "torchvision stride": lambda: Torchvision(32, 64, 2),
    "timm": Timm,
    "zeros": Padded,
    "zeros once": lambda: Padded(1),
    "a layer": lambda: Layer(32, 40, 3, 2),
    "a layer of pixels": lambda: Layer(32, 40, 1, norm=False),
}


@pytest.mark.parametrize("scheme", ["static", "dynamic"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_a_block_gives_the_bits_of_its_code(ran, block, mode, scheme):
    qmodel = made(block(), QConfig(activation=scheme, rounding="nearest", smoothing="none"))
    assert isinstance(qmodel, ConvBlock)
    code = by_code(qmodel)
    sizes = [(20, 20), (9, 7), (8, 13), (5, 5)]
    with mode():
        for height, width in sizes:
            x = normal(2, 32, height, width, seed=height)
            last = x.contiguous(memory_format=torch.channels_last)
            for given in (x, last, last[:1], x.transpose(2, 3), x[:1, :, ::2]):
                before = given.clone()
                ran.clear()
                y, expected = qmodel(given), code(given)
                assert ran == [qmodel] or not (given is x or given is last)
                assert_identical(y, expected)
                assert y.stride() == expected.stride()
                assert_identical(given, before)
                assert type(y) is torch.Tensor


@pytest.mark.parametrize("scheme", ["static", "dynamic"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_network_gives_the_bits_of_its_code(ran, monkeypatch, mode, scheme):
    qmodel = made(Network(), QConfig(activation=scheme, rounding="nearest", smoothing="none"))
    code = by_code(qmodel)
    waiting, usual = [], PendingConv.codes
    monkeypatch.setattr(PendingConv, "codes", lambda pending, pair: waiting.append(pending) or usual(pending, pair))
    with mode():
        for x in (X, X.contiguous(memory_format=torch.channels_last), normal(2, 32, 33, 29, seed=5)):
            ran.clear(), waiting.clear()
            y = qmodel(x)
            assert [type(block).__name__ for block in ran] == ["Layer", *["Inverted"] * 4, "Layer"]
            assert len(waiting) == (
                2 if scheme == "static" else 0
            )  # before and behind the blocks whose sums are floats
            assert_identical(y, code(x))


def test_a_row_without_its_activation_waits_for_it(ran):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.row, self.act = Layer(32, 64, 3, act=None), nn.SiLU()

        def forward(self, x):
            return self.act(self.row(x)).flatten(1)

    qmodel = made(Outer())
    given = []
    qmodel.act.register_forward_pre_hook(lambda _, args: given.append(type(args[0])))
    ran.clear()
    y = qmodel(X)
    assert ran == [qmodel.row]
    assert given == [PendingConv]
    assert_identical(y, by_code(qmodel)(X))


def test_who_writes_to_the_input_of_padded_layers_changes_nothing(ran):
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = Layer(32, 64, 3), Layer(64, 32, 1)

        def forward(self, x, write=False):
            y = self.one(x)
            if write:
                x.zero_()
            return self.two(y).flatten(1)

    qmodel = made(Writes())
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            ran.clear()
            expected = qmodel(X + 0)
            assert_identical(qmodel(X + 0, write=True), expected)
            assert len(ran) == 4


def twice(x, conv):
    return nn.functional.pad(x, (2, 2, 2, 2))


CHANGES = {
    "a config's value": lambda block: setattr(block.depthwise.config, "tf_padding", False),
    "another config": lambda block: setattr(block.depthwise, "config", types.SimpleNamespace(tf_padding=0)),
    "no residual": lambda block: setattr(block, "use_residual", False),
    "another activation": lambda block: setattr(block.depthwise, "activation", nn.Tanh()),
    "no norm": lambda block: setattr(block.depthwise, "normalization", nn.Tanh()),
    "an activation where was none": lambda block: setattr(block.reduce, "activation", nn.Tanh()),
    "another layer": lambda block: setattr(block, "depthwise", nn.Identity()),
    "strides that its code reads": lambda block: setattr(block.depthwise.convolution, "stride", (3, 4)),
    "a hook on a layer": lambda block: block.depthwise.register_forward_hook(lambda *_: _[2] * 2),
    "a hook on a convolution": lambda block: block.depthwise.convolution.register_forward_hook(lambda *_: _[2] * 2),
    "another mode of padding": lambda block: vars(block.depthwise.convolution).update(
        padding_mode="reflect", _reversed_padding_repeated_twice=[1, 1, 1, 1]
    ),
    "a forward of a layer": lambda block: setattr(block.reduce, "forward", lambda x: block.reduce.convolution(-x)),
}


@pytest.mark.filterwarnings("ignore:torchq. this forward hook sees:UserWarning")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_changed_afterwards_counts(ran, change):
    qmodel = made(Inverted())
    with torch.no_grad():
        before, code = qmodel(X), by_code(qmodel)
        ran.clear()
        for model in (qmodel, code):
            torch.manual_seed(0)
            change(model)
        y = None
        with torch.no_grad():
            for model in (qmodel, code):
                try:
                    result = model(X)
                except RuntimeError as error:  # a sum of other shapes
                    result = str(error)
                y, expected = (result, None) if model is qmodel else (y, result)
        assert qmodel not in ran
        if isinstance(expected, str):
            assert y == expected
        else:
            assert_identical(y, expected)
            assert y.shape != before.shape or not torch.equal(y, before)


def test_functions_and_codes_that_are_replaced_count(ran, monkeypatch):
    qmodel = made(Inverted(32, 48))
    before = qmodel(X)
    for where, name, value in (
        (vars(mobile), "same_padding", twice),
        (vars(mobile), "max", lambda *_: 2),
        (vars(nn.functional), "pad", lambda x, *_: torch.ops.aten.constant_pad_nd(x, (1, 1, 1, 1), 0.5)),
    ):
        ran.clear()
        with monkeypatch.context() as patch:
            patch.setitem(where, name, value)
            y = qmodel(X)
            assert not ran
            assert_identical(y, by_code(qmodel)(X))
        assert not torch.equal(y[..., :20, :20], before)
        assert_identical(qmodel(X), before)
        assert ran == [qmodel]
    with monkeypatch.context() as patch:
        patch.setattr(mobile.same_padding, "__code__", twice.__code__)
        ran.clear()
        assert qmodel(X).shape != before.shape
        assert not ran
    with monkeypatch.context() as patch:
        patch.setattr(Layer, "forward", lambda layer, x: layer.convolution(x))
        assert not torch.equal(qmodel(X[..., 1:]), before[..., 1:])
        assert qmodel not in ran
    assert_identical(qmodel(X), before)


@pytest.mark.parametrize(("name", "value"), [("use_residual", False), ("reduce", nn.Identity())])
def test_attributes_that_its_class_gets_later_count(ran, name, value):
    class Own(Inverted):
        pass

    qmodel = made(Own())
    before, code = qmodel(X), by_code(qmodel)
    assert qmodel in ran
    ran.clear()
    setattr(Own, name, property(lambda _: value))
    result = []
    for model in (qmodel, code):
        try:
            result.append(model(X))
        except RuntimeError as error:  # a sum of other shapes
            result.append(str(error))
    assert qmodel not in ran
    if isinstance(result[1], str):
        assert result[0] == result[1]
    else:
        assert_identical(*result)
        assert not torch.equal(result[0], before)
    delattr(Own, name)
    assert_identical(qmodel(X), before)
    assert qmodel in ran


def test_a_sequential_of_another_forward_counts(ran, monkeypatch):
    qmodel = made(Torchvision())
    before = qmodel(X)
    ran.clear()
    monkeypatch.setattr(ConvNormAct, "forward", lambda row, x: row[0](-x))
    assert not torch.equal(qmodel(X), before)
    assert not ran
    assert_identical(qmodel(X), by_code(qmodel)(X))


def test_copies_and_pickles_are_blocks_too(ran):
    qmodel = made(Network())
    y = qmodel(X)
    for copied in (copy.deepcopy(qmodel), pickle.loads(pickle.dumps(qmodel))):
        ran.clear()
        assert_identical(copied(X), y)
        assert len(ran) == 6
        copied.blocks[1].depthwise.config.tf_padding = False  # of the copy alone
        ran.clear()
        assert_identical(qmodel(X), y)
        assert len(ran) == 6


class Stateful(Inverted):
    """Its state is no dict."""

    def __getstate__(self):
        return "a state", self.__dict__

    def __setstate__(self, state):
        super().__setstate__(state[1])


def test_a_class_with_a_state_of_its_own_is_copied_as_it_says(ran):
    qmodel = made(Stateful())
    y = qmodel(X)
    assert qmodel not in ran  # its state could hold anything
    for copied in (copy.deepcopy(qmodel), pickle.loads(pickle.dumps(qmodel))):
        assert type(copied) is Stateful
        assert_identical(copied(X), y)


def test_modes_gradients_autocast_simulation_and_odd_inputs_see_the_code(ran):
    qmodel = made(Inverted())
    code = by_code(qmodel)
    ran.clear()
    with torch.no_grad():
        with simulate():
            assert_identical(qmodel(X), code(X))
        with torch.autocast("cpu", torch.bfloat16):
            assert_identical(qmodel(X), code(X))
        for x in (X.bfloat16(), X[:0], X[0]):
            assert_identical(qmodel(x), code(x))
        assert_identical(qmodel(x=X), code(X))
    x, twin = X.clone().requires_grad_(), X.clone().requires_grad_()
    with torch.enable_grad():
        qmodel(x).square().sum().backward()
        code(twin).square().sum().backward()
    assert_identical(x.grad, twin.grad)
    for wrong, error in ((X[:, :31], r"x must be \(N, 32, height, width\)"), (X.double(), r"got torch\.float64")):
        with pytest.raises((RuntimeError, TypeError), match=error):
            qmodel(wrong)
    assert qmodel not in ran


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_graphs_hold_the_parts():
    qmodel = made(Inverted())
    with torch.no_grad():
        expected = qmodel(X)
        assert_identical(torch.jit.trace(qmodel, X)(X), expected)
        assert_identical(torch.export.export(qmodel, (X,)).module()(X), expected)
        assert_identical(torch.compile(qmodel, backend="aot_eager", fullgraph=True)(X), expected)
