"""prepare_qat and convert: training computes what will run, for every scheme, and convert's rules hold."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import torchq
from helpers.compare import assert_identical, bound
from helpers.covers import pairs_of
from helpers.models import DATA, Doubled, X
from helpers.numbers import normal
from torchq import QConfig, QuantizedLinear, convert, freeze_ranges, prepare_qat, simulate
from torchq.modules.qat_linear import QATLinear
from torchq.numerics.metrics import sqnr_db

SCHEMES = {
    "learned": (DATA, "auto", "learned"),
    "observed": (None, "auto", "observed"),
    "observed from data": (DATA, "static", "observed"),
    "dynamic": (None, "dynamic", "auto"),
}
by_scheme = pytest.mark.parametrize("scheme", SCHEMES)
STATES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, 8))


def prepared(scheme, model=None, *, weight="per_channel", dtype=torch.float32):
    data, activation, ranges = SCHEMES[scheme]
    data = data and [x.to(dtype) for x in data]
    config = QConfig(weight=weight, activation=activation, observer="minmax")
    return prepare_qat((model or mlp()).to(dtype), data, config=config, ranges=ranges)


def step(model, *, batches=3, optimizer=None):
    """Trains for a few steps on arbitrary targets."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.05)
    dtype = next(model.parameters()).dtype
    for i in range(batches):
        optimizer.zero_grad()
        model.train()(normal(16, 24, seed=20 + i).to(dtype)).square().mean().backward()
        optimizer.step()
    return model.eval()


def layers_of(model, kind=QATLinear):
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


# ---- training computes what will run ----


@pytest.mark.parametrize(
    ("scheme", "weight", "dtype"),
    pairs_of(SCHEMES, ["per_channel", "per_tensor"], [torch.float32, torch.bfloat16, torch.float16]),
)
def test_the_training_forward_is_the_simulated_forward_of_the_converted_model(scheme, weight, dtype):
    """Bit for bit, since both multiply the same values in float32. A fused activation is not rounded to 16 bits."""
    model = step(prepared(scheme, weight=weight, dtype=dtype))
    qmodel = convert(model, config=QConfig(fuse=dtype == torch.float32))
    x = X.to(dtype)
    assert list(layers_of(qmodel, QuantizedLinear)) == list(layers_of(model)) == ["0", "2", "5"]
    with simulate(), torch.no_grad():
        assert_identical(qmodel(x), model(x))
    for name, layer in layers_of(qmodel, QuantizedLinear).items():
        trained = model.get_submodule(name)
        expected = QuantizedLinear.from_float(
            trained, per_channel=weight == "per_channel", channel_scale=trained.channel_scale
        )
        assert_identical(layer.weight_int8, expected.weight_int8)
        assert layer.input_qparams == trained.input_range.qparams()
        assert (layer.input_qparams is None) == (scheme == "dynamic")


@by_scheme
@pytest.mark.parametrize("training", [True, False])
def test_one_layer_equals_the_integers_within_the_rounding_of_float_sums(scheme, training):
    """Also in training mode, where an observed range moves before it is used."""
    model = step(prepared(scheme, nn.Sequential(nn.Linear(24, 33))))
    y = model.train(training)(X.reshape(3, 11, 24)).detach()
    layer = convert(model)[0]
    apart = (y.double() - layer(X.reshape(3, 11, 24)).double()).abs().reshape(33, 33)
    assert (apart <= bound(layer, X)).all()
    with simulate():
        assert_identical(layer(X.reshape(3, 11, 24)), y)


@by_scheme
def test_autocast_says_the_output_dtype_and_no_more(scheme):
    layer = next(m for m in step(prepared(scheme)).modules() if isinstance(m, QATLinear))
    expected = layer(X)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            assert_identical(layer(X).detach(), expected.detach().to(dtype))


@by_scheme
def test_convert_with_data_measures_and_fuses(scheme):
    """ReLU and GELU are folded, and static layers pass codes. The ranges are still the trained ones."""
    model = step(prepared(scheme))
    qmodel = convert(model, DATA)
    plan = qmodel.torchq_plan.layers
    assert [plan[name].activation for name in ("0", "2", "5")] == ["1", "3", None]
    assert [plan[name].feeds for name in ("0", "2")] == ([None] * 2 if scheme == "dynamic" else ["2", "5"])
    assert [layer.input_qparams for layer in plan.values()] == [
        layer.input_range.qparams() for layer in layers_of(model).values()
    ]
    assert type(qmodel[1]) is nn.ReLU
    with simulate(), torch.no_grad():
        assert_identical(qmodel(X), model(X))
    assert sqnr_db(model(X), qmodel(X)) > 40  # codes may differ where float32 sums round across a tie
    origin = {"dynamic": "ranges per token", "learned": "learned range"}.get(scheme, "observed range")
    for layer in torchq.report(qmodel).layers:
        assert layer.reason == f"trained, {origin}"
        assert layer.sqnr_db > 25
    assert all(layer.sqnr_db is None for layer in torchq.report(convert(model)).layers)


@pytest.mark.parametrize("config", [QConfig(activation="static"), QConfig(activation="dynamic"), QConfig()])
def test_the_scheme_is_the_trained_one_whatever_the_config_says(config):
    qmodel = convert(step(prepared("learned", weight="per_tensor")), config=config)
    assert [layer.kind for layer in qmodel.torchq_plan.layers.values()] == ["int8 static"] * 3
    assert qmodel[0].weight_scale.unique().numel() == 1


@by_scheme
def test_gradients_reach_all_that_trains(scheme):
    model = prepared(scheme)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step(model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3))
    names = {f"{i}.{kind}" for i in (0, 2, 5) for kind in ("weight", "bias")}
    names |= {f"{i}.input_range.ends" for i in (0, 2, 5)} if scheme == "learned" else set()
    assert set(before) == names
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")  # dynamo does it
@by_scheme
def test_compiled_training_equals_eager(scheme):
    torch.compiler.reset()
    model = prepared(scheme, nn.Sequential(nn.Linear(24, 8)))
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for x in DATA:
        y, again = model(x), compiled(x)
        assert_identical(again.detach(), y.detach())
        for result in (y, again):
            result.square().mean().backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=name)


# ---- modes and state ----


def test_eval_and_freeze_hold_observed_ranges():
    model = prepared("observed")
    model.train()(X)
    ranges = {name: layer.input_range.range().clone() for name, layer in layers_of(model).items()}
    model.eval()(5 * X)
    freeze_ranges(model)
    model.train()(5 * X)
    for name, layer in layers_of(model).items():
        assert torch.equal(layer.input_range.range(), ranges[name])


def test_freeze_holds_learned_ranges_while_weights_train():
    model = prepared("learned")
    freeze_ranges(model)
    before = copy.deepcopy(model)
    step(model)
    for name, p in before.named_parameters():
        assert torch.equal(model.get_parameter(name), p) == name.endswith("ends")


def test_freeze_needs_a_prepared_model():
    with pytest.raises(ValueError, match=r"no layer of the model is a QATLinear. Call torchq.prepare_qat\(\) first"):
        freeze_ranges(mlp())


@by_scheme
@pytest.mark.parametrize("duplicate", STATES.values(), ids=STATES)
def test_copies_are_equal_and_independent(scheme, duplicate):
    model = step(prepared(scheme))
    twin, expected = duplicate(model), model(X).detach()
    assert_identical(twin(X).detach(), expected)
    assert repr(twin) == repr(model)
    step(twin)
    assert_identical(model(X).detach(), expected)
    assert not torch.equal(twin(X), expected)


@by_scheme
def test_state_dict_round_trip(scheme):
    model, file = step(prepared(scheme)), io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = prepared(scheme)
    assert not torch.equal(other.eval()(X), model(X))
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert_identical(other(X).detach(), model(X).detach())
    with simulate(), torch.no_grad():
        assert_identical(convert(other)(X), model(X))


# ---- the model passed in, and which layers are taken ----


@pytest.mark.parametrize("inplace", [False, True])
def test_parameters_are_copied_or_kept(inplace):
    model = mlp()
    model[2].eval()
    parameters, hook = dict(model.named_parameters()), []
    model[0].register_full_backward_hook(lambda *_: hook.append(1))
    qat_model = prepare_qat(model, DATA, inplace=inplace)
    assert (qat_model is model) == inplace
    assert [type(model[i]) is nn.Linear for i in (0, 2, 5)] == [not inplace] * 3
    for name, p in parameters.items():
        assert model.get_parameter(name) is p
        assert (qat_model.get_parameter(name) is p) == inplace
    assert [qat_model[i].input_range.training for i in (0, 2)] == [True, False]
    qat_model(X.clone().requires_grad_()).sum().backward()
    assert hook == [1]  # kept


class Shared(nn.Module):
    """Has a Linear under two names and in a plain list, and a weight that an Embedding shares."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(24, 24)
        self.b, self.unseen = self.a, [self.a]
        self.tied, self.emb = nn.Linear(24, 24), nn.Embedding(24, 24)
        self.emb.weight = self.tied.weight

    def forward(self, x):
        return self.b(self.tied(self.unseen[0](x))) + self.emb(torch.tensor(3))


@pytest.mark.parametrize("inplace", [False, True])
def test_shared_layers_and_tied_weights(inplace):
    model = prepare_qat(Shared(), DATA, inplace=inplace)
    assert model.a is model.b is model.unseen[0]
    assert list(layers_of(model)) == ["a"]
    assert model.emb.weight is model.tied.weight
    step(model)
    with simulate(), torch.no_grad():
        assert_identical(convert(model)(X), model(X))


class Zoo(nn.Module):
    """Layers that stay float, each for a different reason."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.head, self.doubled = nn.Linear(24, 24), nn.Linear(24, 24), Doubled(24, 24)
        self.hooked, self.normed = nn.Linear(24, 24), parametrizations.weight_norm(nn.Linear(24, 24))
        self.hooked.register_forward_hook(lambda module, args, y: 2 * y)
        self.never, self.wide = nn.Linear(24, 24), nn.Linear(24, 24).double()

    def forward(self, x):
        x = self.normed(self.hooked(self.doubled(self.head(self.fc(x)))))
        return self.wide(x.double()).float()


REASONS = {
    "head": "excluded by 'he*'",
    "doubled": "Doubled has a forward of its own",
    "hooked": "it has forward hooks",
    "normed": "its weight is computed by a parametrization",
    "never": "calib_loader never reached it",
    "wide": "its weight is torch.float64",
}


@pytest.mark.parametrize("config", [None, QConfig(exclude=("he*",))])
@pytest.mark.filterwarnings("ignore:torchq.convert. 1 of . layers are float64")
def test_what_stays_float_has_its_reason_then_and_after(config):
    model = prepare_qat(Zoo(), DATA, config=QConfig(exclude=("he*",)))
    assert list(layers_of(model)) == ["fc"]
    qmodel = convert(model, config=config)
    assert list(layers_of(qmodel, QuantizedLinear)) == ["fc"]
    for done, kind in ((model, "to be trained, learned range"), (qmodel, "trained, learned range")):
        reasons = {name: layer.reason for name, layer in done.torchq_plan.layers.items()}
        assert reasons.pop("fc") == kind
        assert {name: reasons[name][: len(reason)] for name, reason in REASONS.items()} == REASONS
        assert list(reasons) == list(REASONS)


def test_left_in_float_where_the_reasons_are_lost():
    """If only a part of a model was prepared, the whole model has no plan with the reasons."""
    whole = nn.ModuleDict({"body": prepare_qat(mlp(), DATA), "head": nn.Linear(8, 2)})
    plan = convert(whole).torchq_plan.layers
    assert plan["head"].reason == "prepare_qat left it in float"
    assert plan["body.0"].kind == "int8 static"


@pytest.mark.parametrize("inplace", [False, True])
def test_a_prepared_layer_that_convert_leaves_out_is_float_again(inplace):
    """An excluded or never trained layer becomes a plain nn.Linear, which does not fake-quantize."""
    model = step(prepared("observed", nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 8))))
    model[1].input_range.ends.fill_(math.nan)
    weight = model[0].weight.detach().clone()
    qmodel = convert(model, config=QConfig(exclude=("0",)), inplace=inplace)
    assert [type(layer) for layer in qmodel] == [nn.Linear, nn.Linear]
    assert_identical(qmodel[0].weight.detach(), weight)
    assert qmodel.torchq_plan.layers["1"].reason.startswith("its trained range is not finite: no training batch")
    assert (type(model[0]) is nn.Linear) == inplace
    assert set(qmodel.state_dict()) == {"0.weight", "0.bias", "1.weight", "1.bias"}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
def test_a_transformer_encoder_is_fake_quantized_in_eval_mode_too():
    """In eval mode, torch's fused kernels would read the float weights."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(24, 4, 48, batch_first=True, dropout=0.0), 2)
    model = prepare_qat(encoder, [x.reshape(2, 8, 24) for x in DATA])
    x = X.reshape(3, 11, 24)
    with torch.no_grad():
        y = model.eval()(x)
        assert not torch.equal(y, encoder.eval()(x))
        with simulate():
            torch.testing.assert_close(convert(model)(x), y, rtol=0, atol=0)


@pytest.mark.parametrize("inplace", [False, True])
def test_the_model_is_a_linear(inplace):
    model = prepare_qat(nn.Linear(24, 8), DATA, inplace=inplace)
    assert type(model) is QATLinear
    with simulate(), torch.no_grad():
        assert_identical(convert(model)(X), model(X))
