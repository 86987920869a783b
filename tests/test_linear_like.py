"""Modules that compute as nn.Linear does are converted as one, and look like themselves to other code."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from helpers.covers import pairs_of
from helpers.linear_like import Conv1D, FalconLinear, twin_of
from helpers.numbers import normal
from torchq import (
    QConfig,
    QuantizedLinear,
    apply_plan,
    convert,
    freeze_ranges,
    plan_of,
    prepare_qat,
    profile_layers,
    report,
    simulate,
)
from torchq.modules.float_view import FloatView
from torchq.modules.qat_linear import QATLinearLike
from torchq.numerics.metrics import sqnr_db

pytestmark = pytest.mark.usefixtures("seeded")

DATA = [normal(200, 32, seed=i) for i in range(4)]
X = normal(50, 32, seed=9)
CONFIGS = {
    "auto": QConfig(),
    "static": QConfig(activation="static", observer="minmax"),
    "gptq": QConfig(activation="dynamic", rounding="gptq"),
}
MAKERS = {"Conv1D": lambda: Conv1D(48, 32), "FalconLinear": lambda: FalconLinear(32, 48)}


def network(middle):
    return nn.Sequential(nn.Linear(32, 32), nn.GELU(), middle, nn.ReLU(), nn.Linear(48, 8)).eval()


@pytest.mark.parametrize(("choice", "kind", "inplace"), pairs_of(CONFIGS, MAKERS, [False, True]))
def test_it_is_converted_as_its_twin(choice, kind, inplace):
    """Plans, weights, outputs and gradients are those of a model of nn.Linear."""
    model, config = network(MAKERS[kind]()), CONFIGS[choice]
    twin = copy.deepcopy(model)
    twin[2] = twin_of(model[2])
    exact = model(X)
    qmodel, expected = convert(model, DATA, config=config, inplace=inplace), convert(twin, DATA, config=config)
    assert isinstance(qmodel[2], QuantizedLinear)
    assert qmodel.torchq_plan.layers == expected.torchq_plan.layers
    assert torch.equal(qmodel(X), expected(X))
    assert sqnr_db(exact, qmodel(X)) > 30
    assert str(report(qmodel)) == str(report(expected))
    with simulate():
        assert torch.allclose(qmodel(X), expected(X), atol=1e-5)  # float sums in another order
    with torch.enable_grad():
        gradients = [
            torch.autograd.grad(m(x := X.clone().requires_grad_()).square().sum(), x)[0] for m in (qmodel, expected)
        ]
    assert torch.equal(*gradients)
    if not inplace:
        assert torch.equal(apply_plan(model, plan_of(qmodel))(X), qmodel(X))


def test_its_time_is_measured():
    model = network(Conv1D(48, 32))
    times = profile_layers(convert(model, DATA), rounds=1)
    assert set(times) == {"0", "2", "4"}
    assert times["2"].float_seconds > 0


def test_channels_of_its_input_are_scaled():
    model = nn.Sequential(nn.LayerNorm(32), Conv1D(48, 32)).eval()
    model[0].weight[[1, 5]] *= 50
    model[1].weight[[1, 5]] /= 50
    qmodel = convert(model, DATA)
    assert qmodel.torchq_plan.layers["1"].channel_scale
    assert sqnr_db(model(X), qmodel(X)) > 30
    assert sqnr_db(model[1].weight, qmodel[1].weight) > 30


# ---- What it presents to foreign code -----------------------------------------------------------------------------


def test_a_converted_conv1d_looks_like_one():
    module = Conv1D(48, 32)
    layer = convert(module)
    assert (layer.nf, layer.nx) == (48, 32)
    for again in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer).float()):
        assert isinstance(again.weight, FloatView)
        assert again.weight.shape == (32, 48)
        assert sqnr_db(module.weight, again.weight) > 40
        assert torch.equal(again.bias, module.bias)
        assert (again.nf, again.nx) == (48, 32)
        assert torch.allclose(X @ again.weight + again.bias, again(X), atol=0.1)
    assert layer.weight_int8.shape == (48, 32)
    assert layer.half().weight.dtype == torch.float16
    with pytest.raises(RuntimeError, match="can't be written"):
        layer.weight.mul_(2)


def test_a_converted_subclass_keeps_its_attributes():
    model = FalconLinear(32, 48)
    model.is_scaled_at_init, model.tag, model.other = True, "up", [1]
    layer = convert(model)
    assert (layer.is_scaled_at_init, layer.tag, layer.in_features) == (True, "up", 32)
    assert not hasattr(layer, "other")
    assert layer.weight.shape == (48, 32)


def test_it_is_saved_and_loaded():
    config = QConfig(activation="static", observer="minmax", rounding="nearest")
    qmodel = convert(network(Conv1D(48, 32)), DATA, config=config)
    assert {key for key in qmodel.state_dict() if key.startswith("2.")} >= {"2.weight_int8", "2.weight_scale", "2.bias"}
    other = apply_plan(network(Conv1D(48, 32)), qmodel.torchq_plan)
    assert not torch.equal(other(X), qmodel(X))
    file = io.BytesIO()
    torch.save(qmodel.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for again in (other, pickle.loads(pickle.dumps(qmodel)), copy.deepcopy(qmodel)):
        assert torch.equal(again(X), qmodel(X))


def test_it_is_compiled_and_exported():
    qmodel = convert(network(Conv1D(48, 32)))
    expected = qmodel(X)
    assert torch.equal(torch.compile(qmodel, backend="aot_eager", fullgraph=True)(X), expected)
    assert torch.equal(torch.export.export(qmodel, (X,)).module()(X), expected)
    reads = torch.compile(lambda x: x @ qmodel[2].weight, backend="aot_eager", fullgraph=True)
    assert torch.equal(reads(X), X @ qmodel[2].weight)


# ---- Training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("data", [None, DATA], ids=["without data", "calibrated"])
def test_it_is_trained_as_its_twin(make, data):
    model = network(make())
    twin = copy.deepcopy(model)
    twin[2] = twin_of(model[2])
    models = [prepare_qat(model, data), prepare_qat(twin, data)]
    with torch.enable_grad():
        for each in models:
            optimizer = torch.optim.SGD(each.parameters(), lr=0.01)
            for x in DATA[:2]:
                each.train()(x).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
    prepared, expected = models
    assert torch.allclose(prepared(X), expected(X), atol=1e-5)
    freeze_ranges(prepared)
    with simulate():
        trained = prepared.eval()(X)
        assert torch.allclose(convert(prepared)(X), trained, atol=1e-5)
    assert sqnr_db(convert(expected.eval())(X), convert(prepared)(X)) > 60


def test_its_training_form_is_released():
    model = prepare_qat(nn.Sequential(nn.Linear(32, 32), Conv1D(48, 32), FalconLinear(48, 48)))
    assert isinstance(model[1], QATLinearLike)
    assert "in_features=32, out_features=48" in repr(model[1])
    weight = model[1].weight
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(X), model(X))
    released = convert(model.eval(), config=QConfig(exclude=("1", "2")), inplace=True)
    assert (type(released[1]), type(released[2])) == (Conv1D, FalconLinear)
    assert released[1].weight is weight
    assert sorted(vars(released[1])) == sorted(vars(Conv1D(48, 32)))
    assert sorted(vars(released[2])) == sorted(vars(FalconLinear(48, 48)))
    converted = convert(prepare_qat(nn.Sequential(Conv1D(48, 32))).eval().requires_grad_(False))
    assert not hasattr(converted[0], "per_channel")


# ---- transformers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [None, 4], ids=["without data", "calibrated"])
def test_gpt2_and_falcon(data):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_positions=64, **sizes, **tokens))
    falcon = transformers.FalconForCausalLM(transformers.FalconConfig(**sizes, **tokens))
    for model in (gpt2.eval(), falcon.eval()):
        for parameter in model.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.125)
        batches = data and [{"input_ids": torch.randint(99, (4, 16))} for _ in range(data)]
        qmodel = convert(model, batches, progress=False)
        blocks = [row for name, row in qmodel.torchq_plan.layers.items() if name != "lm_head"]
        assert len(blocks) == 8
        assert all(row.is_int8 for row in blocks)
        ids = torch.randint(99, (2, 12))
        assert sqnr_db(model(ids).logits, qmodel(ids).logits) > 30
        assert qmodel.generate(ids, max_new_tokens=4, do_sample=False).shape == (2, 16)
    assert report(qmodel).model.int8_weights == report(qmodel).model.weights
