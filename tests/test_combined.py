"""Smoothing, rounding and training, together with stats and the accuracy budget."""

import dataclasses
import json
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from helpers.models import linears
from helpers.numbers import normal
from helpers.smoothable import smoothed
from torchq import QConfig, QuantizedLinear, convert, fake_quantize, prepare_qat, watch_drift
from torchq.modules.qat_linear import QATLinear
from torchq.numerics.metrics import sqnr_db
from torchq.planning.apply import apply_plan
from torchq.planning.plan import Plan

pytestmark = pytest.mark.usefixtures("seeded", "brief_times")

K = 32


DATA = [normal(64, K, seed=i) for i in range(3)]
X = normal(64, K, seed=9)
CONFIGS = {
    "dynamic": QConfig(activation="dynamic"),
    "static": QConfig(activation="static", observer="minmax"),
    "gptq": QConfig(activation="static", observer="minmax", rounding="gptq"),
}
by_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))


class Block(nn.Module):
    """A norm with 3 outlier channels and two readers, and a Linear with one reader."""

    def __init__(self):
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(K), nn.Linear(K, 24), nn.Linear(K, 24, bias=False)
        self.up, self.down = nn.Linear(24, K), nn.Linear(K, 8)
        self.norm.weight[[3, 7, 20]] *= 50
        self.a.weight[:, [3, 7, 20]] /= 50
        self.b.weight[:, [3, 7, 20]] /= 50
        self.up.weight[[1, 5]] *= 50
        self.up.bias[[1, 5]] *= 50
        self.down.weight[:, [1, 5]] /= 50
        self.eval()

    def forward(self, x):
        y = self.norm(x)
        return self.down(self.up(self.a(y) + self.b(y)))


def inputs(model):
    """What each layer gets, over all of DATA, by name."""
    seen = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0]))
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, QuantizedLinear))
    ]
    for x in DATA:
        model(x)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(rows) for name, rows in seen.items()}


@by_config
def test_stats_are_those_of_the_smoothed_and_rounded_layer(config):
    """Compares with stats computed from the float model, the layer's own scales, and its codes."""
    model = Block()
    qmodel = convert(model, DATA, config=config)
    plan = qmodel.torchq_plan
    assert set(smoothed(qmodel)) >= {"a", "b", "down"}
    rows = inputs(model)
    for name in linears(model):
        linear, layer, stats = model.get_submodule(name), qmodel.get_submodule(name), plan.layers[name].stats
        scale = torch.ones(linear.in_features) if layer.channel_scale is None else layer.channel_scale
        codes = layer.weight_int8.float() * layer.weight_scale[:, None]
        assert stats.weight_db == pytest.approx(sqnr_db(linear.weight / scale, codes), abs=1e-3)
        assert stats.rows == 64
        if layer.input_qparams is not None:
            seen = fake_quantize(rows[name] * scale, *layer.input_qparams, dtype=torch.uint8)
            assert stats.input_db == pytest.approx(sqnr_db(rows[name] * scale, seen), abs=1e-2)
        assert stats.input_db > 35
        assert stats.clipped == 0
    with watch_drift(qmodel) as drift:
        for x in DATA:
            qmodel(x)
    assert drift.recalibrate == ()


def test_rounding_shows_in_the_stats():
    """GPTQ lowers the weight SQNR to raise the output SQNR."""
    nearest, gptq = (
        convert(Block(), DATA, config=dataclasses.replace(CONFIGS["gptq"], rounding=name)).torchq_plan.layers["up"]
        for name in ("nearest", "gptq")
    )
    assert (nearest.rounding, gptq.rounding) == ("nearest", "gptq")
    assert gptq.stats.weight_db < nearest.stats.weight_db - 0.01


@pytest.mark.parametrize(
    ("choice", "floats"),
    [*(("gptq", floats) for floats in range(5)), ("dynamic", 1), ("dynamic", 4), ("static", 0), ("static", 3)],
)
def test_a_budget_keeps_smoothings_and_rounded_weights(choice, floats):
    model, config = Block(), CONFIGS[choice]
    exact, tried = model(X).clone(), []

    def evaluate(candidate):
        tried.append(sqnr_db(exact, candidate(X)))
        return min(len(linears(candidate)), floats)

    with pytest.warns(UserWarning, match="no model") if floats == 4 else nullcontext():
        qmodel = convert(model, DATA, config=config, evaluate=evaluate, max_drop=0.5)
    plan = qmodel.torchq_plan
    assert len(linears(qmodel)) == floats
    assert min(tried) > 25  # a channel_scale on only one of the two sides would give far less
    assert sqnr_db(exact, qmodel(X)) in tried  # what is returned was measured
    assert [name for name, layer in plan.layers.items() if layer.channel_scale] == smoothed(qmodel)
    assert not any(layer.channel_scale for layer in plan.layers.values() if not layer.is_int8)
    assert all((layer.stats is None) == (layer.kind == "float") for layer in plan.layers.values())
    restored = Plan.from_dict(json.loads(json.dumps(plan.to_dict(), allow_nan=False)))
    assert restored == plan
    assert plan.frontier is not None
    if config.rounding == "nearest":
        assert torch.equal(apply_plan(model, restored)(X), qmodel(X))


def test_inplace_with_everything():
    model = Block()
    exact = model(X).clone()
    config = CONFIGS["gptq"]
    two = {"evaluate": lambda candidate: min(len(linears(candidate)), 2), "max_drop": 0.5}
    copied = convert(model, DATA, config=config, **two)
    inplace = convert(model, DATA, config=config, inplace=True, **two)
    assert inplace is model
    assert sorted(linears(inplace)) == sorted(linears(copied))
    assert sqnr_db(exact, inplace(X)) > 25
    assert torch.equal(inplace(X), copied(X))


@pytest.mark.parametrize("floats", [0, 1, 3])
def test_a_trained_model_has_stats_and_a_budget(floats):
    """The float model has the trained weights without any quantization, and so do layers returned to float."""
    float_model = nn.Sequential(nn.Linear(K, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 8)).eval()
    trained = prepare_qat(float_model, DATA, config=QConfig(smoothing="none")).eval()
    exact, seen = float_model(X), []

    def evaluate(candidate):
        seen.append(candidate(X))
        assert not any(isinstance(module, QATLinear) for module in candidate.modules())
        return min(len(linears(candidate)), floats)

    with pytest.warns(UserWarning, match="no model") if floats == 3 else nullcontext():
        qmodel = convert(trained, DATA, evaluate=evaluate, max_drop=0.5)
    assert torch.equal(seen[0], exact)
    assert len(linears(qmodel)) == floats
    assert sum(isinstance(module, QATLinear) for module in trained.modules()) == 3
    for layer in convert(trained, DATA).torchq_plan.layers.values():
        assert layer.stats.weight_db > 35
        assert layer.stats.rows == 64
    for layer in convert(trained).torchq_plan.layers.values():
        assert layer.stats is None
