"""Methods that transformers' apply_chunking_to_forward gets bring their signatures along; all else is as ever."""

import copy
import inspect
import pickle

import pytest
import torch

from helpers.compare import assert_identical
from helpers.numbers import normal
from helpers.self_attention import bert, converted, int8_bert, outputs, tokens
from torchq.modules.chunked import Chunked, chunked_code_of

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
modeling = pytest.importorskip("transformers.models.bert.modeling_bert")
Layer = modeling.BertLayer


@pytest.fixture
def model():
    return int8_bert()


def layers(model):
    return [module for module in model.modules() if isinstance(module, Layer)]


def by_code(model):
    """A copy whose layers are plainly those of transformers."""
    copied = copy.deepcopy(model)
    for module in layers(copied):
        object.__setattr__(module, "__class__", Layer)
    return copied


def test_the_layers_of_a_model_are_chunked_and_give_its_bits(model):
    assert [isinstance(layer, Chunked) for layer in layers(model)] == [True, True]
    assert [type(layer).__name__ for layer in layers(model)] == ["BertLayer"] * 2
    x = tokens(3, 17)
    for ours, theirs in zip(outputs(model, x), outputs(by_code(model), x), strict=True):
        assert_identical(ours, theirs)


def test_inspect_reads_no_code_of_the_method(monkeypatch):
    model = converted(bert())  # no copy, which would read the code once more
    layer, plain = layers(model)[0], layers(by_code(model))[0]
    assert inspect.signature(layer.feed_forward_chunk) == inspect.signature(plain.feed_forward_chunk)
    asked = []
    monkeypatch.setattr(inspect, "_signature_from_function", lambda *args, **kwargs: asked.append(args))
    outputs(model, tokens(2, 8))
    assert asked == []
    with pytest.raises(AttributeError):  # the function above gives None
        outputs(by_code(model), tokens(2, 8))
    assert len(asked) == 1


@pytest.mark.parametrize("size", [4, 8])
def test_rows_in_chunks(size):
    whole, parts = int8_bert(), converted(bert(chunk_size_feed_forward=size))
    for one, other in zip(outputs(whole, tokens(2, 8)), outputs(parts, tokens(2, 8)), strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises(ValueError, match="multiple of the chunk"):
        parts(tokens(2, 9))


def test_a_method_that_the_class_gets_later_counts(model, monkeypatch):
    before = outputs(model, tokens(2, 8))[0]
    method = Layer.feed_forward_chunk
    monkeypatch.setattr(Layer, "feed_forward_chunk", lambda self, x: method(self, x) + 1)
    patched = outputs(model, tokens(2, 8))[0]
    assert not torch.equal(patched, before)
    assert_identical(patched, outputs(by_code(model), tokens(2, 8))[0])
    monkeypatch.setattr(Layer, "feed_forward_chunk", lambda self, x, y: x)
    with pytest.raises(ValueError, match="expects 2 arguments, but only 1 input"):
        model(tokens(2, 8))
    monkeypatch.setattr(Layer, "feed_forward_chunk", lambda self, x, y=None: x)  # two, in transformers' way to count
    with pytest.raises(ValueError, match="expects 2 arguments, but only 1 input"):
        model(tokens(2, 8))
    monkeypatch.setattr(Layer, "feed_forward_chunk", staticmethod(lambda x: x))
    assert_identical(outputs(model, tokens(2, 8))[0], outputs(by_code(model), tokens(2, 8))[0])


def test_a_function_whose_code_is_replaced_counts(model, monkeypatch):
    function = Layer.feed_forward_chunk
    before = outputs(model, tokens(2, 8))[0]

    def feed_forward_chunk(self, attention_output, other):
        return attention_output

    monkeypatch.setattr(function, "__code__", feed_forward_chunk.__code__)
    with pytest.raises(ValueError, match="expects 2 arguments, but only 1 input"):
        model(tokens(2, 8))
    monkeypatch.undo()
    assert_identical(outputs(model, tokens(2, 8))[0], before)


def test_a_method_that_a_module_gets_makes_it_the_users_again(model):
    plain = by_code(model)
    for layer in (layers(model)[0], layers(plain)[0]):
        layer.feed_forward_chunk = lambda x: 2 * x
    assert [type(layer) is Layer for layer in layers(model)] == [True, False]
    assert_identical(outputs(model, tokens(2, 8))[0], outputs(plain, tokens(2, 8))[0])


def test_copies_and_pickles_name_the_class_and_are_chunked(model):
    pickled = pickle.dumps(model)
    assert b"BertLayer" in pickled
    for other in (copy.deepcopy(model), pickle.loads(pickled)):
        assert [type(one) is type(two) for one, two in zip(layers(model), layers(other), strict=True)] == [True, True]
        assert_identical(outputs(other, tokens(2, 8))[0], outputs(model, tokens(2, 8))[0])
        assert layers(other)[0].feed_forward_chunk.func.__self__ is layers(other)[0]


def test_distilberts_feed_forward_layers_are_chunked():
    config = transformers.DistilBertConfig(dim=64, n_layers=2, n_heads=4, hidden_dim=96, vocab_size=99)
    model = converted(transformers.DistilBertModel(config).eval())
    assert [isinstance(layer.ffn, Chunked) for layer in model.transformer.layer] == [True, True]
    assert chunked_code_of(type(model.transformer.layer[0].ffn).original).methods == ("ff_chunk",)


def test_a_class_that_would_notice_keeps_its_modules():
    class Noticing(Layer):
        def __init_subclass__(cls):
            raise AssertionError

    class Reduced(Layer):
        def __reduce__(self):
            return super().__reduce__()

    class Usual(Layer):
        pass

    assert chunked_code_of(Layer).methods == chunked_code_of(Usual).methods == ("feed_forward_chunk",)
    assert chunked_code_of(Noticing) is chunked_code_of(Reduced) is None
    assert chunked_code_of(torch.nn.Linear) is None


@pytest.mark.slow(seconds=5)
def test_compiled_without_breaks(model):
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for ours, theirs in zip(outputs(compiled, tokens(2, 8)), outputs(model, tokens(2, 8)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_is_left_to_the_class(model):
    """Transformers gives every subclass of its layers a forward, but not a form."""
    assert all("forward" not in vars(type(layer)) for layer in layers(model))
    model.train().activation_checkpointing_enable()
    x = normal(2, 8, 64, seed=1).requires_grad_()
    model.config._attn_implementation = "eager"
    model(inputs_embeds=x).last_hidden_state.square().sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad.abs().sum() > 0
