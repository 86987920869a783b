"""Stacked experts of mixture-of-experts layers: their arithmetic, what proves them, and every way to use the result."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.functional import linear, silu

from helpers.experts import EXPERTS, FORMS, HIDDEN, INNER, ROWS, Experts, Layer
from helpers.numbers import normal
from torchq import QConfig, QuantizedLinear, apply_plan, convert, plan_of, report, simulate
from torchq.calibration.calibrate import calibrate
from torchq.modules.experts import ExpertsType, QuantizedExperts
from torchq.modules.registry import find_layers
from torchq.numerics.metrics import sqnr_db
from torchq.planning.plan import Plan

X = normal(ROWS, HIDDEN, seed=3)
IDS = torch.tensor([[0, 2], [1, 2], [2, 1], [3, 0]] * (ROWS // 4))
WEIGHTS = torch.rand(ROWS, 2, generator=torch.Generator().manual_seed(0))
DATA = [normal(150, HIDDEN, seed=seed) for seed in range(20, 22)]


def converted(experts, **config):
    return convert(nn.ModuleList([experts]), config=QConfig(**config))[0]


@pytest.fixture(params=FORMS.values(), ids=FORMS)
def experts(request):
    return Experts(**request.param).eval()


@torch.no_grad()
def test_each_row_gets_the_weighted_sum_of_its_experts_int8_layers(experts):
    """The same int8 layers, made by hand of each expert's matrices, give the same bits for each row and expert."""
    layers = {
        (name, expert): QuantizedLinear(*(lambda q: (q.weight_int8, q.weight_scale))(_by_hand(weight)), bias=bias)
        for name in (experts.up, "down_proj")
        for expert in range(EXPERTS)
        for weight, bias in [experts.matrix(name, expert)]
    }
    expected = torch.zeros_like(X)
    for row in range(ROWS):
        for expert, weight in sorted(zip(IDS[row].tolist(), WEIGHTS[row], strict=True), key=lambda pair: pair[0]):
            y = layers[experts.up, expert](X[row])
            y = silu(y[:INNER]) * y[INNER:] if experts.up == "gate_up_proj" else silu(y)
            expected[row] += layers["down_proj", expert](y) * weight

    qexperts = converted(experts)

    assert isinstance(qexperts, QuantizedExperts)
    assert torch.equal(qexperts(X, IDS, WEIGHTS), expected)
    assert sqnr_db(experts(X, IDS, WEIGHTS), expected) > 33


def _by_hand(weight):
    layer = nn.Linear(*weight.shape[::-1], bias=False)
    layer.weight = nn.Parameter(weight)
    return QuantizedLinear.from_float(layer)


@torch.no_grad()
def test_ids_of_no_expert_add_nothing_and_others_are_an_error():
    experts = Experts()
    qexperts, none = converted(experts), torch.full_like(IDS, EXPERTS)
    half = torch.stack([IDS[:, 0], none[:, 0]], dim=1)

    assert not qexperts(X, none, WEIGHTS).any()
    assert sqnr_db(experts(X, half, WEIGHTS), qexperts(X, half, WEIGHTS)) > 33
    assert qexperts(X[:0], IDS[:0], WEIGHTS[:0]).shape == (0, HIDDEN)
    with pytest.raises(IndexError, match="the id of an expert is 5, but there are 4"):
        qexperts(X, none + 1, WEIGHTS)


@torch.no_grad()
def test_arguments_go_by_the_names_of_the_float_module():
    qexperts = converted(Experts())
    expected = qexperts(X, IDS, WEIGHTS)

    assert torch.equal(qexperts(X, routing_weights=WEIGHTS, router_indices=IDS), expected)
    wide = qexperts(X.reshape(4, -1, HIDDEN), IDS.reshape(4, -1, 2), WEIGHTS.reshape(4, -1, 2))
    assert torch.equal(wide, expected.reshape(4, -1, HIDDEN))


@torch.no_grad()
def test_foreign_code_finds_the_attributes_and_stacked_parameters(experts):
    qexperts = converted(experts)

    assert (qexperts.num_experts, type(qexperts.act_fn)) == (EXPERTS, nn.SiLU)
    assert qexperts.act_fn is not experts.act_fn
    for name, parameter in experts.named_parameters():
        stacked = getattr(qexperts, name)
        assert (stacked.shape, stacked.dtype, stacked.device) == (parameter.shape, torch.float32, parameter.device)
        assert stacked.is_contiguous()
        assert sqnr_db(parameter, stacked + 0) > 40
    assert sum(p.numel() for p in qexperts.parameters()) == sum(p.numel() for p in experts.parameters())
    with pytest.raises(RuntimeError, match="can't be written"):
        qexperts.down_proj[0] = 0
    with pytest.raises(RuntimeError, match="can't be written"):
        qexperts.down_proj = experts.down_proj
    with pytest.raises(AttributeError, match="no attribute 'gate_proj'"):
        getattr(qexperts, "gate_proj")  # noqa: B009


@torch.no_grad()
def test_calibration_sees_each_experts_own_rows(experts):
    model = Layer(experts).eval()
    layers = find_layers(model)
    ids = model.router(X).topk(2).indices

    records = calibrate(model, [X], layers, QConfig()).records

    for expert in range(EXPERTS):
        rows = X[(ids == expert).any(dim=-1)]
        hidden = records[f"experts.{expert}.down_proj"].sample.rows
        assert torch.equal(records[f"experts.{expert}.{experts.up}"].sample.rows, rows)
        assert sqnr_db(experts.expert(expert, rows), linear(hidden, *experts.matrix("down_proj", expert))) > 100


CONFIGS = [QConfig(exclude=("router",), **each) for each in ({}, {"activation": "static"}, {"rounding": "gptq"})]


@pytest.mark.parametrize("config", CONFIGS, ids=["auto", "static", "gptq"])
@torch.no_grad()
def test_every_scheme_and_a_plan_as_json(config):
    model = Layer().eval()
    qmodel = convert(model, DATA, config=config)
    whole, lone = plan_of(qmodel), Plan.from_dict(plan_of(qmodel).to_dict())

    assert all(layer.is_int8 for name, layer in whole.layers.items() if name != "router")
    if config.activation == "static":
        assert {layer.kind for layer in whole.layers.values() if layer.is_int8} == {"int8 static"}
    if config.rounding == "gptq":
        assert whole.layers["experts.0.gate_up_proj"].rounding == "gptq"
    assert sqnr_db(model(X), qmodel(X)) > 20
    again = apply_plan(model, whole)
    assert torch.equal(again(X), qmodel(X))
    other = apply_plan(model, lone) if config.rounding != "gptq" else again
    other.load_state_dict(qmodel.state_dict())
    assert torch.equal(other(X), qmodel(X))


def test_an_expert_that_no_data_reached_is_dynamic_and_says_so():
    model = Layer(reached=3).eval()
    for activation in ("auto", "static"):
        qmodel = convert(model, DATA, config=QConfig(activation=activation, observer="minmax", exclude=("router",)))
        planned = qmodel.torchq_plan.layers["experts.3.down_proj"]
        assert (planned.kind, planned.reason) == ("int8 dynamic", "no calibration data reached it")
        assert "no calibration data reached it: experts.3.gate_up_proj, experts.3.down_proj" in str(report(qmodel))


@torch.no_grad()
def test_inplace_gives_the_same():
    model = Layer(Experts(transposed=True)).eval()
    expected = convert(model)(X)

    assert torch.equal(convert(model, inplace=True)(X), expected)
    assert type(model.experts) is QuantizedExperts


@torch.no_grad()
def test_one_expert_may_stay_in_float():
    model = Layer().eval()
    qmodel = convert(model, config=QConfig(exclude=("experts.1", "router")))

    assert type(qmodel.experts.get_submodule("1.down_proj")) is nn.Linear
    assert type(qmodel.experts.get_submodule("2.down_proj")) is QuantizedLinear
    assert sqnr_db(model(X), qmodel(X)) > 33
    assert torch.equal(qmodel.experts.down_proj[1], model.experts.down_proj[1])


@torch.no_grad()
def test_copies_pickles_and_checkpoints_compute_the_same():
    model = Layer(Experts(transposed=True, bias=True)).eval()
    qmodel = convert(model)
    expected, file = qmodel(X), io.BytesIO()
    torch.save(qmodel, file)
    file.seek(0)

    assert torch.equal(copy.deepcopy(qmodel)(X), expected)
    assert torch.equal(pickle.loads(pickle.dumps(qmodel))(X), expected)
    assert torch.equal(torch.load(file, weights_only=False)(X), expected)
    other = convert(Layer(Experts(transposed=True, bias=True)).eval())
    other.experts.get_submodule("1.down_proj").replace_weight(
        torch.zeros(HIDDEN, INNER, dtype=torch.int8), torch.ones(HIDDEN), torch.zeros(HIDDEN)
    )
    assert not torch.equal(other(X), expected)
    other.load_state_dict(qmodel.state_dict())
    assert torch.equal(other(X), expected)
    assert "experts.3.down_proj.weight_int8" in qmodel.state_dict()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(dtype):
    experts = Experts(bias=True).to(dtype).eval()
    qexperts, x = converted(experts), X.to(dtype)
    y = qexperts(x, IDS, WEIGHTS.to(dtype))

    assert y.dtype == dtype
    assert qexperts.down_proj.dtype == dtype
    assert sqnr_db(experts(x, IDS, WEIGHTS.to(dtype)).float(), y.float()) > 30


def test_gradients_reach_the_input_and_the_routing_weights():
    experts = Experts(bias=True).eval()
    qexperts = converted(experts)
    found = []
    for module in (experts, qexperts):
        x, weights = X.clone().requires_grad_(), WEIGHTS.clone().requires_grad_()
        module(x, IDS, weights).square().sum().backward()
        found.append((x.grad, weights.grad))

    for exact, actual in zip(*found, strict=True):
        assert sqnr_db(exact, actual) > 25


@torch.no_grad()
def test_simulated_compiled_and_exported():
    qmodel = convert(Layer().eval())
    expected = qmodel(X)
    with simulate():
        assert sqnr_db(expected, qmodel(X)) > 60
    assert torch.allclose(torch.compile(qmodel, backend="eager")(X), expected, atol=1e-6)
    exported = torch.export.export(qmodel, (X,)).module()
    assert torch.allclose(exported(X), expected, atol=1e-5)


@torch.no_grad()
def test_report_has_a_row_for_all_experts_and_counts_bytes_once():
    qmodel = convert(Layer().eval(), DATA, config=QConfig(exclude=("experts.1.down_proj", "router")))
    found = report(qmodel)
    rows = [line.split()[0] for line in str(found).splitlines() if "experts." in line and "KiB" in line]

    assert rows == ["experts.*.gate_up_proj", "experts.*.down_proj"]
    assert "3 dynamic, 1 float" in str(found)
    layers = {layer.name: layer for layer in found.layers}
    assert layers["experts.0.gate_up_proj"].group == "experts.*.gate_up_proj"
    assert layers["router"].group is None
    assert (
        layers["experts.0.down_proj"].bytes_before == layers["experts.1.down_proj"].bytes_before == HIDDEN * INNER * 4
    )
    whole = convert(nn.ModuleList([Wrong(), nn.Linear(64, 64)]))
    sizes = [layer.bytes_after for layer in report(whole).layers if layer.name.endswith("gate_up_proj")]
    assert sizes == [2 * INNER * HIDDEN * 4] * EXPERTS


class Wrong(Experts):
    """Adds half an expert's output."""

    def forward(self, hidden_states, router_indices, routing_weights):
        return super().forward(hidden_states, router_indices, routing_weights * 0.5)


class OtherCall(Experts):
    """Every expert for every row."""

    def forward(self, hidden_states):
        return sum(self.expert(expert, hidden_states) for expert in range(EXPERTS))


class OtherOutput(Experts):
    def forward(self, *args):
        return super().forward(*args), args[1]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Wrong, "Wrong computes another formula than experts do"),
        (OtherCall, r"OtherCall can't be called as experts are, with rows, ids and weights (TypeError)"),
        (OtherOutput, "OtherOutput gives something else than the weighted sums of its experts' outputs"),
    ],
)
def test_what_calling_does_not_prove_stays_in_float(kind, reason):
    model = nn.ModuleList([kind(), nn.Linear(64, 64)])
    plan = convert(model).torchq_plan

    assert {plan.layers[f"0.{expert}.down_proj"].reason for expert in range(EXPERTS)} == {reason}
    assert plan.layers["1"].is_int8


def test_other_shapes_and_wrappers_are_no_experts_or_stay_in_float():
    kind, flat, wrapped, deaf = ExpertsType(), Experts(), Experts(), Experts()
    flat.down_proj = nn.Parameter(torch.zeros(HIDDEN, INNER))
    wrapped.forward = wrapped.forward
    deaf.down_proj.data[0, 0, 0] = torch.nan

    assert not kind.matches(flat)
    assert not kind.matches(nn.Linear(2, 2))
    assert kind.why_float(wrapped, nn.Module()) == "Experts has a forward of its own"
    reasons = {name: layer.reason for name, layer in convert(nn.ModuleList([deaf])).torchq_plan.layers.items()}
    assert reasons["0.0.down_proj"] == "its weight has NaN or infinity"
    assert reasons["0.1.down_proj"] == "no calibration data"


# ---- transformers ----

transformers = pytest.importorskip("transformers")
COMMON = {
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
}
MODELS = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2, "head_dim": 16},
    "GptOss": {"num_local_experts": 4, "head_dim": 16},
}


def language_model(name):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**COMMON, **MODELS[name])
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1 if parameter.shape[0] == 100 else parameter.shape[-1] ** -0.5)
    return model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("calibrated", [False, True])
@torch.no_grad()
def test_language_models_of_transformers(name, calibrated):
    model, ids = language_model(name), [torch.arange(96).reshape(4, 24) + shift for shift in range(4)]
    qmodel = convert(model, ids if calibrated else None)

    kinds = [type(module).__name__ for module in qmodel.modules()]
    assert "QuantizedExperts" in kinds
    assert f"{name}Experts" not in kinds
    assert report(qmodel).model.int8_weights / report(qmodel).model.weights > 0.99
    assert sqnr_db(model(ids[0]).logits, qmodel(ids[0]).logits) > 30
    with simulate():
        assert torch.isfinite(qmodel(ids[0]).logits).all()
    out = qmodel.generate(ids[0], max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert out.shape == (4, 26)


@pytest.mark.parametrize("way", ["eager", "grouped_mm", "batched_mm"])
@torch.no_grad()
def test_all_ways_of_transformers_are_proven(way):
    model = language_model("Mixtral")
    model.set_experts_implementation(way)

    assert convert(model).torchq_plan.layers["model.layers.0.mlp.experts.0.down_proj"].is_int8
