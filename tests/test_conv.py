"""nn.Conv1d, nn.Conv2d and nn.Conv3d in int8: values, memory formats, checkpoints, gradients, compilers, errors."""

import copy
import io
import pickle
from functools import cache

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from helpers.compare import assert_identical
from helpers.numbers import normal
from torchq import QConfig, QuantizedLinear, convert, simulate
from torchq.modules.quantized_conv import QuantizedConv, QuantizedConv1d, QuantizedConv2d
from torchq.numerics.metrics import sqnr_db
from torchq.numerics.qparams import QParams, dequantize, quantize

pytestmark = [
    pytest.mark.usefixtures("seeded"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),  # torch's own
]

STATIC = QConfig(activation="static", rounding="nearest", smoothing="none")
DYNAMIC = QConfig(activation="dynamic", rounding="nearest", smoothing="none")

# Each convolution with the size of its input, without the batch.
CASES = {
    "1d": (lambda: nn.Conv1d(8, 16, 3), (8, 20)),
    "1d, stride and dilation": (lambda: nn.Conv1d(8, 16, 4, stride=3, dilation=2, padding=2), (8, 40)),
    "1d, even and same": (lambda: nn.Conv1d(8, 16, 4, padding="same"), (8, 9)),
    "2d": (lambda: nn.Conv2d(3, 24, 3, padding=1), (3, 9, 11)),
    "2d, each dimension its own": (lambda: nn.Conv2d(8, 16, (1, 5), (2, 1), (0, 2), (1, 2)), (8, 7, 12)),
    "2d, groups": (lambda: nn.Conv2d(32, 64, 3, groups=4, padding=1, bias=False), (32, 6, 6)),
    "2d, depthwise": (lambda: nn.Conv2d(40, 40, 3, 2, 1, groups=40), (40, 9, 8)),
    "1d, depthwise": (lambda: nn.Conv1d(24, 24, 31, padding="same", groups=24), (24, 50)),
    "2d, pointwise": (lambda: nn.Conv2d(24, 32, 1), (24, 5, 4)),
    "2d, pointwise with a stride": (lambda: nn.Conv2d(24, 32, 1, stride=2), (24, 5, 4)),
    "1d, tiles": (lambda: nn.Conv1d(6, 16, 4, stride=4), (6, 21)),
    "2d, tiles": (lambda: nn.Conv2d(3, 32, (4, 2), stride=(4, 2)), (3, 13, 9)),
    "2d, valid": (lambda: nn.Conv2d(8, 16, 2, padding="valid"), (8, 5, 5)),
    "2d, of the image's size": (lambda: nn.Conv2d(8, 32, 5), (8, 5, 5)),
    "3d": (lambda: nn.Conv3d(4, 16, 3, padding=(0, 1, 1)), (4, 4, 5, 6)),
    "3d, pointwise": (lambda: nn.Conv3d(16, 16, 1), (16, 2, 3, 4)),
    "1d, pointwise, one place": (lambda: nn.Conv1d(24, 32, 1), (24, 1)),
    "2d, pointwise, one place": (lambda: nn.Conv2d(24, 32, 1), (24, 1, 1)),
    "3d, pointwise, one place": (lambda: nn.Conv3d(24, 32, 1), (24, 1, 1, 1)),
    **{
        mode: (lambda mode=mode: nn.Conv2d(8, 16, 3, padding=(1, 2), padding_mode=mode), (8, 6, 7))
        for mode in ("reflect", "replicate", "circular")
    },
}
each_case = pytest.mark.parametrize("case", CASES)
both_schemes = pytest.mark.parametrize("config", [STATIC, DYNAMIC], ids=["static", "dynamic"])


@cache
def _converted(case, config):
    make, size = CASES[case]
    torch.manual_seed(0)
    conv = make().eval()
    return conv, convert(conv, [normal(4, *size, seed=i) for i in range(20)], config=config)


def layers(case, config):
    """A float convolution, its int8 layer and an input."""
    return *map(copy.deepcopy, _converted(case, config)), normal(3, *CASES[case][1], seed=99)


@each_case
@both_schemes
def test_values(case, config):
    """Int8 differs from the simulated path by the rounding of float sums only, and is near float."""
    conv, layer, x = layers(case, config)
    assert isinstance(layer, QuantizedConv)
    y, exact = layer(x), conv(x)
    assert (y.shape, y.dtype, y.stride()) == (exact.shape, exact.dtype, exact.stride())
    with simulate():
        simulated = layer(x)
    assert simulated.stride() == exact.stride()
    assert sqnr_db(simulated, y) > 100
    assert sqnr_db(exact, y) > 30


def test_static_values_are_exact():
    """With scales that are powers of two nothing is rounded but y, and the integers are those of int64."""
    conv = nn.Conv2d(5, 16, 3, stride=2, padding=1)
    codes, scale = torch.randint(-127, 128, (16, 5, 3, 3)), torch.full((16,), 0.25)
    layer = QuantizedConv2d(codes.to(torch.int8), scale, like=conv, input_qparams=QParams(0.5, 100))
    x = normal(2, 5, 8, 7) * 20
    xq = quantize(x, 0.5, 100, dtype=torch.uint8).long() - 100
    exact = nn.functional.conv2d(xq.double(), codes.double(), stride=2, padding=1)
    assert_identical(layer(x), (exact * 0.125).float())


@both_schemes
def test_a_pointwise_one_is_a_linear_layer(config):
    """To the bit, with a scale for each place in the dynamic scheme."""
    conv = nn.Conv2d(24, 40, 1)
    data, x = [normal(4, 24, 6, 6, seed=i) for i in range(4)], normal(2, 24, 5, 7, seed=9)
    layer = convert(conv, data, config=config)
    linear = nn.Linear(24, 40)
    linear.weight.data, linear.bias.data = conv.weight.data.flatten(1), conv.bias.data
    twin = QuantizedLinear.from_float(linear, input_qparams=layer.input_qparams)
    assert_identical(layer(x), twin(x.movedim(1, -1)).movedim(-1, 1).contiguous())


def test_tiles_are_rows_of_a_linear_layer():
    """Each has a scale of its own, as no two of them have a value in common."""
    conv, layer, x = layers("2d, tiles", DYNAMIC)
    linear = nn.Linear(24, 32)
    linear.weight.data, linear.bias.data = conv.weight.data.movedim(1, -1).flatten(1), conv.bias.data
    rows = x[:, :, :12, :8].reshape(3, 3, 3, 4, 4, 2).permute(0, 2, 4, 3, 5, 1).flatten(3)
    twin = QuantizedLinear.from_float(linear)
    assert_identical(layer(x), twin(rows).movedim(-1, 1).contiguous())


@pytest.mark.parametrize("weight_last", [False, True])
@pytest.mark.parametrize("x_last", [False, True])
@pytest.mark.parametrize("kernel", [1, 3])
@both_schemes
def test_memory_formats(weight_last, x_last, kernel, config):
    """The output lies in memory as torch's does, and has the same bits whatever the format."""
    formats = [torch.contiguous_format, torch.channels_last]
    conv = nn.Conv2d(16, 32, kernel).to(memory_format=formats[weight_last])
    layer = convert(conv, [normal(4, 16, 6, 6, seed=i) for i in range(4)], config=config)
    x = normal(2, 16, 6, 5, seed=9)
    given = x.contiguous(memory_format=formats[x_last])
    assert layer(given).stride() == conv(given).stride()
    assert_identical(layer(given).contiguous(), layer(x).contiguous())
    part = torch.cat([given, given], dim=1)[:, :16]
    assert layer(part).stride() == conv(part).stride()
    assert_identical(layer(part).contiguous(), layer(x).contiguous())


@both_schemes
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_keeps_the_format_that_torch_keeps(mode, config):
    """Its circular padding gives contiguous tensors."""
    conv = nn.Conv2d(16, 16, 3, padding=1, padding_mode=mode)
    x = normal(2, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    qmodel = convert(nn.Sequential(conv).eval(), [x], config=config)
    assert qmodel(x).stride() == conv(x).stride()
    assert conv(x).is_contiguous() == (mode == "circular")


@pytest.mark.parametrize("case", ["1d", "2d", "2d, pointwise", "3d", "reflect"])
def test_without_a_batch_dimension(case):
    conv, layer, x = layers(case, DYNAMIC)
    assert_identical(layer(x[0]), layer(x[:1])[0])
    assert layer(x[0]).stride() == conv(x[0]).stride()


@each_case
@both_schemes
def test_an_empty_batch(case, config):
    conv, layer, x = layers(case, config)
    assert layer(x[:0]).shape == conv(x[:0]).shape
    with simulate():
        assert layer(x[:0]).shape == conv(x[:0]).shape


@pytest.mark.parametrize("case", ["1d", "2d", "2d, groups", "2d, pointwise"])
@both_schemes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit(case, config, dtype):
    """Inputs of 16 bits are computed in float32, and y is rounded once; autocast rounds y alone."""
    _, layer, x = layers(case, config)
    exact = layer(x.to(dtype).float())
    assert_identical(layer(x.to(dtype)), exact.to(dtype))
    with torch.autocast("cpu", dtype=dtype):
        assert_identical(layer(x), layer.float()(x).to(dtype))


def test_dynamic_ranges_are_of_a_sample():
    _, layer, x = layers("2d", DYNAMIC)
    x[1] *= 100
    assert_identical(layer(x), torch.cat([layer(each) for each in x.split(1)]))
    x[1, 0, 0, 0] = torch.nan
    y = layer(x)
    assert y[1].isnan().all()
    assert y[::2].isfinite().all()


@each_case
@both_schemes
def test_checkpoints_and_copies(case, config):
    _, layer, x = layers(case, config)
    y, state = layer(x), layer.state_dict()
    assert state["weight_int8"].shape == layer.weight.shape
    other = copy.deepcopy(layer)
    other.replace_weight(*(torch.zeros_like(part) for part in layer.rows()[:1]), torch.ones_like(layer.rows()[1]), None)
    assert not torch.equal(other(x), y)
    other = copy.deepcopy(layer)
    zeros = {key: torch.zeros_like(value) if key == "weight_int8" else value for key, value in state.items()}
    other.load_state_dict(zeros)
    assert not torch.equal(other(x), y)
    other.load_state_dict(state)
    assert_identical(other(x), y)
    assert_identical(pickle.loads(pickle.dumps(layer))(x), y)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    assert_identical(torch.load(buffer, weights_only=False)(x), y)


def test_what_foreign_code_reads():
    conv, layer, _ = layers("2d, groups", DYNAMIC)
    assert (layer.weight.shape, layer.weight.dtype) == (conv.weight.shape, torch.float32)
    assert sqnr_db(conv.weight, layer.weight + 0) > 40
    assert_identical(layer.weight + 0, dequantize(layer.weight_int8, layer.weight_scale, axis=0))
    assert (layer.in_channels, layer.out_channels, layer.kernel_size, layer.groups) == (32, 64, (3, 3), 4)
    assert sum(p.numel() for p in layer.parameters()) == conv.weight.numel()
    with pytest.raises(RuntimeError, match="can't be written"):
        layer.weight.mul_(2)


@pytest.mark.parametrize(
    "case", ["1d, even and same", "2d", "2d, groups", "2d, tiles", "2d, depthwise", "3d", "circular"]
)
@both_schemes
def test_gradients(case, config):
    """Those of a float convolution by the weights that int8 has; the values are int8's own."""
    conv, layer, x = layers(case, config)
    with torch.enable_grad():
        x.requires_grad_()
        y = layer(x)
        (gradient,) = torch.autograd.grad(y.square().sum(), x)
        twin = copy.deepcopy(conv)
        twin.weight.data = layer.weight + 0
        (expected,) = torch.autograd.grad(twin(x), x, 2 * y.detach())
    assert_identical(y.detach(), layer(x.detach()))
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@both_schemes
def test_compiled(config):
    _, modules, inputs = zip(
        *(layers(case, config) for case in ("1d", "2d, groups", "2d, tiles", "reflect")), strict=True
    )

    def run(*inputs):
        return [module(x) for module, x in zip(modules, inputs, strict=True)]

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)(*inputs)
    for actual, expected in zip(compiled, run(*inputs), strict=True):
        assert_identical(actual, expected)


@pytest.mark.slow(seconds=5)
@both_schemes
def test_exported(config):
    _, layer, x = layers("2d", config)
    program = torch.export.export(nn.Sequential(layer), (x,))
    assert_identical(program.module()(x), layer(x))
    assert not any(key.endswith("weight") for key in program.state_dict)


def test_a_traced_one_is_a_node():
    _, layer, x = layers("2d", STATIC)
    traced = torch.fx.symbolic_trace(nn.Sequential(layer, nn.ReLU()))
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "call_module", "output"]
    assert_identical(traced(x), layer(x).relu())


def test_bad_input():
    _, layer, x = layers("2d", STATIC)
    with pytest.raises(RuntimeError, match=r"QuantizedConv2d: x must be \(N, 3, height, width\) or without N, got"):
        layer(x[:, :2])
    with pytest.raises(RuntimeError, match=r"x must be \(N, 3, height, width\)"):
        layer(x[0, 0])
    with pytest.raises(RuntimeError, match="kernel, 3 with dilation 1, is larger than the padded input"):
        layer(x[:, :, :0, :])
    with pytest.raises(TypeError, match="float32, bfloat16 or float16, got uint8"):
        layer(x.to(torch.uint8))
    with pytest.raises(TypeError, match=r"float32, bfloat16 or float16, got torch.float64"):
        layer(x.double())


class Own(nn.Conv2d):
    def forward(self, input):
        return super().forward(input) * 2


def watched():
    conv = nn.Conv2d(16, 16, 3)
    conv.register_forward_hook(lambda *_: None)
    return conv


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.Conv2d(16, 32, 3, groups=16), "16 groups of 1 to 2 channels"),
        (lambda: Own(16, 16, 3), "Own has a forward of its own"),
        (watched, "it has forward hooks, which a swap would drop"),
        (lambda: nn.Conv2d(16, 1, 1), "1 output, fewer than a panel of 16: int8 would save nothing, "),
        (lambda: nn.Conv1d(33000, 16, 2), "a patch has 66000 values; int32 sums are exact up to 65793"),
    ],
)
@pytest.mark.small_layers_stay_float
def test_reasons_to_stay_in_float(make, reason):
    model = nn.Sequential(make(), nn.Linear(64, 64))
    plan = convert(model).torchq_plan.layers["0"]
    assert plan.kind == "float"
    assert plan.reason.startswith(reason)


def test_transposed_ones_are_no_layers():
    model = nn.Sequential(nn.ConvTranspose2d(16, 16, 3), nn.Linear(64, 64))
    assert list(convert(model).torchq_plan.layers) == ["1"]


def test_a_weight_that_is_computed():
    """The value is taken: the int8 layer has neither the parametrization nor what it computes with."""
    conv = parametrizations.weight_norm(nn.Conv1d(32, 32, 3), dim=2)
    x = normal(2, 32, 20)
    layer = convert(nn.Sequential(conv))[0]
    assert type(layer) is QuantizedConv1d
    assert sqnr_db(conv(x), layer(x)) > 30
