"""The self-attention of decoders in a few calls: angles, caches and norms of heads, with the bits of its code."""

import copy
import pickle

import pytest
import torch
from torch import nn

import torchq
from helpers.compare import assert_identical
from helpers.decoder_layers import dynamic, static
from helpers.decoders import FAMILIES, decoded, decoder, int8
from helpers.numbers import normal
from helpers.self_attention import assert_same, by_code, counted, forms, tokens
from torchq import simulate

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture(scope="module")
def llama():
    return int8()


@pytest.fixture
def model(llama):
    return copy.deepcopy(llama)


def assert_decodes_alike(model, x, make=dynamic):
    ours, theirs = make(model), make(model)
    for one, other in zip(decoded(model, x, ours), decoded(by_code(model), x, theirs), strict=True):
        assert_identical(one, other)
    for one, other in zip(ours.layers, theirs.layers, strict=True):
        assert_identical(one.keys, other.keys)
        assert_identical(one.values, other.values)


# ---- The bits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bits_are_those_of_the_code(family, monkeypatch):
    model, count = int8(family), counted(monkeypatch)
    assert len(forms(model)) == 2
    assert_same(model, tokens(2, 7), use_cache=False)
    assert count == [2]
    assert_decodes_alike(model, tokens(1, 9))
    assert count == [10]
    assert_decodes_alike(model, tokens(3, 5), static)
    assert count == [18]


def test_a_sliding_window_counts(monkeypatch):
    model, count = int8("Mistral", sliding_window=6), counted(monkeypatch)
    assert_decodes_alike(model, tokens(2, 9))
    assert count == [8]
    wide = int8("Mistral", sliding_window=30)
    x = tokens(1, 9)
    assert not torch.equal(decoded(model, x, dynamic(model))[-1], decoded(wide, x, dynamic(wide))[-1])


def test_padding_counts(model, monkeypatch):
    count, x = counted(monkeypatch), tokens(2, 8)
    mask = torch.ones_like(x)
    mask[0, :3] = 0
    y = assert_same(model, x, attention_mask=mask, use_cache=False)[0]
    assert count == [2]
    assert not torch.equal(y[0], assert_same(model, x, use_cache=False)[0][0])


def test_generated_tokens_are_the_same(model, monkeypatch):
    count, x = counted(monkeypatch), tokens(2, 6)
    more = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(x)}
    ours = model.generate(x, **more)
    assert count == [10]
    assert_identical(ours, by_code(model).generate(x, **more))


def test_positions_count(model):
    x = tokens(2, 6)
    where = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 2, 3]])
    y = assert_same(model, x, position_ids=where, use_cache=False)[0]
    assert not torch.equal(y[1], assert_same(model, x, use_cache=False)[0][1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(dtype, monkeypatch):
    batches = [{"input_ids": tokens(4, 24, seed=seed)} for seed in range(4)]
    model = torchq.convert(decoder().to(dtype), batches, progress=False)
    count = counted(monkeypatch)
    assert_decodes_alike(model, tokens(1, 9))
    assert count == [8]


def test_it_is_close_to_float(llama):
    model, x = decoder(), tokens(2, 9)
    ours, exact = decoded(llama, x, dynamic(llama)), decoded(model.double(), x, dynamic(model))
    for one, other in zip(ours, exact, strict=True):
        noise = (one.double() - other).square().sum()
        assert 10 * torch.log10(other.square().sum() / noise) > 25


# ---- Calls of another kind ------------------------------------------------------------------------------------------


def inputs(model, batch=2, rows=5):
    x = normal(batch, rows, 64)
    return x, model.model.rotary_emb(x, torch.arange(rows)[None])


def test_arguments_by_place_and_by_name(model, monkeypatch):
    attention, (x, angles), count = forms(model)[0], inputs(model), counted(monkeypatch)
    with torch.inference_mode():
        expected = by_code(attention)(x, angles, None)[0]
        for args, kwargs in [
            ((x, angles), {}),
            ((x, angles, None, None), {}),
            ((x,), {"position_embeddings": angles, "attention_mask": None}),
            ((x,), {"position_embeddings": list(angles), "use_cache": True, "any": 3}),
            ((), {"hidden_states": x, "position_embeddings": angles, "cache": None, "softcap": None}),
        ]:
            assert_identical(attention(*args, **kwargs)[0], expected)
    assert count == [5]


@pytest.mark.parametrize(
    "kwargs",
    [
        {"position_embeddings": None},
        {"position_embeddings": ()},
        {"scaling": 1.0},
        {"dropout": 0.5},
        {"query": None},
        {"position_embeddings": 3},
    ],
)
def test_a_wrong_call_is_the_error_it_was(model, kwargs):
    attention, (x, angles) = forms(model)[0], inputs(model)
    kwargs = {"position_embeddings": angles, **kwargs}
    errors = []
    for module in (attention, by_code(attention)):
        with pytest.raises((TypeError, ValueError)) as error:
            module(x, **kwargs)
        errors.append(str(error.value))
    assert errors[0] == errors[1]


def test_what_the_attention_function_is_asked_counts(model, monkeypatch):
    attention, (x, angles), count = forms(model)[0], inputs(model), counted(monkeypatch)
    for more in ({"is_causal": False}, {"output_attentions": True}, {"position_bias": torch.zeros(1, 4, 5, 5)}):
        with torch.inference_mode():
            ours, theirs = (module(x, angles, **more) for module in (attention, by_code(attention)))
        assert_identical(ours[0], theirs[0])
    assert count == [0]


class Noting:
    """A cache that keeps what it is given."""

    def __init__(self):
        self.given = []

    def update(self, *args, **kwargs):
        self.given.append((args, kwargs))
        return tuple(torch.cat((x, 2 * x), dim=2) for x in args[:2])


def test_any_cache_gets_what_it_got(model):
    attention, (x, angles), notes = forms(model)[1], inputs(model), (Noting(), Noting())
    found = []
    for module, cache in zip((attention, by_code(attention)), notes, strict=True):
        with torch.inference_mode():
            found.append(module(x, angles, None, cache, use_cache=True, flag=None)[0])
    assert_identical(*found)
    (ours,), (theirs,) = (note.given for note in notes)
    for one, other in zip(ours[0][:2], theirs[0][:2], strict=True):
        assert_identical(one, other)
        assert one.stride() == other.stride()
    assert ours[0][2:] == theirs[0][2:] == (1,)
    assert ours[1] == theirs[1] == {"kwargs": {"use_cache": True, "flag": None}}


# ---- What is changed ------------------------------------------------------------------------------------------------


def replaced_child(attention):
    attention.v_proj = nn.Linear(64, 32)


def hooked_child(attention):
    attention.k_proj.register_forward_hook(lambda module, args, y: 2 * y)


def other_scale(attention):
    attention.scaling = 0.7


def other_place(attention):
    attention.layer_idx = 0


def to_eager(attention):
    attention.config._attn_implementation = "eager"


def other_scheme(attention):
    own = attention.torchq_attention
    own.scheme = "float32" if own.scheme == "int8" else "int8"


def not_causal(attention):
    attention.is_causal = False


def own_forward(attention):
    attention.forward = lambda x, *args, **kwargs: (2 * x, None)


CHANGES = [replaced_child, hooked_child, other_scale, to_eager, other_scheme, not_causal, own_forward]


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_afterwards_counts(model, change):
    attention, (x, angles) = forms(model)[1], inputs(model)
    with torch.inference_mode():
        before = attention(x, angles)[0]
        change(attention)
        after = attention(x, angles)[0]
        assert_identical(after, by_code(attention)(x, angles)[0])
    assert not torch.equal(before, after)


def test_the_place_in_the_cache_counts(model):
    attention, (x, angles), cache = forms(model)[1], inputs(model), Noting()
    other_place(attention)
    attention(x, angles, None, cache)
    assert cache.given[0][0][2] == 0
    attention.layer_idx = None
    attention(x, angles, None, cache)
    assert cache.given[1][0][2] is None


def test_another_function_that_turns_is_called(model, monkeypatch):
    from transformers.models.llama import modeling_llama

    attention, (x, angles) = forms(model)[0], inputs(model)
    turn, rotate = modeling_llama.apply_rotary_pos_emb, modeling_llama.rotate_half
    with torch.inference_mode():
        before = attention(x, angles)[0]
        monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin: (q, k))
        unturned = attention(x, angles)[0]
        assert not torch.equal(unturned, before)
        assert_identical(unturned, by_code(attention)(x, angles)[0])
        monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", turn)
        monkeypatch.setattr(modeling_llama, "rotate_half", lambda x: 0 * x)
        half = attention(x, angles)[0]
        assert not torch.equal(half, before)
        assert_identical(half, by_code(attention)(x, angles)[0])
        monkeypatch.setattr(modeling_llama, "rotate_half", rotate)
        assert_identical(attention(x, angles)[0], before)


def test_norms_of_heads_count():
    model = int8("Qwen3")
    attention, (x, angles) = forms(model)[0], inputs(model)
    with torch.inference_mode():
        before = attention(x, angles, None)[0]
        attention.q_norm.weight.copy_(normal(16) + 2)
        after = attention(x, angles, None)[0]
        assert not torch.equal(before, after)
        assert_identical(after, by_code(attention)(x, angles, None)[0])
        attention.k_norm = nn.Identity()
        assert_identical(attention(x, angles, None)[0], by_code(attention)(x, angles, None)[0])
    with pytest.raises(TypeError, match="attention_mask"):  # which it must be given
        attention(x, angles)


# ---- Gradients, modes, graphs, copies -------------------------------------------------------------------------------


def test_gradients_flow(model):
    attention, (x, angles) = forms(model)[0], inputs(model)
    found = []
    for module in (attention, by_code(attention)):
        given, cos = x.clone().requires_grad_(), angles[0].clone().requires_grad_()
        module(given, (cos, angles[1]))[0].square().sum().backward()
        found.append((given.grad, cos.grad))
    for one, other in zip(*found, strict=True):
        assert_identical(one, other)
    assert found[0][1].abs().sum() > 0


def test_training_is_the_users(model, monkeypatch):
    count = counted(monkeypatch)
    model.train()
    model(tokens(1, 4))
    assert count == [0]


def test_simulated_and_under_autocast(model):
    x = tokens(2, 6)
    with simulate():
        simulated = assert_same(model, x, use_cache=False)[0]
    assert not torch.equal(simulated, assert_same(model, x, use_cache=False)[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(model, x, use_cache=False)


class First(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x, cos, sin):
        return self.attention(x, (cos, sin))[0]


def test_compiled_without_breaks_and_exported(model):
    x, angles = inputs(model)
    module = First(forms(model)[0])
    torch._dynamo.reset()
    with torch.no_grad():
        expected = module(x, *angles)
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, *angles), expected, rtol=1e-4, atol=1e-4)
        program = torch.export.export(module, (x, *angles)).module()
        torch.testing.assert_close(program(x, *angles), expected, rtol=1e-4, atol=1e-4)


def test_copies_pickles_and_files(model, tmp_path):
    x = tokens(2, 6)
    expected = assert_same(model, x, use_cache=False)[0]
    torchq.save(model, tmp_path / "model.safetensors")
    loaded = torchq.load(tmp_path / "model.safetensors", decoder())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert len(forms(copied)) == 2
        assert_identical(assert_same(copied, x, use_cache=False)[0], expected)


def test_verify_sees_every_product(model):
    report = torchq.verify(model, tokens(2, 6))
    assert report.ok
