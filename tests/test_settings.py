"""Attributes that are set after conversion: what torch's modules read in each call takes effect, or is refused."""

import copy

import pytest
import torch
from torch import nn

from helpers.compare import assert_identical
from helpers.convolutional import Bottleneck, ConvNorm
from helpers.numbers import normal
from torchq import QConfig, convert
from torchq.modules.norms import IncludedNorm
from torchq.modules.quantized_conv import QuantizedConv

pytestmark = pytest.mark.usefixtures("seeded")

SCHEMES = ["dynamic", "static"]
IMAGES = [normal(2, 16, 9, 9, seed=i) for i in range(2)]
X = normal(2, 16, 9, 9, seed=5)


def conv(scheme, **settings):
    """A converted convolution, by its own quantized numbers whatever the settings."""
    model = nn.Sequential(nn.Conv2d(16, 16, **{"kernel_size": 3, "padding": 1} | settings)).eval()
    return convert(model, IMAGES, config=QConfig(activation=scheme, rounding="nearest", smoothing="none"))


SETTINGS = [
    ("stride", (2, 2)),
    ("stride", 2),
    ("padding", (0, 1)),
    ("padding", 2),
    ("padding", "same"),
    ("padding", "valid"),
    ("dilation", (2, 1)),
    ("padding_mode", "circular"),
]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("name", "value"), SETTINGS)
def test_what_a_convolution_reads_in_each_call_takes_effect(scheme, name, value):
    """The reference is torch's convolution of what int8 has of the input, by the weight that int8 has."""
    qmodel = conv(scheme)
    before = qmodel(X)
    setattr(qmodel[0], name, value)
    exact = nn.Conv2d(16, 16, 3, padding=1).requires_grad_(False)
    exact.weight.copy_(qmodel[0].weight + 0)
    exact.bias.copy_(qmodel[0].bias + 0)
    setattr(exact, name, value)
    y, expected = qmodel(X), exact(X)
    assert y.shape == expected.shape
    assert (y - expected).norm() < 0.02 * expected.norm()
    if y.shape == before.shape and value != "same":
        assert not torch.equal(y, before)
    assert_identical(copy.deepcopy(qmodel)(X), y)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_settings_are_those_of_a_layer_that_was_made_with_them(scheme):
    qmodel, other = conv(scheme), conv(scheme, stride=2, dilation=2, padding=2)
    other.load_state_dict(qmodel.state_dict())
    for name in ("stride", "dilation", "padding"):
        setattr(qmodel[0], name, (2, 2))
    assert_identical(qmodel(X), other(X))


def test_a_tiled_convolution_may_become_another_and_back():
    qmodel = conv("dynamic", kernel_size=3, stride=3, padding=0)
    before = qmodel(X)
    qmodel[0].stride = 1
    other = conv("dynamic", kernel_size=3, padding=0)
    other.load_state_dict(qmodel.state_dict())
    assert_identical(qmodel(X), other(X))
    qmodel[0].stride = 3
    assert_identical(qmodel(X), before)


def test_the_padding_of_another_mode_stays_as_torch_made_it():
    qmodel = conv("static", padding_mode="reflect")
    before = qmodel(X)
    qmodel[0].padding = 3
    assert_identical(qmodel(X), before)
    qmodel[0].padding_mode = "zeros"
    assert qmodel(X).shape == (2, 16, 13, 13)


def test_what_torch_refuses_is_refused_and_changes_nothing():
    qmodel = conv("static", stride=2)
    before = qmodel(X)
    with pytest.raises(ValueError, match="padding='same' is not supported for strided convolutions"):
        qmodel[0].padding = "same"
    assert qmodel[0].padding == (1, 1)
    assert_identical(qmodel(X), before)


@pytest.mark.parametrize("make", [lambda: ConvNorm(16, 16, act=nn.ReLU()), lambda: Bottleneck(16, 16)])
def test_settings_count_in_rows_and_blocks(make):
    qmodel = convert(make().eval(), IMAGES, config=QConfig(activation="static", rounding="nearest", smoothing="none"))
    layer = next(each for each in qmodel.modules() if isinstance(each, QuantizedConv) and each.kernel_size == (3, 3))
    before = qmodel(X)
    layer.padding, layer.dilation = (2, 2), 2
    y = qmodel(X)
    assert not torch.equal(y, before)
    for module in qmodel.modules():
        module.register_forward_hook(lambda *_: None) if not isinstance(module, QuantizedConv) else None
    assert_identical(qmodel(X), y)


# ---- What the packed weight was made for ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["in_channels", "out_channels", "kernel_size", "groups", "in_features"])
def test_what_a_packed_convolution_was_made_for_is_refused(name):
    layer = conv("dynamic")[0]
    setattr(layer, name, getattr(layer, name))
    with pytest.raises(AttributeError, match=f"torchq: '{name}' can't be set of a QuantizedConv2d.*before convert"):
        setattr(layer, name, 4)


@pytest.mark.parametrize("name", ["in_features", "out_features"])
def test_what_a_packed_layer_was_made_for_is_refused(name):
    layer = convert(nn.Linear(32, 16))
    with pytest.raises(AttributeError, match=f"'{name}' can't be set of a QuantizedLinear"):
        setattr(layer, name, 8)


@pytest.mark.parametrize("make", [nn.Embedding, nn.EmbeddingBag])
def test_an_int8_table_takes_no_max_norm(make):
    table = convert(nn.ModuleList([make(500, 64)]))[0]
    assert table.weight_int8.dtype == torch.int8
    table.max_norm = None
    with pytest.raises(AttributeError, match="'max_norm' can't be set of a Quantized"):
        table.max_norm = 1.0


def test_options_of_a_bag_take_effect():
    bag = nn.EmbeddingBag(500, 64, mode="mean")
    ids = torch.tensor([[1, 2, 3], [3, 4, 5]])
    qbag = convert(nn.ModuleList([copy.deepcopy(bag)]))[0]
    for name, value in (("mode", "sum"), ("padding_idx", 3), ("mode", "max")):
        setattr(bag, name, value)
        setattr(qbag, name, value)
        assert (qbag(ids) - bag(ids)).norm() < 0.02 * bag(ids).norm()


def test_an_included_norm_takes_no_settings():
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16)).eval()
    norm = convert(model, IMAGES, config=QConfig(activation="dynamic"))[1]
    assert type(norm) is IncludedNorm
    with pytest.raises(AttributeError, match="'eps' can't be set of a norm that the weight"):
        norm.eps = 1.0
    norm.name = "mine"
    assert norm.name == "mine"


def test_a_later_hook_in_front_of_an_included_norm_is_warned_of():
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16)).eval()
    layer, seen = convert(model, IMAGES, config=QConfig(activation="dynamic"))[0], []
    with pytest.warns(UserWarning, match="behind the norm that is in its int8 weight.*before convert"):
        layer.register_forward_hook(lambda _, args, y: seen.append(y))
    assert "includes=1" in repr(layer)
    assert_identical(layer(X), seen[0])
    model[0].register_forward_hook(lambda *_: seen.append("float"))
    kept = convert(model, IMAGES, config=QConfig(activation="dynamic"))
    assert type(kept[1]) is nn.BatchNorm2d


# ---- Other modules --------------------------------------------------------------------------------------------------


def test_another_number_of_heads_takes_effect():
    attention = nn.MultiheadAttention(64, 8, batch_first=True).eval().requires_grad_(False)
    qattention, x = convert(nn.ModuleList([copy.deepcopy(attention)]).eval())[0], normal(2, 5, 64, seed=1)
    before = qattention(x, x, x)[0]
    attention.num_heads = qattention.num_heads = 2
    for weights in (False, True):
        y, expected = (each(x, x, x, need_weights=weights) for each in (qattention, attention))
        assert (y[0] - expected[0]).norm() < 0.05 * expected[0].norm()
        if weights:
            assert y[1].shape == expected[1].shape
            assert (y[1] - expected[1]).norm() < 0.05 * expected[1].norm()
        assert not torch.equal(y[0], before)


def test_another_nonlinearity_takes_effect():
    cell = nn.RNNCell(32, 64)
    qcell, x = convert(nn.ModuleList([copy.deepcopy(cell)]))[0], normal(4, 32, seed=1)
    cell.nonlinearity = qcell.nonlinearity = "relu"
    y, expected = qcell(x), cell(x).detach()
    assert (y - expected).norm() < 0.05 * expected.norm()
    assert float(y.amin()) == 0.0
