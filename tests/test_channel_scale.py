"""A scale per input channel: x · c before it is quantized, in every kernel, in the layer and in its checkpoints."""

import copy
import itertools
import math
import pickle

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from helpers import reference
from helpers.compare import assert_identical
from helpers.numbers import normal, random_float, random_weight
from torchq import QuantizedLinear, ops, simulate
from torchq.modules.folding import Fold
from torchq.modules.int8_sequential import Int8Sequential
from torchq.numerics.metrics import sqnr_db
from torchq.numerics.qparams import QParams

pytestmark = [
    pytest.mark.usefixtures("no_grad"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),  # of forward mode
]


def random_scale(k, generator):
    return torch.rand(k, generator=generator).mul(12).sub(6).exp2()  # 2^-6 to 2^6


# ---- the ops ----


@pytest.mark.parametrize("dtype", reference.FLOATS)
def test_it_multiplies_x_in_float32_and_every_kernel_gives_these_bits(kernel, generator, dtype):
    """So the op on x equals the oracle on x·c in float32, rounded to x's dtype at the end."""
    for m, n, k in [(1, 5, 1), (3, 17, 15), (7, 33, 16), (2, 65, 31), (13, 64, 64), (6, 48, 100), (33, 20, 257)]:
        weight, w_scale, bias = random_weight(n, k, generator)
        c, x = random_scale(k, generator), random_float(m, k, generator=generator).to(dtype)
        packed, scaled = ops.pack(weight, w_scale, bias, c), x.float() * c
        expected = reference.linear_dynamic(scaled, weight, w_scale, bias)
        assert_identical(ops.linear_dynamic(x, packed), expected.to(dtype), (m, n, k))
        pair = (float(scaled.abs().amax()) / 100, 131)  # some values are out of its range
        for out in (torch.float32, torch.uint8):
            expected = reference.linear_static(scaled, weight, w_scale, bias, pair, out, (0.5, 100))
            assert_identical(ops.linear_static(x, packed, *pair, out, 0.5, 100), expected, (m, n, k, out))


def test_special_values(kernel):
    """NaN and infinity spoil their own row only, a product that overflows counts as infinite, zeros stay zeros."""
    weight, ones = torch.ones(3, 20, dtype=torch.int8), torch.ones(3)
    c = torch.full((20,), 2.0)
    c[1], c[2] = 1e30, 1e-30
    x = torch.ones(6, 20)
    x[:, 1] = 0.0
    x[1, 5], x[2, 6], x[3, 1], x[4] = math.nan, -math.inf, 1e30, 0.0
    y = ops.linear_dynamic(x, ops.pack(weight, ones, None, c))
    assert y.isnan().all(dim=1).tolist() == [False, True, True, True, False, False]
    assert_identical(y, reference.linear_dynamic(x * c, weight, ones, None))
    assert torch.equal(y[4], torch.zeros(3))


def test_threads_give_the_same(set_threads, generator):
    """By columns and by rows, with more work than one thread takes."""
    for m in (7, 601):
        weight, scale, bias = random_weight(1025, 600, generator)
        packed, x = ops.pack(weight, scale, bias, random_scale(600, generator)), normal(m, 600)
        set_threads(1)
        expected = ops.linear_dynamic(x, packed)
        set_threads(2)
        assert_identical(ops.linear_dynamic(x, packed), expected)


def test_the_length_tells_n_and_whether_there_is_a_scale(generator):
    for n, k in itertools.product((0, 1, 15, 16, 17, 33, 64, 200), (1, 3, 8, 15, 16, 17, 64, 100)):
        weight, scale, bias = random_weight(n, k, generator)
        c = random_scale(k, generator)
        packed, plain = ops.pack(weight, scale, bias, c), ops.pack(weight, scale, bias)
        assert packed.numel() == ops.packed_bytes(n, k, channel_scale=True) == plain.numel() + -(-k // 16) * 64
        assert (ops.out_features(packed, k), ops.has_channel_scale(packed, k)) == (n, True)
        assert (ops.out_features(plain, k), ops.has_channel_scale(plain, k)) == (n, False)
        for actual, expected in zip(ops.unpack(packed), (weight, scale, bias, c), strict=True):
            assert_identical(actual, expected, (n, k))
        assert ops.unpack(plain)[3] is None
        assert_identical(ops.pack(weight, scale, bias, c.repeat(2, 1).t()[:, 0]), packed, "not contiguous")
    empty = ops.pack(torch.zeros(3, 0, dtype=torch.int8), torch.ones(3), None, torch.ones(0))
    assert torch.equal(empty, ops.pack(torch.zeros(3, 0, dtype=torch.int8), torch.ones(3)))


WEIGHT, ONES = torch.ones(3, 5, dtype=torch.int8), torch.ones(5)
PACKED = ops.pack(WEIGHT, torch.ones(3), None, ONES)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf, 1e-40])
def test_a_scale_is_a_positive_normal_number(bad):
    c = ONES.clone()
    c[3] = bad
    with pytest.raises(
        RuntimeError, match=r"^torchq::pack: channel_scale must hold positive normal float32 numbers.* at 3\."
    ):
        ops.pack(WEIGHT, torch.ones(3), None, c)


@pytest.mark.parametrize("bad", [ONES.double(), ONES[:4], ONES[None], ONES.to("meta")])
def test_a_scale_is_one_float_per_input_feature(bad):
    with pytest.raises(RuntimeError, match=r"^torchq::pack: channel_scale "):
        ops.pack(WEIGHT, torch.ones(3), None, bad)


def test_codes_are_refused():
    codes = torch.ones(2, 5, dtype=torch.uint8)
    message = r"the weight was packed with a channel_scale, .* holds codes \({}\)\. Pass floats, or pack"
    with pytest.raises(RuntimeError, match="^torchq::linear_static: " + message.format("uint8")):
        ops.linear_static(codes, PACKED, 1.0, 0, torch.float32)
    with pytest.raises(RuntimeError, match="^torchq::gemm: " + message.format("int8")):
        ops.gemm(codes.char(), PACKED)
    layer = QuantizedLinear(WEIGHT, torch.ones(3), channel_scale=ONES, input_qparams=QParams(0.1, 0))
    with pytest.raises(TypeError, match="uint8"):
        layer(codes)


def test_it_is_handed_floats():
    """A layer that multiplies its input by a channel_scale takes no codes from the layer before."""
    static = {"input_qparams": QParams(0.05, 128)}
    first = QuantizedLinear(torch.eye(5, dtype=torch.int8), torch.ones(5), fold=Fold(codes=True), **static)
    plain, scaled = (QuantizedLinear(WEIGHT, torch.ones(3), channel_scale=c, **static) for c in (None, ONES))
    assert (plain.takes_codes, scaled.takes_codes) == (True, False)
    assert Int8Sequential(first, plain)._steps()[0].reader is plain
    model, x = Int8Sequential(first, scaled), torch.linspace(-2, 2, 5)
    assert model._steps()[0].reader is None
    assert torch.equal(model(x), scaled(first(x)))


# ---- the layer ----

K, N = 40, 24
SCHEMES = {"dynamic": None, "static": QParams(0.1, 120)}


@pytest.fixture(params=SCHEMES)
def layers(request, generator):
    """A float layer, a scale, the int8 layer with it, and x. Two of its channels are large and weigh little."""
    linear = nn.Linear(K, N)
    x = random_float(9, K, generator=generator)
    x[:, [3, 20]] *= 100
    linear.weight[:, [3, 20]] /= 100
    c = torch.rand(K, generator=generator) + 0.5
    c[[3, 20]] /= 100
    return linear, c, QuantizedLinear.from_float(linear, channel_scale=c, input_qparams=SCHEMES[request.param]), x


def test_the_layer_is_that_of_the_divided_weight_on_the_multiplied_input(layers):
    linear, c, layer, x = layers
    divided = nn.Linear(K, N)
    divided.weight.copy_(linear.weight / c), divided.bias.copy_(linear.bias)
    twin = QuantizedLinear.from_float(divided, input_qparams=layer.input_qparams)
    assert torch.equal(layer.weight_int8, twin.weight_int8)
    assert_identical(layer.weight_scale, twin.weight_scale)
    assert_identical(layer.channel_scale, c)
    assert twin.channel_scale is None
    assert_identical(layer(x), twin(x * c))
    assert sqnr_db(linear(x), layer(x)) > sqnr_db(linear(x), QuantizedLinear.from_float(linear)(x)) + 5
    with simulate():
        assert_identical(layer(x), twin(x * c))
        torch.testing.assert_close(layer(x), QuantizedLinear.__call__(copy.deepcopy(layer), x))
    assert "channel_scale=True" in repr(layer)
    assert "channel_scale" not in repr(twin)


@pytest.mark.parametrize("per_channel", [True, False])
def test_a_divided_weight_is_quantized_in_blocks(per_channel):
    """Of 2^18 values: the block before has the largest."""
    linear, c = nn.Linear(1000, 600), torch.rand(1000) + 0.1
    linear.weight[5, 7] = 30.0
    layer = QuantizedLinear.from_float(linear, channel_scale=c, per_channel=per_channel)
    whole = linear.weight / c
    peak = whole.abs().amax(dim=1) if per_channel else whole.abs().amax().expand(600)
    assert_identical(layer.weight_scale, peak / 127)
    assert torch.equal(layer.weight_int8, (whole * (1 / (peak / 127))[:, None]).round().to(torch.int8))


@pytest.mark.parametrize("dtype", reference.FLOATS)
def test_the_weight_that_others_read_is_the_float_layers(layers, dtype):
    linear, c, layer, x = layers
    layer = copy.deepcopy(layer).to(dtype)
    expected = layer.weight_int8.float() * layer.weight_scale[:, None] * c
    assert_identical(layer.weight + torch.zeros((), dtype=dtype), expected.to(dtype))
    assert sqnr_db(linear.weight, layer.weight.float()) > 25
    with simulate():
        y = layer(x.to(dtype))
    assert sqnr_db(nn.functional.linear(x.to(dtype), layer.weight, layer.bias).float(), y.float()) > 25
    with pytest.raises(RuntimeError, match="can't be written"):
        layer.channel_scale = c


def test_the_gradient_is_that_of_the_float_weight(layers):
    _, _, layer, x = layers
    weight = (layer.weight + 0).double()
    dy = normal(9, N)
    with torch.enable_grad():
        x = x.clone().requires_grad_()
        layer(x).backward(dy)
    torch.testing.assert_close(x.grad, (dy.double() @ weight).float(), rtol=1e-5, atol=1e-5)
    with forward_ad.dual_level():
        _, tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x.detach(), torch.ones(9, K))))
    torch.testing.assert_close(tangent, (torch.ones(9, K).double() @ weight.T).float(), rtol=1e-4, atol=1e-4)
    with torch.enable_grad(), simulate():
        again = x.detach().clone().requires_grad_()
        layer(again).backward(dy)
    torch.testing.assert_close(again.grad, x.grad, rtol=1e-4, atol=1e-5)


def test_compiled_it_gives_the_same_bits(layers):
    _, _, layer, x = layers
    assert_identical(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


# ---- checkpoints ----


def test_it_travels(layers):
    linear, c, layer, x = layers
    state = layer.state_dict()
    assert_identical(state["channel_scale"], c)
    assert "channel_scale" not in QuantizedLinear.from_float(linear).state_dict()
    fresh = QuantizedLinear.from_float(nn.Linear(K, N), channel_scale=torch.ones(K), input_qparams=layer.input_qparams)
    fresh.load_state_dict(state)
    for other in (fresh, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_identical(other(x), layer(x))
        assert_identical(other.channel_scale, c)


def test_a_checkpoint_with_another_scale_is_refused(layers):
    linear, _, layer, x = layers
    before, state = layer(x), layer.state_dict()
    plain = QuantizedLinear.from_float(linear, input_qparams=layer.input_qparams)
    for bad, message in (
        (torch.full((K,), math.nan), "scales must be positive normal float32"),
        (torch.zeros(K), "scales must be positive normal float32"),
        (torch.ones(K - 1), rf"channel_scale: expected torch.float32 \({K},\), got torch.float32 \({K - 1},\)"),
        (torch.ones(K, dtype=torch.float64), "channel_scale: expected torch.float32"),
        (torch.ones(K, device="meta"), "channel_scale: is on the meta device"),
    ):
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict({**state, "channel_scale": bad})
    with pytest.raises(RuntimeError, match="channel_scale: the saved layer scales the channels of its input, this one"):
        plain.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Missing key.*channel_scale"):
        layer.load_state_dict(plain.state_dict())
    layer.load_state_dict({key: value for key, value in state.items() if key == "weight_int8"}, strict=False)
    assert_identical(layer(x), before)


def test_codes_without_their_scale_are_not_loaded(layers):
    """The codes of another layer mean nothing with this one's channel_scale."""
    _, _, layer, x = layers
    other = QuantizedLinear.from_float(nn.Linear(K, N), channel_scale=torch.ones(K), input_qparams=layer.input_qparams)
    before = layer(x)
    layer.load_state_dict({k: v for k, v in other.state_dict().items() if k.startswith("weight")}, strict=False)
    assert_identical(layer(x), before)
