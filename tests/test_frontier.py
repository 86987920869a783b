"""The frontier of an accuracy budget: its numbers, its table and its plot."""

import copy
import json
import sys

import pytest
import torch
from torch import nn

from helpers.numbers import normal
from torchq import convert, report
from torchq.modules.float_view import FloatView
from torchq.planning.frontier import Frontier, Step

DATA = [normal(8, 32, seed=i) for i in range(3)]


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)).eval()


def a_layer_in_float(candidate):
    """A metric that demands at least one of the layers in float."""
    return 1.0 if any(isinstance(module, nn.Linear) for module in candidate.modules()) else 0.5


def test_bytes_and_times_are_those_of_the_models():
    exact = model()
    qmodel = convert(exact, DATA, evaluate=a_layer_in_float)
    frontier = qmodel.torchq_plan.frontier
    assert [(step.returned, step.metric) for step in frontier.steps] == [(0, 0.5), (1, 1.0), (3, 1.0)]
    for step, converted in ((frontier.steps[frontier.chosen], qmodel), (frontier.steps[-1], exact)):
        held = [t for t in [*converted.parameters(), *converted.buffers()] if not isinstance(t, FloatView)]
        assert step.bytes == sum(t.numel() * t.element_size() for t in held)
    assert frontier.steps[-1].bytes == 4 * (32 * 32 + 32 + 32 * 32 + 32 + 32 * 8 + 8)
    assert [step.bytes for step in frontier.steps] == sorted(step.bytes for step in frontier.steps)
    assert all(step.seconds > 0 and step.speedup > 0 for step in frontier.steps)
    assert frontier.steps[-1].speedup == 1


def test_shared_weights_count_once():
    tied = model()
    tied[2].weight = tied[0].weight
    frontier = convert(tied, DATA, evaluate=lambda m: 1.0).torchq_plan.frontier
    assert frontier.steps[-1].bytes == 4 * (32 * 32 + 32 + 32 + 32 * 8 + 8)


FRONTIER = Frontier(
    0.01, {"a": 12.0, "b": 30.0}, (Step(0, 0.9, 1e-3, 3.0, 1024), Step(1, 0.97, 2e-3, 1.5, 2**20 * 3)), 1
)


def test_the_table():
    assert str(FRONTIER).splitlines() == [
        "in float  metric  drop  latency  speed-up  bytes",
        "-" * 48,
        "0 of 1    0.9     0.07  1.0 ms   3.00x     1.0 KiB",
        "1 of 1    0.97    0     2.0 ms   1.50x     3.00 MiB  <- taken",
        "2 evaluations; max_drop = 0.01",
    ]


def test_the_report_shows_the_frontier_and_its_dict_has_it():
    qmodel = convert(model(), DATA, evaluate=a_layer_in_float)
    result, frontier = report(qmodel), qmodel.torchq_plan.frontier
    assert str(result).endswith("\n\n" + str(frontier))
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["frontier"] == frontier.to_dict()
    assert report(convert(model(), DATA)).to_dict()["frontier"] is None


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_plot_is_an_image(tmp_path, ending):
    pytest.importorskip("matplotlib", reason="an extra")
    path = tmp_path / f"frontier.{ending}"
    report(convert(model(), DATA, evaluate=a_layer_in_float)).plot(path)
    assert path.read_bytes().startswith({"png": b"\x89PNG", "svg": b"<?xml"}[ending])


def test_a_plot_needs_a_frontier_and_matplotlib(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"^torchq.reporting.report.Report.plot: this model has no frontier"):
        report(convert(model(), DATA)).plot(tmp_path / "no.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install matplotlib"):
        FRONTIER.plot(tmp_path / "no.png")


def test_copies_of_the_model_keep_the_frontier():
    qmodel = convert(model(), DATA, evaluate=a_layer_in_float)
    assert copy.deepcopy(qmodel).torchq_plan == qmodel.torchq_plan
