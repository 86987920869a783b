"""Convolutions with a range for each place, and rows of convolutions, past the dispatcher: the usual way's bits."""

import copy

import pytest
import torch
from torch import nn

from helpers.compare import assert_identical
from helpers.conv_blocks import DATA, STATIC, X
from helpers.convolutional import by_code
from helpers.mobile import Inverted
from helpers.numbers import normal
from torchq import _C, QConfig, convert, kernels
from torchq.modules import conv_block
from torchq.modules.convolving import format_of, geometry_of, step_of
from torchq.modules.quantized_conv import QuantizedConv
from torchq.ops import Activation, activate
from torchq.ops.convolution import pack

pytestmark = pytest.mark.usefixtures("seeded")

F32, BF16, U8 = torch.float32, torch.bfloat16, torch.uint8
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
KERNELS = [kernel for kernel in kernels.names() if kernel in kernels.runnable()]
DYNAMIC = QConfig(activation="dynamic", rounding="nearest", smoothing="none")


def channels_last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


class Pixels:
    """A pointwise convolution of 20 channels to 37 whose pixels have ranges of their own."""

    def __init__(self, dims=2, dtype=F32, activation=0, *, scaled=False, **options):
        conv = CONVS[dims - 1](**{"in_channels": 20, "out_channels": 37, "kernel_size": 1, **options})
        weight = torch.randint(-127, 128, conv.weight.shape, dtype=torch.int8)
        n = conv.out_channels
        scale = normal(20, seed=3).abs() + 0.5 if scaled else None
        self.packed = pack(weight, torch.full((n,), 0.01), normal(n), scale, conv.groups)
        self.geometry, sizes = geometry_of(conv).numbers(), (9, 8, 7)[:dims]
        self.x = channels_last(normal(2, 20, *sizes).to(dtype))
        self.residual = channels_last(normal(2, n, *geometry_of(conv).out_sizes(sizes), seed=5).to(dtype))
        self.dtype, self.last, self.activation = dtype, True, activation

    def direct(self, residual=None):
        numbers = (self.geometry, None, self.dtype, self.last, self.activation)
        return _C.call_convolution(0, self.x, self.packed, *numbers, residual)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_pixels_are_rows_of_a_linear_layer(kernel, dims, dtype):
    linear = torch.ops.torchq.linear_dynamic.default
    with kernels.use(kernel):
        for scaled in (False, True):
            for activation in Activation:
                call = Pixels(dims, dtype, int(activation), scaled=scaled)
                y, rows = call.direct(), call.x.movedim(1, -1).contiguous()
                expected = linear(rows, call.packed, int(activation)).movedim(-1, 1)
                assert_identical(y, expected, activation)
                assert y.stride() == expected.stride()
                z = linear(rows.float(), call.packed, 0).movedim(-1, 1) + call.residual.float()
                assert_identical(call.direct(call.residual), activate(z, int(activation)).to(dtype), activation)


@pytest.mark.parametrize("activation", [Activation.NONE, Activation.RELU, Activation.RELU6])
@pytest.mark.parametrize("kernel", KERNELS)
def test_floats_behind_limits_are_those_of_the_activation(kernel, activation):
    """Whose outputs have code of their own, depthwise and dense, NaN and infinity in them."""
    convolution = torch.ops.torchq.convolution.default
    for groups, channels in ((1, 20), (16, 16), (18, 18), (48, 48)):
        conv = nn.Conv2d(channels, channels, 3, padding=1, groups=groups)
        weight = torch.randint(-127, 128, conv.weight.shape, dtype=torch.int8)
        x = normal(2, channels, 9, 13, seed=channels) * 3
        x[0, 1, 4, 5], x[0, 2, 0, 0], x[0, 3, 8, 12] = torch.nan, torch.inf, -torch.inf
        with kernels.use(kernel):
            packed = pack(weight, torch.full((channels,), 0.03), normal(channels), None, groups)
            for given in (x, channels_last(x)):
                arguments = (given, packed, geometry_of(conv).numbers(), [], F32, True)
                y, expected = convolution(*arguments, int(activation)), activate(convolution(*arguments), activation)
                assert_identical(y, expected)
                if groups > 1:
                    assert y[0, 1].isnan().sum() == 9  # the places that see it
                    assert y[0, 4:].isfinite().all()


NOT_BY_PLACES = {
    "channels first": lambda call: setattr(call, "x", call.x.contiguous()),
    "gaps": lambda call: setattr(call, "x", call.x[..., ::2]),
    "an output with the channels first": lambda call: setattr(call, "last", False),
    "codes in": lambda call: setattr(call, "x", torch.zeros(2, 9, 8, 20, dtype=U8)),
    "codes out": lambda call: setattr(call, "dtype", U8),
    "another dtype": lambda call: setattr(call, "dtype", BF16),
    "zeros around": lambda call: setattr(call, "geometry", [*call.geometry[:6], 1, *call.geometry[7:]]),
    "strides": lambda call: setattr(call, "geometry", [*call.geometry[:5], 2, *call.geometry[6:]]),
    "no batch": lambda call: setattr(call, "x", call.x[:0]),
    "a gradient": lambda call: call.x.requires_grad_(),
}


@pytest.mark.parametrize("change", NOT_BY_PLACES.values(), ids=NOT_BY_PLACES)
def test_what_is_no_row_of_pixels_is_not_taken(change):
    call = Pixels()
    change(call)
    with torch.enable_grad():
        assert call.direct() is NotImplemented


def test_wide_kernels_groups_and_other_residuals_have_no_places():
    assert Pixels(kernel_size=3).direct() is NotImplemented
    assert Pixels(out_channels=40, groups=4).direct() is NotImplemented
    call = Pixels()
    assert call.direct(call.residual.bfloat16()) is NotImplemented
    assert call.direct(call.residual[:, :36]) is NotImplemented
    assert call.direct(torch.zeros(2, 9, 8, 37, dtype=U8)) is NotImplemented


# ---- Rows of convolutions -------------------------------------------------------------------------------------------


def converted(block=None, config=DYNAMIC):
    return convert((Inverted() if block is None else block).eval(), DATA, config=config)


def convolutions_of(model):
    return [each for each in model.modules() if isinstance(each, QuantizedConv)]


@pytest.fixture
def calls(monkeypatch):
    """What the calls of several convolutions gave: True for a tensor."""
    seen, usual = [], _C.call_convolutions

    def call(*args):
        y = usual(*args)
        seen.append(y is not NotImplemented)
        return y

    monkeypatch.setattr(_C, "call_convolutions", call)
    return seen


@pytest.mark.parametrize("config", [DYNAMIC, STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_block_knows_its_steps_from_the_second_call_on(calls, config, stride):
    qmodel = converted(Inverted(stride=stride), config)
    code = by_code(qmodel)
    with torch.no_grad():
        for height, width in ((20, 20), (9, 7), (20, 20)):
            for batch in (1, 3, 1, 3):
                x = normal(batch, 32, height, width, seed=batch)
                for given in (x, x.contiguous(memory_format=format_of(4, True))):
                    calls.clear()
                    assert_identical(qmodel(given), code(given))
                    assert calls or given is x
                    assert all(calls) or (given is x and config is DYNAMIC)  # with the channels first they are no rows


@pytest.mark.parametrize("block", [{}, {"stride": 2}, {"kernel": 5}], ids=str)
def test_a_dynamic_block_is_one_call_with_its_sum(calls, monkeypatch, block):
    """With the channels last, and between blocks that hand them over so."""
    network = nn.Sequential(Inverted(**block), Inverted(**block))
    qmodel, x = converted(network), channels_last(X)
    code = by_code(qmodel)
    with torch.no_grad():
        expected = code(x)
        qmodel(x)
        calls.clear()
        alone = []
        usual = _C.call_convolution
        monkeypatch.setattr(_C, "call_convolution", lambda *args: alone.append(args) or usual(*args))
        y = qmodel(x)
    assert_identical(y, expected)
    assert y.stride() == expected.stride()
    assert calls == [True, True]
    assert not alone


def test_it_forgets_sizes(calls, monkeypatch):
    monkeypatch.setattr(conv_block, "MOST_STEPS", 3)
    qmodel = converted(config=STATIC)
    code = by_code(qmodel)
    with torch.no_grad():
        for _ in range(2):
            for width in range(5, 12):
                x = normal(1, 32, 8, width, seed=width)
                assert_identical(qmodel(x), code(x))
    assert len(qmodel._learned().steps) <= 3


AFTERWARDS = {
    "another weight": lambda convs: convs[0].replace_weight(-convs[0].rows()[0], *convs[0].rows()[1:3]),
    "the last one's weight": lambda convs: convs[2].replace_weight(-convs[2].rows()[0], *convs[2].rows()[1:3]),
    "another range": lambda convs: setattr(convs[1], "input_qparams", (0.5, 3)),
    "the last one's range": lambda convs: setattr(convs[2], "input_qparams", (0.5, 3)),
    "padding": lambda convs: setattr(convs[1], "padding", (2, 1)),
    "strides": lambda convs: setattr(convs[0], "stride", (2, 1)),
    "no codes": lambda convs: setattr(convs[0], "fold", convs[0].fold._replace(codes=False)),
}


@pytest.mark.parametrize("config", [DYNAMIC, STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize("change", AFTERWARDS.values(), ids=AFTERWARDS)
def test_what_is_changed_after_the_first_call_counts(config, change):
    qmodel = converted(Inverted(32, 48), config)
    code, x = by_code(qmodel), channels_last(X)
    with torch.no_grad():
        for _ in range(2):
            assert_identical(qmodel(x), code(x))
        before = qmodel(x)
        for model in (qmodel, code):
            change(convolutions_of(model))
        for _ in range(2):
            y = qmodel(x)
            assert_identical(y, code(x))
    assert y.shape != before.shape or not torch.equal(y, before) or change is AFTERWARDS["no codes"]


def test_a_state_that_is_loaded_counts():
    torch.manual_seed(1)
    qmodel, other = converted(), converted(Inverted())
    x = channels_last(X)
    with torch.no_grad():
        qmodel(x), qmodel(x)
        qmodel.load_state_dict(other.state_dict())
        assert_identical(qmodel(x), other(x))
        assert_identical(copy.deepcopy(qmodel)(x), other(x))


def test_steps_that_do_not_fit_are_not_taken():
    convs = convolutions_of(converted())
    step, x = step_of(convs[0], 0, None, ()), channels_last(X)
    with torch.no_grad():
        y = _C.call_convolutions(0, x, (step,), None, True)
        assert_identical(y, convs[0].computed(F32, True, x, 0, None, None))
        for steps in ([step], (step[:5],), (list(step),), (step, step), ((*step[:1], 1, *step[2:]),), (1,)):
            assert _C.call_convolutions(0, x, steps, None, True) is NotImplemented
        facts = {**step[1], "fold": convs[0].fold._replace(adds=True)}
        assert _C.call_convolutions(0, x, ((step[0], facts, *step[2:]),), None, True) is NotImplemented
        assert _C.call_convolutions(0, x.contiguous(), (step,), None, True) is NotImplemented
        assert _C.call_convolutions(1, x, (step,), None, True) is NotImplemented
    assert step_of(convs[0], 0, None, (1, 1)) is None
