"""torchq.ops.attention in float32 against the formula in float64, and against torch's own."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from helpers.attention import assert_exact_to_rounding, operands, oracle
from helpers.compare import assert_identical
from torchq import _C, kernels
from torchq.ops import attention

MIN = torch.finfo(torch.float32).min


def shapes():
    """Shapes around tiles of 6 rows, panels of 16 and blocks of 48 rows, and head sizes from 1 to 256."""
    yield from itertools.product([(1, 1), (2, 3)], [1, 5, 6, 7, 13], [1, 15, 16, 17, 33], [8])
    yield from [((1, 2), rows, 20, 16) for rows in (47, 48, 49, 97)]
    yield from [((1, 2), 7, 70, depth) for depth in (1, 3, 16, 17, 31, 32, 64, 80, 96, 100, 128, 255, 256)]
    yield ((1, 1), 3, 3000, 16)


def test_shapes(kernel, generator):
    for (batch, heads), rows, keys, depth in shapes():
        q, k, v = operands(generator, batch, heads, rows, keys, depth)
        assert_exact_to_rounding(attention(q, k, v), q, k, v, case=(batch, heads, rows, keys, depth))


@pytest.mark.parametrize("columns", [1, 7, 16, 40])
def test_v_may_have_another_head_size(kernel, generator, columns):
    q, k, v = operands(generator, depth=20, columns=columns)
    assert_exact_to_rounding(attention(q, k, v), q, k, v)


@pytest.mark.parametrize("empty", ["batch", "heads", "rows", "keys", "depth"])
def test_empty(kernel, generator, empty):
    """Without keys all is 0; with no head size all scores are 0, and y is the mean of v."""
    sizes = {"batch": 2, "heads": 3, "rows": 4, "keys": 5, "depth": 6}
    q, k, v = operands(generator, **sizes | {empty: 0}, columns=6)
    y = attention(q, k, v)
    assert y.shape == (*q.shape[:3], 6)
    assert_exact_to_rounding(y, q, k, v)
    assert torch.allclose(y, scaled_dot_product_attention(q, k, v))
    assert attention(q, k, v[..., :0]).shape == (*q.shape[:3], 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dtypes(kernel, generator, dtype):
    q, k, v = operands(generator, rows=9, keys=37, depth=24, dtype=dtype)
    mask = torch.randn(9, 37, generator=generator)
    for args in [(), (mask,), (mask.to(dtype),)]:
        assert_exact_to_rounding(attention(q, k, v, *args), q, k, v, *args)


def views(t: Tensor):
    """Gives (B, H, L, D) tensors of these values that lie otherwise in memory."""
    yield t.contiguous()
    yield t.transpose(2, 3).contiguous().transpose(2, 3)
    yield t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    yield torch.stack([t, t], dim=-1)[..., 0]
    yield torch.cat([t, t], dim=2)[:, :, : t.shape[2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides(kernel, generator, dtype):
    """The layout in memory changes no bit, and y lies as q does."""
    q, k, v = operands(generator, rows=9, keys=20, depth=18, dtype=dtype)
    expected = attention(q, k, v)
    for a, b, c in zip(views(q), views(k), views(v), strict=True):
        assert_identical(attention(a, b, c), expected)
        assert attention(a, k, v).stride() == scaled_dot_product_attention(a, k, v).stride() or a.stride(3) != 1
    one = k[:1, :1]
    assert_identical(attention(q, one.expand(2, 3, -1, -1), v), attention(q, one.repeat(2, 3, 1, 1), v))


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_grouped_queries(kernel, generator, kv_heads):
    """Each head of k and v serves heads / kv_heads adjacent heads of q."""
    q, k, v = operands(generator, heads=6, kv_heads=kv_heads, rows=7, keys=19, depth=16)
    mask = torch.randn(2, 6, 7, 19, generator=generator)
    for args in [(), (mask,), (None, True)]:
        y = attention(q, k, v, *args)
        assert_exact_to_rounding(y, q, k, v, *args)
        repeated = (t.repeat_interleave(6 // kv_heads, dim=1) for t in (k, v))
        assert_identical(y, attention(q, *repeated, *args))


MASK_SHAPES = [(), (1,), (20,), (9, 1), (9, 20), (1, 1, 20), (3, 1, 1), (2, 1, 1, 20), (2, 3, 9, 20), (1, 3, 9, 1)]


@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
def test_masks(kernel, generator, shape):
    """Boolean and added ones of any shape that broadcasts, and in any layout."""
    q, k, v = operands(generator, rows=9, keys=20, depth=8)
    added = torch.randn(shape, generator=generator)
    sees = torch.rand(shape, generator=generator) < 0.7
    hidden = added.masked_fill(~sees, -torch.inf)
    for mask in (added, sees, hidden):
        y = attention(q, k, v, mask)
        assert_exact_to_rounding(y, q, k, v, mask)
        expanded = mask.expand(2, 3, 9, 20)
        for view in (expanded, expanded.contiguous(), expanded.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)):
            assert_identical(attention(q, k, v, view), y)


POSITIONS = [
    {"is_causal": True},
    {"is_causal": True, "offset": 3},
    {"is_causal": True, "offset": -4},
    {"is_causal": True, "offset": 70},
    {"window": 1},
    {"window": 5},
    {"window": 9, "offset": 40},
    {"is_causal": True, "window": 20, "offset": 30},
    {"is_causal": True, "window": 10**18, "offset": -(10**18)},
]


@pytest.mark.parametrize("positions", POSITIONS, ids=str)
@pytest.mark.parametrize(("rows", "keys"), [(1, 50), (13, 50), (60, 50), (100, 7)])
def test_positions(kernel, generator, positions, rows, keys):
    """Causal, a cache of earlier keys, sliding windows; alone and together with a mask."""
    q, k, v = operands(generator, rows=rows, keys=keys, depth=16)
    mask = torch.rand(2, 1, rows, keys, generator=generator) < 0.8
    for args in [(), (mask,)]:
        assert_exact_to_rounding(attention(q, k, v, *args, **positions), q, k, v, *args, **positions)


def test_causal_is_torchs(kernel, generator):
    for rows, keys in [(9, 9), (5, 9), (9, 5)]:
        q, k, v = operands(generator, rows=rows, keys=keys)
        expected = scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
        assert torch.allclose(attention(q, k, v, is_causal=True).double(), expected, atol=1e-6)


def test_a_row_at_a_time_with_a_cache(kernel, generator):
    """Decoding: row i alone, with the keys up to its own, gives what it gives among all rows."""
    q, k, v = operands(generator, rows=20, keys=20, depth=16)
    whole = attention(q, k, v, is_causal=True)
    for i in range(20):
        row = attention(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1], is_causal=True, offset=i)
        assert torch.allclose(row, whole[:, :, i : i + 1], atol=2e-6)


@pytest.mark.parametrize("scale", [0.0, 0.3, -1.0, 4.0])
def test_scale(kernel, generator, scale):
    q, k, v = operands(generator, depth=4)
    assert torch.allclose(attention(q, k, v, scale=scale).double(), oracle(q, k, v, scale=scale), atol=1e-5)


# ---- Rows without keys, NaN, infinities ----


def test_rows_without_any_key_are_zeros(kernel, generator):
    q, k, v = operands(generator, rows=7, keys=20)
    sees = torch.ones(7, 20, dtype=torch.bool)
    sees[[1, 6]] = False
    for mask in (sees, torch.zeros(7, 20).masked_fill(~sees, -torch.inf)):
        y = attention(q, k, v, mask)
        assert ((y == 0).all(-1) == ~sees.any(-1)).all()
        assert torch.allclose(y, scaled_dot_product_attention(q, k, v, mask), atol=1e-6)


def test_a_row_of_the_smallest_float_sees_all_keys(kernel, generator):
    """As transformers mark padding: the scores vanish beside finfo.min, and all weights are equal."""
    q, k, v = operands(generator, rows=7, keys=20)
    mask = torch.zeros(7, 20)
    mask[1], mask[2, 5:], mask[3], mask[3, 4] = MIN, MIN, MIN, MIN / 2
    y = attention(q, k, v, mask)
    assert torch.allclose(y[:, :, 1], v.mean(2), atol=1e-6)
    assert torch.allclose(y[:, :, 2], attention(q, k[:, :, :5], v[:, :, :5])[:, :, 2], atol=1e-6)
    assert torch.allclose(y[:, :, 3], v[:, :, 4], atol=1e-6)
    assert torch.allclose(y, scaled_dot_product_attention(q, k, v, mask), atol=1e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["q", "k", "v"])
@pytest.mark.parametrize("masked", [False, True])
def test_nan_and_infinities(kernel, generator, value, which, masked):
    """NaN and infinities appear where the formula has them, and nowhere else."""
    tensors = operands(generator, rows=8, keys=21, depth=16)
    tensors[which] = tensors[which].clone()
    tensors[which][0, 1, 2, 3] = value
    mask = torch.ones(8, 21, dtype=torch.bool)
    mask[:, 2] = not masked
    y, expected = attention(*tensors, mask), oracle(*tensors, mask)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.allclose(y.double(), expected, atol=1e-5, equal_nan=True)
    if which or value != value:
        assert not expected.isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_in_the_mask(kernel, generator, value):
    q, k, v = operands(generator, rows=8, keys=21)
    mask = torch.zeros(8, 21)
    mask[3, 20] = value
    y = attention(q, k, v, mask)
    assert (y.isnan().all(-1) == (torch.arange(8) == 3)).all()
    assert (y.isfinite().all(-1) == (torch.arange(8) != 3)).all()


def test_large_scores(kernel, generator):
    """The largest is subtracted before exp, so no size of scores overflows."""
    q, k, v = operands(generator, rows=8, keys=21)
    y = attention(q * 1e15, k * 1e15, v)
    best = (q @ k.mT).argmax(-1)
    assert torch.allclose(y, v.gather(2, best[..., None].expand(-1, -1, -1, 8)))


# ---- Threads ----


def test_threads_change_no_bit(kernel, generator, set_threads):
    for heads in (1, 5, 16):
        q, k, v = operands(generator, batch=1, heads=heads, rows=130, keys=100, depth=64)
        results = []
        for threads in (1, 2, 3):
            set_threads(threads)
            results.append(attention(q, k, v, is_causal=True))
        for y in results[1:]:
            assert_identical(y, results[0])


# ---- Kernels ----


def test_the_kernel_goes_with_the_forced_one(kernel):
    """Attention uses the vectors of the GEMM kernel that is forced, and no wider ones."""
    features = _C.cpu_features()
    widest = "avx512_bf16" if "avx512_bf16" in features else "avx512"
    tiles = "amx_bf16" if {"amx_bf16", "avx512_bf16"} <= set(features) else widest
    beside = {"reference": "reference", "avx2": "avx2", "avx_vnni": "avx2", "amx_int8": tiles}
    beside |= dict.fromkeys(("avx512_vnni", "avx512vl_vnni"), widest)
    assert kernels.active_attention() == beside.get(kernel, "neon")
