"""torchq.ops.attention as an op of torch: errors, gradients, opcheck, torch.compile."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from helpers.attention import operands, oracle
from torchq.numerics.attention import float_attention
from torchq.ops import attention

pytestmark = [  # torch.compile uses deprecated parts of torch
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


def tensor(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


Q = tensor(2, 4, 5, 8)
BAD = {
    "three dimensions": ((Q[0], Q[0], Q[0]), {}, r"q must have four dimensions \(batch, heads, .*got \(4, 5, 8\). Add"),
    "dtype": ((Q.double(), Q.double(), Q.double()), {}, r"q must be float32, bfloat16 or float16, got float64"),
    "dtypes": ((Q, Q.half(), Q), {}, r"one dtype, but q is float32 and k is float16"),
    "device": ((Q, Q, Q.to("meta")), {}, r"torchq::attention: v is on meta, q on cpu"),
    "batch": ((Q, Q[:1], Q[:1]), {}, r"same batch size \(q: \(2, 4, 5, 8\), k: \(1, 4, 5, 8\), v"),
    "heads of k and v": ((Q, Q[:, :2], Q), {}, r"k and v must have the same number of heads"),
    "group": ((Q, Q[:, :3], Q[:, :3]), {}, r"the heads of q must be a multiple of those of k and v"),
    "no heads": ((Q, Q[:, :0], Q[:, :0]), {}, r"the heads of q must be a multiple of those of k and v"),
    "lengths": ((Q, Q, Q[:, :, :4]), {}, r"k and v must have the same length"),
    "head sizes": ((Q, Q[..., :7], Q), {}, r"q and k must have the same head size"),
    "mask shape": ((Q, Q, Q, tensor(3, 5, 5)), {}, r"mask must broadcast to .* = \(2, 4, 5, 5\), got \(3, 5, 5\)"),
    "mask dimensions": ((Q, Q, Q, tensor(1, 1, 1, 1, 5)), {}, r"mask must broadcast to .*got \(1, 1, 1, 1, 5\)"),
    "mask dtype": ((Q, Q, Q, tensor(5, dtype=torch.int64)), {}, r"mask must be bool .* got int64"),
    "window": ((Q, Q, Q), {"window": 0}, r"window must be positive: .*Got 0"),
    "offset": ((Q, Q, Q), {"offset": 2**62}, r"offset must be the position of the first row among the keys, got 4611"),
}


@pytest.mark.parametrize(("args", "kwargs", "message"), BAD.values(), ids=BAD)
def test_bad_arguments(args, kwargs, message):
    with pytest.raises(RuntimeError, match=f"torchq::attention: .*{message}" if "::" not in message else message):
        attention(*args, **kwargs)


def test_an_unknown_scheme():
    with pytest.raises(ValueError, match=r"torchq.ops.attention: scheme must be one of \('float32'.*, got 'int4'\."):
        attention(Q, Q, Q, scheme="int4")
    with pytest.raises(RuntimeError, match=r"torchq::attention: scheme must be in \[0, \d\), got 9"):
        torch.ops.torchq.attention(Q, Q, Q, scheme=9)


def test_a_resized_storage(generator):
    q, k, v = (t.contiguous() for t in operands(generator))
    k.untyped_storage().resize_(8)
    with pytest.raises(RuntimeError, match=r"torchq::attention: the storage of k .* holds only 8 bytes"):
        attention(q, k, v)


# ---- Gradients ----


CALLS = {
    "plain": lambda q, k, v, mask: ((q, k, v), {}),
    "mask": lambda q, k, v, mask: ((q, k, v, mask), {"scale": 0.5}),
    "causal": lambda q, k, v, mask: ((q, k, v), {"is_causal": True, "offset": 2}),
    "window": lambda q, k, v, mask: ((q, k, v, mask), {"window": 3}),
    "no keys": lambda q, k, v, mask: ((q, k, v), {"is_causal": True, "offset": -3}),
}


@pytest.mark.parametrize("call", CALLS)
def test_gradients_are_those_of_the_formula(generator, call):
    """To q, k, v, and a mask that is added; in float32, so within 1e-5 of float64."""
    leaves = [t.requires_grad_() for t in operands(generator, heads=4, kv_heads=2)]
    leaves.append(torch.randn(4, 1, 7, generator=generator).requires_grad_())
    exact = [t.detach().double().requires_grad_() for t in leaves]
    args, kwargs = CALLS[call](*leaves)
    y = attention(*args, **kwargs)
    dy = torch.randn(y.shape, generator=generator)
    found = torch.autograd.grad(y, args, dy)
    args, kwargs = CALLS[call](*exact)
    for got, want in zip(found, torch.autograd.grad(oracle(*args, **kwargs), args, dy.double()), strict=True):
        assert torch.allclose(got.double(), want, atol=1e-5)


def test_only_what_wants_a_gradient_gets_one(generator):
    q, k, v = operands(generator)
    assert not attention(q, k, v).requires_grad
    k.requires_grad_()
    y = attention(q, k, v)
    y.sum().backward()
    assert [t.grad is not None for t in (q, k, v)] == [False, True, False]
    with torch.no_grad():
        assert not attention(q, k, v).requires_grad


def test_float_attention_is_torchs(generator):
    q, k, v = operands(generator)
    mask = torch.randn(5, 7, generator=generator)
    sees = torch.rand(5, 7, generator=generator) < 0.5
    for one in (None, mask, sees):
        expected = scaled_dot_product_attention(q, k, v, one)
        assert torch.allclose(float_attention(q, k, v, one), expected, atol=1e-6)


# ---- In torch ----


def samples():
    generator = torch.Generator().manual_seed(0)
    q, k, v = operands(generator, heads=4, kv_heads=2)
    yield q, k, v
    yield q.contiguous(), k, v, torch.randn(5, 7, generator=generator), True, 0.3, 2, 4
    yield q.bfloat16(), k.bfloat16(), v.bfloat16()[..., :5], torch.ones(4, 1, 7, dtype=torch.bool)


@pytest.mark.slow(seconds=8)
@pytest.mark.parametrize("args", list(samples()), ids=lambda args: f"{len(args)} arguments")
def test_opcheck(args):
    """Schema, fake (static and dynamic shapes) and the real op agree."""
    assert set(torch.library.opcheck(torch.ops.torchq.attention, args).values()) == {"SUCCESS"}


@pytest.mark.slow(seconds=8)
def test_compile(generator):
    """The whole graph, also where a gradient is wanted."""
    q, k, v = operands(generator)

    def doubled(q, k, v):
        return attention(q, k, v, is_causal=True) * 2

    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), doubled(q, k, v))
    q.requires_grad_()
    (got,) = torch.autograd.grad(compiled(q, k, v).sum(), q)
    (want,) = torch.autograd.grad(doubled(q, k, v).sum(), q)
    assert torch.allclose(got, want, atol=1e-6)
    torch.compiler.reset()
