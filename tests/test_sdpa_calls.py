"""Modules whose own code calls torch's scaled_dot_product_attention: torchq's attention gives what it gives."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.overrides import TorchFunctionMode

from helpers.compare import assert_identical
from helpers.numbers import normal
from torchq import sqnr_db
from torchq.modules import sdpa_calls
from torchq.modules.sdpa_calls import SdpaCalls, calls_sdpa, release, sdpa_code_of


class Calling(nn.Module):
    """Nothing else."""

    def forward(self, *args, **kwargs):
        return F.scaled_dot_product_attention(*args, **kwargs)


def adopted(scheme="float32"):
    module = Calling().eval()
    SdpaCalls.adopt(module, scheme)
    return module


@pytest.fixture
def left(monkeypatch):
    """The calls that were left to torch."""
    calls, torchs = [], sdpa_calls.SDPA

    def noting(*args, **kwargs):
        calls.append(args)
        return torchs(*args, **kwargs)

    monkeypatch.setattr(sdpa_calls, "SDPA", noting)
    return calls


B, H, L, S, D = 2, 4, 9, 13, 16


def rows(length, heads=H, size=D, seed=0, dtype=torch.float32):
    """Heads as models have them: (B, L, H, D) in memory, seen as (B, H, L, D)."""
    return normal(B, length, heads, size, seed=seed).to(dtype).transpose(1, 2)


def operands(length=L, keys=S, *, heads=H, kv_heads=H, size=D, columns=D, dtype=torch.float32):
    return (
        rows(length, heads, size, seed=1, dtype=dtype),
        rows(keys, kv_heads, size, seed=2, dtype=dtype),
        rows(keys, kv_heads, columns, seed=3, dtype=dtype),
    )


def contiguous(tensors):
    return tuple(x.contiguous() for x in tensors)


def hidden(*shape):
    mask = normal(*shape, seed=4) > -0.5
    mask[..., 0] = True
    return mask


QKV = rows(3 * L, H, D).reshape(B, H, 3, L, D).permute(2, 0, 1, 3, 4)
TAKEN = {
    "rows of heads": (operands(), {}),
    "heads of rows": (contiguous(operands()), {}),
    "parts of one tensor": (tuple(normal(B, L, 3, H, D).permute(2, 0, 3, 1, 4)), {}),
    "parts of heads": (tuple(QKV), {}),
    "rows first": (tuple(normal(L, B, H, D, seed=i).permute(1, 2, 0, 3) for i in range(3)), {}),
    "heads first": (tuple(normal(H, B, L, D, seed=i).transpose(0, 1) for i in range(3)), {}),
    "one row": (operands(1), {}),
    "one head": (operands(heads=1, kv_heads=1), {}),
    "causal": (operands(), {"is_causal": True}),
    "causal, more rows than keys": (operands(S, L), {"is_causal": True}),
    "a scale": (operands(), {"scale": 0.5}),
    "a scale of an int": (operands(), {"scale": 1}),
    "no dropout": (operands(), {"dropout_p": 0.0}),
    "bool mask": (operands(), {"attn_mask": hidden(L, S)}),
    "bool mask of keys": (operands(), {"attn_mask": hidden(B, 1, 1, S)}),
    "bool mask of three": (operands(), {"attn_mask": hidden(H, L, S)}),
    "float mask": (operands(), {"attn_mask": normal(B, H, L, S)}),
    "float mask of heads": (contiguous(operands()), {"attn_mask": normal(1, H, L, S)}),
    "a row that sees nothing": (operands(), {"attn_mask": hidden(L, S) & (torch.arange(L) != 3)[:, None]}),
    "three dimensions": (tuple(x[0] for x in operands()), {}),
    "three dimensions, masked": (tuple(x[0] for x in operands()), {"attn_mask": hidden(H, L, S)}),
    "other columns": (operands(columns=24), {}),
    "groups": (operands(kv_heads=2), {"enable_gqa": True}),
    "groups, causal": (contiguous(operands(kv_heads=1)), {"enable_gqa": True, "is_causal": True}),
    "keys of one head for all": (operands(kv_heads=1), {}),
    "odd strides": (tuple(x.transpose(2, 3).contiguous().transpose(2, 3) for x in operands()), {}),
    "large heads": (operands(size=320, columns=320), {}),
}


def same(y, expected, q):
    close = {"rtol": 1e-5, "atol": 1e-5} if q.dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(y, expected, **close)
    laid = [stride for size, stride in zip(expected.shape, expected.stride(), strict=True) if size > 1]
    assert laid == [stride for size, stride in zip(y.shape, y.stride(), strict=True) if size > 1]


@pytest.mark.parametrize(("given", "more"), TAKEN.values(), ids=TAKEN)
def test_values_and_layout_are_torchs(left, given, more):
    with torch.no_grad():
        same(adopted()(*given, **more), F.scaled_dot_product_attention(*given, **more), given[0])
    assert not left


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mask", [None, hidden(L, S), normal(L, S)], ids=["none", "bool", "float32"])
def test_16_bits(left, dtype, mask):
    given = operands(dtype=dtype)
    y = adopted()(*given, attn_mask=mask)
    assert y.dtype == dtype
    same(y, F.scaled_dot_product_attention(*given, attn_mask=mask), given[0])
    assert not left


@pytest.mark.parametrize(("given", "more"), TAKEN.values(), ids=TAKEN)
@pytest.mark.parametrize(("scheme", "least"), [("bfloat16", 40), ("int8_bfloat16", 30), ("int8", 30)])
def test_the_scheme_is_used(left, given, more, scheme, least):
    with torch.no_grad():
        db = sqnr_db(F.scaled_dot_product_attention(*given, **more), adopted(scheme)(*given, **more))
    assert least < db
    few = given[0].shape[-2] * given[0].shape[-3] // given[1].shape[-3] <= 4  # which are computed in float32
    assert few or db < 100
    assert not left


LEFT = {
    "dropout": (operands(), {"dropout_p": 0.5}),
    "mask and causal": (operands(), {"attn_mask": normal(L, S), "is_causal": True}),
    "float64": (operands(dtype=torch.float64), {}),
    "five dimensions": (tuple(x[None] for x in operands()), {}),
    "keys of one batch for all": ((operands()[0], *(x[:1] for x in operands()[1:])), {}),
    "no rows": (operands(0), {}),
}


@pytest.mark.parametrize(("given", "more"), LEFT.values(), ids=LEFT)
def test_torch_computes_the_rest(left, given, more):
    module = adopted("int8")
    torch.manual_seed(0)
    expected = F.scaled_dot_product_attention(*given, **more)
    torch.manual_seed(0)
    assert torch.equal(module(*given, **more), expected)
    assert len(left) == 1


WRONG = {
    "other batch": ((operands()[0][:1], rows(S)[:, :, :, :3], rows(S)), {}),
    "other dtypes": ((rows(L), rows(S).half(), rows(S)), {}),
    "a mask that does not fit": (operands(), {"attn_mask": hidden(L, S + 1)}),
    "a mask of integers": (operands(), {"attn_mask": torch.ones(L, S, dtype=torch.long)}),
    "groups without being asked": (operands(kv_heads=2), {}),
    "groups that do not fit": (operands(kv_heads=3), {"enable_gqa": True}),
    "no tensor": ((rows(L), rows(S), None), {}),
    "a name too many": (operands(), {"heads": 4}),
    "too few": ((rows(L),), {}),
}


@pytest.mark.parametrize(("given", "more"), WRONG.values(), ids=WRONG)
def test_errors_are_errors(given, more):
    with pytest.raises((RuntimeError, TypeError)) as expected:
        F.scaled_dot_product_attention(*given, **more)
    with pytest.raises(expected.type):
        adopted("int8")(*given, **more)


def test_gradients_are_torchs(left):
    q, k, v = (x.detach().requires_grad_() for x in operands())
    adopted("int8")(q, k, v).sum().backward()
    given = [x.detach().requires_grad_() for x in (q, k, v)]
    F.scaled_dot_product_attention(*given).sum().backward()
    for one, other in zip((q, k, v), given, strict=True):
        assert torch.equal(one.grad, other.grad)
    mask = normal(L, S).requires_grad_()
    adopted("int8")(*operands(), attn_mask=mask).sum().backward()
    assert mask.grad is not None
    assert len(left) == 2


def test_autocast_and_modes_are_torchs(left):
    given, seen = operands(), []

    class Seeing(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert adopted("int8")(*given).dtype == torch.bfloat16
    with Seeing():
        adopted("int8")(*given)
    assert F.scaled_dot_product_attention in seen
    assert len(left) == 2


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("scheme", ["float32", "int8"])
def test_a_default_device_changes_nothing(left, scheme, device):
    given, module = operands(), adopted(scheme)
    expected = module(*given)
    with torch.device(device):
        assert_identical(module(*given), expected)
    torch.set_default_device(device)
    try:
        assert_identical(module(*given), expected)
    finally:
        torch.set_default_device(None)
    assert not left


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_are_torchs(left):
    given = tuple(x.contiguous() for x in operands())
    y = torch.vmap(adopted("int8"))(*(x[:, None] for x in given))
    torch.testing.assert_close(y[:, 0], F.scaled_dot_product_attention(*given), rtol=1e-5, atol=1e-6)
    assert left


def test_a_subclass_of_tensor_is_asked():
    class Own(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            return func

    q, k, v = operands()
    assert adopted("int8")(q.as_subclass(Own), k, v) is sdpa_calls.SDPA


def test_more_keys_than_int32_can_sum(left, monkeypatch):
    monkeypatch.setattr(sdpa_calls, "MAX_DEPTH", S - 1)
    for scheme, count in [("int8", 1), ("int8_bfloat16", 1), ("float32", 1)]:
        adopted(scheme)(*operands())
        assert len(left) == count


def test_inference_mode(left):
    with torch.inference_mode():
        given = operands()
        same(adopted()(*given), F.scaled_dot_product_attention(*given), given[0])
    assert not left


# ---- Which modules, and what they call ------------------------------------------------------------------------------


def helper(q, k, v, factor):
    return F.scaled_dot_product_attention(q, k, v) * factor


class ByAMethod(nn.Module):
    def forward(self, q, k, v):
        return self.attended(q, k, v)

    def attended(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v) * 2


class ByAHelper(nn.Module):
    def forward(self, q, k, v):
        return helper(q, k, v, 2)


class Twice(nn.Module):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v) + torch.nn.functional.scaled_dot_product_attention(q, k, v)


class Inherited(ByAMethod):
    pass


@pytest.mark.parametrize("kind", [ByAMethod, ByAHelper, Twice, Inherited])
def test_every_call_is_taken(left, kind):
    module, given = kind(), operands()
    assert calls_sdpa(module)
    SdpaCalls.adopt(module, "int8")
    found = module(*given)
    assert not left
    assert torch.equal(found, 2 * adopted("int8")(*given))
    SdpaCalls.adopt(module, "float32")
    same(module(*given), 2 * F.scaled_dot_product_attention(*given), given[0])
    release(module)
    assert type(module) is kind
    assert vars(module).keys() == vars(kind()).keys()
    assert torch.equal(module(*given), 2 * F.scaled_dot_product_attention(*given))


class ByAnAttribute(nn.Module):
    def __init__(self):
        super().__init__()
        self.attend = F.scaled_dot_product_attention

    def forward(self, q, k, v):
        return self.attend(q, k, v)


class ByAnImport(nn.Module):
    def forward(self, q, k, v):
        from torch.nn.functional import scaled_dot_product_attention

        return scaled_dot_product_attention(q, k, v)


class BySuper(ByAMethod):
    def attended(self, q, k, v):
        return super().attended(q, k, v)


class WithALook(ByAMethod):
    """Its class sees each attribute that is read."""

    def __getattr__(self, name):
        return super().__getattr__(name)


@pytest.mark.parametrize("kind", [ByAnAttribute, ByAnImport, BySuper, WithALook, nn.MultiheadAttention, nn.Linear])
def test_others_are_left_alone(kind):
    assert sdpa_code_of(kind) is None


def test_a_module_with_a_forward_of_its_own_is_left_alone():
    module = Calling()
    module.forward = lambda *given: 1
    assert not calls_sdpa(module)


def test_a_class_that_changes_is_heard(monkeypatch):
    module, given = ByAMethod(), operands()
    SdpaCalls.adopt(module, "float32")
    monkeypatch.setattr(ByAMethod, "attended", lambda self, q, k, v: F.scaled_dot_product_attention(q, k, v) * 5)
    same(module(*given), 5 * F.scaled_dot_product_attention(*given), given[0])
    monkeypatch.setattr(ByAMethod, "attended", len)
    with pytest.raises(TypeError):
        module(*given)
    monkeypatch.setattr(module, "attended", lambda q, k, v: "mine", raising=False)
    assert module(*given) == "mine"


def test_hooks_and_other_instances_see_what_they_did():
    module, other, seen = ByAMethod(), ByAMethod(), []
    SdpaCalls.adopt(module, "int8")
    module.register_forward_hook(lambda module, args, y: seen.append((type(module).__name__, len(args))))
    module(*operands())
    assert seen == [("ByAMethod", 3)]
    assert isinstance(module, ByAMethod)
    assert type(other) is ByAMethod
    assert torch.equal(other(*operands()), 2 * F.scaled_dot_product_attention(*operands()))


def test_a_subclass_of_a_form_runs_its_own_code():
    module = ByAMethod()
    SdpaCalls.adopt(module, "int8")

    class Mine(type(module)):
        def forward(self, q, k, v):
            return self.attended(q, k, v) + 1

    expected = 2 * F.scaled_dot_product_attention(*operands())
    assert torch.equal(Mine()(*operands()), expected + 1)
    assert not calls_sdpa(Mine())
    assert 30 < sqnr_db(expected, module(*operands())) < 100
