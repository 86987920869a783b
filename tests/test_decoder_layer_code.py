"""Copies, files and graphs of layers of decoders in a few calls; and code that is no such layer."""

import copy
import pickle

import pytest
import torch
from torch import nn

import torchq
from helpers.compare import assert_identical
from helpers.decoder_layers import dynamic, inputs
from helpers.decoders import decoded, decoder, int8
from helpers.encoder_forms import assert_same, by_code, forms
from helpers.self_attention import tokens

modeling = pytest.importorskip("transformers.models.llama.modeling_llama")


# ---- Copies, files and graphs ---------------------------------------------------------------------------------------


def test_copies_pickles_and_files_are_forms(tmp_path):
    model, x = int8(), tokens(2, 6)
    expected = assert_same(model, x, use_cache=False)[0]
    torchq.save(model, tmp_path / "model.safetensors")
    loaded = torchq.load(tmp_path / "model.safetensors", decoder())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert len(forms(copied)) == 2
        assert_identical(assert_same(copied, x, use_cache=False)[0], expected)


class Layer(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, cos, sin):
        return self.layer(x, position_embeddings=(cos, sin))


@pytest.mark.slow(seconds=5)
def test_compiled_without_breaks_and_exported():
    model = int8()
    (x, more), module = inputs(model), Layer(forms(model)[0])
    angles = more["position_embeddings"]
    torch._dynamo.reset()
    with torch.no_grad():
        expected = module(x, *angles)
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, *angles), expected, rtol=1e-4, atol=1e-4)
        program = torch.export.export(module, (x, *angles)).module()
        torch.testing.assert_close(program(x, *angles), expected, rtol=1e-4, atol=1e-4)


# ---- Code that is none ----------------------------------------------------------------------------------------------


class Asking(modeling.LlamaDecoderLayer):
    """It does something else with a cache."""

    def forward(self, hidden_states, attention_mask=None, cache=None, position_embeddings=None, **kwargs):
        y, _ = self.self_attn(hidden_states, position_embeddings, attention_mask, cache, **kwargs)
        if cache is not None:
            y = y + y
        return hidden_states + y


class Using(modeling.LlamaDecoderLayer):
    """It computes with an argument."""

    def forward(self, hidden_states, attention_mask=None, cache=None, position_embeddings=None, **kwargs):
        cos, sin = position_embeddings
        y, _ = self.self_attn(hidden_states, (cos, sin), attention_mask, cache, **kwargs)
        return hidden_states + y


class Swapping(modeling.LlamaDecoderLayer):
    """It hands on another one."""

    def forward(self, hidden_states, attention_mask=None, cache=None, position_embeddings=None, **kwargs):
        y, _ = self.self_attn(hidden_states, position_embeddings, attention_mask, None, **kwargs)
        return hidden_states + y


class Positional(modeling.LlamaDecoderLayer):
    """What stands second is no mask."""

    def forward(
        self, hidden_states, /, spare=None, attention_mask=None, cache=None, position_embeddings=None, **kwargs
    ):
        y, _ = self.self_attn(hidden_states, position_embeddings, attention_mask, cache, **kwargs)
        return hidden_states + y


@pytest.mark.parametrize("kind", [Asking, Using, Swapping, Positional])
def test_other_code_runs_as_it_is(kind):
    model = decoder()
    model.model.layers[1] = kind(model.config, 1).eval()
    batches = [{"input_ids": tokens(4, 24, seed=seed)} for seed in range(2)]
    model = torchq.convert(model, batches, progress=False)
    assert [layer.original for layer in map(type, forms(model))] == [modeling.LlamaDecoderLayer]
    ours, theirs = (decoded(each, tokens(2, 5), dynamic(each)) for each in (model, by_code(model)))
    for one, other in zip(ours, theirs, strict=True):
        assert_identical(one, other)


class Optional(modeling.LlamaDecoderLayer):
    """Its input may be left out, as far as its signature says."""

    def forward(self, hidden_states=None, attention_mask=None, cache=None, position_embeddings=None, **kwargs):
        y, _ = self.self_attn(hidden_states, position_embeddings, attention_mask, cache, **kwargs)
        return hidden_states + y


def test_without_an_input_the_code_says_what_is_wrong():
    model = decoder()
    model.model.layers[1] = Optional(model.config, 1).eval()
    layer = forms(torchq.convert(model, [{"input_ids": tokens(4, 24)}], progress=False))[1]
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute"):
        layer(position_embeddings=None)
