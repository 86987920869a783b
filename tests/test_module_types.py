"""A new module type is one class and one entry of the registry.

The two types here are calibrated, converted, reported and saved, although nothing else in torchq knows them.
"""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

from helpers.numbers import normal
from torchq import QConfig, QuantizedLinear, apply_plan, convert, plan_of, prepare_qat, profile_layers, report, simulate
from torchq.calibration.calibrate import calibrate
from torchq.modules import registry
from torchq.modules.base import Int8Module, Matrix, ModuleType
from torchq.modules.registry import find_layers
from torchq.numerics.metrics import sqnr_db
from torchq.planning.plan import Plan


class Transposed(nn.Module):
    """A Linear that stores its weight as (in, out), like the Conv1D of GPT-2."""

    def __init__(self, k, n):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(k, n) / k**0.5)
        self.offset = nn.Parameter(torch.randn(n))

    def forward(self, hidden):
        return hidden @ self.kernel + self.offset


class TransposedType(ModuleType):
    name = "Transposed"

    def matches(self, module):
        return isinstance(module, Transposed)

    def matrices(self, module):
        return {"": Matrix(module.kernel.T, module.offset)}

    def inputs(self, module, args, kwargs):
        return {"": args[0] if args else kwargs.get("hidden")}

    def become(self, module, parts):
        return parts[""]


class Gated(nn.Module):
    """Two matrices in one parameter (2, out, in), read by one input: `gate(x) * up(x)`."""

    def __init__(self, k, n):
        super().__init__()
        self.stacked = nn.Parameter(torch.randn(2, n, k) / k**0.5)

    def forward(self, x):
        return (x @ self.stacked[0].T).sigmoid() * (x @ self.stacked[1].T)


class Int8Gated(Int8Module):
    def __init__(self, gate, up):
        super().__init__()
        self.gate, self.up = gate, up

    @property
    def float_bytes(self) -> int:
        return sum(getattr(part, "float_bytes", 0) for part in (self.gate, self.up))

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x).sigmoid() * self.up(x)


class GatedType(ModuleType):
    name = "Gated"

    def matches(self, module):
        return isinstance(module, Gated)

    def matrices(self, module):
        return {"gate": Matrix(module.stacked[0], None), "up": Matrix(module.stacked[1], None)}

    def inputs(self, module, args, kwargs):
        return {"gate": args[0], "up": args[0]}

    def become(self, module, parts):
        return Int8Gated(parts["gate"], parts["up"])


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setattr(registry, "TYPES", [*registry.TYPES, TransposedType(), GatedType()])
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def network(*middle):
    return nn.Sequential(nn.Linear(16, 32), *middle, nn.Linear(32, 8)).eval()


DATA = [normal(200, 16, seed=i) for i in range(3)]
X = normal(50, 16, seed=9)
CONFIGS = [QConfig(), QConfig(activation="static", observer="minmax"), QConfig(activation="dynamic", rounding="gptq")]


@pytest.mark.parametrize("config", CONFIGS, ids=["auto", "static", "gptq"])
@pytest.mark.parametrize("inplace", [False, True])
def test_a_transposed_layer_is_converted_as_a_linear_is(config, inplace):
    """It computes the same function as a model of nn.Linear, so plan, weights and outputs are the same, bit for bit."""
    model = network(nn.ReLU(), Transposed(32, 32), nn.ReLU())
    twin = copy.deepcopy(model)
    twin[2] = nn.Linear(32, 32)
    twin[2].weight.copy_(model[2].kernel.T), twin[2].bias.copy_(model[2].offset)
    exact = model(X)
    qmodel, expected = convert(model, DATA, config=config, inplace=inplace), convert(twin, DATA, config=config)
    assert isinstance(qmodel[2], QuantizedLinear)
    assert qmodel.torchq_plan.layers == expected.torchq_plan.layers
    assert torch.equal(qmodel(X), expected(X))
    assert sqnr_db(exact, qmodel(X)) > 30
    with simulate():
        assert torch.allclose(qmodel(X), expected(X), atol=1e-5)
    assert report(qmodel).to_dict() == report(expected).to_dict()
    assert str(report(qmodel)) == str(report(expected))


def test_its_calibrated_input_may_come_by_keyword():
    model = Transposed(16, 8).eval()
    evidence = calibrate(model, DATA, find_layers(model), QConfig(), forward=lambda model, x: model(hidden=x))
    assert evidence.records[""].calls == 3


def test_a_transposed_layer_is_smoothed():
    """By scales of its own; neither the norm before it nor its parameters change."""
    model = nn.Sequential(nn.LayerNorm(16), Transposed(16, 32), nn.ReLU(), Transposed(32, 8)).eval()
    model[0].weight[[1, 5]] *= 50
    model[1].kernel[[1, 5]] /= 50
    model[1].kernel[:, [3, 4]] *= 50
    model[1].offset[[3, 4]] *= 50
    model[3].kernel[[3, 4]] /= 50
    exact, kernel = model(X), model[1].kernel.clone()
    qmodel = convert(model, DATA)
    assert all(layer.channel_scale for layer in qmodel.torchq_plan.layers.values())
    assert torch.equal(qmodel[0].weight, model[0].weight)
    assert sqnr_db(exact, qmodel(X)) > 30
    assert torch.equal(model[1].kernel, kernel)
    assert torch.equal(convert(model, DATA, inplace=True)(X), qmodel(X))


@pytest.mark.parametrize("middle", [Transposed, Gated])
def test_it_is_saved_and_loaded(middle):
    qmodel, file = convert(network(middle(32, 32)), DATA), io.BytesIO()
    torch.save(qmodel.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(qmodel)
    state = {key: tensor.clone() for key, tensor in qmodel.state_dict().items()}
    for key in state:
        state[key] = torch.zeros_like(state[key]) if key.endswith("weight_int8") else state[key]
    other.load_state_dict(state)
    assert not torch.equal(other(X), qmodel(X))
    other.load_state_dict(torch.load(file, weights_only=True))
    for again in (other, pickle.loads(pickle.dumps(qmodel)), copy.deepcopy(qmodel)):
        assert torch.equal(again(X), qmodel(X))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("config", CONFIGS, ids=["auto", "static", "gptq"])
def test_a_module_of_two_matrices_has_two_layers(config, inplace):
    model = network(Gated(32, 32))
    exact = model(X)
    qmodel = convert(model, DATA, config=config, inplace=inplace)
    plan = qmodel.torchq_plan
    assert list(plan.layers) == ["0", "1.gate", "1.up", "2"]
    assert isinstance(qmodel[1], Int8Gated)
    assert plan.layers["1.gate"].sqnr_db
    assert sqnr_db(exact, qmodel(X)) > 28
    result = report(qmodel, profile=profile_layers(qmodel, rounds=1))
    assert [layer.bytes_before for layer in result.layers[1:3]] == [4 * 32 * 32] * 2
    assert all(layer.int8_seconds is not None for layer in result.layers)
    assert Plan.from_dict(plan.to_dict()) == plan
    if not inplace:
        assert torch.equal(apply_plan(model, plan_of(qmodel))(X), qmodel(X))


def test_one_of_two_matrices_may_stay_in_float():
    model = network(Gated(32, 32))
    qmodel = convert(model, DATA, config=QConfig(exclude=("1.up",)))
    assert qmodel.torchq_plan.layers["1.up"].reason == "excluded by '1.up'"
    assert (type(qmodel[1].gate), type(qmodel[1].up)) == (QuantizedLinear, nn.Linear)
    assert sqnr_db(model(X), qmodel(X)) > 28
    whole = convert(model, DATA, config=QConfig(exclude=("1",)))
    assert isinstance(whole[1], Gated)
    assert [layer.kind for layer in report(whole).layers][1:3] == ["float", "float"]


def test_a_type_without_a_training_form_stays_float_in_training():
    model = prepare_qat(network(Transposed(32, 32)), DATA)
    assert model.torchq_plan.layers["1"].reason == "Transposed has no training form"
    assert isinstance(model[1], Transposed)
    with pytest.raises(TypeError, match="Transposed has no training form"):
        TransposedType().prepare(model[1], "", None, per_channel=True)


def test_messages_name_all_types():
    with pytest.raises(ValueError, match=r"the model has no nn.Linear, .*nn.GRUCell, .*Transposed, Gated to convert"):
        convert(nn.ReLU())
