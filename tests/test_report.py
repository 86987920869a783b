"""report(): the exact table and numbers of a small model."""

import copy
import dataclasses
import json
import pickle

import pytest
import torch
from torch import nn

from helpers.numbers import normal
from torchq import QConfig, convert, kernels, profile_layers, report, watch_drift
from torchq.reporting.report import LayerReport

X = normal(16, 64)

# The bytes of a packed weight: a header of 64; for each panel of 16 columns, 192 and 16 per k, with k rounded up to a
# multiple of 8; 16 for each k from there to a multiple of 64; and 1 for each column missing in the last panel.
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


@pytest.mark.filterwarnings("ignore:torchq.convert. nothing became int8")
def test_float_layers_have_their_reason_and_no_error():
    qmodel = convert(model(), [X], config=QConfig(exclude=("2",)))
    assert report(qmodel).layers[1] == LayerReport("2", "float", None, 1280, 1280, None, "excluded by '2'")
    below = report(convert(model(), [X], config=QConfig(min_sqnr_db=90))).layers[1]
    assert (below.kind, below.kernel, below.bytes_after, below.sqnr_db) == ("float", None, 1280, None)
    assert below.reason.endswith("below min_sqnr_db = 90")


def test_the_table():
    qmodel = convert(model(), config=QConfig(exclude=("2",)))
    whole, left, empty, head, line, hidden, excluded, total, meanings, *words = str(report(qmodel)).splitlines()
    assert whole == (
        f"whole model: 9.4 KiB -> 3.7 KiB ({9600 / (2496 + 1280):.2f}x smaller), "
        f"{2048 / (2048 + 320):.1%} of the weights of matrix products in int8"
    )
    assert (left, empty) == ("left in float: 1.2 KiB in 1 Linear", "")
    assert head.split() == ["layer", "scheme", "before", "after", "output"]
    assert line == "-" * len(head)
    assert [cell.strip() for cell in hidden.split("  ") if cell.strip()] == ["0", "dynamic", "8.1 KiB", "2.4 KiB", "-"]
    assert [cell.strip() for cell in excluded.split("  ") if cell.strip()] == ["2", "float", "1.2 KiB", "1.2 KiB", "-"]
    for title in ("scheme", "before", "after", "output"):  # columns start below their titles
        assert {row[head.index(title) - 1] for row in (head, hidden, excluded)} == {" "}
    ratio = f"{9600 / (2496 + 1280):.2f}"
    assert total == f"these layers: 9.4 KiB -> 3.7 KiB ({ratio}x smaller), kernel {kernels.active()}"
    assert meanings == "weight, input, output: SQNR in dB."
    assert words == ["no calibration data: 0", "left in float, excluded by '2': 2"]


def test_the_table_of_measured_and_of_large_layers():
    qmodel = convert(nn.Linear(1024, 1024), [normal(16, 1024)])
    result = report(qmodel)
    whole, _, _, _, row, total, *_, last = str(result).splitlines()
    assert "smaller), 100.0% of the weights of matrix products in int8, output SQNR " in whole
    layer = result.layers[0]
    numbers = f"{layer.weight_db:.1f}    {layer.input_db:.1f}   {layer.sqnr_db:.1f}    0.00%  "
    assert row.startswith("(root)  ")
    assert f"  4.00 MiB  1.01 MiB  {numbers}" in row
    assert f"{layer.static_db:.1f}    {layer.dynamic_db:.1f}" in row
    assert total.startswith("these layers: 4.00 MiB -> 1.01 MiB (3.96x smaller), kernel ")
    assert last.startswith("rounded to nearest, no gptq: 8 calibration rows")


class Deep(nn.Module):
    """Attention-like layers with long names, one after the other."""

    def __init__(self):
        super().__init__()
        self.encoder_with_a_long_name = nn.ModuleDict(
            {
                f"layer_{i}": nn.ModuleDict({"self_attention_projection": nn.Linear(64, 64), "norm": nn.LayerNorm(64)})
                for i in range(3)
            }
        )

    def forward(self, x):
        for layer in self.encoder_with_a_long_name.values():
            x = layer["norm"](x + layer["self_attention_projection"](x))
        return x


def test_a_line_fits_a_terminal():
    """Lines have at most 120 columns. Long names lose their beginning in the table, but not in the data."""
    torch.manual_seed(0)
    qmodel = convert(Deep(), [torch.randn(400, 64)], config=QConfig(rounding="gptq"))
    with watch_drift(qmodel) as drift:
        qmodel(torch.randn(4, 64))
    for result in (report(qmodel), report(qmodel, profile=profile_layers(qmodel, rounds=1), drift=drift)):
        lines = str(result).splitlines()
        assert max(map(len, lines)) <= 120
        start = lines.index("") + 3  # below the whole model, the titles and a rule
        assert [line.split()[0][-26:] for line in lines[start : start + 3]] == [
            name[-26:] for name in qmodel.torchq_plan.layers
        ] or lines[start].startswith("...")
        assert result.layers[0].name == "encoder_with_a_long_name.layer_0.self_attention_projection"


def test_what_gptq_gained_is_shown_in_brackets_where_it_was_not_taken():
    torch.manual_seed(0)
    qmodel = convert(nn.Linear(64, 32), [torch.randn(4000, 64)])
    layer = report(qmodel).layers[0]
    assert layer.rounding == "nearest"
    assert f"({layer.gptq_db:+.1f})" in str(report(qmodel))


def test_each_reason_is_said_once():
    qmodel = convert(nn.Sequential(*[nn.Linear(8, 8) for _ in range(9)]), config=QConfig(exclude=("[0-7]",)))
    assert str(report(qmodel)).splitlines()[-2:] == [
        "left in float, excluded by '[0-7]': 0, 1, 2, 3, 4, 5 and 2 more",
        "no calibration data: 8",
    ]


@pytest.mark.parametrize("data", [None, [X]], ids=["without data", "calibrated"])
def test_to_dict_is_json(data):
    result = report(convert(model(), data))
    tree = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert tree == result.to_dict()
    assert (tree["bytes_before"], tree["bytes_after"]) == (9600, 3782)
    assert tree["layers"] == [json.loads(json.dumps(dataclasses.asdict(layer))) for layer in result.layers]


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
