"""Copies, files and graphs of layers of transformers' encoders in a few calls; and code that is no such layer."""

import copy
import pickle

import pytest
import torch
from torch import nn

import torchq
from helpers.compare import assert_identical
from helpers.encoder_forms import assert_same, by_code, layers, padded
from helpers.numbers import normal
from helpers.self_attention import bert, converted, int8_bert, outputs, tokens

modeling = pytest.importorskip("transformers.models.bert.modeling_bert")


@pytest.fixture
def model():
    return int8_bert()


# ---- Copies, files and graphs ---------------------------------------------------------------------------------------


def test_copies_pickles_and_files_are_forms(model, tmp_path):
    x = tokens(2, 9)
    expected = outputs(model, x)
    pickled = pickle.dumps(model)
    assert b"LayerForm" in pickled
    assert b"LayerCode" not in pickled
    torchq.save(model, tmp_path / "model.torchq")
    for other in (copy.deepcopy(model), pickle.loads(pickled), torchq.load(tmp_path / "model.torchq", bert())):
        assert len(layers(other)) == 2
        assert all(one is not two for one, two in zip(layers(model), layers(other), strict=True))
        assert_identical(outputs(other, x)[0], expected[0])
        other.encoder.layer[0].output.LayerNorm = nn.Identity()
        assert not torch.equal(outputs(other, x)[0], expected[0])
        assert_identical(outputs(model, x)[0], expected[0])


def test_a_layer_is_copied_alone(model):
    layer, x = layers(model)[0], normal(2, 5, 64)
    y = layer(x)
    copied = copy.deepcopy(layer)
    assert all(part.module in list(copied.modules()) for part in (copied(x), copied._learned().steps.parts)[1])
    assert_identical(copied(x), y)


@pytest.mark.slow(seconds=8)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_graphs(model):
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for ours, theirs in zip(outputs(compiled, tokens(2, 8)), outputs(by_code(model), tokens(2, 8)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    layer, x = layers(model)[0], normal(2, 5, 64)
    traced = torch.jit.trace(layer, (x,), check_trace=False)
    torch.testing.assert_close(traced(normal(2, 5, 64, seed=3)), layer(normal(2, 5, 64, seed=3)), rtol=1e-4, atol=1e-5)
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(2 * x), layer(2 * x), rtol=1e-4, atol=1e-5)


# ---- Code that is none ----------------------------------------------------------------------------------------------


class Looking(modeling.BertLayer):
    def forward(self, hidden_states, attention_mask=None, encoder_hidden_states=None, **kwargs):
        return self.attention(hidden_states, attention_mask)[0] * (2 if kwargs.get("twice") else 1)


class Counting(modeling.BertLayer):
    def forward(self, hidden_states, attention_mask=None, encoder_hidden_states=None, **kwargs):
        self.calls = 1
        return self.attention(hidden_states, attention_mask, **kwargs)[0]


class Reading(modeling.BertLayer):
    def forward(self, hidden_states, attention_mask=None, encoder_hidden_states=None, **kwargs):
        if hidden_states.shape[1] > 3:
            return hidden_states
        return self.attention(hidden_states, attention_mask, **kwargs)[0]


class Masking(modeling.BertLayer):
    def forward(self, hidden_states, attention_mask=None, encoder_hidden_states=None, **kwargs):
        if attention_mask is None:
            return hidden_states + hidden_states
        return self.attention(hidden_states, attention_mask, **kwargs)[0]


class Dropping(modeling.BertLayer):
    def forward(self, hidden_states, attention_mask=None, encoder_hidden_states=None, **kwargs):
        return self.attention(hidden_states, None, **kwargs)[0]


class Writing(modeling.BertLayer):
    def forward(self, hidden_states, attention_mask=None, encoder_hidden_states=None, **kwargs):
        y = self.attention(hidden_states, attention_mask, **kwargs)[0]
        y += hidden_states
        return y


class Defaulting(modeling.BertLayer):
    def forward(self, hidden_states, attention_mask=None, encoder_hidden_states=None, scale=1.0, **kwargs):
        return self.attention(hidden_states, attention_mask, **kwargs)[0] * scale


class Registered(modeling.BertLayer):
    def __reduce__(self):
        return super().__reduce__()


@pytest.mark.parametrize("kind", [Looking, Counting, Reading, Masking, Dropping, Writing, Defaulting, Registered])
def test_other_code_runs_as_it_is(kind):
    model = bert()
    model.encoder.layer[1] = kind(model.config).eval()
    model = converted(model)
    assert [type(layer).original for layer in layers(model)] == [modeling.BertLayer, modeling.BertAttention]
    assert_same(model, tokens(2, 7), attention_mask=padded(2, 7))
