"""Layers of transformers' encoders in a few calls: they give the bits of their code, and see whatever is changed."""

import copy

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import torchq
from helpers.compare import assert_identical
from helpers.encoder_forms import PICTURES, TEXTS, assert_same, by_code, distilbert, layers, padded
from helpers.numbers import normal
from helpers.self_attention import TEXT, bert, converted, int8_bert, tokens
from torchq import _C
from torchq.modules.layer_form import LayerForm

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
modeling = pytest.importorskip("transformers.models.bert.modeling_bert")


@pytest.fixture
def model():
    return int8_bert()


@pytest.fixture
def taken(monkeypatch):
    """The forms whose calls were taken, in order."""
    found, run = [], LayerForm._run

    def noting(self, *call):
        y = run(self, *call)
        if y is not NotImplemented:
            found.append(self)
        return y

    monkeypatch.setattr(LayerForm, "_run", noting)
    return found


# ---- The bits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEXTS)
def test_models_of_text_give_the_bits_of_their_code(name, taken):
    model = converted(TEXTS[name]())
    assert len(layers(model)) == 2
    for x in (tokens(1, 12), tokens(4, 7), tokens(1, 1), tokens(6, 90)):
        taken.clear()
        assert_same(model, x)
        assert taken == layers(model)
    taken.clear()
    assert_same(model, tokens(2, 12), attention_mask=padded(2, 12))
    assert taken == layers(model)


@pytest.mark.parametrize("name", PICTURES)
def test_models_of_pictures_give_the_bits_of_their_code(name, taken):
    model = converted(PICTURES[name](), [{"pixel_values": normal(8, 3, 32, 32, seed=seed)} for seed in range(6)])
    assert len(layers(model)) == 2
    assert_same(model, normal(3, 3, 32, 32, seed=1))
    assert taken == layers(model)


def test_an_activation_waits_as_in_the_code(taken, monkeypatch):
    """That of DistilBERT's feed-forward layer, with enough values; sums that only their norms read are no tensors."""
    model, x = converted(distilbert()), normal(8, 64, 64)
    layer, plain = layers(model)[0], by_code(model).transformer.layer[0]
    assert layer.ffn._forward_hooks
    with torch.inference_mode():
        expected = plain(x)
        calls = direct_calls(monkeypatch, layer)
        assert_identical(layer(x), expected)
    assert taken == [layer]
    assert calls == ["call_sum", "call_fused", "call_sum"]


def test_a_sum_and_the_norm_behind_it_are_one_call(monkeypatch):
    """Of a ViT, whose layers go on with both; the last sum has no norm in the layer."""
    model = converted(PICTURES["vit"](), [{"pixel_values": normal(8, 3, 32, 32, seed=seed)} for seed in range(6)])
    layer, x = layers(model)[0], normal(2, 17, 64)
    with torch.inference_mode():
        calls = direct_calls(monkeypatch, layer)
        layer(x)
    assert calls == ["call_sums", "call_fused", "call_sums"]


def direct_calls(monkeypatch, layer):
    """The names of the direct calls that are answered from now on, where a layer is read again."""
    calls = []
    del layer.__dict__["_known"]
    for name in ("call_sum", "call_sums", "call_fused"):
        inner = getattr(_C, name)

        def noting(*args, name=name, inner=inner):
            y = inner(*args)
            calls.extend([name] if y is not NotImplemented else [])
            return y

        monkeypatch.setattr(_C, name, noting)
    return calls


class Owner(modeling.BertLayer):
    """The layer's own code has the activation: its scope is the form's own."""

    def __init__(self, config):
        super().__init__(config)
        self.first, self.act = self.intermediate.dense, nn.GELU()
        del self.intermediate

    def forward(self, hidden_states, attention_mask=None, encoder_hidden_states=None, **kwargs):
        y, _ = self.attention(hidden_states, attention_mask, **kwargs)
        return self.output(self.act(self.first(y)), y)


def test_an_activation_of_the_layer_itself_waits_too(taken):
    model = bert()
    for i in range(2):
        model.encoder.layer[i] = Owner(model.config).eval()
    model = converted(model)
    assert [type(layer).original for layer in layers(model)] == [Owner] * 2
    assert layers(model)[0]._forward_hooks
    assert_same(model, tokens(8, 60))
    assert taken == layers(model)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("shape", [(2, 1, 5, 5), (1, 1, 1, 5), (2, 4, 5, 5), (5, 5), (2, 1, 1, 5)])
def test_masks(model, dtype, shape, taken):
    layer, x = layers(model)[0], normal(2, 5, 64)
    mask = normal(*shape, seed=3) if dtype is torch.float32 else normal(*shape, seed=3) > -1
    with torch.inference_mode():
        expected = layer.original.forward(layer, x, mask)
        taken.clear()
        for y in (layer(x, mask), layer(hidden_states=x, attention_mask=mask, cache=None, softcap=None)):
            assert_identical(y, expected)
    assert taken == [layer] * 2


# ---- Calls ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((), {}),
        ((), {"attention_mask": None}),
        ((None,), {}),
        ((0, None), {"attention_mask": None}),
        ((0,), {"hidden_states": None}),
        ((0, None, None, None, None, None), {}),
        ((0,), {"scaling": None}),
        ((0,), {"past_key_values": None}),
        ((0,), {"forward_fn": None}),
        ((0,), {"attention_output": None}),
        ((0,), {"is_causal": True}),
        ((0,), {"position_bias": torch.zeros(2, 4, 5, 5)}),
        ((0, "mask"), {}),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_other_calls_are_those_of_the_code(model, args, kwargs):
    x = normal(2, 5, 64)
    args = tuple(x if each == 0 else each for each in args)
    results = []
    for layer in (layers(model)[0], by_code(model).encoder.layer[0]):
        try:
            with torch.inference_mode():
                results.append(layer(*args, **kwargs))
        except (AttributeError, TypeError, RuntimeError) as error:
            results.append((type(error), str(error).split("forward()")[-1]))
    if isinstance(results[0], tuple):
        assert results[0] == results[1]
    else:
        assert_identical(results[0], results[1])


def test_other_shapes_and_dtypes(model):
    layer, plain = layers(model)[0], by_code(model).encoder.layer[0]
    for x in (normal(2, 64, 5).transpose(1, 2), normal(2, 5, 128)[..., ::2], normal(2, 5, 64).double(), normal(5, 64)):
        results = []
        for module in (layer, plain):
            try:
                results.append(module(x))
            except (RuntimeError, TypeError, ValueError, IndexError) as error:
                results.append(type(error))
        assert type(results[0]) is type(results[1])
        if isinstance(results[0], torch.Tensor):
            assert_identical(results[0], results[1])
    for dtype in (torch.bfloat16, torch.float16):
        results = []
        for each in (copy.deepcopy(layer), copy.deepcopy(plain)):
            with torch.inference_mode():
                results.append(each.to(dtype)(normal(2, 5, 64).to(dtype)))
        assert_identical(results[0], results[1])


def test_autocast_simulation_and_gradients(model):
    layer, plain, x = layers(model)[0], by_code(model).encoder.layer[0], normal(2, 5, 64)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert_identical(layer(x), plain(x))
    with torch.inference_mode(), torchq.simulate():
        assert_identical(layer(x), plain(x))
    grads = []
    for module in (layer, plain):
        leaf = x.clone().requires_grad_()
        module(leaf).square().sum().backward()
        grads.append(leaf.grad)
    assert_identical(grads[0], grads[1])
    assert grads[0].abs().sum() > 0


def test_training_is_left_to_the_code(model, taken):
    x = normal(2, 5, 64)
    results = []
    for layer in (layers(model)[0], by_code(model).encoder.layer[0]):
        torch.manual_seed(0)
        results.append(layer.train()(x))
    assert_identical(results[0], results[1])
    assert not taken
    assert not torch.equal(results[0], layers(model)[0].eval()(x))
    assert taken == layers(model)[:1]
    dropout = layers(model)[0].output.dropout.train()
    torch.manual_seed(0)
    y = layers(model)[0](x)
    dropout.eval()
    assert not torch.equal(y, layers(model)[0](x))


def test_a_cache_is_kept_by_the_code():
    model = converted(transformers.BertLMHeadModel(transformers.BertConfig(**TEXT, is_decoder=True)).eval())
    assert len(layers(model)) == 2
    x = tokens(2, 9)
    ours, theirs = (each.generate(x, max_new_tokens=6, do_sample=False) for each in (model, by_code(model)))
    assert torch.equal(ours, theirs)


def test_hidden_states_are_as_ever(model):
    x = tokens(2, 7)
    ours = assert_same(model, x, output_hidden_states=True)
    assert [len(each) for each in ours if isinstance(each, tuple)] == [3]


# ---- What somebody sees or changes ----------------------------------------------------------------------------------


def test_hooks_see_the_calls_of_all_modules(model, taken):
    layer, plain, x = layers(model)[0], by_code(model).encoder.layer[0], normal(2, 5, 64)
    expected = layer(x)
    for name, _ in layer.named_modules():
        if name == "attention.self.dropout":  # which no code calls
            continue
        results = []
        for module in (layer, plain):
            child, seen = module.get_submodule(name), []
            handles = [
                child.register_forward_pre_hook(lambda module, args, seen=seen: seen.append("before")),
                child.register_forward_hook(lambda module, args, y, seen=seen: seen.append("after")),
            ]
            results.append(module(x))
            assert seen == ["before", "after"], name
            for handle in handles:
                handle.remove()
        assert_identical(results[0], results[1])
    taken.clear()
    assert_identical(layer(x), expected)
    assert taken == [layer]
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.append(type(module).__name__))
    try:
        layer(x)
    finally:
        handle.remove()
    assert {"BertLayer", "BertAttention", "BertSelfAttention", "LayerNorm", "QuantizedLinear"} <= set(seen)


def other_norm(layer):
    layer.output.LayerNorm = nn.LayerNorm(64, eps=1.0)


def other_weight(layer):
    with torch.no_grad():
        layer.output.LayerNorm.weight.mul_(2)


def own_forward(layer):
    layer.attention.forward = lambda x, *args, **kwargs: (2 * x, None)


def own_method(layer):
    layer.feed_forward_chunk = lambda x: 3 * x


def other_attention(layer):
    layer.attention = First()


def no_attention(layer):
    layer.attention.self = First()


class First(nn.Module):
    def forward(self, x, *args, **kwargs):
        return x, None


def other_row(layer):
    layer.intermediate.dense = nn.Linear(64, 96)


def other_activation(layer):
    layer.intermediate.intermediate_act_fn = nn.ReLU()


def chunks(layer):
    layer.chunk_size_feed_forward, layer.seq_len_dim = 5, 0


def other_scale(layer):
    layer.attention.self.scaling = 0.7


def child_beside(layer):
    layer.__dict__["attention"] = First()


def cross_attention(layer):
    layer.attention.is_cross_attention = True


def kind_of_its_own(layer):
    class Doubled(type(layer.output)):
        def forward(self, x, y):
            return 2 * super().forward(x, y)

    object.__setattr__(layer.output, "__class__", Doubled)


CHANGES = [other_norm, other_weight, own_forward, own_method, other_attention, no_attention, other_row]
CHANGES += [other_activation, other_scale, child_beside, kind_of_its_own, chunks, cross_attention]


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_afterwards_counts(model, change):
    layer, x = layers(model)[0], normal(5, 5, 64)
    plain = by_code(model).encoder.layer[0]
    with torch.inference_mode():
        before = layer(x)
        for module in (layer, plain):
            torch.manual_seed(1)
            change(module)
        after = [module(x) for module in (layer, plain)]
    assert_identical(after[0], after[1])
    assert torch.equal(after[0], before) == (change in (chunks, cross_attention))


def test_what_its_classes_get_later_counts(model, monkeypatch):
    layer, x = layers(model)[0], normal(2, 5, 64)
    before = layer(x)
    changes = [
        (modeling.BertLayer, "forward", lambda self, x, *args, **kwargs: x),
        (modeling.BertLayer, "feed_forward_chunk", lambda self, x: x),
        (modeling.BertAttention, "forward", lambda self, x, *args, **kwargs: (x, None)),
        (modeling.BertOutput, "forward", lambda self, y, x: x),
        (modeling.BertIntermediate, "forward", lambda self, x: 2 * self.dense(x)),
        (nn.Dropout, "forward", lambda self, x: 2 * x),
    ]
    for kind, name, function in changes:
        monkeypatch.setattr(kind, name, function)
        assert not torch.equal(layer(x), before), (kind, name)
        monkeypatch.undo()
        assert_identical(layer(x), before)
    monkeypatch.setattr(modeling.BertAttention, "output", property(lambda _: lambda y, x: 2 * y), raising=False)
    assert not torch.equal(layer(x), before)


def test_functions_that_are_replaced_count(model, monkeypatch):
    layer, x = layers(model)[0], normal(2, 5, 64)
    before = layer(x)
    scope = modeling.__dict__
    monkeypatch.setitem(scope, "apply_chunking_to_forward", lambda method, size, dim, x: 2 * method(x))
    assert_identical(layer(x), 2 * before)
    monkeypatch.undo()

    def apply_chunking_to_forward(forward_fn, chunk_size, chunk_dim, *input_tensors):
        return 3 * forward_fn(*input_tensors)

    function = scope["apply_chunking_to_forward"]
    monkeypatch.setattr(function, "__code__", apply_chunking_to_forward.__code__)
    assert_identical(layer(x), 3 * before)
    monkeypatch.undo()
    inner = modeling.BertLayer.forward.__wrapped__.__wrapped__
    monkeypatch.setattr(inner, "__code__", (lambda self, x, *args, **kwargs: 4 * x).__code__)
    assert_identical(layer(x), 4 * x)
    monkeypatch.undo()
    assert_identical(layer(x), before)


def test_modes_see_what_the_code_calls(model):
    class Names(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            names.append(getattr(func, "__name__", str(func)))
            return func(*args, **(kwargs or {}))

    found, x = [], normal(2, 5, 64)
    for layer in (layers(model)[0], by_code(model).encoder.layer[0]):
        names = []
        with Names(), torch.inference_mode():
            layer(x)
        found.append(names)
    assert found[0] == found[1]
