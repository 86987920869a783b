"""Self-attention of transformers in a few calls: hooks, changes, modes, copies and threads see what they ever saw."""

import copy
import pickle
import threading
import types
import warnings

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import torchq
from helpers.compare import assert_identical
from helpers.numbers import normal
from helpers.self_attention import assert_same, bert, by_code, forms, int8_bert, outputs, tokens
from torchq.modules.attention import AttentionScheme

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
registry = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS


@pytest.fixture
def model():
    return int8_bert()


class First(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x):
        return self.attention(x)[0]


def test_hooks_see_the_calls(model):
    attention, x, seen = forms(model)[0], tokens(2, 7), []
    expected = outputs(model, x)
    handle = attention.register_forward_hook(lambda module, args, y: seen.append(type(y)))
    assert_identical(outputs(model, x)[0], expected[0])
    assert seen == [tuple]
    handle.remove()
    handle = attention.key.register_forward_hook(lambda module, args, y: 0 * y)
    changed = assert_same(model, x)
    assert not torch.equal(changed[0], expected[0])
    handle.remove()
    assert_identical(outputs(model, x)[0], expected[0])


def test_hidden_states_and_attentions_are_as_ever(model):
    x = tokens(2, 7)
    ours = model(x, output_hidden_states=True)
    theirs = by_code(model)(x, output_hidden_states=True)
    for one, other in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert_identical(one, other)


def replaced_child(attention):
    attention.value = nn.Linear(64, 64)


def wider_value(attention):
    attention.value = nn.Linear(64, 128)


def narrower_all(attention):
    for name in ("query", "key", "value"):
        setattr(attention, name, nn.Linear(64, 32))


def own_forward(attention):
    attention.forward = lambda x, *args, **kwargs: (2 * x, None)


def other_scale(attention):
    attention.scaling = 0.7


def whole_scale(attention):
    attention.scaling = 1


def other_size(attention):
    attention.attention_head_size = 32


def to_sdpa(attention):
    attention.config._attn_implementation = "sdpa"


def to_eager(attention):
    attention.config._attn_implementation = "eager"


def other_scheme(attention):
    attention.torchq_attention.scheme = "bfloat16"


def no_scheme(attention):
    del attention.torchq_attention


def causal(attention):
    attention.is_causal = True


def child_beside(attention):
    attention.__dict__["query"] = lambda x: x


CHANGES = [replaced_child, wider_value, narrower_all, own_forward, other_scale, whole_scale, other_size]
CHANGES += [to_sdpa, to_eager, other_scheme, no_scheme, causal, child_beside]


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_afterwards_counts(model, change):
    attention, x = forms(model)[1], normal(2, 5, 64)
    with torch.inference_mode():
        before = attention(x)[0]
        torch.manual_seed(1)
        change(attention)
        plain = copy.deepcopy(attention)
        object.__setattr__(plain, "__class__", attention.original)
        results = []
        for module in (attention, plain):
            try:
                results.append(module(x)[0])
            except RuntimeError as error:
                results.append(str(error))
    if isinstance(results[0], str):
        assert results[0] == results[1]
        return
    assert_identical(results[0], results[1])
    assert results[0].shape != before.shape or not torch.equal(results[0], before)


class Flat(nn.Module):
    """Gives the rows of all batches in one."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x).reshape(1, -1, 64)


def flat_children(attention):
    for name in ("query", "key", "value"):
        setattr(attention, name, Flat(getattr(attention, name)))


def before_query(change):
    """A hook on a child that changes the module between the calls of its children."""

    def install(attention):
        attention.query.register_forward_pre_hook(lambda module, args: change(attention, args[0]))

    return install


BETWEEN = {
    "the scale, from its input": lambda attention, x: setattr(attention, "scaling", x.abs().mean().item()),
    "the next child": lambda attention, x: setattr(attention, "key", nn.Identity()),
    "the attention function": lambda attention, x: setattr(attention, "torchq_attention", AttentionScheme("bfloat16")),
    "training": lambda attention, x: setattr(attention, "training", True),
}
CHANGES_BETWEEN = [flat_children, *map(before_query, BETWEEN.values())]


@pytest.mark.parametrize("install", CHANGES_BETWEEN, ids=["flat children", *BETWEEN])
def test_children_may_do_anything_between_the_calls(install):
    """The first call already gives what the code does."""
    results, x = [], normal(2, 5, 64)
    for of in (lambda model: model, by_code):
        attention = of(int8_bert()).encoder.layer[1].attention.self
        with torch.inference_mode():
            before = attention(x)[0]
            install(attention)
            torch.manual_seed(1)
            results.append(attention(x)[0])
    assert_identical(results[0], results[1])
    assert torch.equal(results[0], before) == (install is flat_children)


@pytest.mark.parametrize(("name", "value"), [("scaling", 0.7), ("query", torch.zeros_like)])
def test_what_its_class_gets_later_counts(model, monkeypatch, name, value):
    attention, x = forms(model)[0], normal(2, 5, 64)
    before, plain = attention(x)[0], copy.deepcopy(attention)
    object.__setattr__(plain, "__class__", attention.original)
    monkeypatch.setattr(attention.original, name, property(lambda _: value), raising=False)
    y = attention(x)[0]
    assert not torch.equal(y, before)
    assert_identical(y, plain(x)[0])
    monkeypatch.undo()
    assert_identical(attention(x)[0], before)


def test_code_that_is_replaced_counts(model, monkeypatch):
    attention, x = forms(model)[0], normal(2, 5, 64)
    inner = attention.line.inner
    monkeypatch.setattr(inner, "__code__", (lambda self, x, *args, **kwargs: (2 * x, 0)).__code__)
    assert_identical(attention(x)[0], 2 * x)
    monkeypatch.undo()
    monkeypatch.setattr(attention.original, "forward", lambda self, x, *args, **kwargs: (3 * x, 0))
    assert_identical(attention(x)[0], 3 * x)


def test_the_registry_counts(model, monkeypatch):
    attention, x = forms(model)[0], normal(2, 5, 64)

    def zeros(module, query, key, value, mask, **kwargs):
        return torch.zeros_like(query).transpose(1, 2).contiguous(), None

    monkeypatch.setitem(registry._local_mapping, "torchq", zeros)
    assert not attention(x)[0].any()
    monkeypatch.undo()
    assert attention(x)[0].any()
    scope = attention.line.inner.__globals__
    monkeypatch.setitem(scope, "ALL_ATTENTION_FUNCTIONS", types.SimpleNamespace(get_interface=lambda *args: zeros))
    assert not attention(x)[0].any()


def test_training_and_gradients_are_as_ever(model):
    attention, x = forms(model)[0], normal(2, 5, 64)
    plain = by_code(model).encoder.layer[0].attention.self
    grads = []
    for module in (attention, plain):
        leaf = x.clone().requires_grad_()
        module(leaf)[0].square().sum().backward()
        grads.append(leaf.grad)
    assert_identical(grads[0], grads[1])
    for module in (attention.train(), plain.train()):
        torch.manual_seed(0)
        grads.append(module(x)[0])
    assert_identical(grads[2], grads[3])
    assert not torch.equal(grads[2], attention.eval()(x)[0])


def test_calls_that_the_code_refuses(model):
    attention, x = forms(model)[0], normal(2, 5, 64)
    for args, kwargs in [
        ((), {}),
        ((x,), {"hidden_states": None}),
        ((x, None), {"attention_mask": None}),
        ((x, None, None, None), {}),
        ((None,), {}),
        ((x,), {"dropout": None}),
        ((x,), {"scaling": None}),
        ((x,), {"query": None}),
    ]:
        with pytest.raises((TypeError, AttributeError)):
            attention(*args, **kwargs)
    with pytest.warns(FutureWarning, match="past_key_values"):
        attention(x, past_key_values=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_identical(attention(hidden_states=x)[0], attention(x, None, None)[0])


def test_modes_see_what_the_code_calls(model):
    class Names(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            names.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    attention, x, found = forms(model)[0], normal(2, 5, 64), []
    for call in (attention, types.MethodType(attention.original.forward, attention)):
        names = []
        with Names(), torch.inference_mode():
            call(x)
        found.append(names)
    assert found[0] == found[1]
    assert found[0].count("view") == 3


def test_traces_and_graphs_hold_the_code(model):
    attention, y = forms(model)[0], normal(2, 5, 64)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = attention(y)[0]
        traced = torch.jit.trace(First(attention), (y,), check_trace=False)
        assert_identical(traced(normal(3, 9, 64)), attention(normal(3, 9, 64))[0])
        exported = torch.export.export(attention, (y,), strict=False)
        assert_identical(exported.module()(y)[0], expected)
        compiled = torch.compile(First(attention), backend="eager", fullgraph=True)
        assert_identical(compiled(y), expected)


def test_simulation(model):
    x = tokens(2, 7)
    with torchq.simulate():
        simulated = assert_same(model, x)
    assert not torch.equal(simulated[0], outputs(model, x)[0])


def test_copies_pickles_and_files(model, tmp_path):
    x = tokens(2, 7)
    expected, words = outputs(model, x), repr(model)
    assert type(forms(model)[0]).__name__ == "BertSelfAttention"
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(forms(other)) == 2
        assert repr(other) == words == repr(by_code(model))
        assert_identical(outputs(other, x)[0], expected[0])
    torchq.save(model, tmp_path / "model.safetensors")
    loaded = torchq.load(tmp_path / "model.safetensors", bert())
    assert len(forms(loaded)) == 2
    assert_identical(outputs(loaded, x)[0], expected[0])


def test_the_class_makes_float_modules_and_subclasses(model):
    attention = forms(model)[0]
    made = type(attention)(attention.config)
    assert type(made.query) is nn.Linear
    assert made.eval()(normal(1, 3, 64))[0].shape == (1, 3, 64)


def test_a_thread_may_replace_children(model):
    """Each call computes with the old one or the new one."""
    attention, x = forms(model)[0], normal(1, 6, 64)
    values = [attention.value, copy.deepcopy(attention.value)]
    with torch.inference_mode():
        values[1].register_forward_hook(lambda module, args, y: 2 * y)
        allowed = []
        for value in values:
            attention.value = value
            allowed.append(attention(x)[0].clone())
        stop = threading.Event()

        def swap():
            while not stop.is_set():
                for value in values:
                    attention.value = value

        thread = threading.Thread(target=swap)
        thread.start()
        try:
            found = [attention(x)[0] for _ in range(300)]
        finally:
            stop.set()
            thread.join()
    assert all(any(torch.equal(y, one) for one in allowed) for y in found)
