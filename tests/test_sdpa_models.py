"""Models whose modules call torch's scaled_dot_product_attention: planned, converted, copied and compiled."""

import copy
import dataclasses
import pickle

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import torchq
from helpers.numbers import normal
from torchq import kernels
from torchq.modules.sdpa_calls import SdpaCalls
from torchq.planning.plan import AttentionPlan, Plan

WIDTH, HEADS, LENGTH = 64, 4, 64
SCHEMES = torchq.ops.ATTENTION_SCHEMES
LEAST_DB = {"float32": 110, "bfloat16": 45, "int8_bfloat16": 40, "int8": 35}
QUICK = {"observer": "minmax", "rounding": "nearest", "smoothing": "none"}  # here attention counts, not the layers


class CausalAttention(nn.Module):
    """As in nanoGPT."""

    def __init__(self):
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.dropout = 0.2
        self.flash = hasattr(torch.nn.functional, "scaled_dot_product_attention")

    def forward(self, x):
        batch, length, width = x.size()
        q, k, v = self.c_attn(x).split(WIDTH, dim=2)
        q, k, v = (each.view(batch, length, HEADS, width // HEADS).transpose(1, 2) for each in (q, k, v))
        if not self.flash:
            raise NotImplementedError
        dropout = self.dropout if self.training else 0
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=dropout, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(batch, length, width))


class ImageAttention(nn.Module):
    """As in timm."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.q_norm, self.k_norm = nn.LayerNorm(WIDTH // HEADS), nn.LayerNorm(WIDTH // HEADS)

    def forward(self, x, attn_mask=None):
        batch, length, width = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=0.0)
        return self.proj(x.transpose(1, 2).reshape(batch, length, width))


def attend(q, k, v):
    """Of module level."""
    return F.scaled_dot_product_attention(q, k, v)


class CrossAttention(nn.Module):
    """With a method and a function between, and a child that attends, too."""

    def __init__(self):
        super().__init__()
        self.before = ImageAttention()
        self.to_q, self.to_kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x):
        context = self.before(x)[:, : LENGTH // 2]
        q, (k, v) = self.to_q(x), self.to_kv(context).chunk(2, dim=-1)
        y = self._heads(*(each.unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in (q, k, v)))
        return y.transpose(1, 2).flatten(2)

    def _heads(self, q, k, v):
        return attend(q, k, v)


class Block(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(WIDTH), kind()
        self.mlp = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )

    def forward(self, x):
        x = x + self.attn(self.norm(x))
        return x + self.mlp(x)


KINDS = (CausalAttention, ImageAttention, CrossAttention)


def network(*kinds):
    torch.manual_seed(0)
    return nn.Sequential(*map(Block, kinds or KINDS)).eval()


def batches(length=LENGTH):
    return [normal(4, length, WIDTH, seed=seed) for seed in range(4)]


X = batches()[0]


def converted(model, length=LENGTH, **more):
    return torchq.convert(model, batches(length), config=torchq.QConfig(**QUICK, **more), progress=False)


def only_attention(model, scheme):
    """Converted with every layer in float, so that only attention differs."""
    return converted(model, attention=scheme, min_sqnr_db=1e9)


def db(model, other, x=X):
    with torch.no_grad():
        return torchq.sqnr_db(model(x), other(x))


def forms(model):
    return {name: type(module) for name, module in model.named_modules() if isinstance(module, SdpaCalls)}


NAMES = ["0.attn", "1.attn", "2.attn", "2.attn.before"]


# ---- Plans ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_scheme_is_as_close_as_it_should_be(scheme):
    model = network()
    qmodel = only_attention(model, scheme)
    assert {name: row.scheme for name, row in qmodel.torchq_plan.attentions.items()} == dict.fromkeys(NAMES, scheme)
    assert list(forms(qmodel)) == NAMES
    assert db(model, qmodel) > LEAST_DB[scheme]
    if scheme != "float32":
        assert db(model, qmodel) < 100  # so the scheme was really used
    for model_of_float in (model, network()):
        assert not forms(model_of_float)
        assert [type(block.attn) for block in model_of_float] == list(KINDS)


def test_without_data_it_is_float32():
    model = network()
    rows = torchq.convert(model).torchq_plan.attentions
    assert list(rows) == NAMES
    assert {row.scheme for row in rows.values()} == {"float32"}
    assert db(torchq.convert(model, config=torchq.QConfig(attention="none")), torchq.convert(model)) > 60


def test_none_leaves_attention_alone():
    qmodel = converted(network(), attention="none")
    assert qmodel.torchq_plan.attentions == {}
    assert not forms(qmodel)


def test_auto_keeps_the_output_within_the_margin():
    model = network()
    exact, plan = (converted(model, attention=scheme).torchq_plan for scheme in ("float32", "auto"))
    assert plan.checked.model_db > exact.checked.model_db - 0.3
    assert {row.scheme for row in plan.attentions.values()} != {"float32"}
    assert db(model, torchq.apply_plan(model, plan)) > 30


def test_each_module_is_measured_by_its_own_calls(monkeypatch):
    """The one that holds another has half of its keys; what its child attends is the child's."""
    monkeypatch.setattr(kernels, "attention_schemes", lambda keys: ("int8",) if keys >= LENGTH else ("bfloat16",))
    rows = converted(network()).torchq_plan.attentions
    tried = {name: list(row.sqnr_db) for name, row in rows.items()}
    assert tried == {name: ["bfloat16" if name == "2.attn" else "int8"] for name in NAMES}
    assert all(35 < row.sqnr_db[scheme] < 80 for row in rows.values() for scheme in row.sqnr_db)
    assert len({row.sqnr_db["int8"] for row in rows.values() if "int8" in row.sqnr_db}) == 3


def test_an_edited_plan_is_applied():
    model = network()
    plan = torchq.plan_of(converted(model, attention="int8"))
    rows = {**plan.attentions, "1.attn": AttentionPlan("sdpa", "my choice")}
    edited = dataclasses.replace(plan, attentions=rows)
    qmodel = torchq.apply_plan(model, edited)
    assert list(forms(qmodel)) == ["0.attn", "2.attn", "2.attn.before"]
    assert type(qmodel[1].attn) is ImageAttention
    assert Plan.from_dict(edited.to_dict()) == edited
    assert 30 < db(torchq.apply_plan(model, plan), qmodel) < 100


def test_a_wrong_plan_is_an_error():
    model = network()
    plan = torchq.plan_of(torchq.convert(model))
    wrong = dataclasses.replace(plan, attentions={"0.mlp": AttentionPlan("int8", "")})
    with pytest.raises(ValueError, match=r"'0\.mlp', which is no module .* scaled_dot_product_attention"):
        torchq.apply_plan(model, wrong)


def test_the_report_says_how_attention_is_computed():
    qmodel = converted(network(), attention="int8")
    assert "attention in int8 (as the config says): all 4 of them" in str(torchq.report(qmodel))
    assert list(torchq.report(qmodel).to_dict()["attentions"]) == NAMES


def test_inplace_changes_the_model_itself():
    model, expected = network(), converted(network())
    torchq.convert(model, batches(), config=torchq.QConfig(**QUICK), inplace=True, progress=False)
    assert list(forms(model)) == NAMES
    assert model.torchq_plan.attentions == expected.torchq_plan.attentions
    assert torch.equal(model(X), expected(X))


def test_verify_compares_them_by_name():
    with torch.no_grad():
        result = torchq.verify(converted(network(CausalAttention), attention="int8"), X)
    assert result.ok
    assert "0.attn         attention int8" in str(result)


# ---- Copies and files -----------------------------------------------------------------------------------------------


def test_copies_pickles_and_files_compute_the_same(tmp_path):
    model = network()
    qmodel = converted(model, attention="int8")
    torchq.save(qmodel, tmp_path / "m.safetensors")
    loaded = torchq.load(tmp_path / "m.safetensors", model)
    with torch.no_grad():
        expected = qmodel(X)
        for other in (copy.deepcopy(qmodel), pickle.loads(pickle.dumps(qmodel)), loaded):
            assert torch.equal(other(X), expected)
            assert list(forms(other)) == NAMES
    assert type(loaded[0].attn).__name__ == "CausalAttention"
    assert qmodel.state_dict().keys() == converted(model, attention="none").state_dict().keys()


def test_a_copy_has_a_scheme_of_its_own():
    qmodel = only_attention(network(ImageAttention), "int8")
    other = copy.deepcopy(qmodel)
    SdpaCalls.adopt(other[0].attn, "float32")
    assert 30 < db(other, qmodel) < 100


# ---- Training -------------------------------------------------------------------------------------------------------


def test_gradients_and_dropout_are_torchs():
    model = network(CausalAttention)
    qmodel = only_attention(model, "int8")
    outputs = []
    for each in (model, qmodel):
        torch.manual_seed(1)
        x = X.clone().requires_grad_()
        each.train()(x).square().sum().backward()
        outputs.append(x.grad)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-6)


def test_training_keeps_torchs_attention_until_it_is_converted():
    model = network(ImageAttention)
    prepared = torchq.prepare_qat(copy.deepcopy(model), batches())
    assert not forms(prepared)
    prepared.train()(X).square().mean().backward()
    assert all(parameter.grad is not None for parameter in prepared[0].attn.qkv.parameters())
    assert list(forms(torchq.convert(prepared.eval()))) == ["0.attn"]


# ---- Compilers ------------------------------------------------------------------------------------------------------


def ops_of(graph):
    return [str(node.target) for node in graph.nodes if "attention" in str(node.target)]


@pytest.mark.slow(seconds=20)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torch_compile_gives_the_same_without_a_graph_break():
    qmodel, graphs = only_attention(network(), "float32"), []

    def keep(module, inputs):
        graphs.append(module.graph)
        return module.forward

    with torch.no_grad():
        torch._dynamo.reset()
        kept = torch.compile(qmodel, fullgraph=True, backend=keep)
        torch.testing.assert_close(kept(X), qmodel(X), rtol=1e-4, atol=1e-5)
        compiled = torch.compile(qmodel, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(X), qmodel(X), rtol=1e-4, atol=1e-5)
    assert [ops_of(graph) for graph in graphs] == [["torchq.attention.default"] * 4]


class Breaking(ImageAttention):
    def forward(self, x, attn_mask=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        torch._dynamo.graph_break()
        y = F.scaled_dot_product_attention(q, k, v)
        torch._dynamo.graph_break()
        return self.proj(F.relu(y).transpose(1, 2).flatten(2))


@pytest.mark.slow(seconds=20)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_graph_breaks_change_nothing():
    qmodel = only_attention(network(Breaking, Breaking), "float32")
    with torch.no_grad():
        torch._dynamo.reset()
        compiled = torch.compile(qmodel, backend="aot_eager")
        for x in (X, X[:2], X[:, :50]):
            torch.testing.assert_close(compiled(x), qmodel(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow(seconds=20)
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")  # of strict: the mode that it saw
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_has_the_op(strict):
    qmodel = only_attention(network(CausalAttention), "float32")
    with torch.no_grad():
        program = torch.export.export(qmodel, (X,), strict=strict)
        assert ops_of(program.graph) == ["torchq.attention.default"]
        torch.testing.assert_close(program.module()(X), qmodel(X), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_trace_has_the_op():
    qmodel = only_attention(network(CausalAttention), "float32")
    with torch.no_grad():
        traced = torch.jit.trace(qmodel, X)
        torch.testing.assert_close(traced(X), qmodel(X), rtol=1e-4, atol=1e-5)
    assert "torchq::attention" in str(traced.inlined_graph)


def test_torch_fx_traces_torchs_attention():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            x = self.fc(x)
            return F.scaled_dot_product_attention(x, x, x)

    qmodel = torchq.convert(nn.Sequential(Plain()))
    traced = torch.fx.symbolic_trace(qmodel)
    torch.testing.assert_close(traced(X), qmodel(X), rtol=1e-4, atol=1e-5)
    assert F.scaled_dot_product_attention in [node.target for node in traced.graph.nodes]
