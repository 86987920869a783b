"""nn.MultiheadAttention in int8: every way to call it, against torch's own function.

The oracle is torch's F.multi_head_attention_forward between the int8 layers (helpers/multihead.py).
"""

import pytest
import torch

from helpers.multihead import FORMS, HEADS, E, L, N, S, assert_as_torch, attention, inputs, oracle
from helpers.numbers import normal
from torchq import QConfig, convert
from torchq.modules.multihead_attention import QuantizedMultiheadAttention
from torchq.numerics.metrics import sqnr_db

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("relation", ["self", "memory", "value apart", "cross"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_and_relation(form, relation, need_weights):
    module = attention(**form)
    if (relation in ("self", "memory") and module.kdim != module.vdim) or (
        relation in ("self", "value apart") and (module.kdim != E)
    ):
        relation = "cross"  # these inputs can't be the same tensor
    for scheme in ("none", "float32"):
        int8 = convert(module, config=QConfig(attention=scheme))
        assert type(int8) is QuantizedMultiheadAttention
        assert_as_torch(int8, *inputs(module, relation), need_weights=need_weights)
    assert sqnr_db(module(*inputs(module, relation))[0], int8(*inputs(module, relation))[0]) > 28


def masks():
    """Key padding masks and attention masks of all kinds, for N batches, L rows and S keys."""
    padding = torch.arange(S) >= torch.tensor([[S], [4], [2]])
    hidden = normal(L, S, seed=4) > 0.8
    hidden[:, 0] = padding[:, 0] = False  # no row without a key
    by_head = normal(N * HEADS, L, S, seed=5) > 1
    by_head[..., 0] = False
    return {
        "padding": {"key_padding_mask": padding},
        "padding added": {"key_padding_mask": normal(N, S, seed=6)},
        "mask": {"attn_mask": hidden},
        "mask added": {"attn_mask": normal(L, S, seed=7)},
        "mask by head": {"attn_mask": by_head},
        "mask by head added": {"attn_mask": normal(N * HEADS, L, S, seed=8)},
        "both": {"key_padding_mask": padding, "attn_mask": hidden},
        "both added": {"key_padding_mask": normal(N, S, seed=6), "attn_mask": normal(L, S, seed=7)},
        "both, by head": {"key_padding_mask": padding, "attn_mask": by_head},
        "causal": {"attn_mask": ~torch.ones(L, S).tril().bool(), "is_causal": True},
        "causal, padding": {
            "attn_mask": ~torch.ones(L, S).tril().bool(), "is_causal": True, "key_padding_mask": padding
        },
    }  # fmt: skip


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("form", ["plain", "batch first", "bias_kv and zero"])
@pytest.mark.parametrize("call", masks().values(), ids=masks())
def test_every_mask(call, form, need_weights):
    for scheme in ("none", "float32"):
        int8 = convert(attention(**FORMS[form]), config=QConfig(attention=scheme))
        if form == "bias_kv and zero" and "is_causal" in call:
            call = {**call, "is_causal": False}  # torch's own hides the keys behind
        assert_as_torch(int8, *inputs(int8), **call, need_weights=need_weights)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("average", [True, False])
def test_without_a_batch_dimension(batch_first, average):
    int8 = convert(attention(batch_first=batch_first))
    xs = normal(L, E, seed=1), normal(S, E, seed=2), normal(S, E, seed=3)
    hidden = torch.zeros(L, S, dtype=torch.bool)
    hidden[:, 2] = True
    for call in (
        {},
        {"need_weights": False},
        {"key_padding_mask": torch.arange(S) > 3, "attn_mask": hidden},
        {"attn_mask": hidden.expand(HEADS, L, S)},
    ):
        assert_as_torch(int8, *xs, **call, average_attn_weights=average)
    assert int8(*xs, average_attn_weights=average)[1].shape == ((L, S) if average else (HEADS, L, S))


@pytest.mark.parametrize("average", [True, False])
def test_weights_are_averaged_or_not(average):
    int8 = convert(attention())
    assert_as_torch(int8, *inputs(int8), average_attn_weights=average)


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_acts_in_training_as_in_torch(need_weights):
    module = attention(dropout=0.5)
    int8 = convert(module)
    assert_as_torch(int8, *inputs(int8), need_weights=need_weights)  # not in eval mode
    int8.train()
    torch.manual_seed(1)
    expected = oracle(int8, *inputs(int8), need_weights=need_weights)
    torch.manual_seed(1)
    y, weights = int8(*inputs(int8), need_weights=need_weights)
    assert sqnr_db(int8.out_proj(expected[0]), y) > 50
    if need_weights:
        torch.testing.assert_close(weights, expected[1], rtol=2e-6, atol=2e-7)


def test_rows_without_a_key():
    """As torch's function has it: 0 without the weights, and NaN with them. Where the weights wait, 0 as well."""
    mask = torch.zeros(L, S, dtype=torch.bool)
    mask[2] = True
    for need_weights in (True, False):
        int8 = convert(attention(), config=QConfig(attention="none"))
        assert_as_torch(int8, *inputs(int8), attn_mask=mask, need_weights=need_weights)
    int8 = convert(attention())
    y, weights = int8(*inputs(int8), attn_mask=mask)
    assert torch.equal(y, int8(*inputs(int8), attn_mask=mask, need_weights=False)[0])
    assert torch.equal(weights.isnan().all(dim=-1), (torch.arange(L) == 2).expand(N, L))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_floats(dtype):
    module = attention(batch_first=True).to(dtype)
    int8, x = convert(module), normal(N, L, E).to(dtype)
    for need_weights in (True, False):
        y, _ = int8(x, x, x, need_weights=need_weights, key_padding_mask=torch.zeros(N, L, dtype=torch.bool))
        assert y.dtype == dtype
        assert sqnr_db(module.float()(*[x.float()] * 3)[0], y.float()) > 25
        module.to(dtype)


def test_autocast():
    module, x = attention(batch_first=True), normal(N, L, E)
    int8 = convert(module)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for need_weights in (True, False):
            y, _ = int8(x, x, x, need_weights=need_weights, attn_mask=normal(L, L))
            assert y.dtype == torch.bfloat16
    assert sqnr_db(int8(x, x, x, attn_mask=normal(L, L))[0], y.float()) > 30


# ---- Bad input ----


@pytest.mark.parametrize(
    ("arguments", "call", "error", "message"),
    [
        ([(L, N, E + 1), (S, N, E), (S, N, E)], {}, ValueError, "query must be .length, 16. .* got .6, 3, 17."),
        ([(L, N, E), (S, N, E), (S, N, 1)], {}, ValueError, "value must be .length, 16."),
        ([(L, N, E), (S, E), (S, E)], {}, ValueError, "key must be .* as many dimensions as query"),
        ([(E,), (E,), (E,)], {}, ValueError, "query must be"),
        ([(L, N, E), (S, N, E), (S + 1, N, E)], {}, ValueError, "key and value must have the same length"),
        ([(L, N, E), (S, N + 1, E), (S, N + 1, E)], {}, ValueError, "key and value must have .* batch"),
        ([(L, N, E), (S, N, E), (S, N, E)], {"is_causal": True}, ValueError, "is_causal .* Pass the mask"),
        (
            [(L, N, E), (S, N, E), (S, N, E)],
            {"attn_mask": torch.zeros(L, S, dtype=torch.int64)},
            TypeError,
            "attn_mask must be bool or float, got torch.int64",
        ),
        (
            [(L, N, E), (S, N, E), (S, N, E)],
            {"attn_mask": torch.zeros(S, L)},
            ValueError,
            "attn_mask must be of shape .6, 7. or .12, 6, 7., got .7, 6.",
        ),
        (
            [(L, N, E), (S, N, E), (S, N, E)],
            {"key_padding_mask": torch.zeros(S, N)},
            ValueError,
            "key_padding_mask must be of shape .3, 7., got .7, 3.",
        ),
    ],
)
def test_bad_input(arguments, call, error, message):
    int8 = convert(attention())
    with pytest.raises(error, match=f"nn.MultiheadAttention: {message}"):
        int8(*[torch.zeros(shape) for shape in arguments], **call)


def test_nested_and_integer_inputs_are_refused():
    int8 = convert(attention(batch_first=True))
    nested = torch.nested.nested_tensor([normal(3, E), normal(5, E)], layout=torch.jagged)
    with pytest.raises(TypeError, match="x must be dense"):
        int8(nested, nested, nested)
    codes = torch.zeros(N, L, E, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="must be float32"):
        int8(codes, codes, codes)
