"""A layer deeper than int32 sums are exact stays in float, and the rest of the model becomes int8."""

import pytest
import torch
from torch import nn

from torchq import QConfig, QuantizedLinear, convert, prepare_qat
from torchq.numerics.metrics import sqnr_db

pytestmark = pytest.mark.usefixtures("seeded")


class Deep(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.deep, self.head = layer, nn.Linear(16, 16)

    def forward(self, x):
        return self.head(self.deep(x))


@pytest.mark.parametrize("make", [convert, prepare_qat])
@pytest.mark.parametrize("calibrated", [False, True])
def test_a_layer_deeper_than_sums_are_exact_stays_in_float(make, calibrated):
    model, x = Deep(nn.Linear(65794, 16)).eval(), torch.randn(64, 65794)
    config = QConfig() if calibrated else QConfig(activation="dynamic")
    qmodel = make(model, [x] if calibrated else None, config=config).eval()
    plan = qmodel.torchq_plan.layers
    assert plan["deep"].reason == "in_features = 65794: int32 sums are exact up to 65793"
    assert plan["head"].is_int8
    assert type(qmodel.deep) is nn.Linear
    assert sqnr_db(model(x), qmodel(x)) > 30


def test_a_part_deeper_than_sums_are_exact_stays_in_float():
    model, x = Deep(nn.LSTMCell(65794, 16)).eval(), torch.randn(4, 65794)
    model.head = nn.Identity()
    qmodel = convert(model)
    reasons = [plan.reason for plan in qmodel.torchq_plan.layers.values()]
    assert sorted("sums are exact" in reason for reason in reasons) == [False, True]
    assert sqnr_db(model.deep(x)[0], qmodel.deep(x)[0]) > 30


def test_the_deepest_layer_is_int8():
    model, x = nn.Sequential(nn.Linear(65793, 16)).eval(), torch.randn(4, 65793)
    qmodel = convert(model)
    assert isinstance(qmodel[0], QuantizedLinear)
    assert sqnr_db(model(x), qmodel(x)) > 30
