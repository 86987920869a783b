"""Fusion: Linear, ReLU, Linear in an nn.Sequential pass u8 codes, exactly, unless something else may read them."""

import dataclasses
from types import MethodType

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.compare import assert_close_to_float
from helpers.models import DATA, X, layers_of
from torchq import QConfig, QuantizedLinear, apply_plan, convert, dequantize, ops, quantize, simulate
from torchq.modules.folding import Fold
from torchq.modules.int8_sequential import Int8Sequential
from torchq.numerics.metrics import sqnr_db
from torchq.numerics.qparams import choose_qparams, fake_quantize
from torchq.ops import Activation

pytestmark = pytest.mark.usefixtures("seeded")

AUTO = QConfig()
STATIC, DYNAMIC = (QConfig(activation=name, rounding="nearest", smoothing="none") for name in ("static", "dynamic"))


def chain(kinds, width=24):
    makers = {
        "l": lambda: nn.Linear(width, width),
        "r": nn.ReLU,
        "R": lambda: nn.ReLU(inplace=True),
        "d": nn.Dropout,
        "i": nn.Identity,
        "s": nn.Softplus,  # no activation of the epilogue
    }
    return nn.Sequential(*[makers[kind]() for kind in kinds]).eval()


class Flow(TorchDispatchMode):
    """The input, output dtype and activation of each int8 product, in the order they run; and how many relus ran."""

    def __init__(self):
        super().__init__()
        self.seen, self.tensors, self.relus = [], [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        y = func(*args, **(kwargs or {}))
        if "torchq::linear" in func.name():
            given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
            self.seen.append((args[0].dtype, y.dtype, given.get("activation", 0)))
            self.tensors.append((args[0], y))
        self.relus += "aten::relu" in func.name()
        return y


def flow(qmodel, x):
    """The input and output dtypes of each int8 product, in the order they run."""
    with Flow() as mode:
        qmodel(x)
    return [(x_dtype, y_dtype) for x_dtype, y_dtype, _ in mode.seen]


def oracle(model, plan, x):
    """Runs the chain unfused: each Linear by `ops.linear_static`, from float32 to float32, and other modules as is."""
    y = x.float()
    for name, module in model.named_children():
        if isinstance(module, nn.Linear):
            scale, _ = choose_qparams(module.weight, axis=0)
            packed = ops.pack(quantize(module.weight, scale, axis=0), scale, module.bias.float())
            y = ops.linear_static(y, packed, *plan.layers[name].input_qparams, torch.float32)
        else:
            y = module(y)
    return y.to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kinds", ["ll", "lrl", "lRl", "lrdl", "lirdl", "ldil", "lrrl", "lrlrlr", "lrlrl"])
def test_a_static_chain_hands_over_codes_and_is_exact(kinds, dtype):
    model = chain(kinds).to(dtype)
    qmodel = convert(model, [x.to(dtype) for x in DATA], config=STATIC)
    x = X.to(dtype)
    assert torch.equal(qmodel(x), oracle(model, qmodel.torchq_plan, x))
    inner = [torch.uint8] * (kinds.count("l") - 1)
    assert flow(qmodel, x) == list(zip([dtype, *inner], [*inner, dtype], strict=True))
    with Flow() as mode:
        qmodel(x)
    assert mode.relus == 0
    assert [type(module) for module in qmodel if type(module) is not QuantizedLinear] == [
        type(module) for module in model if type(module) is not nn.Linear
    ]


def test_the_plan_and_repr_tell_what_is_fused():
    qmodel = convert(chain("lirdlr"), DATA, config=STATIC)
    first, last = qmodel.torchq_plan.layers.values()
    assert (first.activation, first.skipped, first.feeds) == ("2", ("1", "3"), "4")
    assert (last.activation, last.skipped, last.feeds) == ("5", (), None)
    assert (qmodel[0].fold, qmodel[4].fold) == (Fold(Activation.RELU, codes=True), Fold(Activation.RELU))
    assert "fuses=relu, passes=uint8)" in repr(qmodel[0])
    assert repr(qmodel[4]).endswith("fuses=relu)")


@pytest.mark.parametrize(
    ("kinds", "config", "relus"),
    [
        ("lrl", DYNAMIC, ["1", None]),
        ("lsl", STATIC, [None, None]),
        ("lslr", STATIC, [None, "3"]),
        ("rl", STATIC, [None]),
    ],
)
def test_codes_are_for_static_neighbours_only_but_a_relu_is_fused_anyway(kinds, config, relus):
    model = chain(kinds)
    qmodel = convert(model, DATA, config=config)
    assert [layer.activation for layer in qmodel.torchq_plan.layers.values()] == relus
    assert set(flow(qmodel, X)) == {(torch.float32, torch.float32)}
    assert_close_to_float(model, qmodel)


@pytest.mark.parametrize(("excluded", "activation"), [("2", Activation.RELU), ("0", Activation.NONE)])
def test_a_float_neighbour_gets_floats(excluded, activation):
    model = chain("lrl")
    qmodel = convert(model, DATA, config=QConfig(activation="static", observer="minmax", exclude=(excluded,)))
    (layer,) = layers_of(qmodel)
    assert layer.fold == Fold(activation)
    assert type(qmodel.get_submodule(excluded)) is nn.Linear
    assert_close_to_float(model, qmodel)


@pytest.mark.parametrize("kinds", ["ll", "lrl"])
def test_a_chain_agrees_with_its_simulation(kinds):
    """A code may differ by one where the float32 rounding of a simulated sum crosses a tie. The outputs then differ by
    the weights of those codes, and by rounding: at most K + 8 = 32 roundings of 2^-24 of the sum of all magnitudes, on
    every path.
    """
    qmodel = convert(chain(kinds), DATA, config=STATIC)
    first, last = layers_of(qmodel)
    with Flow() as mode:
        actual = qmodel(X)
    codes = mode.tensors[0][1]
    with simulate():
        expected = qmodel(X)
        values = first.fused(X, first.fold.activation, last.input_qparams)
    assert (codes.dtype, values.dtype) == (torch.uint8, torch.float32)
    apart = (codes.int() - quantize(values, *last.input_qparams, dtype=torch.uint8).int()).abs()
    assert apart.max() <= 1
    assert torch.equal(values, fake_quantize(values, *last.input_qparams, dtype=torch.uint8))
    assert apart.float().mean() < 0.01
    weight = dequantize(last.weight_int8, last.weight_scale, axis=0).abs()
    rounding = 2 * 32 * 2.0**-24 * (values.abs() @ weight.T + last.bias.abs())
    assert ((actual - expected).abs() <= last.input_qparams.scale * apart.float() @ weight.T + rounding).all()


def test_it_can_be_switched_off():
    model = chain("lrdl")
    qmodel = convert(model, DATA, config=dataclasses.replace(STATIC, fuse=False))
    assert type(qmodel) is nn.Sequential
    assert [(p.activation, p.skipped, p.feeds) for p in qmodel.torchq_plan.layers.values()] == [(None, (), None)] * 2
    assert {layer.fold for layer in layers_of(qmodel)} == {Fold()}
    assert set(flow(qmodel, X)) == {(torch.float32, torch.float32)}
    fused = convert(model, DATA, config=STATIC)
    assert type(fused) is Int8Sequential
    assert torch.equal(qmodel(X), fused(X))


def test_without_data_too():
    model = chain("lrl")
    qmodel = convert(model)
    assert [layer.fold.activation for layer in layers_of(qmodel)] == [Activation.RELU, Activation.NONE]
    assert type(qmodel[1]) is nn.ReLU
    with Flow() as mode:
        qmodel(X)
    assert ([activation for _, _, activation in mode.seen], mode.relus) == ([1, 0], 0)
    assert_close_to_float(model, qmodel)


def test_an_edited_plan_is_followed():
    """A fold taken out of the plan is not run, and one that is not there is an error."""
    model = chain("lrl")
    plan = convert(model, DATA, config=STATIC).torchq_plan
    for edit, expected in (
        ({"activation": None, "feeds": None}, [(torch.float32, torch.float32)] * 2),
        ({"feeds": None}, [(torch.float32, torch.float32)] * 2),
        ({}, [(torch.float32, torch.uint8), (torch.uint8, torch.float32)]),
    ):
        layers = {**plan.layers, "0": dataclasses.replace(plan.layers["0"], **edit)}
        edited = apply_plan(model, dataclasses.replace(plan, layers=layers))
        assert flow(edited, X) == expected
        assert_close_to_float(model, edited)


# ---- what others see ----


class Around(nn.Module):
    """A model whose forward is `run(model, x, rare)`. Calibration never runs it with `rare`."""

    def __init__(self, run, **modules):
        super().__init__()
        self.run = run
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x, rare=False):
        return self.run(self, x, rare)


def around(run, kinds="lrl", **modules):
    return Around(run, seq=chain(kinds), **modules)


class Overridden(nn.Sequential):
    def forward(self, x):
        return self[2](self[0](x) - self[1](x))


class Shifted(nn.ReLU):
    def forward(self, x):
        return super().forward(x) - 1


def with_hook(index):
    model = chain("lrdl")
    model[index].register_forward_hook(lambda module, args, y: y + 1)
    return model


def with_forward():
    model = chain("lrl")
    model.forward = MethodType(Overridden.forward, model)
    return model


def in_two_sequentials():
    model = around(lambda m, x, rare: m.twin(m.seq(x)))
    model.twin = nn.Sequential(nn.Tanh(), model.seq[0])
    return model


def with_an_alias():
    model = around(lambda m, x, rare: m.alias(x) if rare else m.seq(x))
    model.alias = model.seq[0]
    return model


SEEN = {
    "hook on the ReLU": lambda: with_hook(1),
    "hook on the Dropout": lambda: with_hook(2),
    "children called one by one": lambda: around(lambda m, x, rare: m.seq[2](m.seq[1](m.seq[0](x)))),
    "first Linear also called outside": lambda: around(lambda m, x, rare: m.seq(x) + m.seq[0](x)),
    "last Linear also called outside": lambda: around(lambda m, x, rare: m.seq(x) + m.seq[2](x)),
    "ReLU also called outside": lambda: around(lambda m, x, rare: m.seq[1](m.seq(x))),
    "Dropout's place also called outside": lambda: around(lambda m, x, rare: m.seq[2](m.seq(x)), "lrdl"),
    "a slice runs": lambda: around(lambda m, x, rare: m.seq[:2](x) + m.seq(x)),
    "Linear in two Sequentials": in_two_sequentials,
    "Sequential with a forward of its own": lambda: Overridden(*chain("lrl")),
    "Sequential instance with a forward of its own": with_forward,
    "ReLU subclass": lambda: nn.Sequential(nn.Linear(24, 24), Shifted(), nn.Linear(24, 24)),
}


@pytest.mark.parametrize("config", [AUTO, STATIC, DYNAMIC], ids=lambda config: config.activation)
@pytest.mark.parametrize("case", SEEN)
def test_what_others_see_is_right(case, config):
    model = SEEN[case]().eval()
    qmodel = convert(model, DATA, config=config)
    assert_close_to_float(model, qmodel)


@pytest.mark.parametrize("config", [AUTO, STATIC, DYNAMIC], ids=lambda config: config.activation)
def test_a_layer_under_another_name_gives_floats_there(config):
    model = with_an_alias()
    qmodel = convert(model, DATA, config=config)
    assert_close_to_float(model, qmodel)
    assert_close_to_float(model, qmodel, rare=True)


@pytest.mark.parametrize("config", [AUTO, DYNAMIC], ids=lambda config: config.activation)
def test_a_way_that_the_data_never_took(config):
    model = around(lambda m, x, rare: m.seq[0](x) if rare else m.other(x), other=nn.Linear(24, 24))
    qmodel = convert(model, DATA, config=config)
    assert_close_to_float(model, qmodel, rare=True)


@pytest.mark.parametrize("config", [AUTO, STATIC, DYNAMIC], ids=lambda config: config.activation)
def test_one_relu_in_several_places(config):
    act = nn.ReLU()
    repeated = nn.Sequential(nn.Linear(24, 24), act, nn.Linear(24, 24), act, nn.Linear(24, 24))
    apart = Around(
        lambda m, x, rare: m.act(m.other(m.act(m.b(m.a(x))) - 1)),
        a=nn.Sequential(nn.Linear(24, 24), act),
        b=nn.Sequential(nn.Linear(24, 24), act),
        other=nn.Linear(24, 24),
        act=act,
    )
    for model in (repeated.eval(), apart.eval()):
        qmodel = convert(model, DATA, config=config)
        assert_close_to_float(model, qmodel)
    assert type(qmodel.act) is nn.ReLU
    assert [type(seq[1]) for seq in (apart.a, apart.b)] == [nn.ReLU] * 2


@pytest.mark.parametrize("inplace", [False, True])
def test_a_sequential_under_two_names_is_one(inplace):
    model = around(lambda m, x, rare: m.again(m.seq(x)))
    model.again = model.seq
    expected = model(X)
    qmodel = convert(model, DATA, config=STATIC, inplace=inplace)
    assert qmodel.again is qmodel.seq
    assert flow(qmodel, X) == [(torch.float32, torch.uint8), (torch.uint8, torch.float32)] * 2
    assert sqnr_db(expected, qmodel(X)) > 20
