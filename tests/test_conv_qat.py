"""Quantization-aware training of convolutions: they train on int8's values, and norms stay modules until convert."""

import copy

import pytest
import torch
from torch import nn

from helpers.compare import assert_identical
from helpers.convolutional import IMAGE, IMAGES, resnet
from helpers.numbers import normal
from torchq import QConfig, convert, prepare_qat, simulate
from torchq.modules.norms import IncludedNorm
from torchq.modules.qat_conv import QATConv, QATConv2d
from torchq.modules.quantized_conv import QuantizedConv
from torchq.numerics.metrics import sqnr_db

# Each with an input.
CONVOLUTIONS = {
    "1d": (lambda: nn.Conv1d(8, 16, 3, stride=2, padding=1), (8, 20)),
    "2d": (lambda: nn.Conv2d(8, 16, 3, padding="same"), (8, 9, 7)),
    "tiles": (lambda: nn.Conv2d(8, 16, 2, stride=2), (8, 9, 7)),
    "pointwise": (lambda: nn.Conv2d(16, 24, 1), (16, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(24, 24, 3, padding=1, groups=24), (24, 6, 6)),
    "3d": (lambda: nn.Conv3d(4, 16, 2), (4, 4, 4, 4)),
    "circular": (lambda: nn.Conv2d(8, 16, 3, padding=1, padding_mode="circular"), (8, 6, 6)),
}


@pytest.mark.parametrize("scheme", ["static", "dynamic"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_it_trains_on_the_values_of_int8(name, scheme):
    """The training form gives what the converted layer does in simulate(), to the bit."""
    make, size = CONVOLUTIONS[name]
    torch.manual_seed(0)
    model = nn.Sequential(make())
    data = [normal(4, *size, seed=i) for i in range(4)]
    config = QConfig(activation=scheme)
    prepared = prepare_qat(model, None if scheme == "dynamic" else data, config=config)
    assert isinstance(prepared[0], QATConv)
    assert type(model[0]) is type(make())
    prepared.eval()
    x = normal(3, *size, seed=9)
    with torch.no_grad():
        y = prepared(x)
        qmodel = convert(prepared, config=config)
        assert isinstance(qmodel[0], QuantizedConv)
        with simulate():
            assert_identical(y, qmodel(x))
        assert sqnr_db(y[0], prepared(x[0])) > 100  # torch sums one sample in another order
        assert sqnr_db(y, qmodel(x)) > 90


def test_gradients_reach_weights_ranges_and_inputs():
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 16, 3, padding=1)
    prepared = prepare_qat(nn.Sequential(conv), [normal(4, 8, 6, 6)])[0]
    x = normal(2, 8, 6, 6, seed=1).requires_grad_()
    prepared(x).square().sum().backward()
    exact = copy.deepcopy(conv)
    y = exact(x.detach().requires_grad_())
    y.square().sum().backward()
    assert sqnr_db(exact.weight.grad, prepared.weight.grad) > 20
    assert prepared.input_range.ends.grad is not None
    assert prepared.bias.grad is not None
    assert float(x.grad.abs().sum()) > 0


@pytest.mark.slow(seconds=12)
def test_norms_train_and_are_included_by_convert():
    model = resnet()
    prepared = prepare_qat(model, IMAGES)
    assert sum(isinstance(module, QATConv2d) for module in prepared.modules()) == 10
    assert sum(isinstance(module, nn.BatchNorm2d) for module in prepared.modules()) == 10
    before = prepared.stem.norm.running_mean.clone()
    optimizer = torch.optim.SGD(prepared.parameters(), 1e-4)
    prepared.train()
    for batch in IMAGES:
        optimizer.zero_grad()
        prepared(batch).square().mean().backward()
        optimizer.step()
    assert not torch.equal(prepared.stem.norm.running_mean, before)
    prepared.eval()
    with torch.no_grad():
        y = prepared(IMAGE)
        qmodel = convert(prepared, IMAGES)
        assert not any(isinstance(module, (nn.BatchNorm2d, QATConv)) for module in qmodel.modules())
        assert sum(isinstance(module, IncludedNorm) for module in qmodel.modules()) == 10
        assert sqnr_db(y, qmodel(IMAGE)) > 50  # a code may differ by one where a float sum is rounded otherwise
        assert any(layer.feeds for layer in qmodel.torchq_plan.layers.values())
    assert isinstance(prepared.stem.conv, QATConv2d)


def test_one_scale_for_all_channels_keeps_the_norm():
    """With the norm in the weight, one scale for all would be another than that of the training."""
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16))
    config = QConfig(weight="per_tensor")
    prepared = prepare_qat(model, [normal(4, 8, 6, 6)], config=config).eval()
    qmodel = convert(prepared, [normal(4, 8, 6, 6)], config=config)
    assert type(qmodel[1]) is nn.BatchNorm2d


def test_what_is_not_trained_in_int8_becomes_float_again():
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 16, 3))
    prepared = prepare_qat(model, [normal(4, 8, 8, 8)], config=QConfig(exclude=("1",)))
    assert [type(module) for module in prepared] == [QATConv2d, nn.Conv2d]
    qmodel = convert(prepared.eval())
    assert type(qmodel[1]) is nn.Conv2d
