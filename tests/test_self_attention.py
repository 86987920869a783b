"""Self-attention of transformers in a few calls: it gives the bits of its code."""

import types

import pytest
import torch

from helpers.compare import assert_identical
from helpers.numbers import normal
from helpers.self_attention import (
    SIZES,
    TEXT,
    assert_same,
    bert,
    by_code,
    converted,
    counted,
    forms,
    int8_bert,
    tokens,
)

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


def padded(batch, rows):
    mask = torch.ones(batch, rows, dtype=torch.long)
    mask[0, rows // 2 :] = 0
    return mask


def distilbert():
    config = transformers.DistilBertConfig(dim=64, n_layers=2, n_heads=4, hidden_dim=96, vocab_size=99)
    torch.manual_seed(0)
    return transformers.DistilBertModel(config).eval()


def of_text(config, model):
    torch.manual_seed(0)
    return model(config(**TEXT)).eval()


def of_pictures(config, model):
    torch.manual_seed(0)
    return model(config(**SIZES, image_size=32, patch_size=8)).eval()


def minilm():
    torch.manual_seed(0)
    sizes = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 12, "intermediate_size": 192}
    config = transformers.BertConfig(**sizes, vocab_size=99)
    return transformers.BertModel(config, add_pooling_layer=False).eval()


TEXTS = {
    "bert": bert,
    "a causal bert": lambda: bert(is_decoder=True, use_cache=False),
    "minilm": minilm,
    "roberta": lambda: of_text(transformers.RobertaConfig, transformers.RobertaModel),
    "electra": lambda: of_text(transformers.ElectraConfig, transformers.ElectraModel),
    "distilbert": distilbert,
}
PICTURES = {
    "vit": lambda: of_pictures(transformers.ViTConfig, transformers.ViTModel),
    "clip": lambda: of_pictures(transformers.CLIPVisionConfig, transformers.CLIPVisionModel),
    "dinov2": lambda: of_pictures(transformers.Dinov2Config, transformers.Dinov2Model),
}


@pytest.fixture
def model():
    return int8_bert()


# ---- The bits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("scheme", ["float32", "int8", "bfloat16"])
def test_models_of_text_give_the_bits_of_their_code(name, scheme, monkeypatch):
    model = converted(TEXTS[name](), attention=scheme)
    assert len(forms(model)) == 2
    count = counted(monkeypatch)
    for x in (tokens(1, 12), tokens(4, 7), tokens(1, 1), tokens(3, 40)):
        assert_same(model, x)
    assert count[0] == 8
    assert_same(model, tokens(2, 12), attention_mask=padded(2, 12))
    assert count[0] == 10


@pytest.mark.parametrize("name", PICTURES)
def test_models_of_pictures_give_the_bits_of_their_code(name, monkeypatch):
    model = converted(PICTURES[name](), [{"pixel_values": normal(8, 3, 32, 32, seed=seed)} for seed in range(6)])
    assert len(forms(model)) == 2
    count = counted(monkeypatch)
    assert_same(model, normal(3, 3, 32, 32, seed=1))
    assert count[0] == 2


def test_models_with_attention_of_another_kind_keep_theirs():
    sizes = {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "num_mel_bins": 8, "max_source_positions": 20}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    whisper = transformers.WhisperModel(transformers.WhisperConfig(**sizes, **heads, vocab_size=99, pad_token_id=0))
    batches = [{"input_features": normal(4, 8, 40, seed=seed)} for seed in range(6)]
    encoder = converted(whisper.encoder.eval(), batches)
    gemma2 = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**TEXT, head_dim=16)).eval()
    gpt2 = transformers.GPT2Model(transformers.GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=99)).eval()
    assert not forms(encoder)
    assert not forms(converted(gemma2))
    assert not forms(converted(gpt2))


def test_a_cache_is_kept_by_the_code():
    """It decodes with keys of its own, and the form takes the prompt's call only without one."""
    model = converted(transformers.BertLMHeadModel(transformers.BertConfig(**TEXT, is_decoder=True)).eval())
    assert len(forms(model)) == 2
    plain, x = by_code(model), tokens(2, 9)
    prompt, theirs = (each.generate(x, max_new_tokens=6, do_sample=False) for each in (model, plain))
    assert torch.equal(prompt, theirs)
    with torch.inference_mode():
        ours = model(x, use_cache=True)
        theirs = plain(x, use_cache=True)
        assert_identical(ours.logits, theirs.logits)
        more = [each(tokens(2, 1), cache=y.cache) for each, y in ((model, ours), (plain, theirs))]
    assert_identical(more[0].logits, more[1].logits)


def test_none_leaves_the_class_alone():
    assert not forms(converted(bert(), attention="none"))
    assert not forms(converted(bert(attn_implementation="eager")))


def test_dtypes_and_autocast(model):
    x = normal(2, 5, 64)
    attention, plain = forms(model)[0], forms(model)[0].original.forward
    for dtype in (torch.bfloat16, torch.float16):
        with torch.inference_mode():
            assert_identical(attention(x.to(dtype))[0], plain(attention, x.to(dtype))[0])
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        y = attention(x)[0]
        assert_identical(y, plain(attention, x)[0])
        assert y.dtype is torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("shape", [(2, 1, 5, 5), (1, 1, 1, 5), (2, 4, 5, 5), (5, 5), (2, 1, 1, 5)])
def test_masks(model, dtype, shape):
    attention, x = forms(model)[0], normal(2, 5, 64)
    mask = normal(*shape, seed=3) if dtype is torch.float32 else normal(*shape, seed=3) > -1
    with torch.inference_mode():
        expected = attention.original.forward(attention, x, mask)
        for y in (attention(x, mask), attention(hidden_states=x, attention_mask=mask, cache=None, softcap=None)):
            assert_identical(y[0], expected[0])
            assert y[1] is expected[1] is None


def test_a_call_may_say_whether_it_is_causal(model):
    attention, x = forms(model)[0], normal(2, 5, 64)
    with torch.inference_mode():
        found = [attention(x, is_causal=is_causal)[0] for is_causal in (None, False, True, 1)]
        for y, is_causal in zip(found, (None, False, True, 1), strict=True):
            assert_identical(y, attention.original.forward(attention, x, is_causal=is_causal)[0])
    assert_identical(found[0], found[1])
    assert not torch.equal(found[1], found[2])


def test_an_odd_layout_or_number_of_dimensions(model):
    attention = forms(model)[0]
    with torch.inference_mode():
        for x in (normal(2, 64, 5).transpose(1, 2), normal(2, 5, 128)[..., ::2]):
            assert_identical(attention(x)[0], attention.original.forward(attention, x)[0])
        for x in (normal(5, 64), normal(1, 2, 5, 64), normal(0, 5, 64)):
            results = []
            for call in (attention, types.MethodType(attention.original.forward, attention)):
                try:
                    results.append(call(x)[0].shape)
                except (RuntimeError, IndexError, ValueError) as error:
                    results.append(type(error))
            assert results[0] == results[1]
