"""The direct call of a convolution: the op's bits, shape and strides, and NotImplemented where it does not apply."""

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.compare import assert_identical
from helpers.numbers import normal
from torchq import _C, kernels
from torchq.modules import writes
from torchq.modules.convolving import format_of, geometry_of
from torchq.ops.convolution import pack

op = torch.ops.torchq.convolution.default
F32, BF16, U8 = torch.float32, torch.bfloat16, torch.uint8
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
X, Y, RESIDUAL = [0.03, 128.0], [0.05, 100.0], [0.04, 90.0]


class Call:
    """The arguments of a call: a convolution of 12 channels to 20, kernel 3 with padding, or as `options` say."""

    def __init__(
        self, dims=2, x=F32, y=F32, *, qparams=None, last=True, activation=0, residual=None, scaled=False, **options
    ):
        scaled = options.pop("scaled", False)
        channels = {"in_channels": 12, "out_channels": 20, "kernel_size": 3, "padding": 1, "stride": 2, **options}
        conv = CONVS[dims - 1](**channels)
        weight = torch.randint(-127, 128, conv.weight.shape, dtype=torch.int8)
        n = conv.out_channels
        scale = normal(conv.in_channels, seed=3).abs() + 0.5 if scaled else None
        self.packed = pack(weight, torch.full((n,), 0.01), normal(n), scale, conv.groups)
        self.geometry = geometry_of(conv).numbers()
        sizes = (9, 8, 7)[:dims]
        codes = (2, *sizes, conv.in_channels)
        self.x = torch.randint(0, 256, codes, dtype=U8) if x == U8 else normal(2, conv.in_channels, *sizes).to(x)
        out = geometry_of(conv).out_sizes(sizes)
        self.residual: Tensor | None = None
        if residual == U8:
            self.residual = torch.randint(0, 256, (2, *out, n), dtype=U8)
        elif residual is not None:
            self.residual = normal(2, n, *out, seed=5).to(residual)
        needed = X + Y if y == U8 or residual == U8 else X
        self.qparams = (needed + RESIDUAL if residual == U8 else needed) if qparams is None else qparams
        self.y, self.last, self.activation = y, last, activation

    def arguments(self):
        return (self.x, self.packed, self.geometry, self.qparams, self.y, self.last, self.activation, self.residual)

    def direct(self, own_modes=0):
        return _C.call_convolution(own_modes, *self.arguments())

    def check(self):
        y, expected = self.direct(), op(*self.arguments())
        assert_identical(y, expected)
        assert y.stride() == expected.stride()


@pytest.mark.parametrize("kernel", [kernel for kernel in kernels.names() if kernel in kernels.runnable()])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("last", [True, False])
def test_it_is_the_op(kernel, dims, last):
    with kernels.use(kernel):
        for x, y in ((F32, F32), (BF16, BF16), (F32, U8), (U8, U8), (U8, F32), (F32, BF16)):
            Call(dims, x, y, last=last, activation=1).check()
        Call(dims, qparams=[], last=last).check()  # dynamic
        Call(dims, in_channels=20, groups=20, last=last).check()  # depthwise
        Call(dims, U8, U8, in_channels=20, groups=20).check()
        Call(dims, in_channels=20, groups=20, scaled=True).check()
        Call(dims, scaled=True).check()


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize(("y", "residual"), [(F32, F32), (BF16, BF16), (U8, F32), (U8, BF16), (U8, U8), (F32, U8)])
def test_residuals_are_the_ops(y, residual, last):
    call = Call(x=U8, y=y, residual=residual, last=last, activation=1)
    if residual == U8:
        if last or y == U8:
            call.check()
        return
    for format in (torch.contiguous_format, torch.channels_last):
        call.residual = call.residual.contiguous(memory_format=format)
        if format == torch.contiguous_format and (last or y == U8):
            assert call.direct() is NotImplemented  # which the op copies
        else:
            call.check()


@pytest.mark.parametrize("dims", [2, 3])
def test_images_with_the_channels_last(dims):
    call = Call(dims)
    call.x = call.x.contiguous(memory_format=format_of(dims + 2, True))
    call.check()


NOT_TAKEN = {
    "gaps": {"x": lambda x: x[..., ::2]},
    "double": {"x": Tensor.double},
    "no batch": {"x": lambda x: x[0]},
    "an empty batch": {"x": lambda x: x[:0]},
    "other channels": {"x": lambda x: x[:, :11].contiguous()},
    "a small image": {"geometry": lambda g: [*g[:4], 30, *g[5:]]},
    "a negative padding": {"geometry": lambda g: [*g[:6], -1, *g[7:]]},
    "no stride": {"geometry": lambda g: [*g[:5], 0, *g[6:]]},
    "a short geometry": {"geometry": lambda g: g[:-1]},
    "a tuple": {"geometry": tuple},
    "floats": {"geometry": lambda g: [float(each) for each in g]},
    "groups": {"geometry": lambda g: [*g[:3], 2, *g[4:]]},
    "short weights": {"packed": lambda p: p[:-1]},
    "other weights": {"packed": torch.zeros_like},
    "one number": {"qparams": lambda q: q[:1]},
    "no scale": {"qparams": lambda q: [0.0, 3.0]},
    "no zero point": {"qparams": lambda q: [0.1, 256.0]},
    "half a zero point": {"qparams": lambda q: [0.1, 0.5]},
    "a NaN": {"qparams": lambda q: [0.1, float("nan")]},
    "integers": {"qparams": lambda q: [0.1, 3]},
    "another activation": {"activation": lambda _: 99},
    "another dtype": {"y": lambda _: torch.float64},
    "another residual": {"residual": lambda _: torch.zeros(2, 20, 5, 5)},
    "a number": {"residual": lambda _: 1.0},
}


@pytest.mark.parametrize("changes", NOT_TAKEN.values(), ids=NOT_TAKEN)
def test_what_it_does_not_take(changes):
    call = Call()
    for name, change in changes.items():
        setattr(call, name, change(getattr(call, name)))
    assert call.direct() is NotImplemented


def test_codes_need_their_numbers():
    assert Call(x=U8, qparams=[]).direct() is NotImplemented
    assert Call(y=U8, qparams=X).direct() is NotImplemented
    assert Call(x=U8, residual=U8, qparams=X + Y).direct() is NotImplemented


class FunctionMode(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class DispatchMode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "inside",
    [FunctionMode, DispatchMode, torch.profiler.profile, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["function", "dispatch", "profiler", "autocast"],
)
def test_whoever_sees_operations_gets_the_op(inside):
    call = Call()
    with inside():
        assert call.direct() is NotImplemented
    call.check()


def test_modes_of_its_own_do_not_count():
    call = Call()
    with torch.inference_mode():
        call.x = call.x + 0
        held = writes.Unwritten(call.x)
        assert writes.own_modes() == 1
        y = call.direct(1)
        with DispatchMode():
            assert call.direct(1) is NotImplemented
        del held
        assert writes.own_modes() == 0
        assert call.direct(1) is NotImplemented  # there is none
        assert y.is_inference()
        assert_identical(y, op(*call.arguments()))


def test_gradients_and_odd_tensors_get_the_op():
    call = Call()
    call.x.requires_grad_()
    with torch.enable_grad():
        assert call.direct() is NotImplemented
    with torch.no_grad():
        call.check()
    call = Call()
    call.x = nn.Parameter(call.x, requires_grad=False)
    assert call.direct() is NotImplemented
    call = Call()
    call.x = call.x.to("meta")
    assert call.direct() is NotImplemented
    call = Call()
    call.x = torch.complex(call.x, call.x).conj().imag
    assert call.direct() is NotImplemented


def test_outputs_belong_to_the_caller():
    call = Call()
    y = call.direct()
    before = y.clone()
    for _ in range(20):
        call.direct().zero_()
    assert_identical(y, before)
    assert y.contiguous().view(-1).numel() == y.numel()
    assert y.permute(0, 2, 3, 1).is_contiguous()
