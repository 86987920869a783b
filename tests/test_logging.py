"""The `torchq` logger: silent until asked for, and then what convert decided."""

import logging

import pytest
from torch import nn

from helpers.commands import run_code
from helpers.numbers import normal
from torchq import QConfig, convert

MODEL = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def test_convert_logs_a_summary_and_each_layer(caplog):
    with caplog.at_level(logging.DEBUG, logger="torchq"):
        qmodel = convert(
            MODEL, [normal(80, 64)], config=QConfig(exclude=("2",), activation="static", observer="minmax")
        )
    plan = qmodel.torchq_plan
    summary, first, second = caplog.records
    assert {record.name for record in caplog.records} == {"torchq.convert"}
    assert (summary.levelname, first.levelname, second.levelname) == ("INFO", "DEBUG", "DEBUG")
    assert summary.message == (
        f"Int8Sequential: 1 of 2 layers in int8 (1 int8 static, 1 float); output SQNR {plan.checked.model_db:.1f} dB"
    )
    layer = plan.layers["0"]
    extra = ", smoothed" * (layer.channel_scale is not None) + ", rounded by GPTQ" * (layer.rounding == "gptq")
    assert first.message == f"layer 0: int8 static{extra}, {layer.measured_db:.1f} dB: {layer.reason}"
    assert second.message == "layer 2: float: excluded by '2'"


def test_tables_and_attention_are_logged(caplog):
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(4000, 64)
            self.attention = nn.MultiheadAttention(64, 2, batch_first=True)

        def forward(self, ids):
            x = self.table(ids)
            return self.attention(x, x, x)[0]

    with caplog.at_level(logging.DEBUG, logger="torchq.convert"):
        convert(Attending().eval())
    assert "1 of 1 tables in int8; attention in " in caplog.records[0].message
    assert [record.message.split(":")[0] for record in caplog.records[-2:]] == ["attention attention", "table table"]


def test_at_info_there_is_one_line(caplog):
    with caplog.at_level(logging.INFO, logger="torchq"):
        convert(MODEL)
    assert len(caplog.records) == 1


@pytest.mark.subprocess
def test_nothing_is_printed_unless_asked_for():
    """Not even a warning by Python's handler of last resort."""
    code = "import logging, torchq; logging.getLogger('torchq.convert').warning('heard'); print(logging.root.handlers)"
    assert run_code(code) == (0, "[]\n", "")
