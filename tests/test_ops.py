"""The ops against the oracle of reference.py, bit for bit, for every kernel; and the inputs they refuse."""

import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from helpers import reference
from helpers.compare import assert_identical
from helpers.numbers import FLT_MIN, random_float, random_int8, random_weight
from helpers.reference import FLOATS
from torchq import kernels, ops
from torchq.ops import Activation

MAX_DEPTH = 65793
# K around a group of 4, a vector of 16, 32 or 64 codes, and the 64 values of an iteration of the range() loop.
DEPTHS = [0, 1, 3, 4, 5, 15, 16, 17, 33, 63, 64, 65, 130]
INT8_CORNERS = [-128, -127, 127, 0]
EPILOGUES = list(itertools.product([False, True], repeat=2))  # (bias, relu)
dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def shapes_around(kernel):
    """(m, n): every number of rows in a tile, panels minus and plus one column and exact, and more than a tile."""
    tile_m, tile_n, _ = kernels.tile(kernel)
    rows = [0, *range(1, tile_m + 3), 2 * tile_m + 1]
    panels = range(16, tile_n + 1, 16)
    columns = sorted({0, 1, 2 * tile_n + 1, *(n + d for n in panels for d in (-1, 0, 1))})
    return list(itertools.product(rows, columns))


def act(relu):
    return Activation.RELU if relu else Activation.NONE


@pytest.mark.parametrize("k", DEPTHS)
def test_gemm_is_exact(kernel, generator, k):
    for m, n in shapes_around(kernel):
        a = random_int8(m, k, generator=generator)
        weight, scale, bias = random_weight(n, k, generator)
        assert_identical(ops.gemm(a, ops.pack(weight, scale, bias)), reference.gemm(a, weight), f"{m=} {n=} {k=}")


@pytest.mark.parametrize("k", [67, MAX_DEPTH])
def test_gemm_is_exact_at_every_corner(kernel, k):
    """With the largest possible sums, all of one sign, any saturation or overflow would show."""
    m = 2 * kernels.tile(kernel)[0] + 1 if k < MAX_DEPTH else 2
    for fill_a, fill_w in itertools.product(INT8_CORNERS, repeat=2):
        a = torch.full((m, k), fill_a, dtype=torch.int8)
        weight = torch.full((17, k), fill_w, dtype=torch.int8)
        expected = torch.full((m, 17), fill_a * fill_w * k, dtype=torch.int32)
        assert_identical(ops.gemm(a, ops.pack(weight, torch.ones(17))), expected, f"{fill_a=} {fill_w=} {k=}")


@pytest.mark.parametrize("k", [67, MAX_DEPTH])
def test_linear_static_is_exact_at_every_corner(kernel, k):
    for fill_w in INT8_CORNERS:
        weight, scale = torch.full((17, k), fill_w, dtype=torch.int8), torch.ones(17)
        packed = ops.pack(weight, scale)
        for code, zero_point in itertools.product([0, 255], [0, 128, 255]):
            x = torch.full((2, k), code, dtype=torch.uint8)
            actual = ops.linear_static(x, packed, 1.0, zero_point, torch.float32)
            expected = torch.full((2, 17), float((code - zero_point) * fill_w * k))
            assert_identical(actual, expected, f"{code=} {zero_point=} {fill_w=} {k=}")


def test_the_deepest_layer_in_several_blocks_of_rows(kernel, generator):
    """At K = 65793 the codes of a few rows fill the cache budget, so 2 tiles and a row are split into 3 blocks."""
    x = random_float(2 * kernels.tile(kernel)[0] + 1, MAX_DEPTH, generator=generator)
    weight, scale, bias = random_weight(5, MAX_DEPTH, generator)
    expected = reference.linear_dynamic(x, weight, scale, bias)
    assert_identical(ops.linear_dynamic(x, ops.pack(weight, scale, bias)), expected)


@dtypes
def test_linear_dynamic_equals_the_oracle(kernel, generator, dtype):
    k = 70
    for m, n in shapes_around(kernel):
        x = random_float(m, k, generator=generator).to(dtype)
        weight, scale, bias = random_weight(n, k, generator)
        for has_bias, relu in EPILOGUES:
            b = bias if has_bias else None
            actual = ops.linear_dynamic(x, ops.pack(weight, scale, b), act(relu))
            expected = reference.linear_dynamic(x, weight, scale, b, relu)
            assert_identical(actual, expected, f"{m=} {n=} {has_bias=} {relu=}")


@dtypes
def test_linear_dynamic_equals_the_oracle_at_every_depth(kernel, generator, dtype):
    m, n = kernels.tile(kernel)[0] + 1, 17
    for k in DEPTHS:
        x = random_float(m, k, generator=generator).to(dtype)
        weight, scale, bias = random_weight(n, k, generator)
        expected = reference.linear_dynamic(x, weight, scale, bias)
        assert_identical(ops.linear_dynamic(x, ops.pack(weight, scale, bias)), expected, f"{k=}")


@pytest.mark.parametrize("out_dtype", [*FLOATS, torch.uint8], ids=str)
@pytest.mark.parametrize("in_dtype", [*FLOATS, torch.uint8], ids=str)
def test_linear_static_equals_the_oracle(kernel, generator, in_dtype, out_dtype):
    """Input and output codes saturate at both ends."""
    x_qparams, k = (0.02, 117), 21
    epilogues = itertools.cycle(EPILOGUES)
    for m, n in shapes_around(kernel):
        if in_dtype == torch.uint8:
            x = torch.randint(0, 256, (m, k), dtype=torch.uint8, generator=generator)
        else:
            x = (torch.randn(m, k, generator=generator) * 3).to(in_dtype)
        weight, scale, bias = random_weight(n, k, generator)
        has_bias, relu = next(epilogues)
        b = bias if has_bias else None
        y_qparams = (0.05 * math.sqrt(k), 93)
        actual = ops.linear_static(
            x, ops.pack(weight, scale, b), *x_qparams, out_dtype, *y_qparams, activation=act(relu)
        )
        expected = reference.linear_static(x, weight, scale, b, x_qparams, out_dtype, y_qparams, relu)
        assert_identical(actual, expected, f"{m=} {n=} {has_bias=} {relu=}")


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("out_dtype", [*FLOATS, torch.uint8], ids=str)
def test_the_epilogue_rounds_at_every_magnitude(kernel, generator, out_dtype, relu):
    """Outputs reach from float32 and float16 denormals to infinity. A bias is -0.0, infinite or NaN; NaN in u8 is 0."""
    n, k = 300, 5
    weight = random_int8(n, k, generator=generator)
    scale = torch.ldexp(torch.rand(n, generator=generator) + 0.5, torch.linspace(-149, 127, n).int())
    bias = torch.zeros(n)
    bias[::7], bias[1::97], bias[2::97], bias[3::97] = -0.0, math.inf, -math.inf, math.nan
    x = torch.randint(0, 256, (7, k), dtype=torch.uint8, generator=generator)
    for x_scale, zero_point in ((FLT_MIN, 255), (0.75, 128), (3e38, 3)):
        packed = ops.pack(weight, scale, bias)
        actual = ops.linear_static(x, packed, x_scale, zero_point, out_dtype, FLT_MIN, 7, act(relu))
        args = (x_scale, zero_point), out_dtype, (FLT_MIN, 7), relu
        assert_identical(actual, reference.linear_static(x, weight, scale, bias, *args), f"{x_scale=}")


@dtypes
def test_quantize_per_token_equals_the_oracle(kernel, generator, dtype):
    for m, k in itertools.product([0, 1, 5], DEPTHS):
        x = random_float(m, k, generator=generator).to(dtype)
        for actual, expected in zip(ops.quantize_per_token(x), reference.quantize_per_token(x), strict=True):
            assert_identical(actual, expected, f"{m=} {k=}")


def test_ties_round_to_even(kernel):
    """The scale is 2, so that odd values lie half-way between two codes."""
    x = torch.tensor([[-255.0, -3, -1, 1, 3, 5, 7, 255]])
    codes, scale, zero_point = ops.quantize_per_token(x)
    assert (scale.item(), zero_point.item()) == (2.0, 128)
    assert codes.tolist() == [[0, 126, 128, 128, 130, 130, 132, 255]]


SPECIAL_ROWS = {  # the row is filled with the first value, and starts with the others
    "zeros": [0.0],
    "minus zeros": [-0.0],
    "positive constant": [0.3],
    "negative constant": [-0.3],
    "denormals": [1e-40, -1e-39],
    "largest": [3.38e38, -3.38e38, 1.0],
    "smallest range with a scale": [0.0, 255 * FLT_MIN, -FLT_MIN],
    "largest range without": [0.0, 254 * FLT_MIN],
    "one tiny": [0.0, 1e-30],
    "NaN": [1.0, math.nan],
    "infinity": [1.0, math.inf],
    "minus infinity": [1.0, -math.inf],
    "NaN alone": [math.nan],
}


@dtypes
@pytest.mark.parametrize("row", SPECIAL_ROWS.values(), ids=SPECIAL_ROWS)
def test_special_rows(kernel, generator, row, dtype):
    """A row of zeros gives the bias, and NaN or infinity gives NaN. The normal row beside it is unaffected."""
    fill, *start = row
    weight, scale, bias = random_weight(35, 37, generator)
    x = torch.stack([torch.full((37,), fill), random_float(37, generator=generator)]).to(dtype)
    x[0, : len(start)] = torch.tensor(start).to(dtype)

    for actual, expected in zip(ops.quantize_per_token(x), reference.quantize_per_token(x), strict=True):
        assert_identical(actual, expected)
    y = ops.linear_dynamic(x, ops.pack(weight, scale, bias))
    assert_identical(y, reference.linear_dynamic(x, weight, scale, bias))
    if not x[0].isfinite().all():
        assert y[0].isnan().all()
    elif (x[0].float().abs() < FLT_MIN).all():
        assert_identical(y[0], bias.to(dtype))

    static = ops.linear_static(x, ops.pack(weight, scale, bias), 0.01, 3, torch.float32)  # NaN has code 0
    assert_identical(static, reference.linear_static(x, weight, scale, bias, (0.01, 3), torch.float32))


@dtypes
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf], ids=str)
def test_one_bad_value_anywhere_in_a_row_is_noticed(kernel, generator, poison, dtype):
    """The value may be in any lane and chain of the vectors, or in the tail."""
    k = 83
    x = random_float(k, k, generator=generator).to(dtype)
    x.fill_diagonal_(poison)
    assert ops.quantize_per_token(x)[1].isnan().all()
    weight, scale, bias = random_weight(3, k, generator)
    assert ops.linear_dynamic(x, ops.pack(weight, scale, bias), Activation.RELU).isnan().all()


K = 37
VIEWS = {
    "transposed": lambda make: make(K, 7).t(),
    "columns at an odd offset": lambda make: make(7, K + 6)[:, 3 : 3 + K],
    "every second row": lambda make: make(14, K)[::2],
    "every third value": lambda make: make(7, 3 * K)[:, ::3],
    "one row expanded": lambda make: make(1, K).expand(7, K),
    "one value expanded": lambda make: make(7, 1).expand(7, K),
    "1-D": lambda make: make(K),
    "1-D strided": lambda make: make(K, 4)[:, 1],
    "3-D": lambda make: make(2, 4, K),
    "3-D permuted": lambda make: make(4, 2, K).transpose(0, 1),
    "3-D sliced": lambda make: make(3, 5, K)[:, 1:4],
    "4-D": lambda make: make(2, 1, 3, K),
    "4-D channels last": lambda make: make(2, 3, K, 4).permute(0, 1, 3, 2),
    "4-D expanded": lambda make: make(1, 3, 1, K).expand(2, 3, 4, K),
    "5-D": lambda make: make(1, 2, 1, 2, K),
    "no rows": lambda make: make(0, K),
    "no rows, 3-D": lambda make: make(3, 0, K),
    "no rows, transposed": lambda make: make(K, 0).t(),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_any_layout_of_the_input(kernel, generator, view):
    """Strides make no difference, leading dimensions are kept, and the input does not change."""
    weight, scale, bias = random_weight(19, K, generator)
    packed = ops.pack(weight, scale, bias)
    x = view(lambda *shape: random_float(*shape, generator=generator))
    a = view(lambda *shape: random_int8(*shape, generator=generator))
    codes = view(lambda *shape: torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator))
    before = [t.clone() for t in (x, a, codes)]

    assert_identical(ops.gemm(a, packed), reference.gemm(a, weight))
    assert_identical(ops.linear_dynamic(x, packed), reference.linear_dynamic(x, weight, scale, bias))
    for source in (x, x.half(), codes):
        actual = ops.linear_static(source, packed, 0.1, 99, torch.float32)
        expected = reference.linear_static(source, weight, scale, bias, (0.1, 99), torch.float32)
        assert_identical(actual, expected, source.dtype)
        assert actual.is_contiguous()
    for actual, expected in zip(ops.quantize_per_token(x), reference.quantize_per_token(x), strict=True):
        assert_identical(actual, expected)
    for now, then in zip((x, a, codes), before, strict=True):
        assert_identical(now, then, "input")


@pytest.mark.parametrize("k", [0, 1, 3, 4, 5, 64])
def test_pack_and_unpack_are_inverse(generator, k):
    for n in (0, 1, 15, 16, 17, 63, 64, 65, 200):
        weight, scale, bias = random_weight(n, k, generator)
        packed = ops.pack(weight, scale, bias)
        assert (packed.dtype, packed.shape) == (torch.uint8, (ops.packed_bytes(n, k),))
        assert ops.out_features(packed, k) == n
        assert_identical(packed, ops.pack(weight.clone(), scale.clone(), bias.clone()), f"padding, {n=}")
        for actual, expected in zip(ops.unpack(packed)[:3], (weight, scale, bias), strict=True):
            assert_identical(actual, expected, f"{n=}")
        assert ops.unpack(ops.pack(weight, scale))[2] is None


def test_pack_takes_any_layout(generator):
    weight, scale, bias = random_weight(34, 9, generator)
    expected = ops.pack(weight, scale, bias)
    assert_identical(ops.pack(weight.t().contiguous().t(), scale.repeat(2, 1).t()[:, 0], bias), expected)
    one = torch.tensor([0.25])
    assert_identical(ops.pack(weight, one.expand(34), bias), ops.pack(weight, torch.full((34,), 0.25), bias))


def test_a_packed_weight_may_lie_at_any_address(kernel, generator):
    x = random_float(7, 37, generator=generator)
    packed = ops.pack(*random_weight(35, 37, generator))
    memory = torch.zeros(packed.numel() + 1, dtype=torch.uint8)
    memory[1:] = packed
    assert_identical(ops.linear_dynamic(x, memory[1:]), ops.linear_dynamic(x, packed))
    assert_identical(ops.unpack(memory[1:])[0], ops.unpack(packed)[0])


# From 2 * 2^21 multiply-adds on, two threads share the work: they divide columns up to 32 rows, and rows above that.
SHARED = [(1, 2049, 2050), (7, 1025, 601), (32, 385, 345), (33, 385, 345), (601, 33, 300), (900, 17, 1024)]


@pytest.mark.parametrize(("m", "n", "k"), SHARED)
def test_any_number_of_threads_gives_the_same_bits(kernel, generator, set_threads, m, n, k):
    """And all kernels give the same bits."""
    assert m * n * k >= 2 * 2**21
    x = random_float(m, k, generator=generator)
    weight, scale, bias = random_weight(n, k, generator)
    expected = reference.linear_dynamic(x, weight, scale, bias)
    for threads in (1, 2, 3):
        set_threads(threads)
        packed = ops.pack(weight, scale, bias)
        assert_identical(ops.linear_dynamic(x, packed), expected, f"{threads=}")


def test_every_kernel_equals_the_reference_kernel(kernel, generator):
    x = random_float(3, 29, 203, generator=generator)
    packed = ops.pack(*random_weight(211, 203, generator))

    def results():
        return [
            *(ops.linear_dynamic(x.to(dtype), packed, 1) for dtype in FLOATS),
            ops.linear_static(x, packed, 0.03, 50, torch.uint8, 0.2, 80),
            ops.gemm((x * 20).clamp(-128, 127).to(torch.int8), packed),
            *ops.quantize_per_token(x),
        ]

    with kernels.use("reference"):
        expected = results()
    for index, (actual, wanted) in enumerate(zip(results(), expected, strict=True)):
        assert_identical(actual, wanted, f"result {index}")


def test_python_threads_may_share_a_packed_weight(kernel, generator, set_threads):
    set_threads(2)
    packed = ops.pack(*random_weight(385, 345, generator))
    inputs = [random_float(m, 345, generator=generator) for m in (1, 40, 33, 7)]
    expected = [ops.linear_dynamic(x, packed) for x in inputs]

    def work(x):
        with kernels.use(kernel):  # each thread for itself
            return ops.linear_dynamic(x, packed)

    with ThreadPoolExecutor(4) as pool:
        results = [list(pool.map(work, inputs * 8)) for _ in range(2)]
    for run in results:
        for actual, wanted in zip(run, expected * 8, strict=True):
            assert_identical(actual, wanted)


X, WEIGHT, SCALE = torch.ones(2, 5), torch.ones(3, 5, dtype=torch.int8), torch.ones(3)
PACKED = ops.pack(WEIGHT, SCALE)
NOT_PACKED = "packed must be the uint8 vector that"
NO_HEADER = "packed holds no packed weights"
DEEP = torch.zeros(1, MAX_DEPTH + 1, dtype=torch.int8)
raw = torch.ops.torchq  # without the wrappers of torchq.ops
f32 = torch.float32
REFUSED = [
    (r"pack: weight must be int8 \(N, K\), got float32 \(3, 5\)", lambda: ops.pack(WEIGHT.float(), SCALE)),
    (r"pack: weight must be int8 \(N, K\), got int8 \(5\)", lambda: ops.pack(WEIGHT[0], SCALE)),
    (r"pack: K = 65794 is too deep: .* up to K = 65793", lambda: ops.pack(DEEP, SCALE[:1])),
    (r"pack: scale must be float32 \(3,\).*, got float64", lambda: ops.pack(WEIGHT, SCALE.double())),
    (r"pack: scale must be float32 \(3,\).*, got float32 \(2\)", lambda: ops.pack(WEIGHT, SCALE[:2])),
    (r"pack: scale must be float32 \(3,\).*, got float32 \(3, 1\)", lambda: ops.pack(WEIGHT, SCALE[:, None])),
    (r"pack: bias must be float32 \(3,\).*, got float16", lambda: ops.pack(WEIGHT, SCALE, SCALE.half())),
    (r"pack: bias must be float32 \(3,\).*, got float32 \(1\)", lambda: ops.pack(WEIGHT, SCALE, SCALE[:1])),
    (r"unpack: the weight was packed for 5 input features, got in_features = 4", lambda: raw.unpack(PACKED, 4)),
    (rf"unpack: {NO_HEADER} \(\d+ bytes", lambda: ops.unpack(PACKED[:-1])),
    (rf"unpack: {NOT_PACKED}", lambda: ops.unpack(X)),
    (rf"unpack: {NO_HEADER} \(3 bytes", lambda: ops.unpack(PACKED[:3])),
    (rf"linear_dynamic: {NOT_PACKED} .* got int8 \(3, 5\)", lambda: ops.linear_dynamic(X, WEIGHT)),
    (rf"linear_dynamic: {NOT_PACKED}", lambda: ops.linear_dynamic(X, PACKED[None])),
    (rf"linear_dynamic: {NOT_PACKED}", lambda: ops.linear_dynamic(X, PACKED[::2])),
    (rf"linear_dynamic: {NO_HEADER}", lambda: ops.linear_dynamic(X, torch.zeros_like(PACKED))),
    (rf"linear_dynamic: {NO_HEADER}", lambda: ops.linear_dynamic(X, PACKED[:-1])),
    (rf"linear_dynamic: {NO_HEADER}", lambda: ops.linear_dynamic(X, torch.cat([PACKED, PACKED]))),
    (rf"linear_dynamic: {NO_HEADER} \(0 bytes", lambda: ops.linear_dynamic(X, PACKED[:0])),
    (r"gemm: a must be int8, got uint8", lambda: ops.gemm(X.byte(), PACKED)),
    (r"gemm: the weight was packed for 5 .*, but a has 4 \(a: \(2, 4\)\)", lambda: ops.gemm(WEIGHT[:2, :4], PACKED)),
    (r"linear_dynamic: x must be float32, .* got float64", lambda: ops.linear_dynamic(X.double(), PACKED)),
    (r"linear_dynamic: x must be float32, .* got uint8", lambda: ops.linear_dynamic(X.byte(), PACKED)),
    (r"linear_dynamic: .* packed for 5 .*, but x has 6", lambda: ops.linear_dynamic(torch.ones(2, 6), PACKED)),
    (r"linear_dynamic: x must have at least one dimension", lambda: ops.linear_dynamic(torch.tensor(1.0), PACKED)),
    (r"linear_dynamic: activation must be .* got 11", lambda: ops.linear_dynamic(X, PACKED, 11)),
    (r"linear_dynamic: activation must be .* got -1", lambda: ops.linear_dynamic(X, PACKED, -1)),
    (r"linear_static: x must be .*, got float64", lambda: ops.linear_static(X.double(), PACKED, 1.0, 0, f32)),
    (r"linear_static: x must be .*, got int8", lambda: ops.linear_static(X.char(), PACKED, 1.0, 0, f32)),
    (r"linear_static: out_dtype must be .* got float64", lambda: ops.linear_static(X, PACKED, 1.0, 0, torch.float64)),
    (r"linear_static: out_dtype must be .* got int8", lambda: ops.linear_static(X, PACKED, 1.0, 0, torch.int8)),
    (r"linear_static: activation must be", lambda: ops.linear_static(X, PACKED, 1.0, 0, f32, activation=11)),
    (r"linear_static: .* packed for 5 .*, but x has 2", lambda: ops.linear_static(X.T, PACKED, 1.0, 0, f32)),
    (r"quantize_per_token: x must be float32, .* got int32", lambda: ops.quantize_per_token(X.int())),
    (r"quantize_per_token: x must have at least one", lambda: ops.quantize_per_token(torch.tensor(1.0))),
    (r"gemm: .* on meta, the packed weight on cpu", lambda: ops.gemm(WEIGHT.to("meta"), PACKED)),
    (r"linear_dynamic: .* on meta, the packed weight on cpu", lambda: ops.linear_dynamic(X.to("meta"), PACKED)),
    (r"linear_dynamic: .* on cpu, the packed weight on meta", lambda: ops.linear_dynamic(X, PACKED.to("meta"))),
    (r"pack: scale .*meta", lambda: ops.pack(WEIGHT, SCALE.to("meta"))),
    (r"pack: bias .*meta", lambda: ops.pack(WEIGHT, SCALE, SCALE.to("meta"))),
]


@pytest.mark.parametrize(("message", "call"), REFUSED, ids=[message for message, _ in REFUSED])
def test_refused(message, call):
    with pytest.raises(RuntimeError, match=r"^torchq::" + message):
        call()


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf, 1e-39, 1e39])
def test_refuses_a_bad_scale(scale):
    for side, args in (("x", (scale, 0, f32)), ("y", (1.0, 0, torch.uint8, scale))):
        with pytest.raises(
            RuntimeError, match=rf"^torchq::linear_static: {side}_scale must be a positive normal float32"
        ):
            ops.linear_static(X, PACKED, *args)


@pytest.mark.parametrize("zero_point", [-1, 256])
def test_refuses_a_bad_zero_point(zero_point):
    for side, args in (("x", (1.0, zero_point, f32)), ("y", (1.0, 0, torch.uint8, 1.0, zero_point))):
        with pytest.raises(RuntimeError, match=rf"^torchq::linear_static: {side}_zero_point must be in \[0, 255\]"):
            ops.linear_static(X, PACKED, *args)
