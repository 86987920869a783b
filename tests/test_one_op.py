"""Layers in graphs of torch.compile, each as one op: the bits of the eager call, of the right module, as it is then."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import torchq
from helpers.commands import run_code
from helpers.compare import assert_identical
from helpers.graphs import COPIES, Graphs, X, call, compiled, encoder_layer, same, with_other_weights
from helpers.numbers import normal
from torchq import QConfig
from torchq.modules import one_op
from torchq.modules.one_op import LAYERS, NUMBER, NUMBERED, in_graph

pytestmark = [
    pytest.mark.usefixtures("seeded", "fresh_compiler"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),  # torch.compile uses such
]


# ---- The bits -------------------------------------------------------------------------------------------------------


TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
CAUSAL = nn.Transformer.generate_square_subsequent_mask(5)
PADDING = torch.tensor([[False] * 5, [False, False, True, True, True]])
ADDED = torch.zeros(2, 5).masked_fill(PADDING, -torch.inf)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"src_mask": CAUSAL},
        {"src_mask": CAUSAL, "is_causal": True},
        {"src_key_padding_mask": PADDING, "is_causal": False},
        {"src_mask": CAUSAL < 0, "src_key_padding_mask": PADDING},
        {"src_mask": None, "src_key_padding_mask": ADDED},
    ],
)
def test_layers_of_torch(norm_first, given):
    layer, graphs = encoder_layer(norm_first=norm_first), Graphs()
    same(compiled(graphs)(layer, X, **given), layer(X, **given))
    assert graphs.count(LAYERS) == 1


def test_masks_by_their_place():
    """As in eager mode, torch's code takes them."""
    layer, graphs = encoder_layer(), Graphs()
    y = compiled(graphs)(layer, X, CAUSAL)
    assert torchq.sqnr_db(layer(X, CAUSAL), y) > 40
    assert graphs.count(LAYERS) == 0


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("mask", [None, CAUSAL, normal(5, 5)], ids=["none", "causal", "other"])
@pytest.mark.parametrize("padding", [None, ADDED], ids=["whole", "padded"])
def test_encoders_of_torch(nested, mask, padding):
    """Whether their mask is causal depends on its values, so only the op knows."""
    float_layer = nn.TransformerEncoderLayer(64, 4, 96, activation="gelu", batch_first=True)
    encoder = torchq.convert(nn.TransformerEncoder(float_layer, 3, enable_nested_tensor=nested).eval())
    graphs, given = Graphs(), {"mask": mask, "src_key_padding_mask": padding}
    whole = mask is None or TORCH >= (2, 13)  # before, torch's own code breaks where it looks at a mask
    same(torch.compile(call, fullgraph=whole, backend=graphs)(encoder, X, **given), encoder(X, **given))
    assert not whole or graphs.count(LAYERS) == (1 if nested and mask is None and padding is not None else 3)
    assert graphs.count(torch.ops.torchq.linear_dynamic.default) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    layer, graphs, x = encoder_layer().to(dtype), Graphs(), X.to(dtype)
    same(compiled(graphs)(layer, x), layer(x))
    assert graphs.count(LAYERS) == 1


def test_one_graph_serves_all_layers_and_sizes():
    """More layers than Dynamo compiles one function for."""
    graphs = Graphs()
    run, layers = (
        compiled(graphs, dynamic=True),
        [encoder_layer(), *(with_other_weights(encoder_layer()) for _ in range(9))],
    )
    for layer in layers:
        for rows in (5, 7, 9):
            same(run(layer, normal(3, rows, 64)), layer(normal(3, rows, 64)))
    assert not torch.equal(run(layers[0], X), run(layers[1], X))
    assert len(graphs.graphs) == 1


# ---- The right module -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", COPIES)
def test_copies_are_themselves(how):
    layer, run = encoder_layer(), compiled()
    y = run(layer, X)
    other = COPIES[how](layer)
    other._modules = copy.deepcopy(other._modules)  # which some share
    with_other_weights(other)
    assert not torch.equal(other(X), y)
    same(run(other, X), other(X))
    same(run(layer, X), y)
    assert len({each.__dict__[NUMBER].item() for each in (layer, other)}) == 2
    assert all(each.__dict__[NUMBERED]() is each for each in (layer, other))


def test_copies_of_an_encoder_are_themselves():
    """Which is one op where it skips padding."""
    encoder = torchq.convert(nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 96, batch_first=True), 2).eval())
    run = compiled()
    for copied in COPIES.values():
        other = copied(encoder)
        other._modules = copy.deepcopy(other._modules)
        with_other_weights(other.layers[1])
        y = run(other, X, src_key_padding_mask=PADDING)
        same(y, other(X, src_key_padding_mask=PADDING))
        assert not torch.equal(y, run(encoder, X, src_key_padding_mask=PADDING))


def test_nobody_is_kept_alive():
    layer, run = encoder_layer(), compiled()
    run(layer, X)
    number, alive = layer.__dict__[NUMBER], weakref.ref(layer)
    torch.compiler.reset()
    gc.collect()
    del layer
    assert alive() is None  # at once, without a collector's pass
    with pytest.raises(RuntimeError, match=r"torchq::layers: this graph names a layer that is not in this process"):
        LAYERS([number], X, None, None, False)


def test_a_number_from_elsewhere_is_an_error():
    with pytest.raises(RuntimeError, match="not in this process"):
        LAYERS([torch.tensor(17)], X, None, None, False)


def test_training_is_heard():
    layer, run = encoder_layer(dropout=0.9), compiled()
    y = run(layer, X)
    layer.train()
    assert not torch.equal(run(layer, X), run(layer, X))
    layer.eval()
    same(run(layer, X), y)


# ---- Where it is no op ----------------------------------------------------------------------------------------------


def test_gradients():
    layer, graphs, x = encoder_layer(), Graphs(), X.clone().requires_grad_()
    run = compiled(graphs)
    same(run(layer, X), layer(X))
    with torch.enable_grad():
        y = run(layer, x)
        y.square().sum().backward()
        got, x.grad = x.grad, None
        layer(x).square().sum().backward()
    torch.testing.assert_close(got, x.grad, rtol=1e-2, atol=1e-2)
    assert graphs.count(LAYERS) == 1


def test_in_a_part_without_gradients():
    """A teacher, whose student learns in the same graph."""
    layer, graphs, x = encoder_layer(), Graphs(), X.clone().requires_grad_()

    def loss(layer, x):
        with torch.no_grad():
            target = layer(x)
        return (x * target).sum()

    with torch.enable_grad():
        torch.compile(loss, fullgraph=True, backend=graphs)(layer, x).backward()
    assert_identical(x.grad, layer(X))
    assert graphs.count(LAYERS) == 1


def test_autocast_and_simulation():
    layer, graphs = encoder_layer(), Graphs()
    run = compiled(graphs)
    same(run(layer, X), layer(X))
    with torchq.simulate():
        torch.testing.assert_close(run(layer, X), layer(X), rtol=1e-4, atol=1e-4)
        assert not torch.equal(run(layer, X), encoder_layer()(X + 1))
    before = graphs.count(LAYERS)
    with torch.autocast("cpu", torch.bfloat16):
        assert torchq.sqnr_db(layer(X).float(), run(layer, X).float()) > 30
    assert graphs.count(LAYERS) == before
    same(run(layer, X), layer(X))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_transforms():
    layer, graphs = encoder_layer(), Graphs()
    mapped = torch.compile(lambda x: torch.func.vmap(layer)(x), backend=graphs)(X[None])
    assert torchq.sqnr_db(layer(X), mapped[0]) > 30
    assert graphs.count(LAYERS) == 0


@pytest.mark.parametrize(
    ("x", "may"),
    [
        (X, True),
        (X.as_subclass(type("Own", (torch.Tensor,), {})), False),
        (nn.Parameter(X, requires_grad=False), False),
        (X[0], False),
        (X.to("meta"), False),
        (X.long(), False),
    ],
    ids=["plain", "subclass", "parameter", "2-D", "meta", "integers"],
)
def test_inputs(x, may):
    def one_op(layer, x):
        return in_graph(layer, (x,), {}) is not None

    assert torch.compile(one_op, fullgraph=True, backend="eager")(encoder_layer(), x) is may


@pytest.mark.parametrize("strict", [False, True])
def test_exported_programs_have_the_ops_themselves(strict):
    layer = encoder_layer()
    program = torch.export.export(layer, (X,), strict=strict)
    assert not any(node.target is LAYERS for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(X), layer(X), rtol=1e-2, atol=1e-2)


def test_without_fusion_there_is_none():
    layer = torchq.convert(nn.TransformerEncoderLayer(64, 4, 96, batch_first=True).eval(), config=QConfig(fuse=False))
    graphs = Graphs()
    torch.testing.assert_close(compiled(graphs)(layer, X), layer(X), rtol=1e-2, atol=1e-2)
    assert graphs.count(LAYERS) == 0


# ---- Inductor -------------------------------------------------------------------------------------------------------


def test_the_op_is_as_torch_asks():
    layer = encoder_layer()
    number = layer.__dict__[NUMBER]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(LAYERS, ([number], X, None, None, False), test_utils=tests)


CACHED = """
import torch, torchq
from torch import nn
from torch._dynamo.utils import counters

torch.manual_seed({seed})
layer = nn.TransformerEncoderLayer(64, 4, 96, activation="gelu", batch_first=True)
model = torchq.convert(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval())
others = [torchq.convert(nn.TransformerEncoderLayer(64, 4, batch_first=True).eval()) for _ in range({seed})]
x = torch.randn(2, 5, 64)
with torch.no_grad():
    y = torch.compile(model, fullgraph=True, options=torchq.compile_options() | {more})(x)
    assert torch.equal(y, model(x))
found = counters["inductor"]
print(found["fxgraph_cache_hit"], found["fxgraph_cache_miss"])
"""


@pytest.mark.subprocess
@pytest.mark.slow(seconds=20)
@pytest.mark.parametrize("more", [{}, {"freezing": True}], ids=["", "freezing"])
def test_caches_on_disk_name_no_module(tmp_path, more):
    """Each process has other numbers, and other weights; the second takes the graph of the first."""
    found = []
    for seed in (1, 2):
        code, out, err = run_code(CACHED.format(seed=seed, more=more), TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
        assert code == 0, err
        found.append(out.split())
    assert found[0] == ["0", "1"]
    assert more or found[1] == ["1", "0"]


def test_numbers_are_given_under_any_mode():
    layer = encoder_layer()
    with torch.device("meta"), torch.inference_mode():
        layer = copy.deepcopy(layer)
    number = layer.__dict__[NUMBER]
    assert number.device.type == "cpu"
    assert not number.is_inference()
    assert one_op._numbered[number.item()] is layer
