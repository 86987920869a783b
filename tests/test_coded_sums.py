"""Large sums between convolutions are u8 codes, which their readers take as they are. Others see the codes' values."""

import copy
import dataclasses
import pickle

import pytest
import torch
from torch import nn

import torchq
from helpers.compare import assert_identical
from helpers.convolutional import Basic, Bottleneck, ConvNorm
from helpers.numbers import normal
from torchq import Plan, QConfig, apply_plan, convert, plan_of
from torchq.modules import coded_sum
from torchq.modules.coded_sum import CodedSum
from torchq.modules.quantized_conv import QuantizedConv
from torchq.numerics.metrics import sqnr_db
from torchq.numerics.qparams import QParams, fake_quantize
from torchq.planning import coded_sums

pytestmark = pytest.mark.usefixtures("seeded")

STATIC = QConfig(activation="static", rounding="nearest")
DATA = [normal(4, 32, 20, 20, seed=i) for i in range(4)]
X = normal(2, 32, 20, 20, seed=9)


class Chain(nn.Module):
    """Three blocks: with a shortcut, without, and with activations in place; somebody reads a sum if asked to."""

    ask = ""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = Bottleneck(32, 64), Bottleneck(64, 64), Basic(64)
        self.last = ConvNorm(64, 32, 3)

    def forward(self, x):
        y = self.one(x)
        if self.ask == "sum":
            self.seen = y.sum()
        elif self.ask == "view":
            self.seen = y.view(len(y), -1) + 0
        elif self.ask == "write":
            y[:, 0] = 0.0
        elif self.ask == "write through a view":
            y.flatten(1).mul_(2.0)
        elif self.ask == "array":
            self.seen = torch.from_numpy(y.numpy().copy())
        elif self.ask == "keep":
            self.seen = y
        elif self.ask == "return":
            return y, self.last(self.three(self.two(y)))
        elif self.ask == "other sum":
            y = y + x.mean()
        elif self.ask == "pending first":
            return self.last(self.one.layer(x) + y)
        elif self.ask == "pending last":
            return self.last(y + self.one.layer(x))
        return self.last(self.three(self.two(y)))


@pytest.fixture(scope="module")
def qmodel():
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(coded_sums, "LARGE", 1)
        patch.setattr(coded_sums, "SUMS_DB", 40.0)
        patch.setattr(coded_sums, "ENOUGH_DB", 0.0)
        torch.manual_seed(0)
        return convert(Chain().eval(), DATA, config=STATIC)


def in_floats(qmodel):
    """The same layers, whose sums are floats of the codes' values: rounded by the block that gives them."""
    twin = copy.deepcopy(qmodel)
    for module in twin.modules():
        if isinstance(module, QuantizedConv):
            module.hands = None
    for name, planned in qmodel.torchq_plan.layers.items():
        if planned.sum_qparams is not None:
            block, pair = twin.get_submodule(name.split(".")[0]), planned.sum_qparams
            block.register_forward_hook(lambda _, args, y, pair=pair: fake_quantize(y, *pair, dtype=torch.uint8))
    return twin


@pytest.fixture
def made(monkeypatch):
    """Counts the sums whose values something has read."""
    count = []
    usual = coded_sum.Codes.dequantized
    monkeypatch.setattr(coded_sum.Codes, "dequantized", lambda self, last: count.append(1) or usual(self, last))
    return count


def test_all_readers_of_a_sum_have_its_range(qmodel):
    layers = qmodel.torchq_plan.layers
    coded = {name: planned.sum_qparams for name, planned in layers.items() if planned.sum_qparams}
    assert sorted(coded) == ["one.layer.2.conv", "three.conv2", "two.layer.2.conv"]
    readers = {"one": "two.layer.0.conv", "two": "three.conv1", "three": "last.conv"}
    for name, qparams in coded.items():
        reader = layers[readers[name.split(".")[0]]]
        assert reader.input_qparams == qparams
        assert reader.channel_scale is None
        assert reader.reason == "static, and reads a sum in codes"
    assert qmodel.torchq_plan.checked.chosen == "sums in codes"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("last", [False, True])
def test_codes_are_what_rounded_sums_are(qmodel, made, mode, last):
    x = X.contiguous(memory_format=torch.channels_last) if last else X
    with mode():
        y = qmodel(x)
    assert type(y) is torch.Tensor
    assert made == []
    expected = in_floats(qmodel)(x)
    assert y.stride() == expected.stride()
    assert_identical(y, expected)


WAYS = ["sum", "view", "write", "write through a view", "array", "keep", "return", "other sum"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("way", [*WAYS, "pending first", "pending last"])
def test_other_readers_see_values(qmodel, way, mode):
    one, other = copy.deepcopy(qmodel), in_floats(qmodel)
    one.ask = other.ask = way
    with mode():
        y, expected = one(X), other(X)
        for got, asked in zip(*((each if isinstance(each, tuple) else (each,)) for each in (y, expected)), strict=True):
            assert type(got) is torch.Tensor
            assert got.stride() == asked.stride()
            assert_identical(got, asked)
        if hasattr(other, "seen"):
            assert_identical(one.seen + 0, other.seen + 0)


def test_modes_gradients_copies_and_files(qmodel, tmp_path):
    y = qmodel(X)
    torchq.save(qmodel, tmp_path / "q.safetensors")
    for again in (
        copy.deepcopy(qmodel),
        pickle.loads(pickle.dumps(qmodel)),
        torchq.load(tmp_path / "q.safetensors", Chain()),
    ):
        assert_identical(again(X), y)
    with torch.enable_grad():
        x = X.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(qmodel(x).sum(), x)
    assert gradient.isfinite().all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert qmodel(X).dtype == torch.bfloat16
    half = qmodel(X.bfloat16())
    assert half.dtype == torch.bfloat16
    assert sqnr_db(y, half.float()) > 20  # the input has 8 bits


def test_a_hooked_reader_and_a_block_alone_get_tensors(qmodel):
    y, hooked, seen = qmodel(X), copy.deepcopy(qmodel), []
    hooked.two.layer[0].conv.register_forward_pre_hook(lambda _, args: seen.append(args[0] + 0))
    assert_identical(hooked(X), y)
    assert type(seen[0]) is torch.Tensor
    block = qmodel.two(normal(2, 64, 20, 20, seed=3))
    assert type(block) is torch.Tensor
    assert block.is_contiguous()


def test_plans(qmodel):
    plan = Plan.from_dict(plan_of(qmodel).to_dict())
    assert plan.layers == plan_of(qmodel).layers
    old = plan.to_dict()
    for layer in old["layers"].values():
        del layer["sum_qparams"]  # as the version before saved it
    assert Plan.from_dict(old).layers["two.layer.2.conv"].sum_qparams is None
    name, qparams = "two.layer.2.conv", QParams(0.1, 0)
    for change, message in (
        ({"kind": "int8 dynamic", "feeds": None}, "must be static"),
        ({"adds": False}, "adds nothing"),
        ({"sum_qparams": QParams(0.0, 0)}, "has scale 0.0"),
    ):
        layers = {**plan.layers, name: dataclasses.replace(plan.layers[name], **{"sum_qparams": qparams} | change)}
        with pytest.raises(ValueError, match=message):
            apply_plan(Chain(), dataclasses.replace(plan, layers=layers))


@pytest.mark.parametrize(("allowed", "chosen"), [(-1.0, False), (40.0, True)])
def test_they_are_taken_for_what_they_cost(monkeypatch, allowed, chosen):
    monkeypatch.setattr(coded_sums, "LARGE", 1)
    monkeypatch.setattr(coded_sums, "ENOUGH_DB", 0.0)
    monkeypatch.setattr(coded_sums, "SUMS_DB", allowed)
    torch.manual_seed(0)
    layers = convert(Chain().eval(), DATA, config=STATIC).torchq_plan.layers
    assert any(planned.sum_qparams for planned in layers.values()) is chosen


def test_small_sums_stay_floats():
    torch.manual_seed(0)
    layers = convert(Chain().eval(), DATA, config=STATIC).torchq_plan.layers
    assert not any(planned.sum_qparams for planned in layers.values())


def test_a_sum_is_made_once():
    held = coded_sum.Codes(torch.tensor([[[3, 5]]], dtype=torch.uint8), QParams(0.5, 3), torch.float32)
    y = CodedSum(held, False, None)
    first = y.make()
    first.add_(1)
    assert y.make() is first
    assert y.codes() is None
    assert y.tolist() == [[[1.0], [2.0]]]
