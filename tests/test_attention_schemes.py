"""The schemes of torchq.ops.attention in int8 codes and bfloat16: against their definitions, and across kernels."""

import pytest
import torch

from helpers.attention import operands, oracle
from helpers.compare import assert_identical
from torchq import kernels, sqnr_db
from torchq.numerics.attention import simulated_int8
from torchq.ops import ATTENTION_SCHEMES, attention

CODED = ("int8_bfloat16", "int8")
ROUNDED = ("bfloat16", *CODED)
MIN = torch.finfo(torch.float32).min

# More than the four rows that are computed in place. Around tiles of 6 rows, panels of 16, groups of 4 and of 64.
SHAPES = [(5, 1, 1), (6, 15, 3), (7, 16, 16), (13, 17, 19), (49, 33, 31), (97, 70, 64), (12, 300, 80), (9, 65, 256)]
CALLS = {
    "plain": {},
    "causal": {"is_causal": True},
    "causal, cached": {"is_causal": True, "offset": 9, "scale": 0.3},
    "window": {"window": 20, "offset": 5},
    "hidden": {"is_causal": True, "offset": -3},
}


@pytest.mark.parametrize("kwargs", CALLS.values(), ids=CALLS)
def test_int8_is_its_definition(kernel, generator, kwargs):
    """Integers and floats are those of the definition in torch's operations, on every kernel."""
    for rows, keys, depth in SHAPES:
        q, k, v = operands(generator, heads=4, kv_heads=2, rows=rows, keys=keys, depth=depth)
        expected = simulated_int8(q, k + 3, v, **kwargs)
        assert_identical(attention(q, k + 3, v, scheme="int8", **kwargs), expected, (rows, keys, depth))


@pytest.mark.parametrize("shape", [(20,), (9, 20), (2, 1, 1, 20), (2, 3, 9, 20)], ids=str)
def test_int8_with_masks(kernel, generator, shape):
    q, k, v = operands(generator, rows=9, keys=20, depth=24)
    sees = torch.rand(shape, generator=generator) < 0.7
    for mask in (torch.randn(shape, generator=generator), sees, torch.zeros(shape).masked_fill(~sees, MIN)):
        assert_identical(attention(q, k, v, mask, scheme="int8"), simulated_int8(q, k, v, mask))


def test_other_layouts_and_dtypes_change_nothing(kernel, generator):
    """A bfloat16 q, k, v gives the float32 result of the same values, rounded."""
    for scheme in ROUNDED:
        q, k, v = operands(generator, rows=9, keys=20, depth=18, dtype=torch.bfloat16)
        expected = attention(q.float(), k.float(), v.float(), scheme=scheme)
        assert_identical(attention(q, k, v, scheme=scheme), expected.bfloat16(), scheme)
        turned = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in (q, k, v)]
        assert_identical(attention(*turned, scheme=scheme), expected.bfloat16(), scheme)


# dB on normal data with 128 keys: measured 49 to 50, 41 to 42 and 38; 35 with 1500 keys.
FLOORS = {"bfloat16": 43, "int8_bfloat16": 39, "int8": 36}


@pytest.mark.parametrize("scheme", ROUNDED)
def test_accuracy(kernel, generator, scheme):
    q, k, v = operands(generator, rows=40, keys=128, depth=64)
    assert sqnr_db(oracle(q, k, v), attention(q, k, v, scheme=scheme)) > FLOORS[scheme]


@pytest.mark.parametrize("scheme", CODED)
def test_an_offset_of_all_keys_costs_nothing(kernel, generator, scheme):
    """Softmax does not see it, and the codes are of keys less their mean. Without that it costs 10 dB and more."""
    q, k, v = operands(generator, rows=40, keys=128, depth=64)
    k = k + 10 * torch.randn(64, generator=generator)
    assert sqnr_db(oracle(q, k, v), attention(q, k, v, scheme=scheme)) > FLOORS[scheme]


@pytest.mark.parametrize("scheme", ROUNDED)
def test_few_rows_are_computed_in_float32(kernel, generator, scheme):
    """Decoding: up to four rows on a head of k and v are read in place, which takes less time than packing."""
    for heads, rows in [(2, 1), (2, 2), (4, 1), (2, 4)]:
        q, k, v = operands(generator, heads=heads, kv_heads=2, rows=rows, keys=50, depth=20)
        assert_identical(attention(q, k, v, scheme=scheme), attention(q, k, v))


@pytest.mark.parametrize("scheme", ROUNDED)
def test_rows_without_any_key_are_zeros(kernel, generator, scheme):
    q, k, v = operands(generator, rows=7, keys=20)
    sees = torch.ones(7, 20, dtype=torch.bool)
    sees[[1, 6]] = False
    y = attention(q, k, v + 5, sees, scheme=scheme)
    assert ((y == 0).all(-1) == ~sees.any(-1)).all()
    assert (attention(q, k, v + 5, is_causal=True, offset=-3, scheme=scheme)[:, :, :3] == 0).all()
    assert (attention(q, k[:, :, :0], v[:, :, :0], scheme=scheme) == 0).all()


@pytest.mark.parametrize("scheme", ROUNDED)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_are_not_hidden(kernel, generator, scheme, value):
    """In q they make their row NaN; in k all rows, or those where an infinity is no weight of 0; in v their column."""
    q, k, v = operands(generator, rows=8, keys=21, depth=16)
    bad = [t.clone() for t in (q, k, v)]
    for t in bad:
        t[0, 1, 2, 3] = value
    row = attention(bad[0], k, v, scheme=scheme)
    assert row[0, 1, 2].isnan().all()
    assert row.isnan().sum() == 16
    rows = attention(q, bad[1], v, scheme=scheme)
    assert rows[0, 1].isnan().any()
    assert rows.isnan().sum() == rows[0, 1].isnan().sum()
    column = attention(q, k, bad[2], scheme=scheme)
    assert not column[0, 1, :, 3].isfinite().any()
    assert (~column.isfinite()).sum() == 8


def test_extreme_values(kernel, generator):
    """Zeros, denormal and huge numbers, and one value in all of v, whose range is empty."""
    q, k, v = operands(generator, rows=8, keys=21, depth=16)
    for x in (torch.zeros_like(k), k * 1e-42, k * 1e37):
        assert_identical(attention(q, x, v, scheme="int8"), simulated_int8(q, x, v))
        assert_identical(attention(q, k, x, scheme="int8"), simulated_int8(q, k, x))
    assert (attention(q, k, torch.full_like(v, 0.3), scheme="int8") == 0.3).all()


@pytest.mark.parametrize("scheme", ATTENTION_SCHEMES)
def test_threads_change_no_bit(kernel, generator, set_threads, scheme):
    for heads in (1, 5, 16):
        q, k, v = operands(generator, batch=1, heads=heads, rows=130, keys=100, depth=64)
        results = []
        for threads in (1, 2, 3):
            set_threads(threads)
            results.append(attention(q, k, v, is_causal=True, scheme=scheme))
        for y in results[1:]:
            assert_identical(y, results[0])


def test_the_forced_kernel_multiplies_the_codes(kernel, generator):
    q, k, v = operands(generator, rows=130, keys=100, depth=64)
    attention(q, k, v, scheme="int8")
    assert kernels.last_used() == kernel


def test_too_many_keys(generator):
    """int32 holds the sums of 65793 keys; the sums of floats have no limit."""
    q, k, v = operands(generator, batch=1, heads=1, rows=5, keys=65794, depth=2)
    with pytest.raises(RuntimeError, match=r"exact for up to 65793 keys, got 65794\. Use scheme 2 \(int8_bfloat16\)\."):
        attention(q, k, v, scheme="int8")
    for scheme in ("float32", "bfloat16", "int8_bfloat16"):
        assert sqnr_db(oracle(q, k, v), attention(q, k, v, scheme=scheme)) > 25
    most = attention(q, k[:, :, :-1], v[:, :, :-1], scheme="int8")
    assert_identical(most, simulated_int8(q, k[:, :, :-1], v[:, :, :-1]))
