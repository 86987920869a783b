"""Pointwise, depthwise and pointwise convolutions in one call, band by band: the bits of one after the other."""

import itertools

import pytest
import torch
from torch import nn

from helpers.compare import assert_identical
from helpers.numbers import normal
from torchq import _C, kernels
from torchq.modules.convolving import geometry_of, numbers_of, step_of
from torchq.modules.quantized_conv import OF_DIMENSIONS
from torchq.ops import Activation

pytestmark = pytest.mark.usefixtures("seeded", "one_thread")

F32 = torch.float32
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
KERNELS = [kernel for kernel in kernels.names() if kernel in kernels.runnable()]


@pytest.fixture
def one_thread():
    """With two, small images are computed one convolution after the other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def convolution(inputs, outputs, dims=2, **options):
    like = CONVS[dims - 1](inputs, outputs, **{"kernel_size": 1, **options})
    weight = torch.randint(-127, 128, like.weight.shape, dtype=torch.int8)
    scale, bias = torch.rand(outputs) * 0.01 + 0.003, normal(outputs, seed=outputs)
    channel_scale = torch.rand(inputs) + 0.5 if like.groups == 1 else None
    return OF_DIMENSIONS[dims - 1](weight, scale, bias, like=like, channel_scale=channel_scale)


class Row:
    """Convolutions of these numbers of channels; of two equal ones the second is depthwise, with these options."""

    def __init__(self, channels, activation=Activation.RELU6, dims=2, **options):
        options = {"kernel_size": 3, "padding": 1, **options}
        self.convs = [
            convolution(a, b, dims, groups=a, **options) if a == b else convolution(a, b, dims)
            for a, b in itertools.pairwise(channels)
        ]
        self.activations = [
            activation,
            *(Activation.NONE if b < a else activation for a, b in itertools.pairwise(channels[1:])),
        ]

    def steps(self, around=()):
        return tuple(
            step_of(conv, int(act), None, around if conv.groups > 1 else ())
            for conv, act in zip(self.convs, self.activations, strict=True)
        )

    def at_once(self, x, residual=None, around=()):
        return _C.call_convolutions(0, x, self.steps(around), residual, True)

    def one_by_one(self, x, residual=None, around=()):
        for i, (step, conv) in enumerate(zip(self.steps(around), self.convs, strict=True)):
            added = residual if i + 1 == len(self.convs) else None
            x = _C.call_convolution(0, x, conv.packed, *step[2:5], True, step[5], added)
        return x

    def is_right(self, x, residual=None, around=()):
        expected = self.one_by_one(x, residual, around)
        y = self.at_once(x, residual, around)
        assert_identical(y, expected)
        assert y.stride() == expected.stride()
        return y


def last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


CHANNELS = [(16, 96, 96, 24), (20, 37, 37, 18), (8, 8, 16), (24, 40, 40), (5, 9, 9, 3)]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("channels", CHANNELS, ids=str)
def test_all_sizes_and_geometries(kernel, channels):
    """Whose lines are short or long, in one band or several, with and without what is added."""
    settings = [
        {},
        {"stride": 2},
        {"kernel_size": 5, "padding": 2},
        {"kernel_size": (5, 3), "padding": (0, 2), "stride": (1, 2)},
        {"stride": 3, "padding": 0, "kernel_size": 2},
        {"dilation": 2, "padding": (2, 1)},
        {"stride": 4, "padding": (3, 2)},
    ]
    with kernels.use(kernel), torch.no_grad():
        for options, (batch, *sizes) in itertools.product(settings, [(1, 7, 7), (2, 9, 26), (1, 31, 25), (3, 5, 6)]):
            row = Row(channels, **options)
            x = last(normal(batch, channels[0], *sizes, seed=sum(sizes)) * 2)
            y = row.is_right(x)
            if channels[-1] != channels[-2]:
                row.is_right(x, last(normal(*y.shape, seed=9)))


@pytest.mark.parametrize("dims", [1, 3])
def test_lines_and_volumes(dims):
    with torch.no_grad():
        for sizes, options in (((70, 13, 11), {}), ((9, 5, 30), {"stride": 2})):
            row = Row((12, 40, 40, 20), dims=dims, **options)
            row.is_right(last(normal(2, 12, *sizes[:dims])))


@pytest.mark.parametrize("activation", Activation)
def test_activations(activation):
    with torch.no_grad():
        Row((12, 40, 40, 20), activation).is_right(last(normal(1, 12, 9, 30) * 4))


def test_large_images_take_many_bands():
    with torch.no_grad():
        for options, size in (({}, 56), ({"stride": 2}, 113), ({"kernel_size": 7, "padding": 3}, 60)):
            Row((16, 144, 144, 24), **options).is_right(last(normal(2, 16, size, size)))
            Row((32, 32, 16), **options).is_right(normal(2, 32, size, size))  # with the channels first


def test_zeros_that_the_input_lacks():
    row = Row((16, 48, 48, 24), stride=2, padding=0)
    with torch.no_grad():
        y = row.is_right(last(normal(1, 16, 28, 28)), around=(0, 1, 0, 1))
        assert y.shape == (1, 24, 14, 14)
        assert row.steps((0, 1, 0, 1))[1][2] == numbers_of(geometry_of(row.convs[1]), (0, 1, 0, 1))


def test_nan_and_infinity_stay_where_they_are_seen():
    row = Row((16, 48, 48, 24), Activation.RELU)
    x = normal(1, 16, 40, 40)
    x[0, 3, 10, 12], x[0, 5, 30, 0] = torch.nan, torch.inf
    with torch.no_grad():
        y = row.is_right(last(x))
        bad = y.isnan().any(1)[0]
    assert bad[9:12, 11:14].all()
    assert bad[29:32, :2].all()
    assert bad.sum() == 9 + 6


def test_threads_give_the_same_bits():
    """As many parts as there are threads, which compute rows that two of them need twice."""
    for options, sizes in (({}, (40, 30)), ({"stride": 2}, (61, 29)), ({}, (14, 14))):
        row, x = Row((16, 96, 96, 24), **options), last(normal(3, 16, *sizes))
        outputs = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            with torch.no_grad():
                outputs.append(row.is_right(x))
        for y in outputs[1:]:
            assert_identical(y, outputs[0])


def test_values_are_those_of_float_convolutions():
    """Within what eight bits leave."""
    row = Row((16, 48, 48, 24), Activation.RELU)
    x = last(normal(1, 16, 33, 35))
    with torch.no_grad():
        y, exact = row.at_once(x), x
        for conv, activation in zip(row.convs, row.activations, strict=True):
            exact = conv._convolve(exact, conv.weight.clone(), conv.bias.clone())
            exact = exact.relu() if activation else exact
    assert 10 * torch.log10(exact.square().sum() / (y - exact).square().sum()) > 35
