"""report(): the table and the numbers, exact for a model known by heart."""

import copy
import json
import pickle

import pytest
import torch
from torch import nn

from torchq import QConfig, convert, kernels, report
from torchq.reporting.report import LayerReport

X = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))

# packed: a header of 64, per panel of 16 columns 192 and 16 for each k in groups of 8, behind the last one 16 for each
# k to a whole step of 64, and one byte for each column that is missing.
HIDDEN = {"before": 4 * (32 * 64 + 32), "after": 64 + 2 * (192 + 64 * 16)}
HEAD = {"before": 4 * (10 * 32), "after": 64 + 192 + 32 * 16 + 32 * 16 + 6}


def model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10, bias=False)).to(dtype).eval()


def test_the_bytes_of_a_known_model():
    result = report(convert(model()))
    assert [(layer.bytes_before, layer.bytes_after) for layer in result.layers] == [(8320, 2496), (1280, 1286)]
    assert [tuple(sizes.values()) for sizes in (HIDDEN, HEAD)] == [(8320, 2496), (1280, 1286)]
    assert (result.bytes_before, result.bytes_after) == (9600, 3782)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_counts_two_bytes(dtype):
    result = report(convert(model(dtype)))
    assert (result.bytes_before, result.bytes_after) == (4800, 3782)


@pytest.mark.parametrize("activation", ["auto", "static", "dynamic"])
def test_bytes_are_those_resident(activation):
    qmodel = convert(model(), [X], config=QConfig(activation=activation))
    resident = sum(tensor.untyped_storage().nbytes() for tensor in [*qmodel.buffers(), *qmodel.parameters()])
    assert report(qmodel).bytes_after == resident


def test_the_layers_say_what_the_plan_says():
    qmodel = convert(model(), [X], config=QConfig(activation="static"))
    for layer, (name, plan) in zip(report(qmodel).layers, qmodel.torchq_plan.layers.items(), strict=True):
        assert (layer.name, layer.kind, layer.reason) == (name, "int8 static", plan.reason)
        assert layer.sqnr_db == plan.sqnr_db[plan.observer]
        assert layer.kernel == kernels.active()


def test_float_layers_have_their_reason_and_no_error():
    qmodel = convert(model(), [X], config=QConfig(exclude=("2",)))
    assert report(qmodel).layers[1] == LayerReport("2", "float", None, 1280, 1280, None, "excluded by '2'")
    below = report(convert(model(), [X], config=QConfig(min_sqnr_db=90))).layers[1]
    assert (below.kind, below.kernel, below.bytes_after, below.sqnr_db) == ("float", None, 1280, None)
    assert below.reason.endswith("below min_sqnr_db = 90")


def test_the_table():
    qmodel = convert(model(), config=QConfig(exclude=("2",)))
    kernel = kernels.active()
    head, line, hidden, excluded, total = str(report(qmodel)).splitlines()
    assert head.split() == ["layer", "scheme", "kernel", "before", "after", "SQNR", "reason"]
    assert line == "-" * len(head)
    assert [cell.strip() for cell in hidden.split("  ") if cell.strip()] == [
        *("0", "int8 dynamic", kernel, "8.1 KiB", "2.4 KiB", "-", "no calibration data")
    ]
    assert [cell.strip() for cell in excluded.split("  ") if cell.strip()] == [
        *("2", "float", "-", "1.2 KiB", "1.2 KiB", "-", "excluded by '2'")
    ]
    for title in ("scheme", "kernel", "before", "after", "SQNR", "reason"):  # columns start below their titles
        assert {row[head.index(title) - 1] for row in (head, hidden, excluded)} == {" "}
    assert total == f"Linear layers: 9.4 KiB -> 3.7 KiB ({9600 / (2496 + 1280):.2f}x smaller)"


def test_the_table_of_measured_and_of_large_layers():
    qmodel = convert(nn.Linear(1024, 1024), [torch.randn(16, 1024, generator=torch.Generator().manual_seed(0))])
    result = report(qmodel)
    _, _, row, total = str(result).splitlines()
    assert row.startswith("(root)  int8 ")
    layer = result.layers[0]
    numbers = f"{layer.weight_db:.1f} dB  {layer.input_db:.1f} dB  {layer.sqnr_db:.1f} dB  0.00%    static "
    assert f"  4.00 MiB  1.01 MiB  {numbers}" in row
    assert total == "Linear layers: 4.00 MiB -> 1.01 MiB (3.96x smaller)"


@pytest.mark.parametrize("data", [None, [X]], ids=["without data", "calibrated"])
def test_to_dict_is_json(data):
    result = report(convert(model(), data))
    tree = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert tree == result.to_dict()
    assert (tree["bytes_before"], tree["bytes_after"]) == (9600, 3782)
    assert [LayerReport(**layer) for layer in tree["layers"]] == list(result.layers)


def test_the_kernel_is_the_active_one():
    qmodel = convert(model())
    with kernels.use("reference"):
        assert {layer.kernel for layer in report(qmodel).layers} == {"reference"}
    assert {layer.kernel for layer in report(qmodel).layers} == {kernels.active()}


def test_a_shared_layer_is_counted_once():
    shared = nn.Module()
    shared.a = shared.b = nn.Linear(64, 32)
    assert [(layer.name, layer.bytes_before) for layer in report(convert(shared)).layers] == [("a", 8320)]


def test_copies_can_report_too():
    qmodel = convert(model(), [X])
    for again in (copy.deepcopy(qmodel), pickle.loads(pickle.dumps(qmodel))):
        assert report(again) == report(qmodel)


def test_an_unconverted_model_is_refused():
    with pytest.raises(ValueError, match=r"^torchq.report: this Sequential has no torchq_plan. Pass the model that"):
        report(model())
