"""torchq.ops.convolution: exact sums and the floats of its formula on every kernel, layout, dtype and thread count."""

import pytest
import torch

from helpers.compare import assert_identical
from helpers.convolution import Layer, square
from helpers.numbers import random_float
from torchq import ops
from torchq.numerics.qparams import quantize
from torchq.ops import Activation
from torchq.ops.convolution import Geometry, convolve, pack, unpack

# Names: dimensions, channels in and out, then what is special. Sizes are odd, and no multiple of a tile.
GEOMETRIES = {
    "1d": square(1, 24, 33, 3, padding=(1, 1)),
    "1d without padding: one run for a patch": square(1, 40, 17, 5, 2),
    "1d of one channel": square(1, 1, 20, 10, 5),
    "1d, more after than before": square(1, 16, 16, 4, padding=(1, 2)),
    "2d": square(2, 16, 65, 3, padding=(1, 1)),
    "2d, 3 channels": square(2, 3, 64, 7, 2, (3, 3)),
    "pointwise": square(2, 64, 130),
    "pointwise, stride": square(2, 33, 20, 1, 2),
    "dilation": square(2, 12, 18, 3, dilation=2, padding=(2, 2)),
    "stride beyond the kernel": square(2, 10, 18, 2, 3),
    "different axes": Geometry(9, 21, (3, 2), (1, 2), ((0, 1), (2, 0)), (2, 1)),
    "groups": square(2, 24, 40, 3, padding=(1, 1), groups=4),
    "depthwise": square(2, 18, 18, 3, padding=(1, 1), groups=18),
    "depthwise, two outputs of each": square(1, 7, 14, 5, padding=(2, 2), groups=7),
    "3d": square(3, 8, 19, 3, 2, (1, 1)),
    "3d, different axes": Geometry(5, 17, (1, 3, 2), (1, 1, 2), ((0, 0), (1, 1), (0, 1)), (1, 2, 1)),
}
SIZES = {1: (31,), 2: (9, 11), 3: (5, 6, 7)}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
X_QPARAMS, Y_QPARAMS = (0.03, 117), (0.25, 100)
each_geometry = pytest.mark.parametrize("name", GEOMETRIES)


def images(geometry: Geometry, generator, batch=2, sizes=None) -> torch.Tensor:
    return random_float(batch, geometry.in_channels, *(sizes or SIZES[len(geometry.kernel)]), generator=generator)


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def as_codes(x: torch.Tensor) -> torch.Tensor:
    """Codes for as many values."""
    return torch.zeros(x.movedim(1, -1).shape, dtype=torch.uint8)


@each_geometry
@pytest.mark.parametrize("x_qparams", [None, X_QPARAMS])
def test_every_kernel_gives_the_exact_sums(kernel, name, x_qparams, generator):
    layer = Layer.random(GEOMETRIES[name], generator)
    x = images(layer.geometry, generator)
    expected = layer.expected(x, x_qparams)
    for given in (x, channels_last(x)):
        for last in (False, True):
            y = layer(given, x_qparams=x_qparams, channels_last=last)
            assert_identical(y, expected, (last, given.stride()))
            assert y.stride() == (channels_last(expected) if last else expected).stride()


@each_geometry
def test_a_scale_per_input_channel(kernel, name, generator):
    layer = Layer.random(GEOMETRIES[name], generator, channel_scale=True, bias=False)
    x = images(layer.geometry, generator)
    for x_qparams in (None, X_QPARAMS):
        expected = layer.expected(x, x_qparams)
        for given in (x, channels_last(x)):
            assert_identical(layer(given, x_qparams=x_qparams, channels_last=False), expected, x_qparams)


@each_geometry
def test_codes_in_and_out(kernel, name, generator):
    layer = Layer.random(GEOMETRIES[name], generator)
    x = images(layer.geometry, generator)
    codes = torch.randint(0, 256, channels_last(x).movedim(1, -1).shape, dtype=torch.uint8, generator=generator)
    scale, zero_point = X_QPARAMS
    centered = codes.movedim(-1, 1).long() - zero_point
    expected = layer.outputs(centered, torch.tensor(scale), Activation.RELU)
    y = layer(codes, x_qparams=X_QPARAMS, activation=Activation.RELU, channels_last=False)
    assert_identical(y, expected)
    for activation in (Activation.RELU, Activation.RELU6, Activation.SILU):
        expected = layer.outputs(centered, torch.tensor(scale), activation)
        for y_scale, y_zero_point in (Y_QPARAMS, (0.03, 0), (0.02, 0)):  # the last holds less than 6
            scaled = expected * (1 / torch.tensor(y_scale))
            rounded = scaled.clamp(-y_zero_point, 255 - y_zero_point).round() + y_zero_point
            y = layer(codes, x_qparams=X_QPARAMS, y_qparams=(y_scale, y_zero_point), activation=activation)
            assert_identical(y, rounded.to(torch.uint8).movedim(1, -1), (activation, y_scale))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_activations_and_residuals(kernel, dtype, generator):
    layer = Layer.random(GEOMETRIES["2d"], generator)
    x = images(layer.geometry, generator).to(dtype)
    residual = torch.randn(layer.expected(x).shape, generator=generator).to(dtype)
    for activation in (Activation.NONE, Activation.RELU, Activation.SILU, Activation.RELU6):
        for added in (None, residual, channels_last(residual)):
            expected = layer.expected(x, None, activation, added)
            for last in (False, True):
                y = layer(x, activation=activation, residual=added, channels_last=last)
                assert_identical(y, expected, (activation, last, added is None))


@pytest.mark.parametrize("geometry", ["1d", "2d", "depthwise"])
def test_residuals_in_codes(kernel, geometry, generator):
    """(code - zero_point) * scale is added, whatever y is; a residual of floats is added to codes, too."""
    layer = Layer.random(GEOMETRIES[geometry], generator)
    x, x_qparams, y_qparams, qparams = images(layer.geometry, generator), (0.02, 100), (0.05, 7), (0.03, 90)
    shape = layer.expected(x).shape
    codes = torch.randint(0, 256, (shape[0], *shape[2:], shape[1]), generator=generator, dtype=torch.uint8)
    values = ((codes.int() - qparams[1]).float() * torch.tensor(qparams[0])).movedim(-1, 1)
    for activation in (Activation.NONE, Activation.RELU, Activation.SILU):
        expected = layer.expected(x, x_qparams, activation, values)
        options = {"x_qparams": x_qparams, "activation": activation}
        in_codes = {"residual": codes, "residual_qparams": qparams}
        for y in (layer(x, **options, **in_codes, channels_last=True), layer(x, **options, residual=values)):
            assert_identical(y.contiguous(), expected, activation)
        rounded = quantize(expected, *y_qparams, dtype=torch.uint8).movedim(1, -1).contiguous()
        for residual in (in_codes, {"residual": values}, {"residual": channels_last(values)}):
            assert_identical(layer(x, **options, **residual, y_qparams=y_qparams), rounded, activation)


@pytest.mark.parametrize("batch", [1, 3, 64])
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_threads_change_no_bit(batch, threads, set_threads, generator):
    """Pixels are divided among threads, and where there are few of them the channels."""
    for geometry, sizes in (
        (square(2, 64, 256, 3, padding=(1, 1)), (5, 5)),
        (square(1, 512, 512, 3, 2), (30,)),
        (square(2, 16, 32, 3, 2, (1, 1)), (32, 30)),
    ):
        layer = Layer.random(geometry, generator)
        x = images(geometry, generator, batch, sizes)
        set_threads(1)
        expected = layer(x)
        set_threads(threads)
        for last in (False, True):
            assert_identical(layer(x, channels_last=last), expected, (geometry, last))


def test_images_that_do_not_fit_in_one_band(kernel, generator):
    """A band is some rows of an image; the next one reads the last of them again."""
    layer = Layer.random(square(2, 48, 16, 3, 2, (1, 1)), generator)
    x = images(layer.geometry, generator, 2, (90, 110))
    assert_identical(layer(x), layer.expected(x))


@pytest.mark.parametrize("sizes", [(1, 1), (1, 5), (2, 1)])
def test_images_smaller_than_the_kernel(kernel, sizes, generator):
    """With its padding an image has one patch or more."""
    layer = Layer.random(square(2, 20, 24, 5, padding=(2, 2)), generator)
    x = images(layer.geometry, generator, 3, sizes)
    assert_identical(layer(x), layer.expected(x))
    codes = torch.full((3, *sizes, 20), 200, dtype=torch.uint8)
    expected = layer.outputs(codes.movedim(-1, 1).long() - 3, torch.tensor(0.5))
    assert_identical(layer(codes, x_qparams=(0.5, 3), channels_last=False), expected)


def test_nothing_gives_nothing(generator):
    layer = Layer.random(square(2, 16, 20, 3, padding=(2, 2)), generator)
    assert layer(torch.zeros(0, 16, 9, 11)).shape == (0, 20, 11, 13)
    assert layer(torch.zeros(0, 9, 11, 16, dtype=torch.uint8), x_qparams=(1.0, 0)).shape == (0, 20, 11, 13)
    no_rows = torch.zeros(2, 16, 0, 11)  # only padding, which is refused in torch
    assert_identical(layer(no_rows), layer.bias.view(1, -1, 1, 1).expand(2, 20, 2, 13).contiguous())


def test_the_deepest_sum_is_exact(kernel):
    """The largest codes by the most negative weights: 255 * 128 * 65793 is just below 2^31."""
    geometry = square(1, ops.MAX_DEPTH // 3, 2, 3)
    weight = torch.full((2, geometry.in_channels, 3), -128, dtype=torch.int8)
    codes = torch.full((1, 3, geometry.in_channels), 255, dtype=torch.uint8)
    y = convolve(codes, pack(weight, torch.ones(2)), geometry, x_qparams=(1.0, 0))
    assert y.flatten().tolist() == [float(torch.tensor(-255.0 * 128 * ops.MAX_DEPTH))] * 2


def test_a_pointwise_layer_is_a_linear_one(kernel, generator):
    """Of static channels-last input: each pixel is a row."""
    layer = Layer.random(GEOMETRIES["pointwise"], generator)
    x = channels_last(images(layer.geometry, generator))
    rows = ops.linear_static(x.movedim(1, -1), layer.packed(), *X_QPARAMS, torch.float32)
    assert_identical(layer(x, x_qparams=X_QPARAMS), rows.movedim(-1, 1))


def test_nan_stays_in_its_sample(kernel, generator):
    layer = Layer.random(GEOMETRIES["2d"], generator)
    x = images(layer.geometry, generator, batch=3)
    expected = layer.expected(x)
    for bad in (torch.nan, torch.inf, -torch.inf):
        spoiled = x.clone()
        spoiled[1, 3, 4, 5] = bad
        for given in (spoiled, channels_last(spoiled)):
            y = layer(given, channels_last=False)
            assert y[1].isnan().all()
            assert_identical(y[::2], expected[::2])
    spoiled[1, 3, 4, 5] = torch.nan
    lowest = spoiled.nan_to_num(nan=-1e9)  # NaN takes code 0
    assert_identical(layer(spoiled, x_qparams=X_QPARAMS), layer.expected(lowest, X_QPARAMS))


def test_any_strides(generator):
    layer = Layer.random(GEOMETRIES["2d"], generator)
    x = images(layer.geometry, generator)
    expected = layer.expected(x)
    wide = torch.zeros(4, 20, 9, 23)
    view = wide[::2, 2:18, :, 1::2]
    view.copy_(x)
    for given in (view, x.transpose(2, 3).contiguous().transpose(2, 3)):
        assert_identical(layer(given, channels_last=False), expected)


@each_geometry
@pytest.mark.parametrize("channel_scale", [False, True])
def test_unpack_is_the_inverse(kernel, name, channel_scale, generator):
    layer = Layer.random(GEOMETRIES[name], generator, bias=channel_scale, channel_scale=channel_scale)
    weight, scale, bias, scale_of_channels = unpack(layer.packed(), layer.geometry)
    assert torch.equal(weight, layer.weight)
    assert torch.equal(scale, layer.scale)
    assert torch.equal(bias, torch.zeros_like(scale) if layer.bias is None else layer.bias)
    if layer.channel_scale is None:
        assert scale_of_channels is None
    else:
        assert torch.equal(scale_of_channels, layer.channel_scale)


WHOLE_OPCHECK = "1d", "2d", "3d, different axes"


@each_geometry
def test_opcheck(name, generator):
    """All of it for some; for all geometries that the fake gives the shape, strides and dtype of the real one."""
    checks = {} if name in WHOLE_OPCHECK else {"test_utils": "test_faketensor"}
    layer = Layer.random(GEOMETRIES[name], generator)
    x, packed, numbers = images(layer.geometry, generator), layer.packed(), layer.geometry.numbers()
    op = torch.ops.torchq.convolution.default
    codes = as_codes(x)
    y = layer(x)
    for arguments in (
        (x, packed, numbers, [], torch.float32),
        (channels_last(x).half(), packed, numbers, [0.5, 3.0], torch.float16, True),
        (codes, packed, numbers, [0.5, 3.0], torch.bfloat16, False, 1),
        (codes, packed, numbers, [0.5, 3.0, 0.25, 4.0], torch.uint8, True),
        (x, packed, numbers, [], torch.float32, True, 4, y),
        (codes, packed, numbers, [0.5, 3.0, 0.25, 4.0, 0.125, 9.0], torch.uint8, True, 1, as_codes(y)),
    ):
        torch.library.opcheck(op, arguments, **checks)


GEOMETRY = square(2, 4, 6, 3)
WEIGHT, SCALE, X = torch.ones(6, 4, 3, 3, dtype=torch.int8), torch.ones(6), torch.zeros(1, 4, 5, 5)
CODES = torch.zeros(1, 5, 5, 4, dtype=torch.uint8)
ADDED = torch.zeros(1, 3, 3, 6, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (X.double(), {}, "x must be float32, bfloat16, float16, or uint8 codes, got float64"),
        (X[0], {}, r"x must have 4 dimensions \(batch, channels, size...\), got \(4, 5, 5\)"),
        (X[:, :3], {}, "packed for 4 input channels, but x has 3"),
        (X[:, :, :2], {}, "the kernel, 3 with dilation 1, is larger than the padded input, 2"),
        (CODES, {}, "x holds codes .uint8., whose scale and zero point must be given"),
        (CODES.movedim(3, 1), {"x_qparams": (1.0, 0)}, "packed for 4 input channels, but x has 5"),
        (X, {"x_qparams": (0.0, 0)}, "the scale of x must be a positive normal float32, got 0"),
        (X, {"x_qparams": (1.0, 256)}, r"the zero point of x must be an integer in \[0, 255\], got 256"),
        (X, {"y_qparams": (1.0, 0)}, "out_dtype is uint8, so qparams must hold"),
        (X, {"x_qparams": (1.0, 0), "y_qparams": (1.0, -1)}, "the zero point of y must be an integer"),
        (X, {"out_dtype": torch.float64}, "out_dtype must be float32, bfloat16, float16 or uint8, got float64"),
        (X, {"activation": 11}, "activation must be a torchq.ops.Activation"),
        (
            X,
            {"residual": torch.zeros(1, 6, 3, 2)},
            r"residual must be float32 \(1, 6, 3, 3\) as y, or uint8.*got float32",
        ),
        (X, {"x_qparams": (1.0, 0), "residual": ADDED}, "the residual holds codes .uint8., so qparams must hold those"),
        (X, {"x_qparams": (1.0, 0), "residual": ADDED, "residual_qparams": (1.0, 0)}, "so y must have them last, too"),
        (X, {"residual": ADDED[:, 1:]}, "as y, or uint8 codes with the channels last, got uint8"),
        (X, {"x_qparams": (1.0, 0), "residual": ADDED, "residual_qparams": (0.0, 0)}, "the scale of the residual must"),
    ],
)
def test_bad_arguments(x, options, message):
    with pytest.raises(RuntimeError, match=message):
        convolve(x, pack(WEIGHT, SCALE), GEOMETRY, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": (3, 2)}, "packed holds no packed weights of 6 x 24"),
        ({"out_channels": 7}, "packed holds no packed weights of 7 x 36"),
        ({"groups": 2}, "packed must be what torchq.ops.convolution.pack.. returned for 2 groups"),
        ({"groups": 3}, "must be multiples of groups, got 4, 6 and 3 groups"),
        ({"stride": (1, 0)}, "kernel, stride and dilation must be positive"),
        ({"padding": ((0, 0), (-1, 0))}, "padding not negative"),
        ({"padding": ((2**30, 0), (2**30, 0))}, "the padded input would have"),
        ({"dilation": (2**31, 1)}, "must be below"),
    ],
)
def test_bad_geometry(change, message):
    with pytest.raises(RuntimeError, match=message):
        convolve(X, pack(WEIGHT, SCALE), GEOMETRY._replace(**change))


def test_codes_take_no_channel_scale():
    packed = pack(WEIGHT, SCALE, channel_scale=torch.ones(4))
    with pytest.raises(RuntimeError, match="packed with a channel_scale"):
        convolve(CODES, packed, GEOMETRY, x_qparams=(1.0, 0))
