"""The ops and the module in PyTorch: opcheck, compile, export, autograd modes, autocast."""

import copy
import io
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from helpers.compare import assert_identical
from helpers.numbers import random_float, random_int8, random_weight
from torchq import QuantizedLinear, kernels, simulate
from torchq.modules.folding import Fold
from torchq.modules.int8_sequential import Int8Sequential
from torchq.numerics.qparams import QParams
from torchq.ops import Activation

K = 37
INPUT, HIDDEN = QParams(0.03, 90), QParams(0.02, 0)
pytestmark = [  # torch.compile and torch.export use deprecated parts of torch
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning"),  # torch 2.10's export.load
]
SCHEMES = ["dynamic", "static", "chain"]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def build(scheme, generator):
    """A model of QuantizedLinear layers: (..., K) -> (..., 21)."""
    first, second = random_weight(33, K, generator), random_weight(21, 33, generator)
    relu = Activation.RELU
    if scheme == "dynamic":
        layers = QuantizedLinear(*first, fold=Fold(relu)), nn.ReLU(), QuantizedLinear(*second)
    elif scheme == "static":
        layers = QuantizedLinear(*first, input_qparams=INPUT), QuantizedLinear(*second, input_qparams=HIDDEN)
    else:
        layers = (
            QuantizedLinear(*first, input_qparams=INPUT, fold=Fold(relu, codes=True)),
            nn.ReLU(),
            QuantizedLinear(*second, input_qparams=HIDDEN),
        )
    return Int8Sequential(*layers).eval()


def samples():
    generator = torch.Generator().manual_seed(0)
    weight, scale, bias = random_weight(21, K, generator)
    packed, channel_scale = torch.ops.torchq.pack(weight, scale, bias), torch.arange(1.0, K + 1)
    scaled = torch.ops.torchq.pack(weight, scale, bias, channel_scale)
    x = random_float(2, 3, K, generator=generator)
    transposed = random_float(K, 5, generator=generator).t()
    codes = torch.randint(0, 256, (4, K), dtype=torch.uint8, generator=generator)
    for args in ((weight, scale, bias), (weight, scale), (weight.t().contiguous().t(), scale), (weight[:, :0], scale)):
        yield "pack", args
    yield "pack", (weight[:16], scale[:16], bias[:16])
    yield "pack", (weight, scale, bias, channel_scale)
    for each in (packed, scaled):
        yield "unpack", (each, K)
    yield "unpack", (torch.ops.torchq.pack(weight[:16], scale[:16]), K)
    for a in (random_int8(4, K, generator=generator), random_int8(K, 4, generator=generator).t()):
        yield "gemm", (a, packed)
    for v in (x, x.bfloat16(), x.half(), transposed, x[0, 0], x[:0]):
        yield "linear_dynamic", (v, packed, 1)
        yield "linear_dynamic", (v, scaled, 1)
        yield "quantize_per_token", (v,)
    for v in (x, transposed, x[0, 0], x[:0]):
        yield "linear_fine", (v, packed, 1)
        yield "linear_fine", (v, scaled)
    for v in (x, x.bfloat16(), codes):
        for out_dtype in (torch.float32, torch.float16, torch.uint8):
            yield "linear_static", (v, packed, 0.05, 100, out_dtype, 0.1, 80, 1)
    yield "linear_static", (transposed, packed, 0.05, 100, torch.float32)
    table = torch.randint(0, 256, (21, K + 4), dtype=torch.uint8, generator=generator)
    for form in (table, packed, scaled):
        yield "embedding", (form, torch.tensor([[3, 20], [0, 3]]), K, torch.bfloat16)
    yield "embedding", (table, torch.tensor(3, dtype=torch.int32), K, torch.float32)


SAMPLES = list(samples())
FIRST = {op: number for number, (op, _) in reversed([*enumerate(SAMPLES)])}


@pytest.mark.parametrize("number", range(len(SAMPLES)))
def test_opcheck(number):
    """Schema, fake and the real op agree; for the first sample of each op also with dynamic shapes, and compiled."""
    op, args = SAMPLES[number]
    checks = {} if number == FIRST[op] else {"test_utils": ("test_schema", "test_faketensor")}
    result = torch.library.opcheck(getattr(torch.ops.torchq, op), args, **checks)
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_fake_tensors_tell_the_shape_and_dtype(generator, scheme):
    model = build(scheme, generator)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        y = model(torch.empty(2, 9, K, dtype=torch.bfloat16))
    assert (y.shape, y.dtype) == ((2, 9, 21), torch.bfloat16)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_compiled_equals_eager(generator, scheme):
    """Int8 and simulated each compile to one graph. simulate() also works on a model that was compiled before."""
    model = build(scheme, generator)
    x = random_float(2, 9, K, generator=generator)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for mode in (nullcontext, simulate, nullcontext):
        with mode():
            assert_identical(compiled(x), model(x), mode.__name__)
    with simulate():
        simulated = model(x)
    assert not torch.equal(simulated, model(x))  # so two different computations were compared


@pytest.mark.slow(seconds=3)
@pytest.mark.subprocess
@pytest.mark.parametrize("mode", [nullcontext, simulate], ids=["int8", "simulated"])
def test_inductor_equals_eager(generator, mode):
    """Inductor, the default backend, fuses the float operations of simulate() into its own C++."""
    model = build("chain", generator)
    x = random_float(9, K, generator=generator)
    with mode():
        assert_identical(torch.compile(model, fullgraph=True)(x), model(x))


@pytest.mark.parametrize(
    ("scheme", "mode"), [*((scheme, nullcontext) for scheme in SCHEMES), ("dynamic", simulate), ("chain", simulate)]
)
def test_one_compiled_graph_serves_every_batch_size(generator, scheme, mode):
    model = build(scheme, generator)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    with mode():
        compiled(random_float(5, K, generator=generator))
        graphs = counter.frame_count
        for batch in (2, 3, 7, 65):
            x = random_float(batch, K, generator=generator)
            assert_identical(compiled(x), model(x), f"{batch=}")
    assert counter.frame_count == graphs


def test_a_graph_with_a_symbolic_weight(generator):
    """If the packed weight is an argument, its length is symbolic, and N must still be inferred from it."""

    def multiply(x, packed):
        y = torch.ops.torchq.linear_dynamic(x, packed)
        return y, torch.ops.torchq.unpack(packed, x.shape[-1])[0]

    compiled = torch.compile(multiply, fullgraph=True, dynamic=True, backend="aot_eager")
    for n, k in ((21, 37), (33, 40), (16, 5)):
        weight, scale, bias = random_weight(n, k, generator)
        x, packed = random_float(3, k, generator=generator), torch.ops.torchq.pack(weight, scale, bias)
        for actual, expected in zip(compiled(x, packed), multiply(x, packed), strict=True):
            assert_identical(actual, expected, f"{n=} {k=}")


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_export_round_trip(generator, scheme, strict):
    """The program is saved, loaded and decomposed, for any batch size. It contains the packed weights."""
    model = build(scheme, generator)
    batch = torch.export.Dim("batch", min=2)
    example = (random_float(4, 3, K, generator=generator),)
    exported = torch.export.export(model, example, dynamic_shapes=({0: batch},), strict=strict)
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file)
    modules = [program.module() for program in (exported, loaded, loaded.run_decompositions())]
    for size in (2, 5, 64):
        x = random_float(size, 3, K, generator=generator)
        for module in modules:
            assert_identical(module(x), model(x), f"{size=}")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_autograd_modes_change_nothing(generator, scheme):
    model = build(scheme, generator)
    x = random_float(9, K, generator=generator)
    expected = model(x)
    assert not expected.requires_grad
    for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with mode():
            assert_identical(model(x), expected, mode.__name__)
    with torch.inference_mode():
        made_inside = x.clone()
        assert model(made_inside).is_inference()
    with torch.no_grad():
        assert_identical(model(made_inside), expected, "an inference tensor, used outside")
    assert_identical(model.train()(x), expected, "train()")


@pytest.mark.parametrize("mode", [nullcontext, simulate], ids=["int8", "simulated"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_input_that_requires_grad_is_computed(generator, scheme, mode):
    model = build(scheme, generator)
    x = random_float(9, K, generator=generator)
    with mode():
        assert_identical(model(x.clone().requires_grad_()).detach(), model(x))


@pytest.mark.parametrize("mode", [nullcontext, simulate], ids=["int8", "simulated"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_autocast_says_the_output_dtype_and_no_more(generator, scheme, mode):
    """On or off, to either dtype: codes are made from what arrives, and the last output is rounded once."""
    model = build(scheme, generator)
    x = random_float(9, K, generator=generator)
    with mode():
        hidden, expected = model[0](x), model(x)
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype=dtype):
                first = model[0](x)
                assert_identical(first, hidden.to(dtype), f"{dtype=}")
                assert_identical(model[1:](hidden), expected.to(dtype), f"{dtype=}")
                if scheme == "chain":
                    assert_identical(model(x), expected.to(dtype), f"{dtype=}")
                with torch.autocast("cpu", enabled=False):
                    assert_identical(model(x), expected, f"{dtype=} off")


def test_after_a_float_layer_under_autocast(generator):
    """The float layer gives bfloat16, so the quantized layers give bfloat16 too."""
    model = nn.Sequential(nn.Linear(K, K), *build("dynamic", generator))
    x = random_float(9, K, generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert_identical(model(x), model[1:](model[0](x)))
        assert model(x).dtype == torch.bfloat16


def test_layers_take_turns_with_onednn(generator):
    """On CPUs with AMX both configure a thread's tile registers. Each must be right after the other has run."""
    layer = QuantizedLinear(*random_weight(96, 192, generator))
    x, a, b = (torch.randn(shape, generator=generator) for shape in ((40, 192), (70, 256), (256, 80)))
    a, b = a.bfloat16(), b.bfloat16()
    with kernels.use("reference"):
        expected = copy.deepcopy(layer)(x)
    product = a.float() @ b.float()
    for rows in (40, 9, 1, 17):
        assert_identical(layer(x[:rows]), expected[:rows])
        torch.testing.assert_close((a @ b).float(), product, rtol=2e-2, atol=0.3)  # bfloat16 keeps 8 bits
