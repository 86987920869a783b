"""The calls of a layer made by one call of C++: their order, what they are given, and where Python goes on."""

import operator
import weakref

import pytest
import torch

from helpers.compare import assert_identical
from helpers.encoder_forms import PICTURES, assert_same, by_code, layers
from helpers.numbers import normal
from helpers.self_attention import converted, int8_bert
from torchq import _C
from torchq.modules.attention import AttentionScheme
from torchq.modules.layer_steps import LayerSteps

pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture
def done(monkeypatch):
    """How many of its calls each layer has made in one."""
    counts, run = [], LayerSteps.run

    def noting(self, *call):
        values, done, heads = run(self, *call)
        counts.append(done)
        return values, done, heads

    monkeypatch.setattr(LayerSteps, "run", noting)
    return counts


def by_its_code(model, *args):
    """What transformers' own code makes of a model's first layer."""
    return by_code(model).encoder.layer[0](*args)


# ---- One call -------------------------------------------------------------------------------------------------------


def test_a_step_takes_its_arguments_and_values():
    steps = (
        (operator.sub, (None, None), (0, 1, 1, 0), False, ()),
        (max, (None, 4, None), (0, 0, 2, 2), False, ()),
        (divmod, (None, 10), (0, 3), True, ()),
        (divmod, (None, 10), (0, 3), False, ()),
    )
    found = [3, 50]
    assert _C.call_steps(steps, found)
    assert found == [3, 50, 47, 47, 4, 7, (4, 7)]


class Thing:
    """What is made, and let go."""


def test_values_that_nobody_reads_any_more_are_let_go():
    made = []

    def make():
        thing = Thing()
        made.append(weakref.ref(thing))
        return thing

    def is_alive():
        return made[0]() is not None

    steps = (
        (make, (), (), False, ()),
        (is_alive, (), (), False, ()),
        (type, (None,), (0, 0), False, (0,)),
        (is_alive, (), (), False, ()),
    )
    found = []
    assert _C.call_steps(steps, found)
    assert found == [None, True, Thing, False]


def test_a_layer_lets_go_of_queries_keys_and_values():
    steps = layers(int8_bert())[0]._learned().in_one.steps
    (attention,) = [step for step in steps if step.function is _C.call_attention]
    assert len(attention.unread) == 3
    assert attention.unread == tuple(sorted(attention.places[1:6:2]))
    read = [place for step in steps[steps.index(attention) + 1 :] for place in step.places[1::2]]
    assert not {*attention.unread} & {*read}


def test_not_implemented_ends_the_steps():
    steps = (
        (abs, (None,), (0, 0), False, ()),
        (int.__add__, (None, 0.5), (0, 1), False, ()),
        (abs, (-1,), (), False, ()),
    )
    found = [-3]
    assert not _C.call_steps(steps, found)
    assert found == [-3, 3]


def test_an_error_is_that_of_the_step():
    with pytest.raises(ZeroDivisionError):
        _C.call_steps(((operator.floordiv, (1, None), (1, 0), False, ()),), [0])


@pytest.mark.parametrize("places", [(0, 1), (1, 0), (0, -1), (-1, 0)])
def test_a_place_that_is_not_there_ends_the_steps(places):
    found = [1]
    assert not _C.call_steps(((abs, (None,), places, False, ()),), found)
    assert found == [1]


# ---- A layer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_all_values_come_of_plain_calls(masked, done):
    model, x = int8_bert(), normal(2, 5, 64)
    layer = layers(model)[0]
    mask = normal(2, 1, 5, 5, seed=3) > -1 if masked else None
    with torch.inference_mode():
        expected = by_its_code(model, x, mask)
        assert_identical(layer(x, mask), expected)
    assert done == [4]


def test_the_calls_after_one_that_is_not_plain_are_made_in_python(done):
    """A norm that learns: products of tensors that don't are plain calls all the same."""
    model, x = int8_bert(), normal(2, 5, 64)
    layer = layers(model)[0]
    y = layer(x)
    assert y.requires_grad
    assert_identical(y, by_its_code(model, x))
    assert done == [1]


def test_each_call_asks_for_the_scheme(done):
    model, x = int8_bert(), normal(2, 40, 64)
    layer = layers(model)[0]
    attention = layer.attention.self
    found = []
    with torch.inference_mode():
        for scheme in ("float32", "int8"):
            attention.torchq_attention = AttentionScheme(scheme)
            found.append(layer(x))
            assert_identical(found[-1], by_its_code(model, x))
    assert not torch.equal(*found)
    assert done == [4, 4]


def test_each_call_asks_whether_it_is_causal(done):
    model, x = int8_bert(), normal(2, 7, 64)
    layer = layers(model)[0]
    found = []
    with torch.inference_mode():
        for causal in (False, True):
            layer.attention.self.is_causal = causal
            found.append(layer(x))
            assert_identical(found[-1], by_its_code(model, x))
    assert not torch.equal(*found)
    assert done == [4, 4]


# ---- Where it lies --------------------------------------------------------------------------------------------------


def test_lines_outlive_what_they_were_of():
    holder = {"rows": [(i, [i]) for i in range(100)], "module": torch.nn.Linear(3, 4)}
    lines = _C.lines_of((holder, holder), ())
    holder.clear()
    del holder
    assert _C.fetch_lines(lines) is None


def test_only_lines_are_fetched():
    with pytest.raises(ValueError, match="PyCapsule"):
        _C.fetch_lines((1, 2))


@pytest.mark.parametrize("name", PICTURES)
def test_a_row_whose_last_layer_stays_float_is_whole(name):
    """What its sum would be computed with is no int8 layer."""
    last = tuple(each for each, _ in PICTURES[name]().named_modules() if each.endswith("fc2"))
    model = converted(
        PICTURES[name](), [{"pixel_values": normal(8, 3, 32, 32, seed=i)} for i in range(6)], exclude=last
    )
    assert [type(model.get_submodule(each)) for each in last] == [torch.nn.Linear] * 2
    assert_same(model, normal(3, 3, 32, 32, seed=1))
