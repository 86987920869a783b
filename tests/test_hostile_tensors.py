"""Tensors that are not what their type promises: right values or a clear error, on every way in, and never a crash.

What could end the process runs in one of its own.
"""

import pytest
import torch
from torch import nn

from helpers.commands import run_code
from helpers.compare import assert_identical
from torchq import _C, QuantizedLinear, ops, simulate
from torchq.modules.qat_linear import QATLinear
from torchq.numerics.qparams import QParams

pytestmark = [pytest.mark.usefixtures("seeded"), pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")]
SCHEMES = {"dynamic": None, "static": QParams(0.05, 128)}


@pytest.fixture(params=SCHEMES.values(), ids=SCHEMES)
def layer(request):
    return QuantizedLinear.from_float(nn.Linear(16, 4), input_qparams=request.param)


@pytest.fixture
def x():
    return torch.randn(3, 16)


# ---- Right values ----


def lazily_negated():
    real, imaginary = torch.randn(3, 16), torch.randn(3, 16)
    yield "a view", torch._neg_view(real)
    yield "of complex numbers", torch.complex(real, imaginary).conj().imag
    yield "of one complex number", torch.complex(real, imaginary)[:1, :1].conj().imag
    yield "one row", torch._neg_view(real[1])
    yield "bfloat16", torch._neg_view(real.bfloat16())


@pytest.mark.parametrize(("name", "x"), list(lazily_negated()), ids=[name for name, _ in lazily_negated()])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_lazily_negated_values(name, x, scheme):
    assert x.is_neg()
    layer = QuantizedLinear.from_float(nn.Linear(x.shape[-1], 4), input_qparams=SCHEMES[scheme])
    expected = layer(x.resolve_neg())
    assert not torch.equal(expected, layer(-x.resolve_neg()))
    assert_identical(layer(x), expected)
    assert_identical(ops.linear_dynamic(x, layer.packed), ops.linear_dynamic(x.resolve_neg(), layer.packed))


def test_zeros_that_are_not_stored(layer):
    assert_identical(layer(torch._efficientzerotensor(3, 16)), layer(torch.zeros(3, 16)))


@pytest.mark.parametrize("remove", ["mutations", "mutations_and_views"])
def test_functionalize(layer, x, remove):
    inside = []

    def call(x):
        y = layer(x.view(3, 16))
        inside.append(torch._is_functional_tensor(y))
        return y.add_(1)

    assert_identical(torch.func.functionalize(call, remove=remove)(x), layer(x) + 1)
    assert inside == [True]


def test_transforms_inside_one_another(layer, x):
    y = torch.func.functionalize(torch.func.vmap(layer))(x)
    assert_identical(y, layer(x))


@pytest.mark.parametrize("dims", [63, 64])
def test_as_many_dimensions_as_torch_has(layer, dims):
    x = torch.randn([1] * (dims - 2) + [3, 16])
    assert_identical(layer(x), layer(x.reshape(3, 16)).reshape(*x.shape[:-1], 4))


# ---- Refused ----


@pytest.mark.parametrize("dims", [65, 70, 200, 4096])
def test_more_dimensions_are_refused(layer, dims):
    x = torch.zeros([1] * (dims - 1) + [16])
    message = f"x may have up to 64 dimensions, got {dims}. Flatten some"
    for call in (layer, lambda x: ops.linear_dynamic(x, layer.packed), ops.quantize_per_token):
        with pytest.raises(RuntimeError, match=message):
            call(x)
    with pytest.raises(RuntimeError, match="a may have up to 64 dimensions"):
        ops.gemm(x.char(), layer.packed)


def not_dense():
    x = torch.randn(8, 16)
    rows = [x[:3], x[3:]]
    yield "nested, jagged", torch.nested.nested_tensor(rows, layout=torch.jagged), "as x.values()"
    yield "nested, strided", torch.nested.nested_tensor(rows, layout=torch.strided), "padded instead"
    yield "sparse", x.to_sparse(), r"got torch.sparse_coo. Pass x.to_dense\(\) instead"
    yield "sparse rows", x.to_sparse_csr(), r"got torch.sparse_csr. Pass x.to_dense\(\)"
    yield "of oneDNN", x.to_mkldnn(), r"got torch._mkldnn. Pass x.to_dense\(\)"
    yield "quantized by torch", torch.quantize_per_tensor(x, 0.1, 3, torch.quint8), r"Pass x.dequantize\(\)"


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("way", ["int8", "simulated", "autocast"])
def test_what_is_not_dense_is_refused(layer, number, way):
    name, x, message = list(not_dense())[number]
    assert _C.call_linear(layer, QuantizedLinear, x) is NotImplemented, name
    context = {"int8": torch.no_grad, "simulated": simulate, "autocast": lambda: torch.autocast("cpu")}[way]()
    with context, pytest.raises(TypeError, match=f"^QuantizedLinear: .*{message}"):
        layer(x)


# ---- Storages that were freed ----

FREED = {
    "the input": "x.untyped_storage().resize_(0); layer(x)",
    "a view of the input": "v = x[1:]; x.untyped_storage().resize_(0); layer(v)",
    "a view far into it": "x = torch.randn(1 << 16, 16); v = x[-3:]; x.untyped_storage().resize_(0); layer(v)",
    "a part of the input": "x.untyped_storage().resize_(64); ops.linear_dynamic(x, layer.packed)",
    "a strided input": "v = x.t().contiguous().t(); v.untyped_storage().resize_(0); layer(v)",
    "the packed weight": "layer.packed.untyped_storage().resize_(0); layer(x)",
    "the packed weight, to the op": "p = layer.packed; p.untyped_storage().resize_(0); ops.linear_dynamic(x, p)",
    "the packed weight, unpacked": "p = layer.packed; p.untyped_storage().resize_(0); raw.unpack(p, 16)",
    "a weight to pack": "w = torch.ones(4, 16).char(); w.untyped_storage().resize_(0); raw.pack(w, torch.ones(4))",
    "rows to quantize": "x.untyped_storage().resize_(0); ops.quantize_per_token(x)",
}
CHILD = f"""
import torch
from torch import nn
from torchq import QuantizedLinear, ops
raw = torch.ops.torchq
for code in {[*FREED.values()]}:
    layer, x = QuantizedLinear.from_float(nn.Linear(16, 4)), torch.randn(3, 16)
    try:
        exec(code)
        print("an answer", flush=True)
    except Exception as error:
        print(f"{{type(error).__name__}}: {{error}}", flush=True)
"""


@pytest.mark.subprocess
def test_freed_storage_is_an_error():
    code, printed, err = run_code(CHILD)
    said = dict(zip(FREED, printed.splitlines(), strict=False))
    assert code == 0, f"{list(FREED)[len(said)]}: {err}"
    assert said.keys() == FREED.keys()
    for name, error in said.items():
        assert error.startswith("RuntimeError: torchq::"), f"{name}: {error}"
        assert "it was resized" in error
        assert "Restore it before the call." in error


def test_an_empty_storage_of_an_empty_tensor_is_none_of_that(layer):
    assert layer(torch.empty(0, 16)).shape == (0, 4)


# ---- Headers that lie ----


def forged(packed, at, value):
    out = packed.clone()
    out[at : at + 8] = torch.tensor([value]).view(torch.uint8)
    return out


WRONG = [-1, -16, -(2**63), 2**40, 2**62, 2**63 - 1]
WRAPS = 4 + 2**62  # the length of a buffer of 4 columns, modulo 2^64


@pytest.mark.parametrize(("field", "n"), [(8, n) for n in [*WRONG, WRAPS, 3, 5]] + [(16, k) for k in [*WRONG, 65]])
def test_a_header_that_does_not_fit_its_buffer(layer, x, field, n):
    packed = forged(layer.packed, field, n)
    layer.packed = packed
    assert _C.call_linear(layer, QuantizedLinear, x) is NotImplemented
    for call in (lambda: layer(x), lambda: ops.linear_dynamic(x, packed), lambda: torch.ops.torchq.unpack(packed, 16)):
        with pytest.raises(RuntimeError, match="packed holds no packed weights"):
            call()


def test_a_negative_n_whose_length_fits():
    """No panels, and -n bytes of what tells N: the only negative numbers that packed_bytes() itself lets pass."""
    empty = ops.pack(torch.ones(0, 16, dtype=torch.int8), torch.ones(0))
    for n in range(1, 16):
        packed = torch.cat([forged(empty, 8, -n), torch.zeros(n, dtype=torch.uint8)])
        with pytest.raises(RuntimeError, match="packed holds no packed weights"):
            ops.linear_dynamic(torch.ones(2, 16), packed)


# ---- The prepared layer ----


def test_the_prepared_layer(x):
    layer = QATLinear(16, 4)
    assert_identical(layer(torch._neg_view(x)), layer(-x))
