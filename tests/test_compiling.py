"""torch.compile with torchq's options: activations fold into the layers before them, and nothing else changes."""

import pickle
import re

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code

import torchq
from helpers.commands import run_code
from helpers.compare import assert_identical
from helpers.graphs import Graphs
from helpers.numbers import normal
from torchq import compiling
from torchq.compiling import fold_activations
from torchq.modules.layer_norm import LayerNorm
from torchq.numerics.qparams import QParams
from torchq.ops import Activation

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

F = nn.functional


class Model(nn.Module):
    """`between` is computed on the output of the first layer."""

    def __init__(self, between):
        super().__init__()
        self.first, self.second, self.between = nn.Linear(64, 64), nn.Linear(64, 32), between

    def forward(self, x):
        return self.second(self.between(self.first(x)))


def compiled_ops(model, x):
    """What the compiled model gives, and the activations of the layers in its graph."""
    seen = []

    def passes(graph):
        fold_activations(graph)
        seen.extend(node.args[2:] for node in graph.nodes if node.target is torch.ops.torchq.linear_dynamic.default)

    torch.compiler.reset()
    with torch.no_grad():
        y = torch.compile(model, fullgraph=True, options={"pre_grad_custom_pass": passes})(x)
    return y, [args[0] if args else 0 for args in seen]


class Chain(nn.Module):
    """`count` copies of a child, one after the other."""

    def __init__(self, child, count):
        super().__init__()
        self.children_ = nn.ModuleList(child() for _ in range(count))

    def forward(self, x):
        for child in self.children_:
            x = child(x)
        return x


def guards(model, x):
    """How many guards a compiled call passes."""
    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(model, fullgraph=True, backend="eager")(x)
    (entry,) = torch._dynamo.eval_frame._debug_get_cache_entry_list(type(model).forward.__code__)
    lines = str(entry.guard_manager).splitlines()
    return sum("+- " in line and "GuardManager" not in line for line in lines)


@pytest.mark.parametrize(
    ("child", "most"),
    [
        (lambda: torchq.QuantizedLinear.from_float(nn.Linear(16, 16)), 16),
        (lambda: torchq.QuantizedLinear.from_float(nn.Linear(16, 16), input_qparams=QParams(0.1, 128)), 20),
        (lambda: LayerNorm(16), 23),
    ],
    ids=["dynamic", "static", "norm"],
)
def test_a_compiled_layer_has_few_guards(child, most):
    """Each takes 0.15 us of every call. By way of nn.Module's own call they had 26, 29 and 26."""
    few, many = (guards(Chain(child, count), normal(2, 16)) for count in (2, 6))
    assert (many - few) / 4 <= most


@pytest.mark.parametrize("child", [nn.Linear(16, 16), nn.LayerNorm(16)], ids=["layer", "norm"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre"])
def test_hooks_count_in_compiled_calls(child, kind):
    qmodel, x = (
        torchq.convert(nn.ModuleDict({"layer": nn.Linear(16, 16), "child": child}).eval())["child"],
        normal(2, 16),
    )
    hook = (lambda *args: args[-1] + 1) if kind == "forward" else (lambda *args: (args[1][0] + 1,))
    getattr(qmodel, f"register_{kind}_hook")(hook)
    torch.compiler.reset()
    with torch.no_grad():
        y = torch.compile(Chain(lambda: qmodel, 1), fullgraph=True, backend="eager")(x)
        expected = type(qmodel).forward(qmodel, x) + 1 if kind == "forward" else type(qmodel).forward(qmodel, x + 1)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("child", [nn.Linear(16, 16), nn.LayerNorm(16)], ids=["layer", "norm"])
@pytest.mark.parametrize("how", ["object before", "object after", "class"])
def test_a_forward_of_its_own_counts_in_compiled_calls(child, how):
    qmodel, x = torchq.convert(nn.Sequential(nn.Linear(16, 16), child).eval())[1], normal(2, 16)
    chain = Chain(lambda: qmodel, 1)
    torch.compiler.reset()
    compiled = torch.compile(chain, fullgraph=True, backend="eager")
    with torch.no_grad():
        if how == "object after":
            assert not torch.equal(compiled(x), 2 * x)
        if how == "class":
            qmodel.__class__ = type("Own", (type(qmodel),), {"forward": lambda self, x: 2 * x})
        else:
            qmodel.forward = lambda x: 2 * x
        assert torch.equal(compiled(x), 2 * x)


def test_the_options_can_be_pickled():
    """As a function's, so that other processes get them."""
    options = torchq.compile_options()
    assert pickle.loads(pickle.dumps(options)) == options


class Typed(nn.Module):
    """Asks its layer for its dtype first, as the vision models of transformers do."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.to(self.layer.weight.dtype)) + self.layer.bias.mean()


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.Linear(8, 16), (4, 8)),
        (nn.Conv1d(8, 16, 3), (2, 8, 9)),
        (nn.Conv2d(8, 16, 3), (2, 8, 9, 9)),
        (nn.Conv2d(8, 16, 3, stride=3), (2, 8, 9, 9)),
        (nn.Conv2d(8, 16, 3, groups=2), (2, 8, 9, 9)),
        (nn.Conv2d(8, 8, 3, groups=8), (2, 8, 9, 9)),
    ],
    ids=str,
)
def test_code_that_reads_the_weight_breaks_no_graph(layer, size):
    model, x = torchq.convert(Typed(layer).eval()), normal(*size)
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert torch.allclose(compiled(x), model(x), rtol=1e-6, atol=1e-6)


@pytest.mark.slow(seconds=10)
@pytest.mark.parametrize(
    ("function", "activation"),
    [
        (F.gelu, Activation.GELU),
        (lambda y: F.gelu(y, approximate="tanh"), Activation.GELU_TANH),
        (lambda y: y.relu(), Activation.RELU),
        (nn.SiLU(), Activation.SILU),
        (lambda y: y * torch.sigmoid(1.702 * y), Activation.QUICK_GELU),
        (lambda y: 0.5 * y * (1 + torch.tanh(0.7978845608 * (y + 0.044715 * y.pow(3)))), Activation.GELU_TANH),
        (lambda y: F.relu(y).square(), Activation.RELU2),
        (lambda y: torch.tanh(y), Activation.TANH),
    ],
)
def test_an_activation_is_folded(function, activation):
    model = torchq.convert(Model(function))
    x = normal(4, 64)
    y, activations = compiled_ops(model, x)
    assert activations == [activation, 0]
    hidden = torchq.ops.linear_dynamic(x, model.first.packed, activation)
    assert_identical(y, model.second(hidden).detach())


OTHERS = [lambda y: F.gelu(y) + y, F.leaky_relu, lambda y: F.relu(y * 2), lambda y: y.relu_()]


@pytest.mark.slow(seconds=10)
@pytest.mark.parametrize("function", OTHERS)
def test_what_must_not_be_folded(function):
    """Another reader of the layer's output; another function; another operation between; one that writes."""
    model = torchq.convert(Model(function))
    x = normal(4, 64)
    y, activations = compiled_ops(model, x)
    assert activations == [0, 0]
    torch.testing.assert_close(y, model(x).detach(), rtol=1e-3, atol=1e-3)


@pytest.mark.slow(seconds=10)
def test_training_around_frozen_layers_is_not_touched():
    model = torchq.convert(Model(F.gelu))
    x = normal(4, 64).requires_grad_()
    model(x).square().sum().backward()
    expected, x.grad = x.grad, None
    torch.compile(model, options=torchq.compile_options())(x).square().sum().backward()
    torch.testing.assert_close(x.grad, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow(seconds=10)
def test_inductor_caches_what_the_options_made(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    graphs = []
    monkeypatch.setattr(compiling, "fold_activations", lambda graph: (graphs.append(graph), fold_activations(graph)))
    model, x = torchq.convert(Model(F.gelu)), normal(4, 64)
    results = []
    for _ in range(2):
        torch.compiler.reset()
        with torch.no_grad():
            results.append(torch.compile(model, options=torchq.compile_options())(x))
    assert len(graphs) == 1  # the second time what it had made of the graph was taken
    assert_identical(*results)
    expected, activations = compiled_ops(model, x)
    assert activations == [Activation.GELU, 0]
    assert_identical(results[0], expected)


@pytest.mark.subprocess
@pytest.mark.slow(seconds=10)
def test_an_exported_model_runs_ahead_of_time(tmp_path):
    """AOTInductor compiles the program into a library, which calls torchq's ops, in any process that imports torchq."""
    model = torchq.convert(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)))
    x = normal(4, 64)
    program = torch.export.export(model, (x,))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    loaded = torch._inductor.aoti_load_package(path)
    assert_identical(loaded(x), model(x).detach())
    numbers = str(tmp_path / "numbers.pt")
    torch.save((x, model(x).detach()), numbers)
    code = (
        "import torch, torchq\n"
        f"x, y = torch.load({numbers!r})\n"
        f"assert torch.equal(torch._inductor.aoti_load_package({path!r})(x), y)"
    )
    exit_code, _, err = run_code(code)
    assert exit_code == 0, err


# ---- Convolutions and attention -------------------------------------------------------------------------------------


class Stem(nn.Module):
    """A convolution whose output is turned as in Whisper's encoder."""

    def __init__(self, turned, kind=nn.Conv1d):
        super().__init__()
        self.conv, self.turned = kind(8, 16, 3), turned

    def forward(self, x):
        return self.turned(F.gelu(self.conv(x))) * 2


def rewritten(model, *args):
    """What a model gives, compiled with the options' pass; the graph; and what it gives without the pass."""
    graphs = []
    model.eval()
    with torch.no_grad():
        y = torch.compile(
            model,
            fullgraph=True,
            options={"pre_grad_custom_pass": lambda graph: (compiling.rewrite(graph), graphs.append(graph))},
        )(*args)
        torch.compiler.reset()
        expected = torch.compile(model, fullgraph=True, backend="eager")(*args)
    return y, graphs[0], expected


def of_convolution(graph):
    (node,) = (node for node in graph.nodes if node.target is torch.ops.torchq.convolution.default)
    return node.args[5], node.args[6]


CONV1, CONV2 = (2, 8, 9), (2, 8, 9, 9)


@pytest.mark.slow(seconds=10)
@pytest.mark.parametrize(
    ("turned", "shape", "last"),
    [
        (lambda y: y.permute(0, 2, 1), CONV1, True),
        (lambda y: y.permute((0, 2, 1)), CONV1, True),
        (lambda y: torch.permute(y, (0, 2, 1)), CONV1, True),
        (lambda y: y.transpose(1, 2), CONV1, True),
        (lambda y: torch.transpose(y, -1, 1), CONV1, True),
        (lambda y: y.permute(0, 2, 3, 1), CONV2, True),
        (lambda y: y.permute(0, 3, 2, 1), CONV2, False),
        (lambda y: y.transpose(1, 2), CONV2, False),
        (lambda y: y.permute(0, 2, 1) + y.mean(), CONV1, False),
        (lambda y: y.flatten(1), CONV1, False),
    ],
)
def test_a_convolution_computes_its_activation_and_gives_its_channels_last(turned, shape, last):
    torch.manual_seed(0)
    model = torchq.convert(Stem(turned, nn.Conv1d if len(shape) == 3 else nn.Conv2d).eval())
    torch.compiler.reset()
    y, graph, expected = rewritten(model, normal(*shape))
    assert of_convolution(graph) == (last, Activation.GELU)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


class Attending(nn.Module):
    """Copies of queries, keys and values, some of which others read."""

    def __init__(self, reads):
        super().__init__()
        self.reads = reads

    def forward(self, x):
        q, k, v = (x.view(2, 5, 4, 16).transpose(1, 2).contiguous() for _ in range(3))
        y = torchq.ops.attention(q, k, v)
        return y + k if self.reads else y


@pytest.mark.slow(seconds=5)
@pytest.mark.parametrize(("reads", "copies"), [(False, 0), (True, 1)])
def test_attention_reads_its_inputs_as_they_lie(reads, copies):
    torch.compiler.reset()
    y, graph, expected = rewritten(Attending(reads), normal(2, 5, 64))
    assert sum(node.target == "contiguous" for node in graph.nodes) == copies
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)


def test_a_convolution_that_nobody_reads_stays_as_it_is():
    graph = torch.fx.Graph()
    arguments = [graph.placeholder(each.name) for each in compiling._CONVOLUTION._schema.arguments]
    node = graph.call_function(compiling._CONVOLUTION, tuple(arguments))
    compiling.turn_convolutions(graph)
    assert node.args == tuple(arguments)


PATCHES = torch.ops.torchq.patches.default


class Rewritten(Graphs):
    """Of graphs that the options have rewritten."""

    def __call__(self, module, example):
        compiling.rewrite(module.graph)
        module.recompile()
        return super().__call__(module, example)


@pytest.mark.slow(seconds=5)
def test_patches_in_float_are_read_as_they_lie():
    """By inductor itself they would come to two buffers, with channels last, which each call fills."""
    torch.compiler.reset()
    float_model, x = nn.Conv2d(3, 8, 4, stride=4).eval(), normal(2, 3, 16, 19)
    with torch.inference_mode():
        model = torch.compile(float_model, options=torchq.compile_options())
        y, (code,) = run_and_get_code(model, x)
        assert_identical(y, float_model(x))
    assert re.findall(r"torchq.patches.default\((\w+), (\w+), (\w+),", code) == [("arg2_1", "arg0_1", "arg1_1")]


@pytest.mark.parametrize(
    ("convolution", "shape"),
    [
        (nn.Conv2d(3, 8, 4, stride=4, bias=False), (1, 3, 8, 8)),
        (nn.Conv2d(3, 8, (2, 4), stride=(2, 4)), (1, 3, 9, 9)),
    ],
)
def test_what_are_patches(convolution, shape):
    assert_patches(convolution, shape, 1)


@pytest.mark.parametrize(
    ("convolution", "shape"),
    [
        (nn.Conv2d(3, 8, 3, stride=2), (1, 3, 9, 9)),
        (nn.Conv2d(3, 8, 1), (1, 3, 9, 9)),
        (nn.Conv2d(3, 8, 2, stride=2, padding=1), (1, 3, 8, 8)),
        (nn.Conv2d(3, 8, 2, stride=2, padding="valid", dilation=2), (1, 3, 8, 8)),
        (nn.Conv2d(4, 8, 2, stride=2, groups=2), (1, 4, 8, 8)),
        (nn.Conv2d(3, 8, 2, stride=2), (3, 8, 8)),
        (nn.Conv1d(3, 8, 2, stride=2), (1, 3, 8)),
        (nn.Conv2d(3, 8, 2, stride=2).to(memory_format=torch.channels_last), (1, 3, 8, 8)),
    ],
)
def test_what_are_no_patches(convolution, shape):
    assert_patches(convolution, shape, 0)


def assert_patches(convolution, shape, count):
    graphs, x = Rewritten(), normal(*shape)
    with torch.no_grad():
        y = torch.compile(convolution, backend=graphs)(x)
        assert graphs.count(PATCHES) == count
        assert_identical(y, convolution(x))


def test_patches_learn():
    convolution, graphs = nn.Conv2d(3, 8, 2, stride=2), Rewritten()
    torch.compile(convolution, backend=graphs)(normal(1, 3, 8, 8)).sum().backward()
    assert graphs.count(PATCHES) == 0
    assert convolution.weight.grad is not None


def test_patches_under_autocast():
    convolution, graphs = nn.Conv2d(3, 8, 2, stride=2), Rewritten()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        y = torch.compile(convolution, backend=graphs)(normal(1, 3, 8, 8))
    assert graphs.count(PATCHES) == 0
    assert y.dtype == torch.bfloat16


def test_the_op_is_as_torch_asks():
    torch.library.opcheck(PATCHES, (normal(1, 3, 9, 8), normal(5, 3, 4, 2), normal(5), [4, 2]))
