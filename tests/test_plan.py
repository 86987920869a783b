"""The plan: its measurements, its decisions and their reasons, and applying it, edited or not."""

import dataclasses
import json
import re

import pytest
import torch
from torch import nn

from torchq import QConfig, QuantizedLinear, choose_qparams, convert
from torchq.numerics.metrics import sqnr_db
from torchq.numerics.qparams import QParams
from torchq.observers import OBSERVERS
from torchq.planning.apply import apply_plan
from torchq.planning.plan import AttentionPlan, LayerPlan, Plan, TablePlan

STATIC, DYNAMIC = (QConfig(activation=name, rounding="nearest") for name in ("static", "dynamic"))
AUTO = QConfig(rounding="nearest")


def even(rows=64, features=64, seed=0):
    """Uniform rows that all reach from -1 to 1, so that a scale per row is the same as one scale for all."""
    x = torch.rand(rows, features, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    x[:, :2] = torch.tensor([-1.0, 1.0])
    return x


def spiky():
    """`even`, with every sixteenth token 100 times as large."""
    x = even()
    x[::16] *= 100
    return x


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8)).eval()


def linear(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 32)).eval()


def planned(model, data=None, config=None):
    return convert(model, None if data is None else [data], config=config).torchq_plan.layers


def edited(plan, name, **changes):
    return Plan({**plan.layers, name: dataclasses.replace(plan.layers[name], **changes)})


# ---- decisions ----


def test_auto_takes_static_where_it_costs_nothing():
    data = even()
    layer = planned(linear(), data, QConfig(observer="minmax", rounding="nearest"))["0"]
    assert layer.kind == "int8 static"
    assert layer.sqnr_db["minmax"] == layer.sqnr_db["dynamic"]  # the same codes, so the same outputs
    assert layer.reason == "static costs no accuracy"
    assert layer.input_qparams == choose_qparams(data, dtype=torch.uint8, symmetric=False)


def test_auto_takes_dynamic_where_static_costs_accuracy():
    """With a static range, every token has the coarse step of the large ones. With a dynamic one, only a sixteenth of
    them has, so the noise of the activations is 10 log10(16) = 12 dB lower. That is then as low as the noise of the
    weights, so 9 dB of it show in the output.
    """
    layer = planned(linear(), spiky(), AUTO)["0"]
    assert layer.kind == "int8 dynamic"
    static = max(layer.sqnr_db["minmax"], layer.sqnr_db["percentile"])
    assert layer.sqnr_db["dynamic"] - static > 6
    assert layer.reason == "static would cost accuracy"
    assert (layer.input_qparams, layer.observer) == (None, None)


def test_margin_db_is_the_price_static_may_have():
    sqnr = planned(linear(), spiky())["0"].sqnr_db
    price = sqnr["dynamic"] - max(sqnr["minmax"], sqnr["percentile"])
    for margin, kind in [(price - 0.01, "int8 dynamic"), (price + 0.01, "int8 static")]:
        assert planned(linear(), spiky(), QConfig(margin_db=margin))["0"].kind == kind


@pytest.mark.parametrize("data", [even(), spiky()], ids=["even", "spiky"])
def test_forced_schemes_are_honoured_whatever_they_cost(data):
    for config, kind in [(STATIC, "int8 static"), (DYNAMIC, "int8 dynamic")]:
        for layer in planned(mlp(), data, config).values():
            assert layer.kind == kind
            assert layer.reason == "asked for"


def test_without_data_every_layer_is_dynamic():
    dynamic = LayerPlan("int8 dynamic", "no calibration data")
    assert planned(mlp()) == {"0": dataclasses.replace(dynamic, activation="1"), "2": dynamic}


@pytest.mark.parametrize(("data", "scheme"), [(even(), "minmax"), (spiky(), "dynamic")], ids=["even", "spiky"])
def test_the_numbers_are_those_of_the_converted_layer(data, scheme):
    model = linear()
    qmodel = convert(model, [data], config=QConfig(observer="minmax"))
    layer = qmodel.torchq_plan.layers["0"]
    with torch.no_grad():
        assert layer.measured_db == layer.sqnr_db[scheme] == sqnr_db(model(data), qmodel(data))


@pytest.mark.parametrize(("weight", "step"), [("per_channel", 4), ("per_tensor", 1)])
def test_of_many_channels_every_nth_is_measured(weight, step):
    """Some 256 of those that have a scale each; the others have outliers here."""
    model, data = nn.Sequential(nn.Linear(64, 1100)), even()
    with torch.no_grad():
        model[0].weight[1::2, :3] *= 40
    config = QConfig(weight=weight, activation="dynamic", smoothing="none", rounding="nearest")
    qmodel = convert(model, [data], config=config)
    with torch.no_grad():
        expected = sqnr_db(*(each(data)[:, ::step].contiguous() for each in (model, qmodel)))
    assert qmodel.torchq_plan.layers["0"].sqnr_db["dynamic"] == pytest.approx(expected, abs=1e-6)


def test_below_the_floor_a_layer_stays_float_and_says_by_how_much():
    for config in (QConfig(min_sqnr_db=90), QConfig(min_sqnr_db=90, activation="static", weight="per_tensor")):
        layer = planned(linear(), even(), config)["0"]
        assert layer.kind == "float"
        assert re.fullmatch(r"static [\d.]+ dB \(\w+\), dynamic [\d.]+ dB: below min_sqnr_db = 90", layer.reason)
        assert layer.input_qparams is None
        assert layer.measured_db is None  # nothing is quantized


def test_auto_falls_back_to_dynamic_where_only_static_is_below_the_floor():
    sqnr = planned(linear(), spiky())["0"].sqnr_db
    floor = (sqnr["dynamic"] + max(sqnr["minmax"], sqnr["percentile"])) / 2
    layer = planned(linear(), spiky(), QConfig(min_sqnr_db=floor, margin_db=100))["0"]
    assert layer.kind == "int8 dynamic"


def test_an_error_that_cannot_be_measured_is_no_permission():
    """The SQNR of outputs beyond float32 is nan, which must count as below the minimum."""
    model = linear()
    model[0].weight.data *= 1e38
    assert planned(model, 1e3 * even())["0"].kind == "float"


class Branches(nn.Module):
    """`rare` runs only on request."""

    def __init__(self):
        super().__init__()
        self.common, self.rare = nn.Linear(64, 8), nn.Linear(64, 8)

    def forward(self, x, rare=False):
        return self.rare(x) if rare else self.common(x)


def test_a_layer_never_reached():
    layers = planned(Branches(), even())
    assert layers["common"].kind == "int8 static"
    assert layers["rare"].kind == "float"
    assert layers["rare"].reason.startswith("calib_loader never reached it")
    forced = planned(Branches(), even(), DYNAMIC)["rare"]
    assert (forced.kind, forced.reason) == ("int8 dynamic", "no calibration data reached it")


# ---- observers ----


def with_outlier(weight_of_outlier):
    """Feature 0 is 60 in one of 64 tokens and 0 elsewhere: 1 value in 4096. The percentile cuts 1 in 1000."""
    x, model = even(), linear()
    x[:, 0] = 0
    x[5, 0] = 60
    model[0].weight.data[:, 0] *= weight_of_outlier
    return planned(model, x, STATIC)["0"]


def test_the_observer_is_the_one_that_measures_better():
    """Min-max has a step 30 times as large. Clipping loses the outlier, which matters if its weight is not 0."""
    ignored, wanted = with_outlier(0), with_outlier(1)
    assert (ignored.observer, wanted.observer) == ("percentile", "mse")
    assert ignored.sqnr_db["percentile"] > ignored.sqnr_db["minmax"] + 15
    assert wanted.sqnr_db["minmax"] > wanted.sqnr_db["percentile"] + 15
    assert ignored.input_qparams.scale < 3 / 255 < 60 / 255 <= wanted.input_qparams.scale
    for layer in (ignored, wanted):
        assert (
            layer.measured_db
            == layer.sqnr_db[layer.observer]
            == max(value for scheme, value in layer.sqnr_db.items() if scheme != "dynamic")
        )


@pytest.mark.parametrize("observer", OBSERVERS)
def test_a_named_observer_is_used(observer):
    layer = planned(linear(), even(), QConfig(activation="static", observer=observer))["0"]
    assert layer.observer == observer
    assert layer.sqnr_db.keys() == {"dynamic", observer}


def test_the_same_data_give_the_same_plan():
    data = torch.cat([spiky(), even(3000)])  # more than the sample holds
    assert planned(mlp(), data) == planned(mlp(), data)


# ---- exclude, and the weights ----


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleList([mlp() for _ in range(2)])
        self.encoder_head, self.head = nn.Linear(64, 8), nn.Linear(64, 8)

    def forward(self, x):
        return sum(layer(x) for layer in [*self.encoder, self.encoder_head, self.head])


@pytest.mark.parametrize("data", [None, even()], ids=["dynamic", "calibrated"])
@pytest.mark.parametrize(
    ("exclude", "floats"),
    [
        (("head",), {"head": "head"}),
        (("encoder.0.2",), {"encoder.0.2": "encoder.0.2"}),
        (("encoder",), dict.fromkeys(["encoder.0.0", "encoder.0.2", "encoder.1.0", "encoder.1.2"], "encoder")),
        (("encoder.1",), dict.fromkeys(["encoder.1.0", "encoder.1.2"], "encoder.1")),
        (("encoder.*.2",), dict.fromkeys(["encoder.0.2", "encoder.1.2"], "encoder.*.2")),
        (("*head", "head"), {"encoder_head": "*head", "head": "*head"}),
        (("encoder.[!0].0", "hea?"), {"encoder.1.0": "encoder.[!0].0", "head": "hea?"}),
    ],
)
def test_exclude_by_name_by_parent_and_by_pattern(exclude, floats, data):
    model = Nested()
    qmodel = convert(model, None if data is None else [data], config=QConfig(exclude=exclude))
    layers = qmodel.torchq_plan.layers
    assert list(layers) == [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert {name: layer.reason for name, layer in layers.items() if layer.kind == "float"} == {
        name: f"excluded by {pattern!r}" for name, pattern in floats.items()
    }
    for name, layer in layers.items():
        expected = nn.Linear if layer.kind == "float" else QuantizedLinear
        assert type(qmodel.get_submodule(name)) is expected


def test_exclude_the_root():
    assert planned(nn.Linear(8, 8), config=QConfig(exclude=("*",))) == {"": LayerPlan("float", "excluded by '*'")}


@pytest.mark.parametrize("data", [None, even()], ids=["dynamic", "calibrated"])
def test_weights_per_tensor_on_request(data):
    for scheme, distinct in [("per_tensor", 1), ("per_channel", 32)]:
        qmodel = convert(linear(), None if data is None else [data], config=QConfig(weight=scheme))
        assert len(qmodel[0].weight_scale.unique()) == distinct
        assert qmodel.torchq_plan.layers["0"].per_channel is (scheme == "per_channel")


# ---- plain data ----


@pytest.mark.parametrize("config", [None, STATIC, DYNAMIC, QConfig(min_sqnr_db=90)], ids=repr)
def test_a_plan_survives_json(config):
    plan = convert(mlp(), [even()], config=config).torchq_plan
    restored = Plan.from_dict(json.loads(json.dumps(plan.to_dict(), allow_nan=False)))
    assert restored == plan
    assert str(restored) == str(plan)


def test_a_plan_with_an_infinite_sqnr_survives_json():
    """An error of zero is inf dB, which is no number in JSON (RFC 8259)."""
    plan = convert(linear(), [torch.zeros(16, 64)]).torchq_plan
    assert plan.layers["0"].measured_db == torch.inf
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict(), allow_nan=False))) == plan


def test_a_plan_prints_a_line_per_layer():
    plan = convert(Branches(), [even()], config=QConfig(exclude=("common",))).torchq_plan
    assert str(plan).splitlines() == [
        "common: float (excluded by 'common')",
        f"rare: float ({plan.layers['rare'].reason})",
    ]
    assert str(convert(nn.Linear(4, 4)).torchq_plan) == "(root): int8 dynamic (no calibration data)"


# ---- applied ----


def test_a_plan_applies_to_another_copy_of_the_model():
    data = even()
    qmodel = convert(mlp(), [data])
    again = apply_plan(mlp(), Plan.from_dict(qmodel.torchq_plan.to_dict()))
    assert torch.equal(again(data), qmodel(data))
    assert again.torchq_plan == qmodel.torchq_plan


def test_an_edited_plan_is_applied_as_edited():
    model, data = linear(), spiky()
    plan = convert(model, [data], config=dataclasses.replace(STATIC, smoothing="none")).torchq_plan

    pair = QParams(0.125, 3)
    changed = apply_plan(model, edited(plan, "0", input_qparams=pair))
    assert changed[0].input_qparams == pair
    assert torch.equal(changed(data), QuantizedLinear.from_float(model[0], input_qparams=pair)(data))

    dynamic = apply_plan(model, edited(plan, "0", kind="int8 dynamic", reason="mine"))
    assert torch.equal(dynamic(data), QuantizedLinear.from_float(model[0])(data))
    assert str(dynamic.torchq_plan) == "0: int8 dynamic (mine)"

    as_float = apply_plan(model, edited(plan, "0", kind="float"))
    assert torch.equal(as_float(data), model(data))


def test_a_layer_edited_to_float_keeps_its_relu():
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(64, 8), nn.ReLU()).eval(), even()
    plan = convert(model, [data]).torchq_plan
    assert plan.layers["0"].activation == "1"
    assert torch.equal(apply_plan(model, edited(plan, "0", kind="float"))(data), model(data))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("0", {"input_qparams": None}, "layer '0' is static, but its input_qparams are None"),
        ("2", {"input_qparams": None}, "layer '0' feeds '2', so both must be static, with input_qparams"),
        ("0", {"feeds": "nope"}, "layer '0' feeds 'nope', so both must be static, with input_qparams"),
        ("2", {"kind": "int8 dynamic"}, "layer '0' feeds '2', so both must be static"),
        ("2", {"kind": "float"}, "layer '0' feeds '2', so both must be static"),
        ("0", {"kind": "float"}, "layer '0' feeds '2', so both must be static"),
        ("0", {"kind": "int4", "feeds": None}, "layer '0'.*'int4'"),
        ("0", {"input_qparams": QParams(0.0, 0)}, r"layer '0'.*scale"),
        ("0", {"input_qparams": QParams(0.1, 256)}, r"layer '0'.*zero_point"),
        ("0", {"activation": "nope"}, "layer '0'.*'nope'"),
        ("0", {"activation": "no.pe"}, "layer '0'.*'no.pe'"),
        ("0", {"activation": "2"}, "layer '0'.*'2'"),
        ("0", {"skipped": ("nope",)}, "layer '0'.*'nope'"),
        ("0", {"skipped": ("2",)}, "layer '0'.*'2'"),
        ("0", {"per_channel": "yes"}, "layer '0' has per_channel 'yes', expected True or False"),
    ],
    ids=lambda value: "-".join(f"{key}={item}" for key, item in value.items()) if isinstance(value, dict) else None,
)
@pytest.mark.parametrize("inplace", [False, True])
def test_an_invalid_plan_is_refused_and_changes_nothing(name, changes, message, inplace):
    model = mlp()
    plan = convert(model, [even()], config=STATIC).torchq_plan
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=rf"^torchq\.apply_plan: .*{message}"):
        apply_plan(model, edited(plan, name, **changes), inplace=inplace)
    assert dict(model.named_modules()) == before
    assert not hasattr(model, "torchq_plan")


@pytest.mark.parametrize("part", [None, "tables", "attentions"])
def test_an_unknown_name_in_a_plan_is_refused(part):
    table, attention = TablePlan("int8", "mine"), AttentionPlan("int8", "mine")
    data = Plan({}, tables={"a": table}, attentions={"a": attention}).to_dict()
    (data if part is None else data[part]["a"])["of_tomorrow"] = 1
    with pytest.raises(ValueError, match=r"torchq\.Plan\.from_dict: .*TypeError \w+ has no of_tomorrow"):
        Plan.from_dict(data)


def test_a_plan_of_another_model_is_refused():
    plan = convert(Branches()).torchq_plan
    with pytest.raises(ValueError, match=r"the plan names layer 'common', which is no nn.Linear, .* of the model"):
        apply_plan(mlp(), plan)


@pytest.mark.parametrize("change", [lambda layer: layer.pop("gptq_db"), lambda layer: layer.update(of_tomorrow=1)])
def test_a_plan_of_another_version_is_an_error_that_says_so(change):
    data = convert(mlp()).torchq_plan.to_dict()
    change(data["layers"]["0"])
    with pytest.raises(
        ValueError, match=r"torchq\.Plan\.from_dict: data must be .*(gptq_db|of_tomorrow).*convert the model"
    ):
        Plan.from_dict(data)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["layers"]["0"].update(channel_scale=["a"]),
        lambda data: data["layers"]["0"].update(input_qparams=[1.0]),
        lambda data: data.update(layers=[]),
    ],
    ids=["word", "half a pair", "list"],
)
def test_values_that_no_plan_can_hold_are_an_error_that_names_the_call(change):
    data = convert(mlp()).torchq_plan.to_dict()
    change(data)
    with pytest.raises(ValueError, match=r"torchq\.Plan\.from_dict: data must be what .* does not fit: \w+Error"):
        Plan.from_dict(data)
