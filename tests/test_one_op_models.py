"""Layers of transformers in graphs of torch.compile, each as one op, whatever becomes of them later."""

import copy

import pytest
import torch
from torch import nn

import torchq
from helpers.compare import assert_identical
from helpers.encoder_forms import PICTURES, TEXTS, layers, padded
from helpers.graphs import COPIES, Graphs, Stack, X, call, compiled, same, with_other_weights
from helpers.numbers import normal
from helpers.self_attention import bert, converted, int8_bert, outputs, tokens
from torchq import compiling
from torchq.modules.one_op import LAYERS, NUMBER, NUMBERED, SOME
from torchq.modules.quantized_linear import QuantizedLinear

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
modeling = pytest.importorskip("transformers.models.bert.modeling_bert")

pytestmark = [
    pytest.mark.usefixtures("seeded", "fresh_compiler"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),  # torch.compile uses such
]


@pytest.fixture
def model():
    return int8_bert()


# ---- The bits -------------------------------------------------------------------------------------------------------


@pytest.mark.slow(seconds=15)
@pytest.mark.parametrize("name", [*TEXTS, *PICTURES])
def test_layers_of_models_are_ops(name):
    text = name in TEXTS
    batches = None if text else [{"pixel_values": normal(8, 3, 32, 32, seed=seed)} for seed in range(6)]
    model = converted((TEXTS if text else PICTURES)[name](), batches)
    graphs, x = Graphs(), tokens(2, 12) if text else normal(3, 3, 32, 32)
    run = torch.compile(model, fullgraph=True, backend=graphs)
    with torch.inference_mode():
        y, expected = run(x)[0], model(x)[0]
        if text:
            run(x, attention_mask=padded(2, 12))
    assert len(layers(model)) == 2
    assert [sum(node.target is LAYERS for node in graph.nodes) for graph in graphs.graphs] == [2] * (1 + text)
    assert torchq.sqnr_db(expected, y) > 30  # norms outside the layers are torch's own in a graph
    for layer in layers(model):
        same(compiled()(layer, X, None), layer(X, None))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("shape", [(2, 1, 5, 5), (1, 1, 1, 5), (5, 5)])
def test_masks(model, dtype, shape):
    mask = normal(*shape, seed=3) if dtype is torch.float32 else normal(*shape, seed=3) > -1
    layer, graphs = layers(model)[0], Graphs()
    for args, kwargs in [((X, mask), {}), ((), {"hidden_states": X, "attention_mask": mask, "cache": None})]:
        same(compiled(graphs)(layer, *args, **kwargs), layer(X, mask))
    assert graphs.count(LAYERS) == 2


def test_a_part_that_returns_a_pair(model):
    attention, graphs = layers(model)[0].attention, Graphs()
    same(compiled(graphs)(attention, X), attention(X))
    assert graphs.count(LAYERS) == 1


def test_few_guards():
    """A layer of BERT had 200 of them."""

    def guards(stack):
        torch.compiler.reset()
        torch.compile(stack, fullgraph=True, backend="eager")(X)
        (entry,) = torch._dynamo.eval_frame._debug_get_cache_entry_list(Stack.forward.__code__)
        return sum("+- " in line and "GuardManager" not in line for line in str(entry.guard_manager).splitlines())

    few, many = (guards(Stack([layers(int8_bert())[0] for _ in range(count)])) for count in (2, 6))
    assert (many - few) / 4 <= 15


@pytest.mark.parametrize("how", COPIES)
def test_copies_are_themselves(model, how):
    layer, run = layers(model)[0], compiled()
    y = layer(X)
    same(run(layer, X), y)
    other = COPIES[how](layer)
    if how == "copy":  # which shares its children
        other._modules = copy.deepcopy(layer._modules)
    with_other_weights(other)
    assert not torch.equal(other(X), y)
    same(run(other, X), other(X))
    same(run(layer, X), y)
    assert len({each.__dict__[NUMBER].item() for each in (layer, other)}) == 2
    assert all(each.__dict__[NUMBERED]() is each for each in (layer, other))


def test_checkpoints_say_nothing_of_it(model):
    layer = layers(model)[0]
    assert not any("number" in key for key in model.state_dict())
    assert not any("number" in name for name, _ in [*model.named_buffers(), *model.named_parameters()])
    assert not {NUMBER, NUMBERED} & layer.__reduce_ex__(2)[2].keys()


# ---- What is changed afterwards -------------------------------------------------------------------------------------


def loaded(layer):
    layer.load_state_dict(with_other_weights(copy.deepcopy(layer)).state_dict())


def assigned(layer):
    layer.load_state_dict(with_other_weights(copy.deepcopy(layer)).state_dict(), assign=True)


def replaced(layer):
    layer.output.dense = QuantizedLinear.from_float(nn.Linear(96, 64))


def float_child(layer):
    layer.attention.output.dense = nn.Linear(64, 64)


def hooked(layer):
    layer.register_forward_hook(lambda module, args, y: 2 * y)


def hooked_within(layer):
    layer.intermediate.dense.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def own_forward(layer):
    layer.output.forward = lambda x, residual: x[..., :64] - residual


def own_method(layer):
    layer.feed_forward_chunk = lambda x: -x


def in_training(layer):
    layer.train()


def identity(layer):
    """What it gives has the memory of its input."""
    layer.attention.forward = lambda x, *args, **kwargs: (x, None)
    layer.output.forward = lambda x, residual: residual


def of_another_class(layer):
    layer.__class__ = type("Twice", (type(layer),), {"forward": lambda self, x, *args, **kwargs: 2 * x})


CHANGES = [loaded, assigned, replaced, float_child, hooked, hooked_within, own_forward, own_method, identity]
CHANGES += [of_another_class]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_what_is_changed_afterwards_counts(model, change, backend):
    layer, run = layers(model)[0], torch.compile(call, fullgraph=True, backend=backend)
    y = run(layer, X)
    same(y, layer(X))
    change(layer)
    expected = layer(X)
    assert not torch.equal(y, expected)
    torch.testing.assert_close(run(layer, X), expected)
    torch.testing.assert_close(run(layer, X), expected)


def test_what_it_gives_has_memory_of_its_own(model):
    layer = layers(model)[0]
    identity(layer)
    y = LAYERS([layer.__dict__[NUMBER]], X, None, None, False)
    assert torch.equal(y, X)
    assert y.data_ptr() != X.data_ptr()


class Wide(nn.Module):
    def forward(self, x, residual):
        return torch.cat([residual, residual], -1)


def test_another_shape_is_an_error(model):
    layer, run = layers(model)[0], compiled()
    run(layer, X)
    layer.output = Wide()
    with pytest.raises(
        RuntimeError, match=r"BertLayer gave torch.float32 \(2, 5, 128\) where the graph takes torch.fl"
    ):
        run(layer, X)
    torch.compiler.reset()
    assert compiled()(layer, X).shape == (2, 5, 128)


# ---- Where it is no op ----------------------------------------------------------------------------------------------


def test_hooks_that_are_there_are_in_the_graph(model):
    """As those by which transformers keeps hidden states."""
    graphs = Graphs()
    run, x = torch.compile(model, fullgraph=True, backend=graphs), tokens(2, 9)
    outputs(run, x)
    assert graphs.count(LAYERS) == 2
    expected = model(x, output_hidden_states=True).hidden_states
    states = run(x, output_hidden_states=True).hidden_states
    assert [torchq.sqnr_db(a, b) > 30 for a, b in zip(expected, states, strict=True)] == [True] * 3
    assert graphs.count(LAYERS) == 2


class Bare(modeling.BertLayer):
    """Without a sum, nothing says that it gives the shape of its input."""

    def __init__(self, config):
        super().__init__(config)
        self.attention = self.attention.self

    def forward(self, hidden_states, attention_mask=None, encoder_hidden_states=None, **kwargs):
        y, _ = self.attention(hidden_states, attention_mask, **kwargs)
        return y


class InPlace(modeling.BertLayer):
    """It writes to its input."""

    def __init__(self, config):
        super().__init__(config)
        self.act = nn.ReLU(inplace=True)

    def forward(self, hidden_states, attention_mask=None, encoder_hidden_states=None, **kwargs):
        y, _ = self.attention(self.act(hidden_states), attention_mask, **kwargs)
        return y


@pytest.mark.parametrize("kind", [Bare, InPlace])
def test_layers_that_are_none(kind):
    """Their attention may be one."""
    model = bert()
    model.encoder.layer[0] = kind(model.config).eval()
    layer = converted(model).encoder.layer[0]
    assert layer.original is kind
    assert layer.asked_in_graph(1, (), (SOME,)) == ""
    ours, theirs = X.clone(), X.clone()
    torch.testing.assert_close(compiled()(layer, ours), layer(theirs), rtol=1e-4, atol=1e-4)
    assert torch.equal(ours, theirs)


def test_exported_programs_have_the_ops_themselves(model):
    layer = layers(model)[0]
    program = torch.export.export(layer, (X,))
    assert not any(node.target is LAYERS for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(X), layer(X), rtol=1e-2, atol=1e-2)


# ---- Inductor -------------------------------------------------------------------------------------------------------


@pytest.mark.slow(seconds=20)
@pytest.mark.parametrize(
    "options", [{}, {"cpp_wrapper": True}, {"freezing": True}], ids=["", "cpp_wrapper", "freezing"]
)
def test_inductor(model, options):
    """Joined to one op, where nobody reads what is between them."""
    seen = []

    def rewrite(graph):
        compiling.rewrite(graph)
        seen.extend(len(node.args[0]) for node in graph.nodes if node.target is LAYERS)

    stack = Stack(layers(model))
    run = torch.compile(stack, fullgraph=True, options={**options, "pre_grad_custom_pass": rewrite})
    assert_identical(run(X), stack(X))
    for one, other in zip(run(X, all_states=True), stack(X, all_states=True), strict=True):
        assert_identical(one, other)
    assert seen == [2, 1, 1]
