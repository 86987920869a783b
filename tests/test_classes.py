"""What a class, or torch, gets after a conversion counts in each form that leaves out calls of its modules."""

import copy
import gc
import types
import weakref

import pytest
import torch
from torch import nn

from helpers.compare import assert_identical
from helpers.convolutional import Bottleneck, ConvNorm
from helpers.numbers import normal
from torchq import _C, QConfig, QuantizedLinear, convert
from torchq.modules.classes import compared, know
from torchq.modules.conv_block import ConvBlock
from torchq.modules.encoder_layer import Int8TransformerEncoderLayer
from torchq.modules.int8_sequential import Int8Sequential
from torchq.modules.layer_norm import LayerNorm
from torchq.modules.straight_forms import ConvRow, Residual, Row

pytestmark = pytest.mark.usefixtures("seeded")

IMAGES = [normal(4, 32, 20, 20, seed=i) for i in range(4)]
STATIC = QConfig(activation="static", rounding="nearest", smoothing="none")


class Output(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.dropout, self.norm = nn.Linear(48, 48), nn.Dropout(0.1), nn.LayerNorm(48)

    def forward(self, hidden, residual):
        return self.norm(self.dropout(self.dense(hidden)) + residual)


class MLP(nn.Module):
    def __init__(self, act=nn.ReLU):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(48, 100), act(), nn.Linear(100, 48)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


def sequential():
    return nn.Sequential(nn.Linear(48, 100), nn.ReLU(), nn.Linear(100, 48))


def encoder_layer():
    return nn.TransformerEncoderLayer(48, 4, 96, batch_first=True)


def rows(model):
    return convert(model.eval()).requires_grad_(False)


def images(model):
    return convert(model.eval(), IMAGES, config=STATIC).requires_grad_(False)


FLAT, WIDE, X = (normal(5, 48, seed=1),), (normal(2, 5, 48, seed=2),), (normal(2, 32, 20, 20, seed=9),)
MADE = {  # how a form is made, its class, what it is called with
    "a residual": (lambda: rows(Output()), Residual, FLAT * 2),
    "a row": (lambda: rows(MLP()), Row, FLAT),
    "a sequential": (lambda: rows(sequential()), Int8Sequential, FLAT),
    "an encoder layer": (lambda: rows(encoder_layer()), Int8TransformerEncoderLayer, WIDE),
    "a convolution": (lambda: images(ConvNorm(32, 32, act=nn.ReLU())), ConvRow, X),
    "a block": (lambda: images(Bottleneck(32, 64)), ConvBlock, X),
}


def of_negative(forward):
    return lambda module, x, *args, **kwargs: forward(module, -x, *args, **kwargs)


def call_doubled(module, *args, **kwargs):
    return 2 * nn.Module._call_impl(module, *args, **kwargs)


def shifted(x, inplace=False):
    return x + 1.0


CHANGES = [  # the form, the class or namespace that gets it, its name, the value
    *(("a residual", Output, "forward", lambda module, hidden, residual: module.norm(residual)),),
    *(("a residual", Output, "__call__", call_doubled), ("a residual", Output, "dense", property(lambda _: nn.ReLU()))),
    *(("a residual", nn.LayerNorm, "forward", of_negative(nn.LayerNorm.forward)),),
    *(("a residual", LayerNorm, "__call__", call_doubled), ("a residual", nn.Dropout, "forward", lambda _, x: -x)),
    *(("a residual", nn.functional, "dropout", lambda x, *_: -x),),
    *(("a residual", QuantizedLinear, "forward", of_negative(QuantizedLinear.forward)),),
    *(("a row", MLP, "forward", of_negative(MLP.forward)), ("a row", MLP, "__call__", call_doubled)),
    *(("a row", MLP, "act", property(lambda _: torch.tanh)), ("a row", nn.ReLU, "forward", lambda _, x: x.tanh())),
    *(("a row", nn.ReLU, "__call__", call_doubled), ("a row", nn.functional, "relu", shifted)),
    *(("a row", torch, "relu", shifted), ("a row", nn.Module, "__call__", call_doubled)),
    *(("a sequential", nn.ReLU, "forward", lambda _, x: x.tanh()), ("a sequential", nn.functional, "relu", shifted)),
    *(("a sequential", nn.Sequential, "forward", of_negative(nn.Sequential.forward)),),
    *(("an encoder layer", nn.functional, "dropout", lambda x, *_: -x),),
    *(("an encoder layer", nn.TransformerEncoderLayer, "_ff_block", lambda _, x: -x),),
    *(("an encoder layer", nn.LayerNorm, "forward", of_negative(nn.LayerNorm.forward)),),
    *(("a convolution", ConvNorm, "forward", of_negative(ConvNorm.forward)),),
    *(("a convolution", ConvNorm, "__call__", call_doubled), ("a convolution", nn.functional, "relu", shifted)),
    *(("a convolution", nn.ReLU, "forward", lambda _, x: x.tanh()),),
    *(
        ("a block", Bottleneck, "forward", of_negative(Bottleneck.forward)),
        ("a block", Bottleneck, "__call__", call_doubled),
    ),
    *(("a block", ConvNorm, "forward", of_negative(ConvNorm.forward)), ("a block", nn.functional, "relu", shifted)),
    *(("a block", nn.ReLU, "forward", lambda _, x: x.tanh()), ("a block", torch, "relu", shifted)),
]


def plainly(module, args):
    """What the code of the form's class gives when all calls are those of nn.Module, and nothing waits."""
    handles = [each.register_forward_pre_hook(lambda *_: None) for each in module.modules()]
    try:
        return module(*args)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize(
    ("form", "where", "name", "value"),
    CHANGES,
    ids=[f"{form}-{where.__name__}-{name}" for form, where, name, _ in CHANGES],
)
def test_what_a_class_or_torch_gets_later_counts(monkeypatch, form, where, name, value):
    make, kind, args = MADE[form]
    module = make()
    assert isinstance(module, kind)
    before = module(*args)
    with monkeypatch.context() as patch:
        patch.setattr(where, name, value, raising=False)
        changed = module(*args)
        assert not torch.equal(changed, before)
        assert_identical(changed, plainly(module, args))
        assert_identical(module(*args), changed)
    assert_identical(module(*args), before)


EXPORTED = [each for each in CHANGES if each[0] in ("a row", "a sequential") and each[2] in ("forward", "relu")]


@pytest.mark.parametrize(
    ("form", "where", "name", "value"),
    EXPORTED,
    ids=[f"{form}-{where.__name__}-{name}" for form, where, name, _ in EXPORTED],
)
def test_export_sees_the_change_too(monkeypatch, form, where, name, value):
    """Though it changes nn.Module itself while it traces."""
    make, _, args = MADE[form]
    module = make()
    before = module(*args)
    with monkeypatch.context() as patch:
        patch.setattr(where, name, value, raising=False)
        exported = torch.export.export(module, args, strict=False).module()(*args)
        assert_identical(exported, module(*args))
    assert not torch.equal(exported, before)


@pytest.mark.parametrize("form", MADE)
def test_what_is_changed_before_the_first_call_counts(monkeypatch, form):
    make, _, args = MADE[form]
    module = make()
    other = copy.deepcopy(module)
    name = "__call__" if form == "an encoder layer" else "forward"
    original = getattr(module, "original", type(module))
    value = call_doubled if name == "__call__" else of_negative(type(module).forward)
    monkeypatch.setattr(original, name, value)
    changed = module(*args)
    monkeypatch.undo()
    assert not torch.equal(changed, other(*args))
    assert_identical(module(*args), other(*args))


def test_code_that_is_put_into_a_function_counts():
    class Own(MLP):
        def forward(self, x):
            return self.fc2(self.act(self.fc1(x)))

    module = rows(Own())
    before, code = module(*FLAT), Own.forward.__code__
    Own.forward.__code__ = (lambda self, x: self.fc2(self.fc1(x))).__code__
    assert_identical(module(*FLAT), module.fc2(module.fc1(*FLAT)))
    Own.forward.__code__ = code
    assert_identical(module(*FLAT), before)


def test_a_new_base_counts():
    class Doubled(nn.Module):
        __call__ = call_doubled

    class Own(MLP):
        def forward(self, x):
            return self.fc2(self.act(self.fc1(x)))

    module = rows(Own())
    before = module(*FLAT)
    Own.__bases__ = (Doubled,)
    assert_identical(module(*FLAT), 2 * before)


# ---- What is compared -----------------------------------------------------------------------------------------------


class Own(nn.Module):
    count = 0

    def forward(self, x):
        return nn.functional.relu(x)


def test_what_no_call_asks_for_changes_nothing():
    know(Own)
    for count in range(3):
        Own.count = count
        assert _C.computes_as_known(Own)
    Own.forward, kept = types.FunctionType(Own.forward.__code__, globals()), Own.forward
    assert not _C.computes_as_known(Own)
    Own.forward = kept
    assert _C.computes_as_known(Own)


def test_names_may_be_noted_later():
    class Late(nn.Module):
        pass

    know(Late)
    Late.scale = 1
    know(Late, ["scale"])
    assert _C.computes_as_known(Late)
    Late.scale = 2
    assert not _C.computes_as_known(Late)
    Late.scale = 1
    assert _C.computes_as_known(Late)
    del Late.scale
    assert not _C.computes_as_known(Late)


def test_functions_are_those_of_torch_that_the_code_names():
    known = compared(Own)
    assert [(each.name, each.value) for each in known.functions[:1]] == [("relu", nn.functional.relu)]
    assert {each.name for each in known.functions[1:]} == {"relu", "relu_"}
    assert compared(nn.Identity).functions == ()


def test_an_error_in_the_comparison_is_a_class_that_is_not_known():
    assert not _C.computes_as_known(3)
    assert not _C.computes_as_known(type("Odd", (), {"__mro__": None}))


def test_classes_may_go():
    class Gone(nn.Module):
        def forward(self, x):
            return super().forward(x)

    know(Gone)
    assert _C.computes_as_known(Gone)
    reference = weakref.ref(Gone)
    del Gone
    gc.collect()
    assert reference() is None
