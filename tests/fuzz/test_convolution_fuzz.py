"""Convolutions on any tensors: the op against exact integer sums, bit for bit; and whole networks against float ones.

Shapes, strides, padding, dilation, groups, layouts, dtypes, codes, special values, kernels, threads, and arguments that
are wrong are drawn.
"""

import copy
import pickle
import random
import warnings
from dataclasses import dataclass

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import torchq
from helpers.compare import assert_identical, snapshot
from helpers.convolution import Layer, per_channel
from helpers.convolutional import shaken, unfused
from helpers.fuzzing import fuzz, seeds
from helpers.numbers import normal, random_float
from torchq import QConfig, kernels, simulate
from torchq.modules.quantized_conv import QuantizedConv
from torchq.numerics.metrics import sqnr_db
from torchq.ops import Activation
from torchq.ops.convolution import Geometry, is_depthwise

pytestmark = [pytest.mark.usefixtures("no_grad"), pytest.mark.slow(seconds=30)]

# ---- The op ---------------------------------------------------------------------------------------------------------


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


LAYOUTS = {
    "contiguous": Tensor.contiguous,
    "channels last": channels_last,
    "with gaps": lambda x: torch.cat([x, x, x], -1)[..., x.shape[-1] : 2 * x.shape[-1]],
    "some channels of more": lambda x: torch.stack([x, x], 2).flatten(1, 2)[:, ::2],
    "turned": lambda x: x.transpose(1, -1).contiguous().transpose(1, -1),
    "all samples are one": lambda x: x[:1].expand(x.shape) if len(x) else x,
}


@dataclass
class Case:
    """A convolution. Its tensors come of `seed`, so that a small case is one of small numbers."""

    kernel: str
    geometry: Geometry
    batch: int
    sizes: tuple[int, ...]
    dtype: torch.dtype
    layout: str
    special: bool
    has_bias: bool
    has_channel_scale: bool
    x_qparams: tuple[float, int] | None
    codes: tuple[bool, bool]
    activation: Activation
    residual: str | None
    last: bool
    threads: int
    seed: int

    def x(self, generator: torch.Generator) -> Tensor:
        x = random_float(self.batch, self.geometry.in_channels, *self.sizes, generator=generator)
        if self.special and x.numel():
            values = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e30, -1e30, 1e-45])
            picked = values[torch.randint(len(values), x.shape, generator=generator)]
            x = torch.where(torch.rand(x.shape, generator=generator) < 0.02, picked, x)
        return LAYOUTS[self.layout](x.to(self.dtype))


def geometries(dims: int) -> st.SearchStrategy[Geometry]:
    def made(groups, inputs, outputs, depthwise, axes):
        if depthwise:
            groups, inputs, outputs = groups * inputs * 5, 1, 1
        kernel, stride, padding, dilation = zip(*axes, strict=True)
        return Geometry(groups * inputs, groups * outputs, kernel, stride, padding, dilation, groups)

    few = st.integers(0, 3)
    axis = st.tuples(st.integers(1, 4), st.integers(1, 3), st.tuples(few, few), st.integers(1, 3))
    axes = st.lists(axis, min_size=dims, max_size=dims)
    channels = st.one_of(st.integers(1, 6), st.integers(1, 70))
    return st.builds(made, st.sampled_from([1, 1, 1, 2, 3]), channels, channels, st.booleans(), axes)


def cases() -> st.SearchStrategy[Case]:
    def of_dimensions(dims: int) -> st.SearchStrategy[Case]:
        size = st.integers(0, {1: 40, 2: 12, 3: 5}[dims])
        return st.builds(
            Case,
            kernel=st.sampled_from(kernels.runnable()),
            geometry=geometries(dims),
            batch=st.integers(0, 3),
            sizes=st.lists(size, min_size=dims, max_size=dims).map(tuple),
            dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]),
            layout=st.sampled_from(sorted(LAYOUTS)),
            special=st.booleans(),
            has_bias=st.booleans(),
            has_channel_scale=st.booleans(),
            x_qparams=st.one_of(st.none(), st.tuples(st.sampled_from([0.03, 1e-3, 2.0]), st.integers(0, 255))),
            codes=st.tuples(st.booleans(), st.booleans()),
            activation=st.sampled_from([Activation.NONE, Activation.NONE, Activation.RELU, Activation.RELU6]),
            residual=st.one_of(st.none(), st.sampled_from(sorted(LAYOUTS))),
            last=st.booleans(),
            threads=st.integers(1, 3),
            seed=st.integers(0, 2**31),
        )

    return st.integers(1, 3).flatmap(of_dimensions)


Y_QPARAMS = (0.25, 100)


def rounded(y: Tensor) -> Tensor:
    scale, zero_point = Y_QPARAMS
    return ((y * (1 / torch.tensor(scale))).clamp(-zero_point, 255 - zero_point).round() + zero_point).to(torch.uint8)


def fits(case: Case) -> bool:
    return all(size > 0 for size in case.geometry.out_sizes(case.sizes))


def test_floats(set_threads):
    """Of either memory format, in and out, with a residual and an activation; or codes out."""

    def check(case: Case) -> None:
        set_threads(case.threads)
        g = torch.Generator().manual_seed(case.seed)
        layer = Layer.random(case.geometry, g, bias=case.has_bias, channel_scale=case.has_channel_scale)
        x, options = case.x(g), {"x_qparams": case.x_qparams, "activation": case.activation}
        with kernels.use(case.kernel):
            if not fits(case):
                with pytest.raises(RuntimeError, match="is larger than the padded input"):
                    layer(x, **options)
                return
            shape = (case.batch, case.geometry.out_channels, *case.geometry.out_sizes(case.sizes))
            if case.codes[1] and case.x_qparams is not None:
                y = layer(x, y_qparams=Y_QPARAMS, **options)
                found, wanted = y, rounded(expected(layer, x.float(), case)).movedim(1, -1)
            else:
                residual = None
                if case.residual is not None:
                    residual = LAYOUTS[case.residual](torch.randn(shape, generator=g).to(case.dtype))
                y = layer(x, residual=residual, channels_last=case.last, **options)
                found, wanted = y, expected(layer, x, case, residual)
                assert y.dtype == case.dtype
                assert (channels_last(y) if case.last else y.contiguous()).stride() == y.stride()
        assert_identical(found.contiguous(), wanted.contiguous(), case.kernel)

    fuzz(check, cases(), examples=150)


def expected(layer: Layer, x: Tensor, case: Case, residual: Tensor | None = None) -> Tensor:
    """What is right, of values that are not finite too: a range of its own makes all of a sample NaN."""
    if case.x_qparams is None and is_depthwise(layer.weight.shape, case.geometry.groups):
        return layer.expected(x, None, case.activation, residual)
    if case.x_qparams is not None:
        return layer.expected(x.nan_to_num(nan=-torch.inf), case.x_qparams, case.activation, residual)
    scaled = x.float() if layer.channel_scale is None else x.float() * per_channel(layer.channel_scale, x)
    finite = scaled.flatten(1).isfinite().all(dim=1)
    y = layer.expected(torch.where(finite.view(-1, *[1] * (x.dim() - 1)), x, 0), None, case.activation, residual)
    y[~finite] = torch.nan
    return y


def test_codes(set_threads):
    def check(case: Case) -> None:
        set_threads(case.threads)
        if not fits(case):
            return
        g = torch.Generator().manual_seed(case.seed)
        layer = Layer.random(case.geometry, g, bias=case.has_bias)
        shape = (case.batch, *case.sizes, case.geometry.in_channels)
        codes = torch.randint(0, 256, shape, dtype=torch.uint8, generator=g)
        scale, zero_point = case.x_qparams or (0.01, 128)
        centered = codes.movedim(-1, 1).long() - zero_point
        wanted = layer.outputs(centered, torch.tensor(scale), case.activation)
        options = {"x_qparams": (scale, zero_point), "activation": case.activation}
        with kernels.use(case.kernel):
            y = layer(codes, channels_last=False, **options)
            assert_identical(y, wanted, case.kernel)
            again = layer(codes, y_qparams=Y_QPARAMS, **options)
            assert_identical(again, rounded(wanted).movedim(1, -1), case.kernel)

    fuzz(check, cases(), examples=150)


# ---- Arguments that are wrong ----

NUMBERS = [-(2**63), -(2**31), -2, -1, 0, 1, 2, 3, 7, 2**16, 2**31 - 1, 2**31, 2**62, 2**63 - 1]


def spoiled(arguments: list, rng: random.Random) -> list:
    """The arguments of a good call, one of them changed to anything."""
    x, packed, geometry, _, _, last, *_ = arguments
    number = rng.choice(NUMBERS)

    def other(values: list) -> list:
        values = list(values)
        if values and rng.random() < 0.8:
            values[rng.randrange(len(values))] = type(values[0])(number)
        else:
            values = values[: rng.randrange(len(values) + 1)] + [1] * rng.randrange(3)
        return values

    def reshaped(t: Tensor) -> Tensor:
        ways = [t[:0], t[None], t[..., :-1], t.double(), t.to(torch.int8), t.flatten(), t.new_zeros(()), t.to("meta")]
        return rng.choice([*ways, t.view(torch.uint8) if t.dtype != torch.uint8 else t, t.transpose(0, -1)])

    changed = list(arguments)
    place = rng.randrange(8)
    changed[place] = [
        lambda: reshaped(x),
        lambda: reshaped(packed),
        lambda: other(geometry),
        lambda: [
            rng.choice([float("nan"), float("inf"), -1.0, 0.0, 256.0, 1e300, 0.5]) for _ in range(rng.randrange(6))
        ],
        lambda: rng.choice([torch.float64, torch.int8, torch.uint8, torch.bfloat16, torch.bool]),
        lambda: not last,
        lambda: number,
        lambda: reshaped(x),
    ][place]()
    return changed


def right_shape(arguments: list) -> tuple[int, ...] | None:
    """Of the output that these arguments ask for, whatever they were meant to be."""
    x, _, numbers, *_ = arguments
    _, inputs, outputs, groups = numbers[:4]
    kernel, stride, before, after, dilation = (tuple(numbers[4 + i :: 5]) for i in range(5))
    padding = tuple(zip(before, after, strict=True))
    geometry = Geometry(inputs, outputs, kernel, stride, padding, dilation, groups)
    codes_out = arguments[4] == torch.uint8
    sizes = geometry.out_sizes(x.shape[1:-1] if x.dtype == torch.uint8 else x.shape[2:])
    return (len(x), *sizes, outputs) if codes_out else (len(x), outputs, *sizes)


def test_wrong_arguments_are_errors():
    """An error, or an output of the shape that was asked for; never a crash."""
    op = torch.ops.torchq.convolution.default
    geometry = Geometry(6, 8, (3, 2), (1, 2), ((1, 0), (0, 1)), (1, 1), 2)
    for number in seeds():
        rng, g = random.Random(number), torch.Generator().manual_seed(number)
        layer, x = Layer.random(geometry, g), torch.randn(2, 6, 5, 4, generator=g)
        codes = torch.randint(0, 256, (2, 5, 4, 6), dtype=torch.uint8, generator=g)
        residual = torch.randn(layer(x).shape, generator=g)
        good = [
            [x, layer.packed(), geometry.numbers(), [], torch.float32, False, 0, residual],
            [x, layer.packed(), geometry.numbers(), [0.03, 128.0], torch.float32, True, 1, None],
            [codes, layer.packed(), geometry.numbers(), [0.03, 128.0, 0.1, 3.0], torch.uint8, True, 1, None],
        ]
        errors = 0
        for _ in range(1500):
            arguments = spoiled(rng.choice(good), rng)
            try:
                y = op(*arguments)
            except (RuntimeError, NotImplementedError, TypeError):
                errors += 1
                continue
            assert tuple(y.shape) == right_shape(arguments), arguments[2:]
        assert errors > 900


# ---- Networks -------------------------------------------------------------------------------------------------------

CHANNELS = 16
DATA = [normal(6, CHANNELS, 14, 14, seed=i) for i in range(4)]
X = normal(3, CHANNELS, 14, 14, seed=9)
ACTS = [nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.Tanh, nn.Identity]


def padded_conv(rng: random.Random, inputs: int, outputs: int, groups: int = 1) -> nn.Module:
    kernel = rng.choice([1, 3, 3, 5])
    options = {"padding": rng.choice(["same", kernel // 2]), "groups": groups, "bias": rng.random() < 0.5}
    options["padding_mode"] = rng.choice(["zeros", "zeros", "zeros", "reflect", "replicate", "circular"])
    return nn.Conv2d(inputs, outputs, kernel, **options)


class Unit(nn.Module):
    """A convolution, perhaps a norm and an activation, called by name."""

    def __init__(self, rng: random.Random, inputs: int, outputs: int, groups: int = 1) -> None:
        super().__init__()
        self.conv = padded_conv(rng, inputs, outputs, groups)
        self.norm = rng.choice([nn.Identity(), shaken(nn.BatchNorm2d(outputs), seed=rng.randrange(99))])
        act = rng.choice(ACTS)
        self.act = act(inplace=True) if act in (nn.ReLU, nn.SiLU) and rng.random() < 0.3 else act()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class Residual(nn.Module):
    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        wide, depthwise = rng.choice([16, 32, 48]), rng.random() < 0.5
        middle = [Unit(rng, wide, wide, groups=wide)] if depthwise else []
        self.body = nn.Sequential(Unit(rng, CHANNELS, wide), *middle, Unit(rng, wide, CHANNELS))
        self.in_place, self.act = rng.random() < 0.5, rng.choice(ACTS)()

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        if self.in_place:
            y += x
            return self.act(y)
        return self.act(x + y)


class Branches(nn.Module):
    """Two readers of one tensor, a grouped and a plain one, joined and gated."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.a, self.b, self.c = Unit(rng, 16, 16, groups=4), Unit(rng, 16, 16), Unit(rng, 32, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.a(x), self.b(x)], 1)
        return self.c(y) * torch.sigmoid(y[:, :16].mean((2, 3), keepdim=True))


class AlongTime(nn.Module):
    """A convolution over one dimension, of rows."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv1d(CHANNELS, CHANNELS, rng.choice([1, 3]), padding="same"), rng.choice(ACTS)()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x.flatten(2))).view_as(x)


def flat(rng: random.Random) -> nn.Module:
    return nn.Sequential(
        padded_conv(rng, 16, 24), shaken(nn.BatchNorm2d(24)), nn.ReLU(), nn.Dropout(), padded_conv(rng, 24, 16)
    )


BLOCKS = [lambda rng: Unit(rng, 16, 16), Residual, Branches, AlongTime, flat]
CONFIGS = [QConfig(), QConfig(activation="dynamic"), QConfig(activation="static"), QConfig(fuse=False)]


def network(blocks: list[int], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    rng = random.Random(seed)
    return nn.Sequential(*(BLOCKS[number](rng) for number in blocks)).eval()


def check_model(model: nn.Module, config: QConfig, calibrated: bool) -> None:
    before, exact = snapshot(model), model(X)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        qmodel = torchq.convert(model, DATA if calibrated or config.activation == "static" else None, config=config)
    assert snapshot(model) == before
    y, last = qmodel(X), X.contiguous(memory_format=torch.channels_last)
    error = float((y - exact).square().sum())
    # Int8 has 30 to 45 dB per layer, and the longest of these networks 12 of them in a row; a bug has 0 to 5.
    assert sqnr_db(exact, y) > 15
    with torch.inference_mode():
        assert_identical(qmodel(X), y, "inference mode")
    assert qmodel(last).stride() == model(last).stride()
    # By float32's rounding in what stays float, and codes that lie on a tie.
    for other in (unfused(qmodel)(X), qmodel(last), simulated(qmodel)):
        assert float((y - other).square().sum()) <= 0.25 * error + 1e-10 * float(exact.square().sum())
    assert_identical(copy.deepcopy(qmodel)(X), y, "deepcopy")
    assert_identical(pickle.loads(pickle.dumps(qmodel))(X), y, "pickle")
    again = torchq.apply_plan(model, torchq.plan_of(qmodel))
    assert_identical(again(X), y, "plan")
    for layer in again.modules():
        if isinstance(layer, QuantizedConv):
            codes, scale, bias, _ = layer.rows()
            layer.replace_weight(torch.zeros_like(codes), scale, bias if layer.has_bias else None)
    again.load_state_dict(qmodel.state_dict())
    assert_identical(again(X), y, "state_dict")


def simulated(qmodel: nn.Module) -> Tensor:
    with simulate():
        return qmodel(X)


def test_networks():
    networks = st.builds(network, st.lists(st.integers(0, 4), min_size=1, max_size=3), st.integers(0, 2**31))
    fuzz(check_model, networks, st.sampled_from(CONFIGS), st.booleans(), examples=10)
