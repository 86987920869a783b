"""The layers of decoders in a few calls: they give the bits of their code, and see whatever is changed."""

import copy

import pytest
import torch
from torch import nn

import torchq
from helpers.compare import assert_identical
from helpers.decoder_layers import assert_decodes_alike, dynamic, inputs, pair, static
from helpers.decoders import decoded, decoder, int8, whole
from helpers.encoder_forms import assert_same, by_code, forms
from helpers.numbers import normal
from helpers.self_attention import tokens
from torchq import _C

modeling = pytest.importorskip("transformers.models.llama.modeling_llama")

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Ministral")


@pytest.fixture(scope="module")
def llama():
    return int8()


@pytest.fixture
def model(llama):
    return copy.deepcopy(llama)


@pytest.fixture
def count(monkeypatch):
    return whole(monkeypatch)


# ---- The bits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bits_are_those_of_the_code(family, count):
    model = int8(family)
    assert forms(model) == list(model.model.layers)
    assert_same(model, tokens(2, 7), use_cache=False)
    assert count == [2]
    assert_decodes_alike(model, tokens(1, 9))
    assert count == [10]
    assert_decodes_alike(model, tokens(3, 5), static)
    assert count == [18]


@pytest.mark.parametrize("rows", [1, 8, 700])
def test_many_rows(model, count, rows):
    assert_same(model, tokens(2, rows), use_cache=False)
    assert count == [2]


def test_a_sliding_window_and_padding(count):
    model = int8("Mistral", sliding_window=6)
    assert_decodes_alike(model, tokens(2, 9))
    assert count == [8]
    x = tokens(2, 8)
    mask = torch.ones_like(x)
    mask[0, :3] = 0
    y = assert_same(model, x, attention_mask=mask, use_cache=False)[0]
    assert not torch.equal(y[0], assert_same(model, x, use_cache=False)[0][0])
    assert count == [12]


def test_generated_tokens_are_the_same(model, count):
    x = tokens(2, 6)
    more = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(x)}
    ours = model.generate(x, **more)
    assert count == [10]
    assert_identical(ours, by_code(model).generate(x, **more))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(dtype, count):
    batches = [{"input_ids": tokens(4, 24, seed=seed)} for seed in range(4)]
    model = torchq.convert(decoder().to(dtype), batches, progress=False)
    assert_decodes_alike(model, tokens(1, 9))
    assert count == [8]


def test_it_is_close_to_float(llama):
    model, x = decoder().double(), tokens(2, 9)
    ours, exact = decoded(llama, x, dynamic(llama)), decoded(model, x, dynamic(model))
    for one, other in zip(ours, exact, strict=True):
        noise = (one.double() - other).square().sum()
        assert 10 * torch.log10(other.square().sum() / noise) > 25


def test_products_and_what_is_around_them_are_one_call(model, monkeypatch, count):
    taken = []
    for name in ("call_sums", "call_gated", "call_heads"):
        inner = getattr(_C, name)

        def counted(*args, name=name, inner=inner):
            y = inner(*args)
            taken.append((name, y is not NotImplemented))
            return y

        monkeypatch.setattr(_C, name, counted)
    layer, (x, more) = forms(model)[0], inputs(model)
    with torch.inference_mode():
        layer(x, **more)
    assert taken == [(name, True) for name in ("call_heads", "call_sums", "call_gated", "call_sums")]
    assert count == [1]


# ---- Calls ----------------------------------------------------------------------------------------------------------


class Own:
    """A cache of the user, which turns off the norm behind it."""

    def __init__(self, layer):
        self.layer = layer

    def update(self, k, v, *args, **more):
        self.layer.post_attention_layernorm = nn.Identity()
        return torch.cat((k, 2 * k), dim=2), torch.cat((v, 2 * v), dim=2)


def test_a_cache_of_the_user_may_change_anything(model, count):
    x, more = inputs(model)
    results = []
    for layer in pair(model):
        with torch.inference_mode():
            results.append(layer(x, **more, cache=Own(layer)))
    assert_identical(*results)
    assert count == [0]


def test_a_cache_with_a_method_of_its_own(model, count):
    x, more = inputs(model)
    results = []
    for layer in pair(model):
        cache = dynamic(model)
        cache.layers[0].update = Own(layer).update
        with torch.inference_mode():
            results.append(layer(x, **more, cache=cache))
    assert_identical(*results)
    assert count == [0]


def test_a_cache_that_makes_layers_of_the_user(model, count):
    cache_utils = pytest.importorskip("transformers.cache_utils")
    x, more = inputs(model)
    results = []
    for layer in pair(model):

        class Changing(cache_utils.DynamicLayer):
            def update(self, k, v, *args, changed=layer, **more):
                changed.post_attention_layernorm = nn.Identity()
                return super().update(k, v, *args, **more)

        cache = cache_utils.DynamicCache()  # which has no layers yet
        cache.layer_class_to_replicate = Changing
        with torch.inference_mode():
            results.append(layer(x, **more, cache=cache))
    assert_identical(*results)
    assert count == [0]


def test_a_copy_by_its_dict_has_parts_of_its_own(model, count):
    x, more = inputs(model)
    results = []
    for layer in pair(model):
        with torch.inference_mode():
            layer(x, **more)
            copied = layer._replicate_for_data_parallel()
            copied._modules = {**layer._modules, "mlp": nn.Identity()}
            results.append(copied(x, **more))
    assert_identical(*results)
    assert count == [2]


@pytest.mark.parametrize(
    ("more", "taken"),
    [
        ({}, True),
        ({"attention_mask": None, "use_cache": 3, "position_ids": torch.arange(5)[None]}, True),
        ({"any": 3, "flag": None}, True),
        ({"attention_mask": torch.rand(2, 1, 5, 5) > 0.2}, True),
        ({"is_causal": False}, False),
        ({"output_attentions": True}, False),
        ({"softcap": None}, True),
        ({"position_bias": torch.zeros(1, 4, 5, 5)}, False),
        ({"past_key_values": None}, False),
        ({"position_embeddings": None}, False),
        ({"position_embeddings": 3}, False),
        ({"scaling": 1.0}, False),
        ({"query": None}, False),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_other_calls_are_those_of_the_code(model, more, taken, count):
    x, usual = inputs(model)
    results = []
    for layer in pair(model):
        try:
            with torch.inference_mode():
                results.append(layer(x, **{**usual, **more}))
        except (TypeError, ValueError) as error:
            results.append(str(error))
    if isinstance(results[0], str):
        assert results[0] == results[1]
    else:
        assert_identical(*results)
    assert count == [int(taken)]


def test_other_shapes(model):
    layer, plain = pair(model)
    _, more = inputs(model)
    for x in (normal(2, 64, 5).transpose(1, 2), normal(2, 5, 128)[..., ::2], normal(2, 0, 64), normal(5, 64)):
        results = []
        for module in (layer, plain):
            try:
                results.append(module(x, **more))
            except (RuntimeError, TypeError, ValueError, IndexError) as error:
                results.append(type(error))
        if isinstance(results[0], torch.Tensor):
            assert_identical(*results)
        else:
            assert results[0] is results[1]


# ---- What somebody sees or changes ----------------------------------------------------------------------------------


def test_hidden_states_are_as_ever(model):
    ours = assert_same(model, tokens(2, 7), output_hidden_states=True, use_cache=False)
    assert [len(each) for each in ours if isinstance(each, tuple)] == [3]


def test_hooks_see_the_calls_of_all_modules(model, count):
    (layer, plain), (x, more) = pair(model), inputs(model)
    expected = layer(x, **more)
    for name, _ in layer.named_modules():
        results = []
        for module in (layer, plain):
            child, seen = module.get_submodule(name), []
            handles = [
                child.register_forward_pre_hook(lambda module, args, seen=seen: seen.append("before")),
                child.register_forward_hook(lambda module, args, y, seen=seen: seen.append("after")),
            ]
            results.append(module(x, **more))
            assert seen == ["before", "after"], name
            for handle in handles:
                handle.remove()
        assert_identical(*results)
    assert count == [1]
    assert_identical(layer(x, **more), expected)
    assert count == [2]


def other_norm(layer):
    layer.input_layernorm = nn.RMSNorm(64, eps=1.0)


def other_eps(layer):
    layer.post_attention_layernorm.variance_epsilon = 3.0


def other_weight(layer):
    with torch.no_grad():
        layer.post_attention_layernorm.weight.mul_(2)


def own_forward(layer):
    layer.mlp.forward = lambda x: 2 * x


def other_layer(layer):
    layer.mlp.down_proj = nn.Linear(96, 64)


def other_activation(layer):
    layer.mlp.act_fn = nn.ReLU()


def other_scale(layer):
    layer.self_attn.scaling = 0.7


def no_attention(layer):
    layer.self_attn = First()


class First(nn.Module):
    def forward(self, hidden_states, **kwargs):
        return hidden_states, None


def child_beside(layer):
    layer.__dict__["mlp"] = nn.Identity()


def kind_of_its_own(layer):
    class Doubled(type(layer.post_attention_layernorm)):
        def forward(self, x):
            return 2 * super().forward(x)

    object.__setattr__(layer.post_attention_layernorm, "__class__", Doubled)


CHANGES = [other_norm, other_eps, other_weight, own_forward, other_layer, other_activation, other_scale]
CHANGES += [no_attention, child_beside, kind_of_its_own]


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_afterwards_counts(model, change):
    (layer, plain), (x, more) = pair(model, 1), inputs(model)
    with torch.inference_mode():
        before = layer(x, **more)
        for module in (layer, plain):
            torch.manual_seed(1)
            change(module)
        after = [module(x, **more) for module in (layer, plain)]
    assert_identical(*after)
    assert not torch.equal(after[0], before)


def test_what_its_classes_get_later_counts(model, monkeypatch):
    layer, (x, more) = forms(model)[0], inputs(model)
    before = layer(x, **more)
    inner = modeling.LlamaDecoderLayer.forward.__wrapped__.__wrapped__
    for kind, name, function in [
        (modeling.LlamaDecoderLayer, "forward", lambda self, x, **kwargs: x),
        (modeling.LlamaMLP, "forward", lambda self, x: x),
        (modeling.LlamaRMSNorm, "forward", lambda self, x: 2 * x),
        (modeling.LlamaAttention, "forward", lambda self, hidden_states, **kwargs: (hidden_states, None)),
        (inner, "__code__", (lambda self, x, *args, **kwargs: 4 * x).__code__),
        (modeling, "apply_rotary_pos_emb", lambda q, k, cos, sin: (q, k)),
    ]:
        monkeypatch.setattr(kind, name, function)
        assert not torch.equal(layer(x, **more), before), (kind, name)
        monkeypatch.undo()
        assert_identical(layer(x, **more), before)


def test_a_method_of_a_norm_with_other_code_counts(monkeypatch):
    model = int8("Gemma")
    layer, (x, more) = forms(model)[0], inputs(model)
    before = layer(x, **more)
    method = type(layer.post_attention_layernorm).original._norm
    monkeypatch.setattr(method, "__code__", (lambda self, x: 2 * x).__code__)
    after = layer(x, **more)
    assert not torch.equal(after, before)
    assert_identical(after, by_code(model).model.layers[0](x, **more))
    monkeypatch.undo()
    assert_identical(layer(x, **more), before)


def test_training_and_checkpoints_are_the_codes(model, count):
    x, more = inputs(model)
    results = []
    for layer in pair(model):
        layer.train()
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = lambda function, *args: 2 * function(*args)
        results.append(layer(x, **more))
    assert_identical(*results)
    assert count == [0]
    forms(model)[0].eval()
    assert_identical(2 * forms(model)[0](x, **more), results[0])
    assert count == [1]


def test_autocast_simulation_and_gradients(model):
    (layer, plain), (x, more) = pair(model), inputs(model)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert_identical(layer(x, **more), plain(x, **more))
    with torch.inference_mode(), torchq.simulate():
        simulated = layer(x, **more)
        assert_identical(simulated, plain(x, **more))
    assert not torch.equal(simulated, layer(x, **more))
    grads = []
    for module in (layer, plain):
        leaf = x.clone().requires_grad_()
        module(leaf, **more).square().sum().backward()
        grads.append(leaf.grad)
    assert_identical(*grads)
    assert grads[0].abs().sum() > 0
