"""What stays in float, and what is said of it: small layers, nothing in int8, float64, and the report's whole model."""

import copy
import dataclasses
import json
import warnings

import pytest
import torch
from torch import nn

from helpers.numbers import normal
from torchq import Plan, QConfig, QuantizedLinear, convert, ops, prepare_qat, report
from torchq.modules.float_view import FloatView
from torchq.planning.budget import return_to_float
from torchq.reporting.whole import LeftInFloat, WholeModel

X = normal(64, 64)
FEW = "{}, fewer than a panel of 16: int8 would save nothing, {} bytes where float has {}"


def said(model, data=None, **kwargs):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        qmodel = convert(model, data, progress=False, **kwargs)
    assert all(warning.filename == __file__ for warning in caught)
    return qmodel, [str(warning.message) for warning in caught]


# ---- Small layers -------------------------------------------------------------------------------------------------


@pytest.mark.small_layers_stay_float
@pytest.mark.parametrize("data", [None, [X]], ids=["without data", "calibrated"])
@pytest.mark.parametrize(
    ("k", "n", "bias", "dtype", "reason"),
    [
        (64, 1, True, "float32", FEW.format("1 output", 1295, 260)),
        (64, 4, True, "float32", FEW.format("4 outputs", 1292, 1040)),
        (64, 5, True, "float32", None),
        (64, 10, False, "bfloat16", FEW.format("10 outputs", 1286, 1280)),
        (64, 10, True, "bfloat16", None),
        (8, 16, True, "float32", "int8 would save nothing, 1280 bytes where float has 576"),
        (256, 1, True, "float32", FEW.format("1 output", 4367, 1028)),
    ],
)
def test_a_layer_that_would_not_shrink_stays_in_float(k, n, bias, dtype, reason, data):
    dtype = getattr(torch, dtype)
    model = nn.ModuleDict({"body": nn.Linear(64, 64), "last": nn.Linear(k, n, bias)}).to(dtype)
    data = data and [(batch.to(dtype), normal(16, k).to(dtype)) for batch in data]
    qmodel = convert(model, data, forward=lambda model, xs: [model["body"](xs[0]), model["last"](xs[1])])
    last = qmodel.torchq_plan.layers["last"]
    assert isinstance(qmodel["body"], QuantizedLinear)
    assert (last.kind == "float", isinstance(qmodel["last"], QuantizedLinear)) == (reason is not None, reason is None)
    if reason is not None:
        assert last.reason == reason
        assert torch.equal(qmodel["last"].weight, model["last"].weight)
    assert all(layer.bytes_after <= layer.bytes_before for layer in report(qmodel).layers)
    before = sum(parameter.nbytes for parameter in model["last"].parameters())
    assert (ops.packed_bytes(n, k) >= before) == (reason is not None)


@pytest.mark.small_layers_stay_float
def test_small_layers_are_not_prepared_either_and_prepared_ones_become_int8():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    prepared = prepare_qat(model, [X])
    assert prepared.torchq_plan.layers["2"].reason.startswith("1 output, fewer than a panel of 16")
    assert type(prepared[2]) is nn.Linear
    assert [layer.kind for layer in convert(prepared.eval()).torchq_plan.layers.values()] == ["int8 static", "float"]


@pytest.mark.small_layers_stay_float
@pytest.mark.parametrize("data", [None, [X]], ids=["without data", "calibrated"])
def test_a_model_of_small_layers_alone_is_trained_as_it_is(data):
    model = nn.Sequential(nn.Linear(64, 1)).eval()
    message = r"torchq.prepare_qat: nothing was prepared; '0': 1 output, fewer than a panel of 16"
    with pytest.warns(UserWarning, match=message):
        prepared = prepare_qat(model, data)
    assert torch.equal(prepared(X), model(X))
    with pytest.warns(UserWarning, match="nothing became int8"):
        assert torch.equal(convert(prepared)(X), model(X))


# ---- Nothing in int8, and float64 ---------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [None, [X]], ids=["without data", "calibrated"])
def test_nothing_in_int8_is_a_warning(data):
    hooked = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)).eval()
    for layer in (hooked[0], hooked[2]):
        layer.register_forward_pre_hook(lambda *args: None)
    assert said(hooked, data)[1] == [
        "torchq.convert: nothing became int8. Of 2 layers, all stay in float: it has forward hooks, which a swap would "
        "drop (2)."
    ]
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).eval()
    assert said(model, data, config=QConfig(exclude=("0",)))[1] == []
    assert said(model, data, config=QConfig(exclude=("0", "1")))[1] == [
        "torchq.convert: nothing became int8. Of 2 layers, all stay in float: excluded by '0' (1); excluded by '1' (1)."
    ]


@pytest.mark.parametrize("data", [None, [X.double()]], ids=["without data", "calibrated"])
def test_float64_is_a_warning(data):
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)).double().eval()
    assert said(model, data)[1] == [
        "torchq.convert: nothing became int8. Of 2 layers, all stay in float: its weight is torch.float64; float32, "
        "bfloat16 and float16 can be quantized (2). Make the model float32 first: model.float()."
    ]


def test_float64_in_one_layer_is_a_warning_too():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64).double()).eval()
    qmodel, messages = said(model)
    assert isinstance(qmodel[0], QuantizedLinear)
    assert messages == [
        "torchq.convert: 1 of 2 layers are float64 and stay so, '1' first. Make the model float32 first: model.float()."
    ]


def test_a_budget_that_returns_all_layers_warns_once():
    model = nn.Sequential(nn.Linear(64, 64)).eval()
    want = model(X)
    _, messages = said(model, [X], evaluate=lambda candidate: float(torch.equal(candidate(X), want)), max_drop=0.1)
    assert len(messages) == 1
    assert "no model with an int8 layer keeps the metric" in messages[0]


# ---- Few rows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "warned"),
    [
        ({}, False),
        ({"activation": "static"}, True),
        ({"activation": "auto"}, True),
        ({"rounding": "auto"}, True),
        ({"smoothing": "auto"}, True),
    ],
)
def test_few_rows_are_a_warning_where_they_choose(changes, warned):
    fixed = QConfig(activation="dynamic", rounding="nearest", smoothing="none")
    model = nn.Sequential(nn.Linear(64, 64)).eval()
    _, messages = said(model, [X[:8]], config=dataclasses.replace(fixed, **changes))
    assert ["1 of 1 layers saw fewer than 16 rows" in message for message in messages] == [True] * warned


# ---- The whole model ----------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.rnn = nn.ConvTranspose1d(64, 64, 3), nn.LSTM(64, 64, batch_first=True)
        self.attention = nn.MultiheadAttention(64, 4)
        self.norm, self.head = nn.BatchNorm1d(64), nn.Linear(64, 32)
        self.raw, self.scale = nn.Parameter(normal(64, 48)), nn.Parameter(torch.ones(1, 64))


def test_what_is_left_in_float():
    model = Mixed().eval()
    whole = report(convert(model, config=QConfig(exclude=("attention", "rnn")))).model
    sizes = {
        "Mixed's own parameters": (1, 4 * (64 * 48 + 64)),
        "ConvTranspose1d": (1, 4 * (64 * 64 * 3 + 64)),
        "LSTM": (1, 4 * 4 * (2 * 64 * 64 + 2 * 64)),
        "MultiheadAttention's own parameters": (1, 4 * (3 * 64 * 64 + 3 * 64)),
        "NonDynamicallyQuantizableLinear": (1, 4 * (64 * 64 + 64)),
        "BatchNorm1d": (1, 4 * 4 * 64 + 8),
    }
    assert {each.kind: (each.modules, each.bytes) for each in whole.left} == sizes
    assert [each.bytes for each in whole.left] == sorted((each.bytes for each in whole.left), reverse=True)
    head = 4 * (64 * 32 + 32)
    assert whole.bytes_before == sum(size for _, size in sizes.values()) + head
    assert whole.bytes_after == whole.bytes_before - head + ops.packed_bytes(32, 64)
    assert whole.int8_weights == 64 * 32
    assert whole.weights == 64 * (32 + 48 + 64 * 3 + 4 * 2 * 64 + 3 * 64 + 64)


class Inner(nn.Module):
    """Attention with weights of its own, by functions."""

    def __init__(self):
        super().__init__()
        self.qkv, self.scale = nn.Parameter(normal(192, 64)), nn.Parameter(torch.ones(64))
        self.out = nn.Linear(64, 64)

    def forward(self, x):
        q, k, v = nn.functional.linear(x, self.qkv).chunk(3, -1)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v) * self.scale)


def test_what_multiplies_without_a_layer_is_named_with_its_bytes_and_what_helps():
    model = nn.ModuleDict({"body": Inner(), "conv": nn.ConvTranspose1d(4, 4, 3)})
    model["normed"] = nn.utils.parametrizations.weight_norm(nn.ConvTranspose1d(4, 4, 3))
    model["raw"] = nn.ParameterList([nn.Parameter(normal(64, 32)), nn.Parameter(normal(64))])
    result = report(convert(model))
    left = {each.kind: each for each in result.model.left}
    assert left["Inner's own parameters"].matrices == ("body.qkv",)
    assert left["Inner's own parameters"].bytes == 4 * (192 * 64 + 64)
    assert left["ParameterList"].matrices == ("raw.0",)
    for kind in ("Inner's own parameters", "ParameterList"):
        assert left[kind].advice.endswith("or an nn.Bilinear holds it and is called")
    assert left["ConvTranspose1d"].advice.startswith("transposed convolutions stay in float")
    computed = left["ParametrizationList's own parameters"]
    assert computed.matrices == ("normed.parametrizations.weight.original1",)
    assert computed.advice == "a weight is computed of them, for a module that stays in float"
    text = " ".join(str(result).split())
    assert "48.2 KiB in 1 Inner's own parameters" in text
    assert "Inner's own parameters (body.qkv): parameters of its own: what it multiplies by" in text
    assert all(len(line) <= 120 for line in str(result).splitlines())


def test_what_has_a_reason_in_the_plan_has_no_second_one():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Embedding(80, 64), nn.LayerNorm((2, 64)))
    whole = report(convert(model, config=QConfig(exclude=("1",), embeddings=False))).model
    assert [(each.kind, each.matrices, each.advice) for each in whole.left][:2] == [
        ("Embedding", (), None),
        ("Linear", (), None),
    ]


@pytest.mark.parametrize("inplace", [False, True])
def test_bytes_are_those_of_all_tensors(inplace):
    model = Mixed()
    model.again, model.twin = model.head, nn.Linear(64, 32)
    model.twin.weight = model.head.weight
    before = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    qmodel = convert(model.eval(), inplace=inplace)
    whole = report(qmodel).model
    assert whole.bytes_before == before
    assert whole.bytes_after == sum(
        tensor.nbytes
        for tensor in [*qmodel.parameters(), *qmodel.buffers()]
        if not isinstance(tensor, FloatView)  # a view takes none
    )
    assert report(copy.deepcopy(qmodel)).model == whole


def test_a_tied_head_in_float_is_counted_once():
    model = nn.ModuleDict({"table": nn.Embedding(80, 64), "head": nn.Linear(64, 80, bias=False)})
    model["head"].weight = model["table"].weight
    result = report(convert(model, config=QConfig(embeddings=False)))
    size = 80 * 64 * 4
    assert result.model == WholeModel(size, size, 0, 0, (LeftInFloat("Embedding", 1, size),))
    assert str(result).splitlines()[:2] == [
        "whole model: 20.0 KiB -> 20.0 KiB (1.00x smaller)",
        "left in float: 20.0 KiB in 1 Embedding",
    ]


class Scaled(nn.Embedding):
    """With a buffer beside its table, as Gemma's."""

    def __init__(self):
        super().__init__(200, 64)
        self.register_buffer("factor", torch.tensor(8.0))

    def forward(self, ids):
        return super().forward(ids) * self.factor


def test_a_tied_table_with_a_buffer_of_its_own_is_counted():
    model = nn.ModuleDict({"words": Scaled(), "head": nn.Linear(64, 200, bias=False)})
    model["head"].weight = model["words"].weight
    qmodel = convert(model, config=QConfig(embeddings=True))
    assert qmodel.torchq_plan.tables["words"].owner == "head"
    whole = report(qmodel).model
    assert whole.bytes_before == 200 * 64 * 4 + 4
    assert whole.bytes_after == sum(buffer.nbytes for buffer in qmodel.buffers())
    assert whole.int8_weights == whole.weights == 200 * 64


def test_the_measured_model_is_shown():
    model = nn.Sequential(nn.Linear(64, 64)).eval()
    assert "SQNR" not in str(report(convert(model))).splitlines()[0]
    qmodel = convert(model, [X, X], progress=False)
    db = qmodel.torchq_plan.checked.model_db
    first = str(report(qmodel)).splitlines()[0]
    assert first.endswith(f"100.0% of the weights of matrix products in int8, output SQNR {db:.1f} dB")
    assert report(qmodel).to_dict()["model"]["output_db"] == db


def test_a_model_without_matrices_and_plans_without_sizes():
    qmodel = convert(nn.Sequential(nn.Linear(64, 64)))
    expected = report(qmodel).model
    qmodel.torchq_plan = dataclasses.replace(qmodel.torchq_plan, model_bytes=None)
    assert report(qmodel).model == expected


def test_the_plan_keeps_it_in_json():
    plan = convert(nn.Sequential(nn.Linear(64, 80, bias=False))).torchq_plan
    assert plan.model_bytes == 80 * 64 * 4
    data = json.loads(json.dumps(plan.to_dict(), allow_nan=False))
    assert Plan.from_dict(data) == plan
    older = {key: value for key, value in data.items() if key != "model_bytes"}
    assert Plan.from_dict(older) == Plan(plan.layers)
    assert return_to_float(plan, {"0": "mine"}).model_bytes == plan.model_bytes
