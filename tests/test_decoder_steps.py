"""The calls of a decoder's layer made by one call of C++: its cache gets keys and values once, whatever comes of it."""

import copy
from types import SimpleNamespace

import pytest
import torch

from helpers.compare import assert_identical
from helpers.decoder_layers import assert_decodes_alike, dynamic, inputs, pair
from helpers.decoders import int8, whole
from helpers.encoder_forms import by_code, forms
from helpers.self_attention import tokens
from torchq import _C
from torchq.modules.layer_given import MOST, reading_of
from torchq.modules.layer_steps import LayerSteps, OneStep, _forgetting
from torchq.modules.self_attention import Given

pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture(scope="module")
def llama():
    return int8()


@pytest.fixture
def model(llama):
    return copy.deepcopy(llama)


@pytest.fixture
def done(monkeypatch):
    """How many of its calls each layer has made in one, and whether its cache had got keys and values then."""
    counts, run = [], LayerSteps.run

    def noting(self, *call):
        values, done, heads = run(self, *call)
        counts.append((done, heads is not None))
        return values, done, heads

    monkeypatch.setattr(LayerSteps, "run", noting)
    return counts


def replaced(layer, function, other):
    """The layer, with another function where a step calls this one."""
    known = layer._learned()
    steps = tuple(each._replace(function=other) if each.function is function else each for each in known.in_one.steps)
    assert steps != known.in_one.steps
    layer.__dict__["_known"] = layer, known._replace(in_one=known.in_one._replace(steps=steps))


def one_token(model, cache, layer):
    """What a layer makes of a token behind a cache."""
    x, more = inputs(model, 1, 1)
    with torch.inference_mode():
        return layer(x, **more, cache=cache)


def filled(model):
    cache = dynamic(model)
    with torch.inference_mode():
        by_code(model)(tokens(1, 5), cache=cache, use_cache=True)
    return cache


def assert_same_token(model):
    """That a layer gives the bits of its code, and so does its cache."""
    ours, theirs = filled(model), filled(model)
    one, other = pair(model)
    assert_identical(one_token(model, ours, one), one_token(model, theirs, other))
    assert ours.layers[0].keys.shape[2] == 6
    assert_identical(ours.layers[0].keys, theirs.layers[0].keys)
    assert_identical(ours.layers[0].values, theirs.layers[0].values)


def not_plain(*_):
    return NotImplemented


def test_a_token_is_one_call(model, done):
    assert_same_token(model)
    assert done == [(5, False)]


def test_a_prompt_behind_a_cache_that_asks_which_keys_a_row_sees_is_attended_in_python(model, done):
    assert_decodes_alike(model, tokens(2, 7))
    assert done == [(0, False)] * 2 + [(5, False)] * 6


@pytest.mark.parametrize("function", [_C.call_heads, _C.call_attention])
def test_python_goes_on_with_what_the_cache_has_got(model, function, done):
    replaced(forms(model)[0], function, not_plain)
    assert_same_token(model)
    assert done == [(1, function is _C.call_attention)]


def test_heads_are_held_until_the_whole_call_of_the_attention_is_done():
    steps = [OneStep(abs, (None,), (0, i), False) for i in range(3)]
    assert [step.unread for step in _forgetting(steps, {}, {0, 3})] == [(), (1,), (2,)]
    assert [step.unread for step in _forgetting(steps, {2: (1,)}, {0, 3})] == [(), (), (1, 2)]


def test_an_error_of_the_cache_is_raised_and_it_is_called_once(model, monkeypatch):
    cache, calls = filled(model), []

    def update(*args, **more):
        calls.append(args)
        raise RuntimeError("it is full")

    monkeypatch.setattr(type(cache.layers[0]), "update", update)
    with pytest.raises(RuntimeError, match="it is full"):
        one_token(model, cache, forms(model)[0])
    assert len(calls) == 1


def test_call_cache_gives_keys_and_values():
    class Kept:
        def update(self, *args, **more):
            return [*args, more]

    class Both(Kept):
        def update(self, *args, **more):
            return [args, more]

    assert _C.call_cache(None, 1, 2, 3, {}, True) == (1, 2)
    assert _C.call_cache(Both(), 1, 2, 3, {"a": 4}, False) == ((1, 2, 3), {})
    assert _C.call_cache(Both(), 1, 2, 3, {"a": 4}, True) == ((1, 2, 3), {"kwargs": {"a": 4}})
    with pytest.raises(ValueError, match="other than keys and values"):
        _C.call_cache(Kept(), 1, 2, 3, {}, False)
    assert _C.call_cache(None, 1, 2) is NotImplemented


def test_each_way_to_call_is_read_once(model, monkeypatch):
    count = whole(monkeypatch)
    layer, (x, more) = forms(model)[0], inputs(model)
    with torch.inference_mode():
        expected = layer(x, **more)
        for i in range(2 * MOST):
            assert_identical(layer(hidden_states=x, **more, **{f"own_{i}": i}), expected)
        assert_identical(layer(x, None, **more), expected)
    assert count == [2 * MOST + 2]
    assert 1 < len(layer._learned().readings) <= MOST


@pytest.mark.parametrize(("own", "given"), [(("x", "attention_mask"), Given(0, 1)), (("x",), Given(0, absent=(1,)))])
def test_a_mask_that_the_code_does_not_name_must_be_none(own, given):
    line = SimpleNamespace(names=own, required={"x"}, takes_more=True, defaults=())
    steps = SimpleNamespace(refused=frozenset(), hands_on=False, attentions=(None,))
    assert reading_of(line, steps, 1, ("attention_mask",)).given == (given,)
