"""nn.TransformerEncoder in int8: padding is skipped where torch skips it, and nowhere else."""

import copy
import pickle

import pytest
import torch
from torch import nn

from helpers.numbers import normal
from torchq import _C, Plan, QConfig, QuantizedLinear, apply_plan, convert
from torchq.modules import encoder as encoders
from torchq.modules import pending
from torchq.modules.encoder import Int8TransformerEncoder
from torchq.numerics.metrics import sqnr_db
from torchq.ops import Activation

pytestmark = [
    pytest.mark.usefixtures("seeded"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning"),
]

E, T = 32, 9
LENGTHS = (9, 4, 1, 6)
PADDING = torch.arange(T) >= torch.tensor(LENGTHS)[:, None]
X = normal(len(LENGTHS), T, E)


def encoder(layers=2, norm=None, **more):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, 4, 64, batch_first=True, **more)
    return nn.TransformerEncoder(layer, layers, norm).eval()


def norm_with_bias():
    norm = nn.LayerNorm(E)
    norm.bias.normal_()
    return norm


@pytest.fixture
def skipped(monkeypatch):
    """Lists the calls that skip padding: the lengths of each."""
    calls, inner = [], encoders.of_sequences

    def counted(attention, x, lengths):
        assert len(x) == sum(lengths)
        calls.append(tuple(lengths))
        return inner(attention, x, lengths)

    monkeypatch.setattr(encoders, "of_sequences", counted)
    return calls


def torchs_way(qmodel, *args, **kwargs):
    return nn.TransformerEncoder.forward(qmodel, *args, **kwargs)


@pytest.mark.parametrize("scheme", ["none", "float32", "int8"])
@pytest.mark.parametrize(
    "form",
    [{}, {"activation": "gelu"}, {"activation": nn.GELU()}, {"layers": 1}],
    ids=["plain", "gelu", "GELU", "one layer"],
)
def test_real_rows_are_the_same_and_the_others_as_torch_has_them(form, scheme, skipped):
    model = encoder(**form)
    qmodel = convert(model, config=QConfig(attention=scheme))
    assert type(qmodel) is Int8TransformerEncoder
    y = qmodel(X, src_key_padding_mask=PADDING)
    assert skipped == [LENGTHS] * len(model.layers)
    expected = model(X, src_key_padding_mask=PADDING)
    assert torch.equal(y[PADDING], expected[PADDING])
    assert (y[PADDING] == 0).all()
    assert sqnr_db(expected[~PADDING], y[~PADDING]) > 28
    if scheme != "int8":  # whose scale of v and mean of keys would take padding in
        assert sqnr_db(torchs_way(qmodel, X, src_key_padding_mask=PADDING)[~PADDING], y[~PADDING]) > 50


def test_a_norm_behind_sees_zeros(skipped):
    """So hidden rows are its bias, as in torch."""
    model = encoder(norm=norm_with_bias())
    y = convert(model)(X, src_key_padding_mask=PADDING)
    assert torch.equal(y[PADDING], model.norm.bias.expand(int(PADDING.sum()), E))
    assert torch.equal(y[PADDING], model(X, src_key_padding_mask=PADDING)[PADDING])
    assert len(skipped) == 2


def test_of_a_sequence_only_its_own_rows_count(skipped):
    """Each is computed as if it were alone, bit for bit, and other values in the padding change nothing."""
    qmodel = convert(encoder(), config=QConfig(attention="int8"))
    y = qmodel(X, src_key_padding_mask=PADDING)
    other = torch.where(PADDING[..., None], torch.inf, X)
    assert torch.equal(qmodel(other, src_key_padding_mask=PADDING), y)
    for i, length in enumerate(LENGTHS):
        assert torch.equal(qmodel(X[i : i + 1, :length]), y[i : i + 1, :length])
    assert len(skipped) == 2 * 2


def test_sequences_without_a_row(skipped):
    qmodel, empty = convert(encoder()), PADDING.clone()
    empty[2] = True
    y = qmodel(X, src_key_padding_mask=empty)
    assert torch.equal(y[2], torch.zeros(T, E))
    assert torch.equal(y[[0, 1, 3]], qmodel(X, src_key_padding_mask=PADDING)[[0, 1, 3]])
    assert torch.equal(qmodel(X, src_key_padding_mask=torch.ones_like(empty)), torch.zeros_like(X))
    assert len(skipped) == 6


def test_a_mask_that_hides_nothing(skipped):
    qmodel = convert(encoder())
    assert torch.equal(qmodel(X, src_key_padding_mask=torch.zeros_like(PADDING)), qmodel(X))
    assert skipped == []


def test_a_mask_that_is_added(skipped):
    qmodel = convert(encoder())
    added = torch.zeros(PADDING.shape).masked_fill(PADDING, -torch.inf)
    y = qmodel(X, src_key_padding_mask=added)
    assert torch.equal(y, qmodel(X, src_key_padding_mask=PADDING))
    assert len(skipped) == 4


def test_frozen_parameters_need_no_gradient_mode(skipped):
    """Torch asks whether any parameter wants a gradient, too."""
    model = encoder().requires_grad_(False)
    qmodel = convert(model)
    with torch.enable_grad():
        assert (qmodel(X, src_key_padding_mask=PADDING)[PADDING] == 0).all()
        assert len(skipped) == 2
        qmodel(X.clone().requires_grad_(), src_key_padding_mask=PADDING).sum().backward()
    assert len(skipped) == 2


# ---- What goes torch's way ----


def hooked(qmodel):
    qmodel.layers[1].linear1.register_forward_hook(lambda *args: None)


def in_training(qmodel):
    qmodel.layers[1].train()


def foreign(qmodel):
    qmodel.layers[1].self_attn = nn.MultiheadAttention(E, 4, batch_first=True, add_bias_kv=True).eval()


def patched(qmodel):
    qmodel.layers[1].forward = lambda *args, **kwargs: nn.TransformerEncoderLayer.forward(
        qmodel.layers[1], *args, **kwargs
    )


CHANGES = {
    "activation": torch.tanh,
    "linear1": QuantizedLinear.from_float(nn.Linear(E, 64)).eval(),
    "dropout": nn.Softsign().eval(),
    "dropout1": nn.Softsign().eval(),
    "_sa_block": lambda x, *args, **kwargs: 2 * x,
    "_ff_block": lambda x: x,
}


@pytest.mark.parametrize("kept", [(), ("layers.0.linear1",)], ids=["int8", "partly float"])
@pytest.mark.parametrize("name", CHANGES)
def test_what_is_changed_in_a_layer_counts(name, kept):
    qmodel = convert(encoder(), config=QConfig(exclude=kept))
    before = qmodel(X, src_key_padding_mask=PADDING)
    setattr(qmodel.layers[0], name, CHANGES[name])
    y, expected = (way(qmodel, X, src_key_padding_mask=PADDING) for way in (type(qmodel).__call__, torchs_way))
    assert (y - before)[~PADDING].abs().max() > 0.1
    torch.testing.assert_close(y[~PADDING], expected[~PADDING], rtol=0, atol=2e-2)


@pytest.mark.parametrize("change", [hooked, in_training, foreign, patched])
def test_a_changed_model_goes_torchs_way(change, skipped):
    qmodel = convert(encoder(dropout=0.0))
    change(qmodel)
    y = qmodel(X, src_key_padding_mask=PADDING)
    assert skipped == []
    assert torch.equal(y, torchs_way(qmodel, X, src_key_padding_mask=PADDING))
    assert (y[PADDING] != 0).any()


CALLS = {
    "no padding mask": {},
    "a mask": {"mask": torch.zeros(T, T, dtype=torch.bool), "src_key_padding_mask": PADDING},
    "padding in front": {"src_key_padding_mask": PADDING.flip(1)},
    "an added mask of other numbers": {"src_key_padding_mask": normal(*PADDING.shape)},
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_other_calls_go_torchs_way(call, skipped):
    model = encoder()
    qmodel = convert(model)
    y = qmodel(X, **call)
    assert skipped == []
    assert torch.equal(y, torchs_way(qmodel, X, **call))
    with torch.enable_grad():  # which keeps torch from its own way of leaving rows out
        expected = model(X, **call)
    assert sqnr_db(expected.detach(), y) > 28


def test_where_torch_does_not_skip_padding(skipped):
    qmodel = convert(encoder())
    expected = torchs_way(qmodel, X, src_key_padding_mask=PADDING)
    with torch.enable_grad():  # its parameters want gradients, and so torch computes attention
        assert sqnr_db(expected, qmodel(X, src_key_padding_mask=PADDING).detach()) > 50
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        assert torch.equal(qmodel(X, src_key_padding_mask=PADDING), expected)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (qmodel(X, src_key_padding_mask=PADDING)[PADDING] != 0).any()
    unpadded = X[0], {"src_key_padding_mask": PADDING[1]}
    assert torch.equal(qmodel(unpadded[0], **unpadded[1]), torchs_way(qmodel, unpadded[0], **unpadded[1]))
    assert skipped == []


@pytest.mark.parametrize("form", [{"norm_first": True}, {"bias": False}])
def test_what_torch_never_skips_padding_in(form):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, 4, 64, batch_first=True, **form)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    qmodel = convert(model)
    assert type(qmodel) is nn.TransformerEncoder
    y, expected = (each(X, src_key_padding_mask=PADDING) for each in (qmodel, model))
    assert sqnr_db(expected, y) > 28


@pytest.mark.parametrize("kept", ["layers.1.self_attn", "*.self_attn", "*.linear*", "layers.0"])
def test_layers_that_stay_in_float(kept, skipped):
    """They run without padding, too: torch's own way for them ended when others became int8."""
    model = encoder()
    qmodel = convert(model, config=QConfig(exclude=(kept,)))
    y, expected = (each(X, src_key_padding_mask=PADDING) for each in (qmodel, model))
    assert skipped == [LENGTHS] * 2
    assert torch.equal(y[PADDING], expected[PADDING])
    assert sqnr_db(expected[~PADDING], y[~PADDING]) > 28


def test_a_wrong_mask_is_an_error():
    qmodel = convert(encoder())
    for mask, error in ((PADDING.T, ValueError), (PADDING.long(), AssertionError)):
        with pytest.raises(error, match="key_padding_mask"):
            qmodel(X, src_key_padding_mask=mask)


# ---- The feed forward ----


class Own(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {
    "relu": (nn.functional.relu, Activation.RELU),
    "gelu": (nn.functional.gelu, Activation.GELU),
    "silu": (nn.functional.silu, Activation.SILU),
    "GELU": (nn.GELU("tanh"), Activation.GELU_TANH),
    "of several operations": (Own(), Activation.QUICK_GELU),
    "unknown": (nn.functional.softsign, Activation.NONE),
}


def computed_activations(monkeypatch):
    """Lists those that layers compute from now on: with a product in one call, or with one that waited."""
    computed, end, fused = [], _C.end_linear, _C.call_fused
    monkeypatch.setattr(_C, "end_linear", lambda begun, kind: (computed.append(kind), end(begun, kind))[1])
    monkeypatch.setattr(_C, "call_fused", lambda *args: (computed.append(args[4]), fused(*args))[1])
    return computed


@pytest.mark.parametrize(("activation", "kind"), ACTIVATIONS.values(), ids=ACTIVATIONS)
@pytest.mark.parametrize(("decoder", "data"), [(False, None), (True, None), (False, [X] * 4)])
def test_the_activation_is_computed_by_the_layer_before_it(activation, kind, decoder, data, monkeypatch):
    """A function of torch's as well as a module. A decoder that is copied keeps its module, which torch would lose."""
    monkeypatch.setattr(pending, "MIN_VALUES", 1)
    torch.manual_seed(0)
    of = nn.TransformerDecoderLayer if decoder else nn.TransformerEncoderLayer
    model = nn.ModuleDict({"layer": of(E, 4, 64, batch_first=True, activation=activation)}).eval()
    call = {"forward": lambda model, x: model["layer"](*[x] * (1 + decoder))}
    plain = {"smoothing": "none", "rounding": "nearest"}
    apart = convert(model, data, config=QConfig(fuse=False, **plain), **call)
    qmodel = convert(model, data, config=QConfig(**plain), **call)
    name = "layer.activation" if kind else None
    assert qmodel.torchq_plan.layers["layer.linear1"].activation == name
    assert qmodel["layer"].linear1.fold.activation == kind
    computed = computed_activations(monkeypatch)
    y = call["forward"](qmodel, X)
    assert computed == [kind] * (kind != Activation.NONE)
    torch.testing.assert_close(y, call["forward"](apart, X), rtol=1e-3, atol=2e-2)  # a code of linear2's input
    assert sqnr_db(call["forward"](model, X), y) > 28
    again = apply_plan(model, Plan.from_dict(qmodel.torchq_plan.to_dict()))
    assert again["layer"].linear1.fold.activation == kind


def test_without_padding_it_is_computed_so_too(monkeypatch, skipped):
    monkeypatch.setattr(pending, "MIN_VALUES", 1)
    qmodel, computed = convert(encoder()), computed_activations(monkeypatch)
    y = qmodel(X, src_key_padding_mask=PADDING)
    assert computed == [Activation.RELU] * 2
    assert torch.equal(y, convert(encoder(), config=QConfig(fuse=False))(X, src_key_padding_mask=PADDING))
    assert len(skipped) == 4


# ---- In use ----


def test_a_whole_transformer(skipped):
    torch.manual_seed(0)
    model = nn.Transformer(E, 4, 2, 2, 64, batch_first=True).eval()
    qmodel, target = convert(model), normal(len(LENGTHS), 5, E, seed=1)
    call = {
        "src_key_padding_mask": PADDING, "memory_key_padding_mask": PADDING,
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(5), "tgt_is_causal": True,
    }  # fmt: skip
    assert sqnr_db(model(X, target, **call), qmodel(X, target, **call)) > 28
    assert skipped == [LENGTHS] * 2


@pytest.mark.parametrize("inplace", [False, True])
def test_copies_files_and_inplace(inplace, skipped):
    qmodel = convert(encoder(), inplace=inplace)
    y = qmodel(X, src_key_padding_mask=PADDING)
    for other in (copy.deepcopy(qmodel), pickle.loads(pickle.dumps(qmodel))):
        assert torch.equal(other(X, src_key_padding_mask=PADDING), y)
    assert len(skipped) == 6


def test_inference_mode(skipped):
    qmodel = convert(encoder())
    with torch.inference_mode():
        y = qmodel(X, src_key_padding_mask=PADDING)
    assert torch.equal(y, qmodel(X, src_key_padding_mask=PADDING))
    assert len(skipped) == 4


def test_a_graph_skips_padding_too(skipped):
    """In one op, which gives the bits of the eager call."""
    qmodel = convert(encoder())
    with torch.no_grad():
        compiled = torch.compile(qmodel, fullgraph=True, backend="aot_eager")
        y = compiled(X, src_key_padding_mask=PADDING)
        assert skipped == [LENGTHS] * len(qmodel.layers)
        assert torch.equal(y, qmodel(X, src_key_padding_mask=PADDING))


@pytest.mark.slow(seconds=5)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile
def test_a_graph_with_gradients_goes_torchs_way(skipped):
    """As the float encoder does when it is compiled, unless told not to check masks."""
    qmodel = convert(encoder(), config=QConfig(attention="float32"))
    with torch.enable_grad():
        compiled = torch.compile(qmodel, fullgraph=True, backend="aot_eager")
        y = compiled(X, src_key_padding_mask=PADDING)
    assert skipped == []
    assert sqnr_db(torchs_way(qmodel, X, src_key_padding_mask=PADDING), y.detach()) > 50


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_it_is_a_node_of_a_traced_graph():
    """As torch's own encoder and attention are."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.encoder = nn.MultiheadAttention(E, 4, batch_first=True), encoder()

        def forward(self, x, padding):
            return self.encoder(self.attention(x, x, value=x)[0], src_key_padding_mask=padding)

    qmodel = convert(Model().eval())
    traced = torch.fx.symbolic_trace(qmodel)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["attention", "encoder"]
    assert torch.equal(traced(X, PADDING), qmodel(X, PADDING))
    called = torch.jit.trace(qmodel, (X, PADDING))
    assert sqnr_db(qmodel(X, PADDING)[~PADDING], called(X, PADDING)[~PADDING]) > 50
