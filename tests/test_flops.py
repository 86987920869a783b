"""FlopCounterMode counts for int8 models what it counts for the float ones."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from helpers.numbers import normal
from torchq import QConfig, convert
from torchq.numerics.recurrent import Cell
from torchq.ops import flops

pytestmark = pytest.mark.usefixtures("no_grad")
MODELS = {
    "linear": (nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 8)), (5, 32), 2 * 5 * 48 * 40),
    "conv": (nn.Sequential(nn.Conv2d(4, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4)), (2, 4, 11, 9), None),
    "depthwise": (nn.Sequential(nn.Conv1d(16, 16, 5, padding=2, groups=16), nn.Conv1d(16, 24, 1)), (2, 16, 9), None),
    "encoder": (nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), (2, 7, 32), None),
}


def counted(model, *args):
    with FlopCounterMode(display=False) as counter:
        model(*args)
    return counter.get_total_flops()


@pytest.mark.parametrize("activation", ["dynamic", "static"])
@pytest.mark.parametrize("name", MODELS)
def test_int8_counts_as_float(name, activation):
    model, shape, exact = MODELS[name]
    model, x = model.eval(), normal(*shape)
    with torch.enable_grad():  # torch's own fused encoder counts as nothing
        expected = counted(model.requires_grad_(), x)
    qmodel = convert(model, [normal(64, *shape[1:])], config=QConfig(activation=activation), progress=False)
    attention = 2 * (2 * 4 * 7) * 7 * (8 + 8) if name == "encoder" else 0  # torch counts that of the CPU as nothing
    assert counted(qmodel, x) == expected + attention
    assert exact in (None, expected)


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_recurrent_layers(kind, gates):
    """Torch counts those of float as nothing."""
    layer = nn.Sequential(kind(16, 24, 2, bidirectional=True, batch_first=True))
    rows, first, second = 3 * 5, 16 + 24, 48 + 24
    qmodel = convert(layer.eval())
    assert counted(qmodel, normal(3, 5, 16)) == 2 * rows * gates * 24 * 2 * (first + second)


def test_projections():
    """(rows, 4 H) by h (P), and (rows, H) to P."""
    assert flops.recurrent_flops(Cell.LSTM, [(10, 4 * 6)], [None], [None], (1, 2, 3)) == 2 * 10 * (4 * 6 * 3 + 6 * 3)


@pytest.mark.subprocess
@pytest.mark.parametrize("order", ["torchq, torch.utils.flop_counter", "torch.utils.flop_counter, torchq"])
def test_whichever_is_imported_first(order):
    code = f"""import sys, torch, {order}
    from torch.utils.flop_counter import flop_registry
    assert torch.ops.torchq.linear_static in flop_registry
    assert not any(type(finder).__name__ == "_WhenImported" for finder in sys.meta_path)"""
    subprocess.run([sys.executable, "-c", code.replace("    ", "")], check=True)


@pytest.mark.subprocess
def test_torchq_does_not_import_it():
    subprocess.run(
        [sys.executable, "-c", "import sys, torchq; assert 'torch.utils.flop_counter' not in sys.modules"], check=True
    )
