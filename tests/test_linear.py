"""QuantizedLinear as a module: from_float, its error, its state, its copies, its size."""

import contextlib
import copy
import io
import math
import multiprocessing
import pickle

import pytest
import safetensors.torch
import torch
from torch import nn

from helpers.compare import assert_identical, bound
from helpers.models import ACTIVATIONS
from helpers.numbers import random_float, random_weight
from torchq import QuantizedLinear, choose_qparams, ops, quantize, simulate
from torchq.modules.folding import Fold
from torchq.modules.int8_sequential import Int8Sequential
from torchq.numerics.qparams import QParams
from torchq.ops import Activation

N, K = 33, 50
INPUT, OUTPUT = QParams(0.046875, 100), QParams(0.03125, 37)  # float32 has these scales exactly
ATTRIBUTES = ["in_features", "out_features", "has_bias", "input_qparams", "fold", "dtype", "training"]
VARIANTS = {
    "dynamic": {},
    "static": {"input_qparams": INPUT},
    "folding": {"input_qparams": INPUT, "fold": Fold(Activation.RELU, codes=True)},
}
variants = pytest.mark.parametrize("kwargs", VARIANTS.values(), ids=VARIANTS)


def linear(n, k, generator, *, bias=True, dtype=torch.float32):
    """An nn.Linear with the usual initial values, uniform in ±1/sqrt(K), but from `generator`."""
    layer = nn.utils.skip_init(nn.Linear, k, n, bias=bias)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_((torch.rand(p.shape, generator=generator) * 2 - 1) / math.sqrt(max(k, 1)))
    return layer.to(dtype)


def layer_of(generator, *, bias=True, **kwargs):
    weight, scale, b = random_weight(N, K, generator)
    return QuantizedLinear(weight, scale, b if bias else None, **kwargs)


def assert_same_layer(actual, expected, x):
    for name in ATTRIBUTES:
        assert getattr(actual, name) == getattr(expected, name), name
    assert_identical(actual.packed, expected.packed)
    assert_identical(actual(x), expected(x))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_from_float_quantizes_the_weight(generator, dtype, per_channel, bias):
    source = linear(N, K, generator, bias=bias, dtype=dtype)
    axis = 0 if per_channel else None
    scale, _ = choose_qparams(source.weight, axis=axis)
    layer = QuantizedLinear.from_float(source, per_channel=per_channel)
    assert_identical(layer.weight_int8, quantize(source.weight, scale, axis=axis))
    assert_identical(layer.weight_scale, scale.expand(N).contiguous())
    assert layer.weight_int8.abs().amax() == 127
    if bias:
        assert_identical(layer.bias.clone(), source.bias.detach())
    else:
        assert layer.bias is None
    assert layer.dtype == dtype


def test_what_from_float_was_given_can_be_read_back(generator):
    source = linear(N, K, generator)
    layer = QuantizedLinear.from_float(source, **VARIANTS["folding"])
    assert (layer.in_features, layer.out_features, layer.has_bias) == (K, N, True)
    assert (layer.input_qparams, layer.fold) == (INPUT, Fold(Activation.RELU, codes=True))
    assert (layer.weight_int8.dtype, layer.weight_scale.dtype) == (torch.int8, torch.float32)
    assert (layer.weight_int8.shape, layer.weight_scale.shape, layer.bias.shape) == ((N, K), (N,), (N,))
    assert [tuple(parameter.shape) for parameter in layer.parameters()] == [(N, K), (N,)]
    weight = source.weight.detach().clone()
    layer.weight_int8.zero_()  # a new tensor at each access
    assert layer.weight_int8.any()
    assert_identical(source.weight.detach(), weight)


@pytest.mark.parametrize("scheme", ["dynamic", "static"])
def test_the_error_on_normal_data_is_below_one_percent(generator, scheme):
    """The rms error of rounding is step/sqrt(12): 0.39 % for the weights and 0.79 % for the inputs, together 0.88 %.

    The steps are 2·sqrt(3)σ/254 (uniform weights) and 7σ/255 (inputs within ±3.5σ). A bug gives a far larger error.
    """
    source = linear(64, 64, generator, bias=False)
    x = torch.randn(64, 64, generator=generator).clamp(-3.5, 3.5)
    pair = choose_qparams(x, dtype=torch.uint8, symmetric=False)
    input_qparams = QParams(pair[0].item(), pair[1].item()) if scheme == "static" else None
    y, expected = QuantizedLinear.from_float(source, input_qparams=input_qparams)(x), source(x)
    error = ((y - expected).norm() / expected.norm()).item()
    assert 0.001 < error < 0.01


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", ["dynamic", "static"])
def test_simulated_equals_int8_but_for_float32_sums(kernel, generator, scheme, dtype, relu):
    activation = Activation.RELU if relu else Activation.NONE
    layer = Int8Sequential(layer_of(generator, **VARIANTS[scheme], fold=Fold(activation)), ACTIVATIONS[activation]())
    x = random_float(40, K, generator=generator).to(dtype)
    y = layer(x)
    with simulate():
        simulated = layer(x)
    assert y.dtype == simulated.dtype == dtype
    # Rounding to 16 bits moves each of the two by at most half a unit in the last place: eps/2 of its power of two.
    rounding = 0 if dtype == torch.float32 else torch.finfo(dtype).eps * torch.maximum(y.abs(), simulated.abs())
    apart = (y.double() - simulated.double()).abs()
    assert (apart <= bound(layer[0], x) + rounding).all()
    assert (y != 0).any()


def test_simulated_codes_are_at_most_one_code_apart(kernel, generator):
    """They differ only where float32 rounding crosses a tie, which is rare."""
    layer = layer_of(generator, **VARIANTS["folding"])
    x = random_float(500, K, generator=generator)
    with simulate():
        simulated = quantize(layer(x).relu(), *OUTPUT, dtype=torch.uint8).int()
    apart = (layer.fused(x, Activation.RELU, OUTPUT).int() - simulated).abs()
    assert apart.max() <= 1
    assert apart.float().mean() < 1e-3
    assert simulated.unique().numel() > 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_chain_passes_codes_and_ends_in_the_dtype_of_the_model(generator, dtype):
    """It equals the two ops in turn. A call of the first layer by itself gives floats, before the activation."""
    first = layer_of(generator, **VARIANTS["folding"])
    second = QuantizedLinear(*random_weight(7, N, generator), input_qparams=OUTPUT)
    chain = Int8Sequential(first, nn.ReLU(), second).to(dtype)
    x = random_float(3, 4, K, generator=generator).to(dtype)
    codes = ops.linear_static(x, first.packed, *INPUT, torch.uint8, *OUTPUT, activation=Activation.RELU)
    y = chain(x)
    assert_identical(first(x), ops.linear_static(x, first.packed, *INPUT, dtype))
    assert_identical(y, ops.linear_static(codes, second.packed, *OUTPUT, dtype))
    assert second.dtype == y.dtype == dtype
    with simulate():
        simulated = chain(x)
    assert simulated.dtype == dtype
    # If one code differs at a tie, y moves by one step of that input.
    step = OUTPUT.scale * 127 * second.weight_scale.max()
    assert (y.double() - simulated.double()).abs().max() <= 2 * step + torch.finfo(dtype).eps * y.abs().max()


def test_simulate_nests_and_ends_after_an_exception(generator):
    layer, x = layer_of(generator), random_float(4, K, generator=generator)
    y = layer(x)
    with simulate():
        simulated = layer(x)
        with simulate():
            assert_identical(layer(x), simulated)
        assert_identical(layer(x), simulated, "after the inner block")
    assert_identical(layer(x), y, "after the outer block")
    assert not torch.equal(y, simulated)
    with pytest.raises(KeyError), simulate():
        raise KeyError
    assert_identical(layer(x), y, "after an exception")


def test_codes_are_refused_simulated_or_not(generator):
    layer = layer_of(generator, input_qparams=INPUT)
    codes = torch.randint(0, 256, (5, K), dtype=torch.uint8, generator=generator)
    for mode in (contextlib.nullcontext, simulate):
        with mode(), pytest.raises(TypeError, match="got uint8"):
            layer(codes)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
@pytest.mark.parametrize("scheme", ["dynamic", "static"])
@pytest.mark.parametrize(("n", "k"), [(0, 5), (5, 0), (0, 0)])
def test_empty_layers(n, k, scheme):
    """K = 0 gives the bias."""
    source = nn.Linear(k, n)
    nn.init.constant_(source.bias, 0.5)
    layer = QuantizedLinear.from_float(source, **VARIANTS[scheme])
    assert (layer.weight_int8.shape, layer.weight_scale.shape) == ((n, k), (n,))
    for shape in ((3, k), (2, 0, k), (k,)):
        x, expected = torch.ones(shape), torch.full((*shape[:-1], n), 0.5 if k == 0 else 0.0)
        assert_identical(layer(x), expected)
        with simulate():
            assert_identical(layer(x), expected)
    assert_identical(copy.deepcopy(layer)(torch.ones(3, k)), layer(torch.ones(3, k)))


def test_from_float_refuses():
    with pytest.raises(ValueError, match=r"in_features = 65794 is too deep.* up to 65793"):
        QuantizedLinear.from_float(nn.utils.skip_init(nn.Linear, 65794, 1))
    with pytest.raises(ValueError, match=r"on device meta, expected cpu"):
        QuantizedLinear.from_float(nn.Linear(4, 4, device="meta"))
    bad = nn.Linear(4, 4)
    nn.init.constant_(bad.weight, math.nan)
    with pytest.raises(ValueError, match=r"16 NaN or Inf"):
        QuantizedLinear.from_float(bad)
    bad.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"must be floating point, got torch.int8"):
        QuantizedLinear.from_float(bad)


@variants
@pytest.mark.parametrize("bias", [False, True])
def test_state_dict_holds_canonical_tensors(generator, bias, kwargs):
    layer = layer_of(generator, bias=bias, **kwargs)
    expected = {"weight_int8": (torch.int8, (N, K)), "weight_scale": (torch.float32, (N,))}
    if bias:
        expected["bias"] = torch.float32, (N,)
    for side in ("input", "output"):
        if f"{side}_qparams" in kwargs:
            expected |= {f"{side}_scale": (torch.float32, ()), f"{side}_zero_point": (torch.int32, ())}
    state = nn.ModuleDict({"fc": layer}).state_dict()
    assert {key: (t.dtype, t.shape) for key, t in state.items()} == {f"fc.{key}": v for key, v in expected.items()}
    assert_identical(state["fc.weight_int8"], layer.weight_int8)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_state_does_not_depend_on_the_default_dtype(generator, default):
    layer = layer_of(generator, **VARIANTS["folding"])
    expected = layer.state_dict()
    torch.set_default_dtype(default)
    try:
        state, duplicate = layer.state_dict(), copy.deepcopy(layer)
    finally:
        torch.set_default_dtype(torch.float32)
    for key, tensor in expected.items():
        assert_identical(state[key], tensor, key)
        assert_identical(duplicate.state_dict()[key], tensor, key)


@variants
@pytest.mark.parametrize("bias", [False, True])
def test_strict_loading_into_a_module_of_other_weights(generator, bias, kwargs):
    """All weights and quantization parameters come from the file (torch.save, weights_only=True)."""
    layer, file = layer_of(generator, bias=bias, **kwargs), io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    others = {key: QParams(0.5, 3) if key.endswith("qparams") else value for key, value in kwargs.items()}
    target = layer_of(generator, bias=bias, **others)
    assert not torch.equal(target.weight_int8, layer.weight_int8)
    target.load_state_dict(torch.load(file, weights_only=True), strict=True)
    loaded = target.state_dict()
    for key, tensor in layer.state_dict().items():
        assert_identical(loaded[key], tensor, key)
    x = random_float(4, K, generator=generator)
    assert_identical(target(x), layer(x))


BAD_STATES = {
    "shape": (
        {"weight_int8": torch.ones(N, K + 1, dtype=torch.int8)},
        r"fc\.weight_int8: expected .*33, 50.*got .*33, 51",
    ),
    "dtype": ({"weight_int8": torch.ones(N, K)}, r"fc\.weight_int8: expected torch.int8 .*got torch.float32"),
    "scale": ({"weight_scale": torch.ones(1)}, r"fc\.weight_scale: expected .*\(33,\), got .*\(1,\)"),
    "bias": ({"bias": torch.ones(N).half()}, r"fc\.bias: expected torch.float32 .*got torch.float16"),
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(("replaced", "message"), BAD_STATES.values(), ids=BAD_STATES)
def test_a_tensor_that_does_not_fit_changes_nothing(generator, replaced, message, strict):
    layer = layer_of(generator, input_qparams=INPUT)
    state = nn.ModuleDict({"fc": layer_of(generator, input_qparams=OUTPUT)}).state_dict()
    state |= {f"fc.{name}": tensor for name, tensor in replaced.items()}
    before = copy.deepcopy(layer)
    with pytest.raises(RuntimeError, match=message):
        nn.ModuleDict({"fc": layer}).load_state_dict(state, strict=strict)
    assert_same_layer(layer, before, random_float(4, K, generator=generator))


@pytest.mark.parametrize("missing", ["weight_int8", "weight_scale", "input_scale", "input_zero_point"])
def test_codes_are_never_paired_with_the_scale_of_others(generator, missing):
    """A weight without its scale, or a scale without its zero point, is reported, and neither is loaded."""
    layer = layer_of(generator, input_qparams=INPUT)
    state = nn.ModuleDict({"fc": layer_of(generator, input_qparams=OUTPUT)}).state_dict()
    del state[f"fc.{missing}"]
    before = layer.state_dict()
    with pytest.raises(RuntimeError, match=rf'Missing key\(s\) in state_dict: "fc\.{missing}"'):
        nn.ModuleDict({"fc": layer}).load_state_dict(state)
    for key, tensor in layer.state_dict().items():
        if key.startswith(missing.split("_")[0]):
            assert_identical(tensor, before[key], key)


@pytest.mark.parametrize("unexpected", ["gain", "packed", "weight", "inner.weight"])
def test_unexpected_keys_are_reported(generator, unexpected):
    model = nn.ModuleDict({"fc": layer_of(generator)})
    state = model.state_dict() | {f"fc.{unexpected}": torch.ones(1)}
    with pytest.raises(RuntimeError, match=rf'Unexpected key\(s\) in state_dict: "fc\.{unexpected}"\. $'):
        model.load_state_dict(state)


def test_loading_what_is_there_when_not_strict(generator):
    layer, bias = layer_of(generator), torch.full((N,), 2.0)
    weight = layer.weight_int8
    result = layer.load_state_dict({"bias": bias, "gain": bias}, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["weight_int8", "weight_scale"], ["gain"])
    assert_identical(layer.bias.clone(), bias)
    assert_identical(layer.weight_int8, weight)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "torch.save": lambda layer: torch.load(io.BytesIO(saved(layer)), weights_only=False),
}


def test_a_copy_has_the_scale_of_its_original(generator):
    """Also if the given scale, 0.05, is not exactly a float32 number."""
    layer = layer_of(generator, input_qparams=QParams(0.05, 3))
    assert copy.deepcopy(layer).input_qparams == layer.input_qparams


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@variants
@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copies_are_equal_and_independent(generator, duplicate, kwargs):
    layer, x = layer_of(generator, **kwargs).eval(), random_float(4, K, generator=generator)
    twin = duplicate(layer)
    assert_same_layer(twin, layer, x)
    y = layer(x)
    state = {key: t + 1 if key == "bias" else t for key, t in twin.state_dict().items()}
    twin.load_state_dict(state)
    assert not torch.equal(twin(x), y)
    assert_identical(layer(x), y, "the original, after its copy changed")


def compute_elsewhere(layer, x):
    return layer(x).tolist(), layer.weight_int8.tolist()


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
@pytest.mark.parametrize(
    "method", ["fork", pytest.param("spawn", marks=[pytest.mark.subprocess, pytest.mark.slow(seconds=5)])]
)
def test_other_processes(generator, set_threads, method):
    """The processes use one thread, like a DataLoader's workers, because OpenMP's threads do not survive a fork."""
    layer = QuantizedLinear.from_float(linear(512, 512, generator))
    x = random_float(33, 512, generator=generator)
    set_threads(2)
    y = layer(x)  # starts the thread pool of this process
    with multiprocessing.get_context(method).Pool(1, torch.set_num_threads, (1,)) as pool:
        running = pool.apply_async(compute_elsewhere, (layer, x))
        result = running.get(timeout=600)  # a deadlock reaches it, a busy machine does not
    assert result == (y.tolist(), layer.weight_int8.tolist())


def test_size_in_memory_and_on_disk(generator):
    """Only the packed weight is kept in memory, and only the canonical tensors are saved."""
    source = linear(1024, 1024, generator)
    layer = QuantizedLinear.from_float(source)
    float_bytes = source.weight.numel() * 4
    assert list(dict(layer.named_buffers())) == ["packed"]
    assert [type(v) for v in layer.__dict__.values() if isinstance(v, torch.Tensor)] == []
    assert float_bytes >= 3.9 * layer.packed.untyped_storage().nbytes()
    assert len(saved(source.state_dict())) >= 3.9 * len(saved(layer.state_dict()))
    assert len(safetensors.torch.save(source.state_dict())) >= 3.9 * len(safetensors.torch.save(layer.state_dict()))
    assert len(pickle.dumps(layer)) < 1.02 * 1024 * 1024


def test_repr_shows_scheme_and_kernel(kernel, generator):
    assert repr(layer_of(generator)) == (
        f"QuantizedLinear(in_features=50, out_features=33, bias=True, scheme=dynamic, kernel={kernel})"
    )
    assert repr(layer_of(generator, bias=False, **VARIANTS["folding"])) == (
        "QuantizedLinear(in_features=50, out_features=33, bias=False, scheme=static, "
        f"kernel={kernel}, fuses=relu, passes=uint8)"
    )
