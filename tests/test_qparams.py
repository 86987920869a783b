"""Scale and zero point: against a scalar oracle in numpy float32, against torch, and property tests."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import properties
from helpers.numbers import FLT_MAX, FLT_MIN, normal
from torchq.numerics.metrics import sqnr_db
from torchq.numerics.qparams import choose_qparams, dequantize, fake_quantize, qparams_from_range, quantize

CODES = {torch.int8: (-128, 127), torch.uint8: (0, 255)}
SCHEMES = [(dtype, symmetric) for dtype in CODES for symmetric in (True, False)]
SCHEME_NAMES = ["int8-symmetric", "int8-asymmetric", "uint8-symmetric", "uint8-asymmetric"]

# The round-trip error in steps: 1/2 by rounding to a code, plus float32 rounding of up to 255 steps. The latter is, in
# units of u = 2^-24: 2 for inv and x * inv, 2 for the scale, 2 for the zero point, and 1 for the product in dequantize.
# Together 7, rounded up to 8.
HALF_STEP = 0.5 + 255 * 8 * 2.0**-24

every_scheme = pytest.mark.parametrize(("dtype", "symmetric"), SCHEMES, ids=SCHEME_NAMES)
repeatable = settings(properties.repeatable, max_examples=200)
finite_float32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
# Within half a step of FLT_MAX a value may dequantize to Inf: FLT_MAX / (1 + 1 / 254) = 3.389e38 is safe.
restorable = st.floats(-3.375 * 2.0**126, 3.375 * 2.0**126, width=32)
schemes = st.sampled_from(SCHEMES)


def spread(*shape, seed=0, centre=0.0):
    return normal(*shape, seed=seed) * 3 + centre


def round_trip_steps(x, scale, restored):
    """The largest error in steps of the quantizer, computed in float64."""
    return ((x.double() - restored.double()).abs() / scale.double()).max().item()


def oracle_qparams(lo, hi, dtype, symmetric):
    """The module's formulas, one numpy float32 operation at a time: how a scalar C++ kernel would do it."""
    qmin = CODES[dtype][0]
    f = np.float32
    lo, hi = min(f(lo), f(0)), max(f(hi), f(0))
    scale = max(hi, -lo) / f(127) if symmetric else hi / f(255) - lo / f(255)
    if not scale >= f(FLT_MIN):
        scale = f(1)
    if symmetric:
        return float(scale), qmin + 128
    return float(scale), qmin + int(min(max(np.rint(-lo * (f(1) / scale)), 0), 255))


def oracle_quantize(value, scale, zero_point, dtype):
    qmin, qmax = CODES[dtype]
    steps = np.rint(np.float32(value) * (np.float32(1) / np.float32(scale)))
    return int(min(max(float(steps) + zero_point, qmin), qmax))


@repeatable
@given(finite_float32, finite_float32, schemes)
def test_qparams_match_the_oracle(a, b, scheme):
    dtype, symmetric = scheme
    lo, hi = min(a, b), max(a, b)
    pair = qparams_from_range(torch.tensor(lo), torch.tensor(hi), dtype=dtype, symmetric=symmetric)
    assert (pair[0].item(), pair[1].item()) == oracle_qparams(lo, hi, dtype, symmetric)


@repeatable
@given(st.lists(finite_float32, min_size=1, max_size=40), schemes)
def test_quantize_matches_the_oracle(values, scheme):
    dtype, symmetric = scheme
    x = torch.tensor(values)
    scale, zero_point = choose_qparams(x, dtype=dtype, symmetric=symmetric)
    expected = [oracle_quantize(v, scale.item(), zero_point.item(), dtype) for v in values]
    assert quantize(x, scale, zero_point, dtype=dtype).tolist() == expected


@repeatable
@given(st.lists(restorable, min_size=1, max_size=40), schemes)
def test_any_data_survives_the_round_trip(values, scheme):
    """For any float32 values, the error is at most half a step, the order is kept, and zero is exact."""
    dtype, symmetric = scheme
    x = torch.tensor([0.0, *sorted(values)])
    scale, zero_point = choose_qparams(x, dtype=dtype, symmetric=symmetric)
    q = quantize(x, scale, zero_point, dtype=dtype)
    restored = dequantize(q, scale, zero_point)
    assert restored[0] == 0
    assert (q[1:].int().diff() >= 0).all()
    assert round_trip_steps(x, scale, restored) <= HALF_STEP


def test_known_values():
    # 5 / scale is 127.49999, 5 * (1 / scale) is 127.5: kernels must multiply, as the definition does.
    lo, hi = torch.tensor([-1.0, -5.0, -7.0]), torch.tensor([254.0, 5.0, 7.0])
    scale, zero_point = qparams_from_range(lo, hi, dtype=torch.uint8, symmetric=False)
    assert (scale[0], zero_point.tolist()) == (1.0, [1, 128, 127])
    scale, zero_point = choose_qparams(torch.tensor([-254.0, 1.0]))
    assert (scale, zero_point, scale.shape, zero_point.shape) == (2.0, 0, (), ())


@pytest.mark.parametrize("symmetric", [True, False])
def test_int8_zero_point_is_the_uint8_one_minus_128(symmetric):
    lo, hi = -spread(5, 100, seed=1).abs(), spread(5, 100, seed=2).abs()
    scale_u, zero_u = qparams_from_range(lo, hi, dtype=torch.uint8, symmetric=symmetric)
    scale_s, zero_s = qparams_from_range(lo, hi, dtype=torch.int8, symmetric=symmetric)
    assert torch.equal(scale_u, scale_s)
    assert torch.equal(zero_s, zero_u - 128)
    assert zero_u.shape == (5, 100)
    assert ((zero_u >= 0) & (zero_u <= 255)).all()


@every_scheme
@pytest.mark.parametrize("axis", [None, 0, 1, 2, -1, -3])
@pytest.mark.parametrize("centre", [0.0, 10.0, -10.0], ids=["centred", "positive", "negative"])
def test_round_trip_is_within_half_a_step(dtype, symmetric, axis, centre):
    x = spread(4, 5, 60, seed=5, centre=centre)
    scale, zero_point = choose_qparams(x, dtype=dtype, symmetric=symmetric, axis=axis)
    q = quantize(x, scale, zero_point, axis=axis, dtype=dtype)
    restored = dequantize(q, scale, zero_point, axis=axis)
    assert (q.dtype, q.shape, restored.dtype) == (dtype, x.shape, torch.float32)
    if axis is None:
        assert round_trip_steps(x, scale, restored) <= HALF_STEP
        return
    assert scale.shape == zero_point.shape == (x.shape[axis],)
    for i in range(x.shape[axis]):  # each channel is quantized as if it were alone
        channel = x.select(axis, i)
        alone = choose_qparams(channel, dtype=dtype, symmetric=symmetric)
        assert (scale[i], zero_point[i]) == alone
        assert torch.equal(q.select(axis, i), quantize(channel, *alone, dtype=dtype))
        assert round_trip_steps(channel, scale[i], restored.select(axis, i)) <= HALF_STEP


@every_scheme
@pytest.mark.parametrize("axis", [None, 0])
def test_error_on_normal_data_is_below_half_a_percent_of_the_range(dtype, symmetric, axis):
    x = spread(16, 4096, seed=6)
    pair = choose_qparams(x, dtype=dtype, symmetric=symmetric, axis=axis)
    error = (fake_quantize(x, *pair, axis=axis, dtype=dtype) - x).abs().max()
    assert error < 0.005 * (x.max() - x.min())


@every_scheme
def test_every_code_is_reached_and_survives(dtype, symmetric):
    qmin, qmax = CODES[dtype]
    x = torch.linspace(-3, 5, 5001)
    scale, zero_point = choose_qparams(x, dtype=dtype, symmetric=symmetric)
    # A symmetric pair covers [-5, 5]. Its lowest code, the 256th, lies outside, and only a value outside gets it.
    wide = torch.linspace(-6, 5, 5001) if symmetric else x
    assert quantize(wide, scale, zero_point, dtype=dtype).unique().tolist() == list(range(qmin, qmax + 1))

    codes = torch.arange(qmin, qmax + 1).to(dtype)
    assert torch.equal(quantize(dequantize(codes, scale, zero_point), scale, zero_point, dtype=dtype), codes)


def test_ties_go_to_even():
    x = torch.tensor([0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5, 126.5])
    assert quantize(x, 1.0).tolist() == [0, 2, 2, 4, 0, -2, -2, 126]
    # The zero point is added after rounding, so an odd one does not make ties round to odd values.
    assert quantize(x, 1.0, 1).tolist() == [1, 3, 3, 5, 1, -1, -1, 127]
    assert quantize(torch.tensor([0.75, 1.25]), 0.5, 3, dtype=torch.uint8).tolist() == [5, 5]


# int_repr() has the codes of torch's own quantizer. torch warns that it will remove these tensors.
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, torch.quantize_per_channel:UserWarning")
@every_scheme
@pytest.mark.parametrize("columns", [1, 7, 8, 9, 31, 33, 1000])  # around torch's vector lengths
def test_codes_are_those_of_torch(dtype, symmetric, columns):
    torch_dtype = {torch.int8: torch.qint8, torch.uint8: torch.quint8}[dtype]
    x = spread(6, columns, seed=columns, centre=1.0)
    x[0, 0] = 0.0
    wide = torch.cat([x, 4 * x, (x * 2).round() / 2])  # saturating values and ties, too

    scale, zero_point = choose_qparams(x, dtype=dtype, symmetric=symmetric)
    theirs = torch.quantize_per_tensor(wide, scale.item(), zero_point.item(), torch_dtype)
    ours = quantize(wide, scale, zero_point, dtype=dtype)
    assert torch.equal(ours, theirs.int_repr())
    assert torch.equal(dequantize(ours, scale, zero_point), theirs.dequantize())

    ties = quantize(wide, 0.25, zero_point, dtype=dtype)
    assert torch.equal(ties, torch.quantize_per_tensor(wide, 0.25, zero_point.item(), torch_dtype).int_repr())

    scale, zero_point = choose_qparams(wide, dtype=dtype, symmetric=symmetric, axis=0)
    theirs = torch.quantize_per_channel(wide, scale, zero_point, 0, torch_dtype).int_repr()
    ours = quantize(wide, scale, zero_point, axis=0, dtype=dtype)
    # Here torch adds the zero point before it rounds, in float32. That moves numbers up to 255 by at most 2^-17 +
    # 255 * 2^-23 < 2^-14, and ties go to an even code. So only values that close to a tie may differ.
    steps = wide.double() / scale.double()[:, None]
    tie = (steps - steps.floor() - 0.5).abs() < 2.0**-14
    assert torch.equal(ours[~tie], theirs[~tie])
    assert ((ours.int() - theirs.int()).abs() <= (tie & (zero_point != 0)[:, None])).all()


def test_saturation_and_non_finite_values():
    x = torch.tensor([math.inf, -math.inf, math.nan, FLT_MAX, -FLT_MAX])
    for zero_point in (-128, 0, 127):
        assert quantize(x, 0.1, zero_point).tolist() == [127, -128, -128, 127, -128]
    for zero_point in (0, 128, 255):
        assert quantize(x, 0.1, zero_point, dtype=torch.uint8).tolist() == [255, 0, 0, 255, 0]


def test_dequantize_every_corner_exactly():
    """The subtraction reaches -255 and 255, which don't fit into int8 or uint8."""
    for dtype, (qmin, qmax) in CODES.items():
        q = torch.tensor([qmin, qmax], dtype=dtype)
        assert dequantize(q, 0.5, qmax).tolist() == [-127.5, 0.0]
        assert dequantize(q, 0.5, qmin).tolist() == [0.0, 127.5]
        assert dequantize(q, torch.tensor(0.5), torch.tensor(qmin)).tolist() == [0.0, 127.5]


def test_numbers_and_tensors_mix():
    x = spread(3, 4, seed=7)
    ones = torch.ones(4, dtype=torch.int32)
    expected = quantize(x, 0.1, 1)
    assert torch.equal(quantize(x, torch.tensor(0.1), torch.tensor(1)), expected)
    assert torch.equal(quantize(x, torch.full([4], 0.1), 1, axis=1), expected)
    assert torch.equal(quantize(x, 0.1, ones, axis=-1), expected)
    assert torch.equal(quantize(x, torch.tensor(0.1, dtype=torch.float64), 1, axis=0), expected)


def test_layouts_and_shapes():
    x = spread(6, 5, seed=8)
    assert torch.equal(quantize(x.T, 0.1), quantize(x, 0.1).T)
    assert torch.equal(choose_qparams(x.T, axis=1)[0], choose_qparams(x, axis=0)[0])
    assert quantize(torch.tensor(0.3), 0.1).tolist() == 3
    assert choose_qparams(spread(7, seed=8), axis=0)[0].shape == (7,)


@every_scheme
@pytest.mark.parametrize("float_dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_every_float_is_computed_in_float32(dtype, symmetric, float_dtype):
    x = spread(4, 50, seed=9).to(float_dtype)
    for axis in (None, 0):
        pair = choose_qparams(x, dtype=dtype, symmetric=symmetric, axis=axis)
        expected = choose_qparams(x.float(), dtype=dtype, symmetric=symmetric, axis=axis)
        assert (pair[0].dtype, pair[1].dtype) == (torch.float32, torch.int32)
        assert all(map(torch.equal, pair, expected))
        q = quantize(x, *pair, axis=axis, dtype=dtype)
        assert torch.equal(q, quantize(x.float(), *pair, axis=axis, dtype=dtype))
        faked = fake_quantize(x, *pair, axis=axis, dtype=dtype)
        assert faked.dtype == float_dtype
        assert torch.equal(faked, dequantize(q, *pair, axis=axis).to(float_dtype))


def test_parameters_are_chosen_without_gradient():
    scale, zero_point = choose_qparams(torch.nn.Parameter(spread(3, 4)), axis=0)
    assert (scale.requires_grad, zero_point.requires_grad) == (False, False)


@every_scheme
@pytest.mark.parametrize(
    "values", [[], [0.0], [0.0] * 9, [-0.0, 0.0], [-1e-45, 1e-45], [-1e-39, 1e-38], [FLT_MIN]], ids=str
)
def test_data_without_size_gets_scale_one(dtype, symmetric, values):
    x = torch.tensor(values)
    scale, zero_point = choose_qparams(x, dtype=dtype, symmetric=symmetric)
    assert scale == 1
    assert zero_point == CODES[dtype][0] + (128 if symmetric else 0)
    assert (quantize(x, scale, zero_point, dtype=dtype) == zero_point).all()
    assert (fake_quantize(x, scale, zero_point, dtype=dtype) == 0).all()


@every_scheme
def test_smallest_scale_is_normal(dtype, symmetric):
    steps = 127 if symmetric else 255
    scale, zero_point = choose_qparams(torch.tensor([FLT_MIN * steps]), dtype=dtype, symmetric=symmetric)
    assert scale == FLT_MIN
    assert quantize(torch.tensor(FLT_MIN * steps), scale, zero_point, dtype=dtype) == zero_point + steps
    assert choose_qparams(torch.tensor([FLT_MIN * (steps - 1)]), dtype=dtype, symmetric=symmetric)[0] == 1


@every_scheme
@pytest.mark.parametrize("x", [[3e38], [-3e38], [-3e38, 3e38], [5.0] * 4, [-0.1] * 4], ids=str)
def test_huge_and_constant_data(dtype, symmetric, x):
    x = torch.tensor(x)
    scale, zero_point = choose_qparams(x, dtype=dtype, symmetric=symmetric)
    assert scale.isfinite()
    restored = fake_quantize(x, scale, zero_point, dtype=dtype)
    assert restored.isfinite().all()
    assert round_trip_steps(x, scale, restored) <= HALF_STEP


@pytest.mark.parametrize(("shape", "axis"), [((3, 0), 0), ((3, 0), 1), ((0,), 0), ((0, 5), 1), ((2, 0, 4), -1)])
def test_empty_channels(shape, axis):
    scale, zero_point = choose_qparams(torch.empty(shape), axis=axis)
    assert torch.equal(scale, torch.ones(shape[axis]))
    assert torch.equal(zero_point, torch.zeros(shape[axis], dtype=torch.int32))
    assert fake_quantize(torch.empty(shape), scale, zero_point, axis=axis).shape == shape


@every_scheme
@pytest.mark.parametrize(("lo", "hi"), [(math.nan, 1.0), (-1.0, math.nan), (-math.inf, 1.0), (-1.0, math.inf)])
def test_non_finite_range_dequantizes_to_nan(dtype, symmetric, lo, hi):
    """A row of activations with NaN gives NaN, and the other rows are unaffected."""
    lo, hi = torch.tensor([-1.0, lo]), torch.tensor([1.0, hi])
    scale, zero_point = qparams_from_range(lo, hi, dtype=dtype, symmetric=symmetric)
    assert scale.isnan().tolist() == [False, True]
    assert zero_point[1] == CODES[dtype][0] + (128 if symmetric else 0)
    row = fake_quantize(torch.ones(2, 3), scale, zero_point, axis=0, dtype=dtype)
    assert row.isnan().tolist() == [[False] * 3, [True] * 3]


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_choose_refuses_non_finite_data(axis, bad):
    x = spread(4, 5, seed=11)
    x[1, 2] = x[3, 0] = bad
    with pytest.raises(ValueError, match=r"choose_qparams: .* got 2 NaN or Inf among the 20 of x.*nan_to_num"):
        choose_qparams(x, axis=axis)


def test_float64_beyond_float32_counts_as_infinite():
    x = torch.tensor([1e300, 1.0], dtype=torch.float64)
    with pytest.raises(ValueError, match="got 1 NaN or Inf among the 2"):
        choose_qparams(x)
    assert quantize(x, 0.1).tolist() == [127, 10]


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("dtype", CODES)
def test_everything_traces_as_one_graph(dtype, axis):
    def whole(x):
        scale, zero_point = choose_qparams(x, dtype=dtype, symmetric=False, axis=axis)
        return scale, zero_point, fake_quantize(x, scale, zero_point, axis=axis, dtype=dtype)

    x = spread(4, 33, seed=12)
    compiled = torch.compile(whole, fullgraph=True, backend="eager")
    for ours, expected in zip(compiled(x), whole(x), strict=True):
        assert torch.equal(ours, expected)

    x[2, 3] = math.nan  # a compiled graph can't raise for it, but its scale is NaN
    assert compiled(x)[0].isnan().any()


def test_number_arguments_trace():
    compiled = torch.compile(lambda x, scale: quantize(x, scale, 3), fullgraph=True, backend="eager")
    x = spread(4, 33, seed=13)
    for scale in (0.013, 0.02):
        assert torch.equal(compiled(x, scale), quantize(x, scale, 3))


def test_sqnr_known_values():
    ref = torch.tensor([3.0, 4.0])
    assert sqnr_db(ref, ref) == math.inf
    assert sqnr_db(torch.zeros(2), torch.zeros(2)) == math.inf
    assert sqnr_db(torch.empty(0), torch.empty(0)) == math.inf
    assert sqnr_db(torch.zeros(2), ref) == -math.inf
    assert sqnr_db(ref, torch.tensor([3.0, math.inf])) == -math.inf
    assert math.isnan(sqnr_db(ref, torch.tensor([3.0, math.nan])))
    # 10 log10(25 / 0.25), every number exact in binary
    assert sqnr_db(ref, torch.tensor([3.0, 4.5])) == 20.0
    assert sqnr_db(ref.bfloat16(), torch.tensor([3.0, 4.5])) == 20.0
    assert sqnr_db(1e30 * ref, torch.zeros(2)) == 0.0  # in float64: 1e60 overflows float32


X = torch.zeros(2, 3)
Q = torch.zeros(2, 3, dtype=torch.int8)
ONES = torch.ones(3)
INT8 = {"dtype": torch.int8, "symmetric": True}
# fmt: off
ERRORS = [
    (lambda: quantize(Q, 1.0), TypeError, r"quantize: x must be floating .* got torch.int8. Pass x.float"),
    (lambda: choose_qparams(Q), TypeError, "choose_qparams: x must be floating point"),
    (lambda: qparams_from_range(Q, X, **INT8), TypeError, "qparams_from_range: lo must be floating point"),
    (lambda: qparams_from_range(X, Q, **INT8), TypeError, "qparams_from_range: hi must be floating point"),
    (lambda: quantize(X, 1.0, dtype=torch.int32), TypeError, "dtype must be torch.int8 or torch.uint8, got"),
    (lambda: choose_qparams(X, dtype=torch.qint8), TypeError, "dtype must be torch.int8 .* got torch.qint8"),
    (lambda: dequantize(X, 1.0), TypeError, "q must be torch.int8 .* Make codes with torchq.quantize"),
    (lambda: quantize(X, ONES), ValueError, r"without axis, scale must be .* got shape \[3\]. Pass axis="),
    (lambda: dequantize(Q, 1.0, ONES.int()), ValueError, "without axis, zero_point must be one number"),
    (lambda: quantize(X, ONES, axis=0), ValueError, r"axis=0, scale .* \[2\] .* \[2, 3\], got \[3\]"),
    (lambda: quantize(X, 1.0, ONES.int(), axis=0), ValueError, "axis=0, zero_point must have shape"),
    (lambda: dequantize(Q, ONES[None], axis=-1), ValueError, r"axis=1, .* got \[1, 3\]. Pass one value"),
    (lambda: quantize(X, ONES, axis=2), ValueError, r"axis .* the 2 dimensions of x \[2, 3\], got 2"),
    (lambda: choose_qparams(X, axis=-3), ValueError, "choose_qparams: axis must be one of the 2 .* got -3"),
    (lambda: choose_qparams(X[0, 0], axis=0), ValueError, r"0 dimensions of x \[\], got 0. Pass axis=None"),
    (lambda: quantize(X, 0.0), ValueError, "scale must be positive, finite and at .* 1.18e-38, got 0.0"),
    (lambda: fake_quantize(X, -1), ValueError, "scale must be positive.*got -1. Choose one with"),
    (lambda: dequantize(Q, math.nan), ValueError, "dequantize: scale must be .* got nan"),
    (lambda: quantize(X, math.inf), ValueError, "scale must be .*finite.* got inf"),
    (lambda: quantize(X, 1e-40), ValueError, "at least 1.18e-38, got 1e-40"),
    (lambda: quantize(X, 1.0, 128), ValueError, r"zero_point .* \[-128, 127\] .*int8, got 128. An int8"),
    (lambda: dequantize(Q.byte(), 1.0, -1), ValueError, r"zero_point .* \[0, 255\] .*uint8, got -1"),
    (lambda: quantize(X, 1.0, ONES[0]), TypeError, "zero_point must be an int or an integer tensor, got"),
    (lambda: sqnr_db(X, X[0]), ValueError, r"got reference \[2, 3\] and approximation \[3\]. Reshape"),
]
# fmt: on


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_errors_say_what_and_what_to_do(call, error, message):
    with pytest.raises(error, match=r"^torchq\.") as caught:
        call()
    assert caught.match(message)
