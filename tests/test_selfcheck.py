"""convert() checks itself: what the model keeps beside its modules follows the swap, or is told; and no plan made of
data is much worse for the whole model than one made without.
"""

import copy
import dataclasses
import functools
import json
import math
import types
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from helpers.convolutional import IMAGE, IMAGES, resnet
from helpers.covers import pairs_of
from helpers.numbers import normal
from torchq import QConfig, QuantizedLinear, apply_plan, conversion, convert
from torchq.calibration.calibrate import calibrate
from torchq.modules.quantized_conv import QuantizedConv
from torchq.modules.registry import find_layers
from torchq.numerics.metrics import sqnr_db
from torchq.numerics.qparams import QParams
from torchq.planning import convolutions, selfcheck, stems
from torchq.planning.plan import Plan
from torchq.planning.selfcheck import CLOSE_DB, SelfCheck

pytestmark = pytest.mark.usefixtures("seeded")

DATA = [normal(100, 64, seed=i) for i in range(4)]
GLOBAL = {}


class Kept(nn.Module):
    """Runs `fc` through what `keep(fc, self)` gives, held as an attribute. One norm channel asks for smoothing."""

    def __init__(self, keep):
        super().__init__()
        self.norm, self.fc, self.out = nn.LayerNorm(64), nn.Linear(64, 64), nn.Linear(64, 8)
        self.norm.weight.data[5] = 60.0
        self.step = keep(self.fc, self)

    def forward(self, x):
        step = self.step
        while not callable(step) or isinstance(step, SimpleNamespace):
            step = (
                step.layer if isinstance(step, SimpleNamespace) else step["fc"] if isinstance(step, dict) else step[-1]
            )
        return self.out(torch.relu(step(self.norm(x))))


class Holder:
    def __init__(self, layer):
        self.layer = layer

    def run(self, x):
        return self.layer(x)


def keep_partial(fc, model):
    return functools.partial(lambda layer, x: layer(x), fc)


KEEPS = {
    "closure over self": lambda fc, model: lambda x: model.fc(x),
    "closure over the layer": lambda fc, model: lambda x: fc(x),
    "default": lambda fc, model: lambda x, layer=fc: layer(x),
    "nested closure": lambda fc, model: (lambda inner: lambda x: inner(x))(lambda x: fc(x)),
    "list": lambda fc, model: [model.norm, fc],
    "tuple in a dict": lambda fc, model: {"fc": (1, fc)},
    "object": lambda fc, model: SimpleNamespace(layer=fc),
    "bound method": lambda fc, model: fc.forward,
    "function bound to the layer": lambda fc, model: types.MethodType(lambda layer, x: layer(x), fc),
    "partial bound to the layer": lambda fc, model: types.MethodType(functools.partial(lambda layer, x: layer(x)), fc),
    "method of another object that holds it": lambda fc, model: Holder(fc).run,
    "partial": keep_partial,
}


def ran_in_int8(qmodel, x):
    ran = set()
    handles = [
        module.register_forward_hook(lambda *_, name=name: ran.add(name))
        for name, module in qmodel.named_modules()
        if isinstance(module, QuantizedLinear)
    ]
    qmodel(x)
    for handle in handles:
        handle.remove()
    return ran


@pytest.mark.parametrize(("kept", "inplace", "calibrated"), pairs_of(KEEPS, [False, True], [False, True]))
def test_what_a_model_keeps_beside_its_modules_follows_the_swap(kept, inplace, calibrated):
    model, data = Kept(KEEPS[kept]).eval(), DATA if calibrated else None
    x = normal(32, 64, seed=9)
    exact = model(x)
    qmodel = convert(model, data, inplace=inplace)
    assert sqnr_db(exact, qmodel(x)) > 30
    if kept != "bound method":  # a method's own call runs no hooks
        assert ran_in_int8(qmodel, x) == set(qmodel.torchq_plan.int8_layers()) == {"fc", "out"}
    if not inplace:
        assert torch.equal(model(x), exact)
        assert type(model.fc) is nn.Linear


def test_state_that_closures_share_stays_shared():
    """Of the cells, those with a module are new; a counter is the original's, as deepcopy has it."""
    model = Kept(lambda fc, model: None)
    calls, fc = [], model.fc

    def step(x):
        calls.append(len(x))
        return fc(x)

    model.step = step
    qmodel = convert(model.eval())
    qmodel(DATA[0])
    model(DATA[1][:7])
    assert calls == [100, 7]


def keep_global(fc, model):
    GLOBAL["fc"] = fc
    return lambda x: GLOBAL["fc"](x)


def test_a_float_layer_out_of_reach_is_named():
    with pytest.raises(ValueError, match=r"1 of 2 int8 layers") as error:
        convert(Kept(keep_global).eval(), DATA)
    assert str(error.value) == (
        "torchq.convert: 1 of 2 int8 layers did not run on a batch that ran them in float: 'fc'. The model runs Linear "
        "layers that are not among its modules: a function, a list or an object that it uses keeps the float ones. Let "
        "it call its own modules, pass inplace=True, or leave these in float with QConfig(exclude=...)."
    )


def test_in_place_the_error_says_what_state_the_model_is_in():
    model = Kept(keep_global).eval()
    with pytest.raises(ValueError, match=r"'fc'.*The model is converted now, which inplace=True can't undo\."):
        convert(model, DATA, inplace=True)
    assert type(model.fc) is QuantizedLinear


def test_out_of_reach_but_excluded_converts():
    qmodel = convert(Kept(keep_global).eval(), DATA, config=QConfig(exclude=("fc",)))
    assert qmodel.torchq_plan.int8_layers() == ["out"]


class OwnCopy(Kept):
    def __init__(self):
        super().__init__(lambda fc, model: None)

    def forward(self, x):
        return self.out(torch.relu(self.fc(self.norm(x))))

    def __deepcopy__(self, memo):
        new = OwnCopy()
        new.load_state_dict(self.state_dict())
        return new.eval()


@pytest.mark.parametrize("data", [None, DATA], ids=["without data", "calibrated"])
def test_a_model_that_copies_itself_in_its_own_way_is_told(data):
    model = OwnCopy().eval()
    with pytest.raises(TypeError, match=r"OwnCopy makes copies in its own way .* 'fc', 'out'\. Pass inplace=True"):
        convert(model, data)
    assert ran_in_int8(convert(model, data, inplace=True), DATA[0]) == {"fc", "out"}


class Routed(nn.Module):
    """Which expert the rows go to, their values decide, which int8 may turn: here it always does."""

    def __init__(self):
        super().__init__()
        self.first, self.experts = nn.Linear(64, 64), nn.ModuleList([nn.Linear(64, 8), nn.Linear(64, 8)])

    def forward(self, x):
        return self.experts[int(isinstance(self.first, QuantizedLinear))](self.first(x))


def test_layers_that_the_data_choose_need_not_run():
    qmodel = convert(Routed().eval(), DATA)
    assert qmodel.torchq_plan.int8_layers() == ["first", "experts.0"]
    assert ran_in_int8(qmodel, DATA[0]) == {"first"}


def test_a_converted_model_that_fails_is_told():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(64, 8)

        def forward(self, x):
            assert type(self.fc) is nn.Linear, "not mine"
            return self.fc(x)

    with pytest.raises(ValueError, match=r"the converted Reads fails on a batch .*AssertionError: not mine"):
        convert(Reads().eval(), DATA)
    assert type(convert(Reads().eval()).fc) is QuantizedLinear  # nothing to check it with


# ---- the model's output ----


def test_the_plan_says_how_far_the_output_is_from_float():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    for settings in ({}, {"inplace": True}, {"evaluate": lambda candidate: 1.0}):
        qmodel = convert(copy.deepcopy(model), DATA, **settings)
        checked = qmodel.torchq_plan.checked
        judged = torch.cat([DATA[1], DATA[3]])
        assert checked.model_db == pytest.approx(sqnr_db(model(judged), qmodel(judged)), abs=1e-3)
        assert (checked.chosen, checked.batches, checked.apart) == ("as made", 2, True)
        assert Plan.from_dict(json.loads(json.dumps(qmodel.torchq_plan.to_dict()))) == qmodel.torchq_plan
    only = convert(model, DATA[:1]).torchq_plan.checked
    assert (only.batches, only.apart) == (1, False)
    assert convert(model).torchq_plan.checked is None


def test_a_batch_of_many_values_judges_alone(monkeypatch):
    model = nn.Sequential(nn.Linear(64, 8)).eval()
    values = DATA[3].numel() // 64 * 8
    for enough, count in ((values, 1), (values + 1, 2)):
        monkeypatch.setattr(selfcheck, "ENOUGH_VALUES", enough)
        checked = convert(model, DATA).torchq_plan.checked
        assert checked.batches == count
    qmodel = convert(model, DATA)
    monkeypatch.setattr(selfcheck, "ENOUGH_VALUES", values)
    checked = convert(model, DATA).torchq_plan.checked
    assert checked.model_db == pytest.approx(sqnr_db(model(DATA[3]), qmodel(DATA[3])), abs=1e-3)  # the last


def test_a_plan_that_falls_too_far_behind_runs_no_more_batches():
    """The figure is then that of the batches so far. One that may still reach what it must runs on all."""
    model = nn.Sequential(nn.Linear(64, 8)).eval()
    qmodel = convert(model, DATA)
    check = SelfCheck(calibrate(model, DATA, find_layers(model), QConfig()))
    rough = nn.Sequential(QuantizedLinear.from_float(model[0], input_qparams=QParams(0.5, 128)))
    ran = []
    rough[0].register_forward_pre_hook(lambda module, args: ran.append(args[0]))
    both = sqnr_db(model(torch.cat([DATA[3], DATA[1]])), rough(torch.cat([DATA[3], DATA[1]])))
    last = sqnr_db(model(DATA[3]), rough(DATA[3]))
    for least_db, expected, batches in ((-math.inf, both, 2), (both - 0.01, both, 2), (both + 6, last, 1)):
        ran.clear()
        assert check.compare(rough, least_db=least_db) == pytest.approx(expected, abs=1e-3)
        assert [torch.equal(*pair) for pair in zip(ran, (DATA[3], DATA[1]), strict=False)] == [True] * batches
    assert check.compare(qmodel, least_db=math.inf) < math.inf
    assert CLOSE_DB >= convolutions.STATIC_DB  # what asks how far the plan without data is behind


def worse(db):
    """A stage that makes a layer's static range `db` too wide, as data that misleads would."""
    return lambda plan, evidence: dataclasses.replace(
        plan,
        layers={
            name: dataclasses.replace(layer, kind="int8 static", input_qparams=QParams(0.04 * 10 ** (db / 20), 128))
            for name, layer in plan.layers.items()
        },
    )


@pytest.mark.parametrize(("db", "chosen"), [(20, "without data"), (0, "as made")])
def test_what_is_better_without_data_is_taken(monkeypatch, db, chosen):
    if db:
        monkeypatch.setattr(conversion, "describe", worse(db))
    model = nn.Sequential(nn.Linear(64, 8)).eval()
    qmodel = convert(model, DATA, config=QConfig(rounding="nearest"))
    plan = qmodel.torchq_plan
    assert plan.checked.chosen == chosen
    assert set(plan.checked.output_db) == {"as made", chosen}
    x = normal(200, 64, seed=9)
    monkeypatch.undo()
    if chosen == "without data":
        assert plan.layers["0"].kind == "int8 dynamic"
        assert torch.equal(qmodel(x), convert(model)(x))
    assert torch.equal(apply_plan(model, plan)(x), qmodel(x))


def test_the_plan_without_data_is_fused_as_runs_have_shown(monkeypatch):
    """Convolutions that would feed codes to another one hand it their floats, as dynamic ones do."""
    fed = []

    def scripted(self, converted, **settings):
        folds = [module.fold for module in converted.modules() if isinstance(module, QuantizedConv)]
        fed.append(sum(fold.codes for fold in folds))
        return 0.0 if fed[-1] else 90.0

    monkeypatch.setattr(SelfCheck, "compare", scripted)
    monkeypatch.setattr(stems, "SMALL_SHARE", 0)  # the first convolution is not tried in float
    model, config = resnet(), QConfig(rounding="nearest", smoothing="none", margin_db=60)
    qmodel = convert(model, IMAGES, config=config)
    dynamic = convert(model, IMAGES, config=dataclasses.replace(config, activation="dynamic"))
    assert fed[0] > 0
    assert qmodel.torchq_plan.checked.chosen == "without data"
    fields = ("kind", "norm", "adds", "activation", "feeds", "hands")
    found, expected = (
        {name: [getattr(layer, field) for field in fields] for name, layer in each.torchq_plan.layers.items()}
        for each in (qmodel, dynamic)
    )
    assert found == expected
    assert any(hands for *_, hands in found.values())
    assert torch.equal(qmodel(IMAGE), dynamic(IMAGE))


@pytest.mark.parametrize("settings", [{"activation": "static"}, {"rounding": "gptq"}, {"margin_db": 90.0}])
def test_what_the_user_asks_for_is_not_undone(monkeypatch, settings):
    monkeypatch.setattr(conversion, "describe", worse(20))
    config = QConfig(**{"rounding": "nearest", **settings})
    plan = convert(nn.Sequential(nn.Linear(64, 8)).eval(), DATA, config=config).torchq_plan
    assert (plan.checked.chosen, plan.layers["0"].kind) == ("as made", "int8 static")


def test_noise_of_the_model_itself_is_the_same_for_both():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(64, 8)

        def forward(self, x):
            return self.fc(x) + torch.randn(len(x), 8)

    plan = convert(Noisy().eval(), [DATA[0]], forward=lambda model, batch: model(batch)).torchq_plan
    assert plan.checked.model_db > 30


def test_hidden_scores_of_minus_infinity_are_not_compared():
    model = nn.Sequential(nn.Linear(64, 8))
    run = lambda model, batch: model(batch).masked_fill(torch.arange(8) > 5, -torch.inf)  # noqa: E731
    assert convert(model, DATA, forward=run).torchq_plan.checked.model_db > 30


def test_without_floats_in_the_output_nothing_is_compared():
    model = nn.Sequential(nn.Linear(64, 8))
    plan = convert(model, DATA, forward=lambda model, batch: model(batch).argmax(1)).torchq_plan
    assert plan.checked is None
