"""What users of other quantization tools reported of convolutions: here each gives the float model's values.

The numbers are those of the issues. Each runs without data and static.
"""

import pytest
import torch
from torch import nn

from helpers.compare import assert_identical
from helpers.convolution import Layer, square
from helpers.convolutional import shaken
from helpers.numbers import normal
from torchq import QConfig, convert, prepare_qat, report
from torchq.numerics.metrics import sqnr_db
from torchq.ops.convolution import Geometry, convolve, pack

pytestmark = [
    pytest.mark.usefixtures("seeded"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
]

STATIC = QConfig(activation="static", rounding="nearest", smoothing="none")


def seven_rows():
    """pytorch/pytorch#41406: FBGEMM's depthwise wrote past small images."""
    return nn.Conv2d(72, 72, 5, stride=2, padding=2, groups=72), (72, 7, 1)


def string_padding():
    """pytorch/pytorch#76304: padding given as a string; and the norm is behind the activation."""
    parts = [nn.Conv1d(1, 128, 80, stride=4, padding="valid"), nn.ReLU(), shaken(nn.BatchNorm1d(128))]
    return nn.Sequential(*parts), (1, 8000)


def even_kernel():
    """pytorch/executorch#20558: an even kernel and padding "same" gave wrong values."""
    return nn.Conv1d(2, 16, 4, padding="same"), (2, 16)


def tall_kernel():
    """pytorch/executorch#20517: a kernel of 32 x 1 and padding "same" failed at run time."""
    return nn.Sequential(nn.Conv2d(1, 16, (32, 1), padding="same"), nn.ReLU()), (1, 256, 1)


def groups():
    """Tencent/ncnn#1304: groups that are not depthwise gave wrong values."""
    return nn.Conv2d(32, 64, 3, padding=1, groups=4), (32, 9, 9)


def two_with_norms():
    """pytorch/pytorch#112579: the norms were lost."""
    parts = [nn.Conv2d(3, 64, 3, padding=1), shaken(nn.BatchNorm2d(64)), nn.Conv2d(64, 64, 3, padding=1)]
    return nn.Sequential(*parts, shaken(nn.BatchNorm2d(64))), (3, 12, 12)


REPORTED = [seven_rows, string_padding, even_kernel, tall_kernel, groups, two_with_norms]


@pytest.mark.parametrize("make", REPORTED, ids=lambda make: make.__name__)
def test_reported_models(make):
    model, size = make()
    model = nn.Sequential(model).eval()
    data, x = [normal(8, *size, seed=i) for i in range(9)], normal(2, *size, seed=99)
    for qmodel in (convert(model), convert(model, data, config=STATIC), convert(model, data)):
        assert all(layer.is_int8 for layer in qmodel.torchq_plan.layers.values())
        assert sqnr_db(model(x), qmodel(x)) > 30
        for _ in range(20):
            assert_identical(qmodel(x), qmodel(x))


def test_depthwise_of_small_images_is_exact():
    """pytorch/pytorch#41406, by the definition."""
    layer = Layer.random(square(2, 72, 72, 5, 2, (2, 2), groups=72), torch.Generator().manual_seed(0))
    x = normal(1, 72, 7, 1)
    assert_identical(layer(x, x_qparams=(0.03, 100)), layer.expected(x, (0.03, 100)))


@pytest.mark.parametrize(
    ("groups", "message"), [(8, "must be multiples of groups"), (0, "must be multiples of groups")]
)
def test_groups_that_do_not_divide(groups, message):
    """pytorch/pytorch#182653 and #91558: divisions by zero, which ended the process."""
    packed = pack(torch.zeros(6, 1, 7, 1, dtype=torch.int8), torch.ones(6))
    geometry = Geometry(8, 6, (7, 1), (1, 1), ((0, 0), (0, 0)), (1, 1), groups)
    with pytest.raises(RuntimeError, match=message):
        convolve(torch.zeros(2, 8, 16, 7), packed, geometry)


@pytest.mark.small_layers_stay_float
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.filterwarnings("ignore:torchq.convert. nothing became int8")
def test_no_output_channels():
    """pytorch/pytorch#171591: it ended the process. A layer without outputs stays in float, with the reason."""
    model = nn.Sequential(nn.Conv3d(3, 0, 3, stride=2, padding=1)).eval()
    qmodel = convert(model)
    assert type(qmodel[0]) is nn.Conv3d  # which torch refuses to run
    assert "int8 would save nothing" in str(report(qmodel))


@pytest.mark.slow(seconds=5)
def test_training_of_depthwise_convolutions():
    """pytorch/pytorch#157222: what was trained with groups could not be converted."""
    parts = [nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 1)]
    model = prepare_qat(nn.Sequential(*parts), [normal(4, 16, 10, 10)])
    with torch.enable_grad():
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for seed in range(3):
            loss = model(normal(4, 16, 10, 10, seed=seed)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    x = normal(2, 16, 10, 10, seed=9)
    trained = model.eval()(x)
    assert sqnr_db(trained, convert(model)(x)) > 40
