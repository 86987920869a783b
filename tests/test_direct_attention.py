"""torchq._C.call_attention: the bits of the op, for whatever it takes; and NotImplemented for all else."""

import pytest
import torch

from helpers.numbers import normal
from torchq import _C, ops

INT8 = ops.SCHEME_NUMBERS["int8"]


def by_head(rows, batch=2, heads=4, columns=8, seed=0):
    """(B, H, rows, columns), as a view of (B, rows, H · columns)."""
    return normal(batch, rows, heads * columns, seed=seed).unflatten(-1, (heads, columns)).transpose(1, 2)


def call(q, k, v, mask=None, heads=0, is_causal=False, scale=None, scheme=INT8):
    return _C.call_attention(q, k, v, mask, heads, is_causal, scale, scheme)


def operands(rows=16, keys=24, **form):
    return by_head(rows, **form), by_head(keys, **form, seed=1), by_head(keys, **form, seed=2)


MASKS = {
    "none": None,
    "bool": torch.rand(2, 4, 16, 24, generator=torch.Generator().manual_seed(0)) > 0.3,
    "of keys": torch.arange(24)[None, None, None] < torch.tensor([24, 7])[:, None, None, None],
    "added": normal(2, 1, 16, 24),
    "strided": normal(2, 1, 24, 16).transpose(2, 3),
    "bfloat16": normal(1, 1, 16, 24).bfloat16(),
    "of rows": normal(1, 1, 16, 1),
    "expanded": normal(1, 1, 1, 24).expand(2, 4, 16, 24),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("scheme", ops.ATTENTION_SCHEMES)
@pytest.mark.parametrize(("is_causal", "scale"), [(False, None), (True, 0.3)])
def test_it_gives_the_bits_of_the_op(mask, scheme, is_causal, scale):
    q, k, v = operands()
    y = call(q, k, v, mask, 0, is_causal, scale, ops.SCHEME_NUMBERS[scheme])
    assert y.shape == (2, 16, 4, 8)
    assert y.is_contiguous()
    expected = ops.attention(q, k, v, mask, is_causal, scale, scheme=scheme)
    assert torch.equal(y.transpose(1, 2), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_heads_inside_rows_and_other_layouts(dtype):
    q, k, v = (x.to(dtype) for x in operands())
    expected = ops.attention(q, k, v, scheme="int8")
    assert torch.equal(call(*(x.contiguous() for x in (q, k, v))).transpose(1, 2), expected)
    rows = [x.transpose(1, 2).flatten(2) for x in (q, k, v)]
    y = call(*rows, heads=4)
    assert y.dtype is dtype
    assert torch.equal(y, expected.transpose(1, 2).flatten(2))


def test_heads_are_joined():
    q, k, v = operands()
    y = call(q, k, v, heads=-1)
    assert y.is_contiguous()
    assert torch.equal(y, call(q, k, v).flatten(2))


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_groups_share_keys(rows):
    q, k, v = by_head(rows, heads=6), by_head(24, heads=2, seed=1), by_head(24, heads=2, seed=2)
    assert torch.equal(call(q, k, v).transpose(1, 2), ops.attention(q, k, v, scheme="int8"))


def test_sizes_of_one():
    q, k, v = by_head(1, 1, 1), by_head(1, 1, 1, seed=1), by_head(1, 1, 1, seed=2)
    for mask in (None, torch.ones(1, 1, 1, 1, dtype=torch.bool), torch.zeros(1, 1, 1, 1, dtype=torch.bool)):
        assert torch.equal(call(q, k, v, mask).transpose(1, 2), ops.attention(q, k, v, mask, scheme="int8"))


Q, K, V = operands()
WRONG = {
    "a tensor in float64": (Q.double(), K.double(), V.double()),
    "codes": (Q.byte(), K.byte(), V.byte()),
    "two dtypes": (Q, K.bfloat16(), V),
    "three dimensions": (Q[0], K[0], V[0]),
    "other heads": (Q, K[:, :3], V[:, :3]),
    "other keys": (Q, K, V[:, :, :5]),
    "another batch": (Q, K[:1], V[:1]),
    "another depth": (Q, K[..., :4], V),
    "no rows": (Q[:, :, :0], K, V),
    "no keys": (Q, K[:, :, :0], V[:, :, :0]),
    "a mask that does not fit": (Q, K, V, torch.zeros(2, 1, 16, 23)),
    "a mask of two dimensions": (Q, K, V, torch.zeros(16, 24)),
    "a mask of integers": (Q, K, V, torch.zeros(2, 1, 16, 24, dtype=torch.int64)),
    "codes for a mask": (Q, K, V, torch.zeros(2, 1, 16, 24, dtype=torch.uint8)),
    "no tensor": (Q, K, None),
    "no number of heads": (Q, K, V, None, None),
    "heads that don't divide the width": (*(normal(2, 4, 32) for _ in "qkv"), None, 5),
    "negative heads": (Q, K, V, None, -2),
    "heads to be joined that are not there": (*(normal(2, 4, 32) for _ in "qkv"), None, -1),
    "no such scheme": (Q, K, V, None, 0, False, None, 4),
    "a scale that is no float": (Q, K, V, None, 0, False, 1),
}


@pytest.mark.parametrize("args", WRONG.values(), ids=WRONG)
def test_all_else_is_for_the_op(args):
    assert call(*args) is NotImplemented


def test_gradients_and_modes_are_for_the_op():
    with torch.enable_grad():
        assert call(Q.clone().requires_grad_(), K, V) is NotImplemented
        mask = torch.zeros(2, 1, 16, 24, requires_grad=True)
        assert call(Q, K, V, mask) is NotImplemented
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert call(Q, K, V) is NotImplemented
    with torch.utils._python_dispatch.TorchDispatchMode():
        assert call(Q, K, V) is NotImplemented
    assert call(torch.nn.Parameter(Q), K, V) is NotImplemented
