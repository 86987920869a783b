"""convert() and prepare_qat() under autocast: the model's calls are under it, and what torchq computes is not."""

import pytest
import torch
from torch import nn

import torchq
from helpers.numbers import normal
from torchq import QConfig

X = normal(256, 64)
X[:, 3] *= 30  # something to smooth
BATCHES = X.split(64)


@pytest.fixture
def model(seeded):
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.GELU(), nn.Linear(96, 32)).eval()


def in_16_bits(model, batch):
    with torch.autocast("cpu", torch.bfloat16):
        return model(batch)


def same(model, other):
    state, others = model.state_dict(), other.state_dict()
    assert state.keys() == others.keys()
    return all(torch.equal(value, others[key]) for key, value in state.items())


CONFIGS = {"auto": QConfig(), "static, gptq": QConfig(activation="static", rounding="gptq"), "no data": None}


@pytest.mark.parametrize("config", CONFIGS)
def test_convert_is_what_it_is_with_autocast_in_each_call_alone(model, config):
    data = None if config == "no data" else BATCHES
    expected = torchq.convert(model, data, config=CONFIGS[config], forward=in_16_bits)
    with torch.autocast("cpu", torch.bfloat16):
        qmodel = torchq.convert(model, data, config=CONFIGS[config])
    assert qmodel.torchq_plan == expected.torchq_plan
    assert same(qmodel, expected)
    assert data is None or qmodel.torchq_plan.checked.output_db["as made"] > 30


def test_prepare_qat_is_too(model):
    expected = torchq.prepare_qat(model, BATCHES, forward=in_16_bits)
    with torch.autocast("cpu", torch.bfloat16):
        prepared = torchq.prepare_qat(model, BATCHES)
    assert any("channel_scale" in key for key in expected.state_dict())
    assert same(prepared, expected)


def test_a_metric_is_measured_under_it(model):
    dtypes = []

    def evaluate(tried):
        dtypes.append(tried(X).dtype)
        return 0.0

    with torch.autocast("cpu", torch.bfloat16):
        torchq.convert(model, BATCHES, evaluate=evaluate)
    assert set(dtypes) == {torch.bfloat16}
    dtypes.clear()
    torchq.convert(model, BATCHES, evaluate=evaluate)
    assert set(dtypes) == {torch.float32}
