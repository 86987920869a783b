"""nn.MultiheadAttention in int8: calibration and plan, what foreign code reads of it, copies and compilers."""

import copy
import pickle

import pytest
import torch
from torch import nn

from helpers.multihead import FORMS, HEADS, E, N, S, assert_as_torch, attention, inputs
from helpers.numbers import normal
from torchq import QConfig, QuantizedLinear, apply_plan, convert, kernels, plan_of, prepare_qat, report, simulate
from torchq.modules.float_view import FloatView
from torchq.modules.registry import find_layers
from torchq.numerics.metrics import sqnr_db

pytestmark = pytest.mark.usefixtures("seeded")

PARTS = ("q_proj", "k_proj", "v_proj", "out_proj")

# ---- Planning ----


def data(module, count=6, need_weights=False):
    xs = [tuple(x + 0.01 * i for x in inputs(module)) for i in range(count)]
    return {"calib_loader": xs, "forward": lambda model, batch: model(*batch, need_weights=need_weights)}


def test_each_matrix_is_a_layer_of_the_plan():
    module = attention(kdim=12, vdim=20)
    layers = find_layers(nn.ModuleDict({"a": module}))
    assert list(layers) == [f"a.{part}" for part in PARTS]
    assert [layers[name].in_features for name in layers] == [E, 12, 20, E]
    assert torch.equal(layers["a.k_proj"].weight, module.k_proj_weight)
    assert torch.equal(layers["a.k_proj"].matrix.bias, module.in_proj_bias[E : 2 * E])


@pytest.mark.parametrize("form", ["plain", "sizes of its own", "bias_kv and zero"])
def test_calibration_sees_the_input_of_each(form):
    """The ranges are those of query, key and value, and of the heads between."""
    module = attention(**FORMS[form])
    config = QConfig(activation="static", observer="minmax", rounding="nearest", smoothing="none")
    qmodel = convert(module, config=config, **data(module, 1))
    plan, xs = qmodel.torchq_plan, inputs(module)
    heads, _ = oracle_of_float(module, *xs)
    for part, x in zip(PARTS, (*xs, heads), strict=True):
        scale, _ = plan.layers[part].input_qparams
        assert plan.layers[part].kind == "int8 static"
        assert scale == pytest.approx((x.max().clamp(min=0) - x.min().clamp(max=0)).item() / 255, rel=1e-5)
    assert sqnr_db(module(*xs)[0], qmodel(*xs)[0]) > 28


def oracle_of_float(module, query, key, value):
    """The heads of the float module: its output with an identity as out_proj."""
    twin = copy.deepcopy(module)
    twin.out_proj.weight.copy_(torch.eye(E))
    if twin.out_proj.bias is not None:
        twin.out_proj.bias.zero_()
    return twin(query, key, value)


def test_gptq_scales_and_attention_are_chosen_by_data():
    torch.manual_seed(0)
    module = nn.MultiheadAttention(64, 4, batch_first=True).eval()
    outliers = torch.ones(64)
    outliers[[3, 40]] = 40
    xs = [normal(4, 50, 64, seed=i) * outliers for i in range(4)]
    qmodel = convert(module, xs, forward=lambda model, x: model(x, x, x, need_weights=False))
    plan = qmodel.torchq_plan
    assert all(plan.layers[part].channel_scale for part in PARTS[:3])
    assert any(plan.layers[part].rounding == "gptq" for part in PARTS)
    (row,) = plan.attentions.values()
    assert row.sqnr_db.keys() == set(kernels.attention_schemes(keys=50))
    assert qmodel.scheme == row.scheme
    text = str(report(qmodel))
    assert f"attention in {row.scheme}" in text
    assert "100.0% of the weights of matrix products in int8" in text


def test_a_scheme_is_applied():
    module = nn.MultiheadAttention(64, 4, batch_first=True).eval()
    x, found, exact = normal(2, 40, 64), {}, None
    for scheme in ("none", "float32", "bfloat16", "int8"):
        int8 = convert(module, config=QConfig(attention=scheme))
        assert int8.scheme == {"none": "sdpa"}.get(scheme, scheme)
        int8.out_proj = nn.Linear(64, 64, bias=False)
        int8.out_proj.weight.copy_(torch.eye(64))
        exact = exact if found else int8(x, x, x)[0]
        found[scheme] = min(sqnr_db(exact, int8(x, x, x, need_weights=needed)[0]) for needed in (True, False))
    assert min(found["none"], found["float32"]) > 110
    assert 45 < found["bfloat16"] < 90
    assert 35 < found["int8"] < found["bfloat16"]


def test_a_plan_is_applied_again_and_edited():
    module = attention(add_bias_kv=True)
    qmodel = convert(module, **data(module))
    again = apply_plan(module, plan_of(qmodel))
    assert again.scheme == qmodel.scheme
    assert torch.equal(again(*inputs(module))[0], qmodel(*inputs(module))[0])
    int8 = convert(module, config=QConfig(exclude=("k_proj",)))
    assert isinstance(int8.q_proj, QuantizedLinear)
    assert torch.equal(int8.k_proj.weight, module.in_proj_weight[E : 2 * E])
    assert int8.torchq_plan.layers["k_proj"].reason == "excluded by 'k_proj'"
    assert_as_torch(int8, *inputs(module))
    assert int8.in_proj_weight[E : 2 * E].sum() == module.in_proj_weight[E : 2 * E].sum()


def test_a_budget_that_nothing_keeps_returns_attention_too():
    module = attention()
    exact = module(*inputs(module), need_weights=False)[0]

    def evaluate(model):
        return float(torch.equal(model(*inputs(module), need_weights=False)[0], exact))

    with pytest.warns(UserWarning, match="no model with an int8 layer keeps the metric"):
        qmodel = convert(module, **data(module), evaluate=evaluate, max_drop=0.5)
    assert type(qmodel) is nn.MultiheadAttention
    assert qmodel.torchq_plan.attentions == {}
    assert evaluate(qmodel) == 1


def test_inplace():
    model = nn.ModuleDict({"a": attention()})
    expected = convert(model)
    assert convert(model, inplace=True) is model
    assert torch.equal(model["a"](*inputs(model["a"]))[0], expected["a"](*inputs(model["a"]))[0])


class Own(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x)[0]


def test_what_stays_in_float():
    """A forward of its own is foreign code, and hooks would be lost."""
    hooked = attention()
    hooked.register_forward_hook(lambda *args: None)
    model = nn.ModuleDict({"own": Own(E, HEADS), "hooked": hooked, "fc": nn.Linear(E, E)}).eval()
    plan = convert(model).torchq_plan
    assert list(plan.layers) == ["own.out_proj", *(f"hooked.{part}" for part in PARTS), "fc"]
    assert "reads this layer's weight" in plan.layers["own.out_proj"].reason
    assert "hooks" in plan.layers["hooked.q_proj"].reason
    prepared = prepare_qat(model, config=QConfig(activation="dynamic"))
    assert prepared.torchq_plan.layers["hooked.q_proj"].reason.startswith("it has forward hooks")


# ---- What foreign code reads, copies and compilers ----


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_attributes_are_those_of_the_float_module(form):
    module = attention(**form)
    int8 = convert(module)
    assert isinstance(int8, nn.MultiheadAttention)
    for name in (
        "embed_dim", "kdim", "vdim", "num_heads", "head_dim", "dropout", "batch_first", "add_zero_attn",
        "_qkv_same_embed_dim", "training",
    ):  # fmt: skip
        assert getattr(int8, name) == getattr(module, name)
    for name in ("in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
        ours, theirs = getattr(int8, name), getattr(module, name)
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            assert (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, theirs.device)
            assert isinstance(ours, FloatView)
            assert sqnr_db(theirs, ours.clone()) > 38
        with pytest.raises(RuntimeError, match=f"can't be written .{name}"):
            setattr(int8, name, theirs)
    assert sqnr_db(module.out_proj.weight, int8.out_proj.weight.clone()) > 38
    assert int8.float_bytes == sum(parameter.nbytes for parameter in module.parameters())
    xs = [x.transpose(0, 1) if module.batch_first else x for x in inputs(module)]
    by_hand, _ = nn.functional.multi_head_attention_forward(  # as foreign code may call it, on the float views
        *xs, E, HEADS, int8.in_proj_weight, int8.in_proj_bias, int8.bias_k, int8.bias_v, int8.add_zero_attn, 0.0,
        int8.out_proj.weight, int8.out_proj.bias, use_separate_proj_weight=int8.in_proj_weight is None,
        q_proj_weight=int8.q_proj_weight, k_proj_weight=int8.k_proj_weight, v_proj_weight=int8.v_proj_weight,
        training=False,
    ) if module.kdim == module.vdim or int8.in_proj_weight is None else (None, None)  # fmt: skip
    if by_hand is not None:
        by_hand = by_hand.transpose(0, 1) if module.batch_first else by_hand
        assert sqnr_db(by_hand, int8(*inputs(module))[0]) > 25


@pytest.mark.parametrize("form", ["plain", "sizes of its own", "bias_kv and zero"])
def test_copies_files_and_checkpoints(form):
    module = attention(**FORMS[form])
    qmodel = convert(module, config=QConfig(attention="float32"))
    xs = inputs(module)
    expected = qmodel(*xs, need_weights=False)[0]
    for other in (copy.deepcopy(qmodel), pickle.loads(pickle.dumps(qmodel))):
        assert other.scheme == "float32"
        assert torch.equal(other(*xs, need_weights=False)[0], expected)
    other = convert(nn.MultiheadAttention(E, HEADS, **FORMS[form]).eval(), config=QConfig(attention="float32"))
    assert not torch.equal(other(*xs, need_weights=False)[0], expected)
    other.load_state_dict(qmodel.state_dict())
    assert torch.equal(other(*xs, need_weights=False)[0], expected)
    with pytest.raises(RuntimeError, match="nothing of it was"):
        other.load_state_dict(module.state_dict())


def test_simulate():
    int8 = convert(attention(batch_first=True))
    expected = int8(*inputs(int8))[0]
    with simulate():
        assert sqnr_db(int8(*inputs(int8))[0], expected) > 50


def test_gradients_reach_the_inputs():
    module = attention()
    int8 = convert(module, config=QConfig(attention="int8"))
    found = []
    for each in (module, int8):
        xs = [x.clone().requires_grad_() for x in inputs(module)]
        with torch.enable_grad():
            each(*xs, need_weights=False)[0].square().sum().backward()
        found.append([x.grad for x in xs])
    for theirs, ours in zip(*found, strict=True):
        assert sqnr_db(theirs, ours) > 25


@pytest.mark.slow(seconds=8)
@pytest.mark.parametrize("need_weights", [True, False])
def test_compile_and_export(need_weights):
    int8 = convert(attention(batch_first=True), config=QConfig(attention="float32"))
    xs, call = inputs(int8), {"need_weights": need_weights, "key_padding_mask": torch.arange(S).expand(N, S) > 4}
    expected = int8(*xs, **call)[0]
    compiled = torch.compile(int8, fullgraph=True, backend="aot_eager")
    assert sqnr_db(expected, compiled(*xs, **call)[0]) > 50
    program = torch.export.export(int8, xs, call)
    assert sqnr_db(expected, program.module()(*xs, **call)[0]) > 50
    assert not program.state_dict  # no weights in float
