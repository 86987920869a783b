"""nn.TransformerEncoderLayer in int8, in a few calls: torch's own code, bit for bit, and used only where it may be."""

import copy
import pickle

import pytest
import torch
from torch import nn

from helpers.numbers import normal
from torchq import _C, Plan, QConfig, QuantizedLinear, apply_plan, convert
from torchq.modules.encoder_layer import Int8TransformerEncoderLayer
from torchq.modules.folding import NOTHING, Fold
from torchq.ops import Activation

pytestmark = pytest.mark.usefixtures("seeded")

E, T, N = 32, 9, 3
X = normal(N, T, E)
PADDING = torch.arange(T) >= torch.tensor((9, 4, 6))[:, None]
CAUSAL = nn.Transformer.generate_square_subsequent_mask(T)


def layer(**more):
    torch.manual_seed(0)
    built = nn.TransformerEncoderLayer(E, 4, 64, **{"batch_first": True, **more}).eval()
    for name, parameter in built.named_parameters():
        if name.startswith("norm"):
            nn.init.normal_(parameter)
    return built


def converted(**more):
    return convert(layer(**more), config=QConfig(attention="int8"))


def by_code(qlayer, *args, **kwargs):
    """What torch's code gives, with torchq's own activation as an operation."""
    kind, plain = int(qlayer.linear1.fold.activation), copy.copy(qlayer)
    vars(plain)["_modules"] = {name: child for name, child in qlayer._modules.items() if name != "activation"}
    vars(plain)["activation"] = lambda x: torch.ops.torchq.activate(x, kind)
    return nn.TransformerEncoderLayer.forward(plain, *args, **kwargs)


@pytest.fixture
def sums(monkeypatch):
    """Lists the calls that compute a product, a sum and a norm at once: whether they did."""
    found, inner = [], _C.call_sum

    def counted(*args):
        y = inner(*args)
        found.append(y is not NotImplemented)
        return y

    monkeypatch.setattr(_C, "call_sum", counted)
    return found


FORMS = {
    "relu": {},
    "gelu": {"activation": "gelu"},
    "GELU": {"activation": nn.GELU("tanh")},
    "norm first": {"norm_first": True},
    "without bias": {"bias": False},
}
CALLS = {
    "no mask": {},
    "padding": {"src_key_padding_mask": PADDING},
    "added padding": {"src_key_padding_mask": torch.zeros(N, T).masked_fill(PADDING, -torch.inf)},
    "causal": {"src_mask": CAUSAL, "is_causal": True},
    "both": {"src_mask": CAUSAL, "src_key_padding_mask": torch.zeros(N, T).masked_fill(PADDING, -1e4)},
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_it_gives_the_bits_of_torchs_code(form, call, sums):
    qlayer = converted(**form)
    assert type(qlayer) is Int8TransformerEncoderLayer
    y = qlayer(X, **call)
    assert sums == ([] if qlayer.norm_first else [True, True])
    assert torch.equal(y, by_code(qlayer, X, **call))
    with torch.inference_mode():
        assert torch.equal(qlayer(X, **call), y)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", [1, 5, 300])
def test_sizes_and_threads(rows, threads, sums):
    qlayer, x, before = converted(), normal(2, rows, E), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(qlayer(x), by_code(qlayer, x))
    finally:
        torch.set_num_threads(before)
    assert sums == [True, True]


def test_the_plan_says_so_and_is_read():
    qlayer = converted()
    plan = qlayer.torchq_plan
    assert (plan.layers["self_attn.out_proj"].sum_norm, plan.layers["linear2"].sum_norm) == ("norm1", "norm2")
    assert plan.layers["linear1"].activation == "activation"
    again = apply_plan(layer(), Plan.from_dict(plan.to_dict()))
    assert type(again) is Int8TransformerEncoderLayer
    assert torch.equal(again(X), qlayer(X))
    assert converted(norm_first=True).torchq_plan.layers["linear2"].sum_norm is None


def test_without_fusion_it_is_torchs_own(sums):
    qlayer = convert(layer(), config=QConfig(attention="int8", fuse=False))
    assert type(qlayer) is nn.TransformerEncoderLayer
    assert torch.equal(qlayer(X), converted()(X))
    assert sums == [True, True]


def test_copies_and_files():
    qlayer = converted(activation=nn.GELU())
    for other in (copy.deepcopy(qlayer), pickle.loads(pickle.dumps(qlayer))):
        assert type(other) is Int8TransformerEncoderLayer
        assert other._may_run(X)
        assert torch.equal(other(X), qlayer(X))


# ---- Where torch's code runs ----


def first(fold=NOTHING):
    return QuantizedLinear.from_float(nn.Linear(E, 64), fold=fold)


CHANGES = {
    "another activation": lambda qlayer: setattr(qlayer, "activation", torch.tanh),
    "another module": lambda qlayer: setattr(qlayer, "linear2", nn.Linear(64, E)),
    "another norm": lambda qlayer: setattr(qlayer, "norm1", nn.LayerNorm(E, eps=0.1)),
    "an attention in float": lambda qlayer: setattr(qlayer, "self_attn", nn.MultiheadAttention(E, 4, batch_first=True)),
    "a layer before the dropout": lambda qlayer: setattr(qlayer, "dropout1", nn.Softsign()),
    "an int8 layer": lambda qlayer: setattr(qlayer, "linear1", first()),
    "an int8 layer before GELU": lambda qlayer: setattr(qlayer, "linear1", first(Fold(Activation.GELU))),
    "a forward of its own": lambda qlayer: setattr(qlayer, "forward", lambda x: 2 * x),
    "an attention block of its own": lambda qlayer: setattr(qlayer, "_sa_block", lambda x, *args, **kwargs: x),
    "a feed-forward block of its own": lambda qlayer: setattr(qlayer, "_ff_block", lambda x: x),
    "a hook": lambda qlayer: qlayer.register_forward_hook(lambda *args: args[-1] + 1),
    "a hook on a layer": lambda qlayer: qlayer.linear1.register_forward_hook(lambda *args: args[-1] + 1),
    "a hook on a norm": lambda qlayer: qlayer.norm2.register_forward_hook(lambda *args: args[-1] + 1),
    "a hook on a dropout": lambda qlayer: qlayer.dropout2.register_forward_hook(lambda *args: args[-1] + 1),
    "a hook on the attention": lambda qlayer: qlayer.self_attn.register_forward_hook(
        lambda *args: (args[-1][0] + 1, None)
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_changed_afterwards_counts(change):
    qlayer = converted()
    before = qlayer(X)
    change(qlayer)
    y, plain = qlayer(X), copy.deepcopy(qlayer)
    plain.__class__ = nn.TransformerEncoderLayer
    assert not torch.equal(y, before)
    assert torch.equal(y, plain(X))


def test_a_hook_on_an_activation_sees_the_layers_output():
    qlayer, seen = converted(activation=nn.GELU()), []
    qlayer.activation.register_forward_hook(lambda module, args, y: seen.append(args[0]))
    qlayer(X)
    assert len(seen) == 1
    assert (seen[0] < -0.3).any()  # which GELU never gives


def test_replaced_code_of_torch_counts(monkeypatch):
    qlayer = converted()
    monkeypatch.setattr(nn.TransformerEncoderLayer, "_ff_block", lambda self, x: x)
    expected = qlayer.norm1(X + qlayer.self_attn(X, X, X)[0])
    assert torch.equal(qlayer(X), qlayer.norm2(expected + expected))


def test_in_training_dropout_acts():
    qlayer = converted(dropout=0.5).train()
    assert not torch.equal(qlayer(X), qlayer(X))


def test_gradients_reach_the_input():
    qlayer, grads = converted(), []
    for call in (qlayer, lambda x: nn.TransformerEncoderLayer.forward(qlayer, x)):
        x = X.clone().requires_grad_()
        with torch.enable_grad():
            call(x).square().sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("x", [X.transpose(0, 1), X[0]], ids=["rows first", "unbatched"])
def test_other_forms_of_input(x, sums):
    qlayer = converted(batch_first=False)
    assert torch.equal(qlayer(x), by_code(qlayer, x))
    assert sums == []


def test_other_dtypes_and_autocast():
    qlayer = converted().bfloat16()
    assert torch.equal(qlayer(X.bfloat16()), by_code(qlayer, X.bfloat16()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        qlayer = converted()
        assert torch.equal(qlayer(X), by_code(qlayer, X))


@pytest.mark.parametrize(
    ("args", "kwargs", "error"),
    [
        ((normal(2, T, E + 1),), {}, "query must be"),
        ((X,), {"src_key_padding_mask": PADDING.long()}, "src_key_padding_mask"),
        ((X,), {"is_causal": True}, "is_causal"),
        ((X,), {"mask": None}, "unexpected keyword"),
        ((), {}, "src"),
    ],
)
def test_errors_are_torchs(args, kwargs, error):
    with pytest.raises((ValueError, TypeError, AssertionError), match=error):
        converted()(*args, **kwargs)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
def test_a_nested_tensor_gets_the_error_of_the_layers():
    with pytest.raises(TypeError, match="x must be dense, got a nested tensor"):
        converted()(torch.nested.nested_tensor([X[0], X[1, :4]]))


def test_it_is_a_node_of_a_traced_graph():
    qmodel = convert(nn.Sequential(layer()))
    graph = torch.fx.symbolic_trace(qmodel).graph
    assert [node.op for node in graph.nodes] == ["placeholder", "call_module", "output"]
