"""Rotary position embedding in one call: the bits of torch's operations, and functions known by their code."""

import types

import pytest
import torch

from helpers.compare import assert_identical
from helpers.decoders import ROTARY, turning
from helpers.numbers import normal
from torchq import _C
from torchq.modules.rotary_code import rotary_of


def by_torch(x, cos, sin):
    """Of x (batch, rows, heads, columns)."""
    x = x.transpose(1, 2)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    one, two = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-two, one), dim=-1) * sin).transpose(1, 2)


def angles(batch, rows, columns, seed=1):
    return normal(batch, rows, columns, seed=seed), normal(batch, rows, columns, seed=seed + 1)


# ---- The call -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 16, 64), (2, 7, 3, 6), (1, 33, 2, 128), (3, 1, 1, 2), (2, 300, 4, 64)])
@pytest.mark.parametrize("alike", [True, False])
def test_it_has_torchs_bits(shape, dtype, alike):
    batch, rows, _, columns = shape
    x = (normal(*shape) * 10 ** normal(*shape, seed=3)).to(dtype)
    cos, sin = (each.to(dtype) for each in angles(1 if alike else batch, rows, columns))
    y = _C.call_rotary(x, cos, sin)
    assert_identical(y, by_torch(x, cos, sin).contiguous())


def test_it_is_the_rotation():
    """In double, of angles as a model has them."""
    x, where = normal(2, 50, 3, 64), torch.arange(50).double()
    angle = where[:, None] * 10000.0 ** (-torch.arange(0, 64, 2).double() / 64)
    angle = torch.cat((angle, angle), dim=-1)[None]
    y = _C.call_rotary(x, angle.cos().float(), angle.sin().float())
    torch.testing.assert_close(y.double(), by_torch(x.double(), angle.cos(), angle.sin()), rtol=0, atol=1e-6)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=0)


def test_special_values_are_as_torchs():
    x, (cos, sin) = normal(1, 4, 2, 8), angles(1, 4, 8)
    x[0, 0, 0, 0], x[0, 1, 0, 5], x[0, 2] = torch.nan, torch.inf, -0.0
    sin[0, 3, 2] = torch.nan
    for dtype in (torch.float32, torch.bfloat16):
        given = [each.to(dtype) for each in (x, cos, sin)]
        torch.testing.assert_close(_C.call_rotary(*given), by_torch(*given), rtol=0, atol=0, equal_nan=True)


def test_angles_may_lie_anywhere():
    x, (cos, sin) = normal(2, 5, 3, 8), angles(5, 2, 16)
    for one, other in (
        (cos[..., :8].transpose(0, 1), sin[..., 8:].transpose(0, 1)),
        (cos[:1, :1, 2:10].expand(2, 5, 8), sin[:1, :1, 3:11].expand(1, 5, 8)),
    ):
        assert_identical(_C.call_rotary(x, one, other), by_torch(x, one, other).contiguous())


def test_what_takes_more_is_left_to_torch():
    x, (cos, sin) = normal(2, 5, 3, 8), angles(2, 5, 8)
    strided = normal(2, 3, 5, 8).transpose(1, 2)
    others = [
        (x[0], cos, sin),
        (strided, cos, sin),
        (x, cos[..., :4], sin[..., :4]),  # some of the columns
        (x, cos, sin[..., :4]),
        (x[..., :7].contiguous(), cos[..., :7], sin[..., :7]),
        (x, cos[:, :1], sin[:, :1]),
        (x[:1], cos, sin),
        (x, cos.bfloat16(), sin),
        (x.half(), cos.half(), sin.half()),
        (x.double(), cos.double(), sin.double()),
        (x.to("meta"), cos, sin),
        (x.clone().requires_grad_(), cos, sin),
        (x, cos.clone().requires_grad_(), sin),
        (x, cos.transpose(1, 2).contiguous().transpose(1, 2), sin),
        (x, cos[0], sin[0]),
        (x, None, sin),
    ]
    for given in others:
        assert _C.call_rotary(*given) is NotImplemented
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert _C.call_rotary(x, cos, sin) is NotImplemented
    assert _C.call_rotary(x, cos) is NotImplemented


def test_no_rows_and_no_columns():
    code = rotary_of(turning(ROTARY))
    for shape in ((2, 0, 3, 8), (0, 2, 3, 8), (2, 3, 0, 8), (2, 3, 4, 0)):
        x, (cos, sin) = torch.zeros(shape), angles(1, shape[1], shape[3])
        for y in code.of(x, x, cos, sin):
            assert y.shape == x.transpose(1, 2).shape


# ---- The code -------------------------------------------------------------------------------------------------------


def test_a_function_is_known_by_what_it_computes():
    function = turning(ROTARY)
    assert rotary_of(function).function is function
    assert rotary_of(turning(ROTARY.replace("(q * cos) + (rotate_half(q) * sin)", "rotate_half(q) * sin + cos * q")))
    for given in (None, torch.cat, 1, types.SimpleNamespace):
        assert rotary_of(given) is None


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(-x2, x1)", "(x2, x1)"),
        ("(-x2, x1)", "(-x1, x2)"),
        ("x1 = x[..., : x.shape[-1] // 2]", "x1 = x[..., ::2]"),
        ("(k * cos) +", "(k * sin) +"),
        ("(q * cos) + (", "(q * cos) - ("),
        ("(q * cos) + (", "1.0000001 * (q * cos) + ("),
        ("(q * cos)", "(q.clamp(-9, 9) * cos)"),
        ("(q * cos)", "(q.clamp(-1e5, 1e5) * cos)"),
        ("(q * cos)", "(q * (1.5 * cos if q.shape[2] > 16 else cos))"),
        ("(q * cos)", "(q * (cos if q.shape[-1] == 128 else cos))"),
        ("return q_embed, k_embed", "return k_embed, q_embed"),
        ("return q_embed, k_embed", "return [q_embed, k_embed]"),
        ("return q_embed, k_embed", "return q_embed, k_embed.clone()"),
        ("return q_embed, k_embed", "print(q); return q_embed, k_embed"),
        ("return q_embed, k_embed", "q.copy_(q_embed); return q, k_embed"),
        ("return q_embed, k_embed", "sin *= 2; return q_embed, k_embed"),
        ("q_embed =", "global last; last = q; q_embed ="),
        ("(q * cos)", "(q.double() * cos).float()"),
        ("unsqueeze_dim=1", "unsqueeze_dim=2"),
        ("cos, sin, unsqueeze_dim=1", "sin, cos, unsqueeze_dim=1"),
    ],
)
def test_all_else_is_no_such_function(old, new):
    assert old in ROTARY
    assert rotary_of(turning(ROTARY.replace(old, new, 1))) is None


def test_what_it_calls_counts():
    function = turning(ROTARY)
    code = rotary_of(function)
    assert code.facts.hold()
    rotate = function.__globals__["rotate_half"]
    function.__globals__["rotate_half"] = lambda x: x
    assert not code.facts.hold()
    function.__globals__["rotate_half"] = rotate
    assert code.facts.hold()
    rotate.__code__ = (lambda x: x).__code__
    assert not code.facts.hold()
    assert rotary_of(function) is None or not rotary_of(function).facts.hold()


def test_partial_angles_go_to_the_function():
    """One that turns the first columns only, where there are angles for these only."""
    rest = "    q, q_rest = q[..., :n], q[..., n:]\n    k, k_rest = k[..., :n], k[..., n:]\n"
    source = ROTARY.replace("    cos = cos.unsqueeze", f"    n = cos.shape[-1]\n{rest}    cos = cos.unsqueeze")
    source = source.replace(
        "return q_embed, k_embed", "return torch.cat([q_embed, q_rest], -1), torch.cat([k_embed, k_rest], -1)"
    )
    function = turning(source)
    q, k, (cos, sin) = normal(2, 5, 4, 8), normal(2, 5, 2, 8, seed=5), angles(1, 5, 4)
    found = rotary_of(function).of(q, k, cos, sin)
    for y, expected in zip(found, function(q.transpose(1, 2), k.transpose(1, 2), cos, sin), strict=True):
        assert_identical(y, expected)
