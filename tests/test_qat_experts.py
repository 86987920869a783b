"""Quantization-aware training of stacked experts: each expert's rows are multiplied by int8's values."""

import copy
import pickle

import pytest
import torch

from helpers.compare import assert_identical
from helpers.covers import pairs_of
from helpers.experts import EXPERTS, FORMS, HIDDEN, Experts, Layer
from helpers.numbers import normal
from torchq import QConfig, QuantizedLinear, convert, prepare_qat, simulate
from torchq.modules.experts import QATExperts, QuantizedExperts
from torchq.modules.ranges import LearnedRange, ObservedRange, PerToken

SCHEMES = {"learned": ("static", "learned"), "observed": ("static", "observed"), "dynamic": ("dynamic", "auto")}
X = normal(64, HIDDEN, seed=3)


def layer(form="gated", reached=EXPERTS):
    torch.manual_seed(0)
    return Layer(Experts(**FORMS[form]), reached)


def prepared(scheme="learned", model=None, data=(X,), **config):
    activation, ranges = SCHEMES[scheme]
    data = None if activation == "dynamic" else list(data)
    return prepare_qat(model or layer(), data, config=QConfig(activation=activation, **config), ranges=ranges)


def train(model, x=X, steps=3):
    """Trains for a few steps on arbitrary targets; gives the losses."""
    optimizer, losses = torch.optim.Adam(model.train().parameters(), lr=3e-3), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - normal(*x.shape, seed=5)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def parts_of(model):
    return [f"{expert}.{name}" for expert in range(EXPERTS) for name in (model.experts.up, "down_proj")]


@pytest.mark.parametrize(("form", "scheme", "weight"), pairs_of(FORMS, SCHEMES, ["per_channel", "per_tensor"]), ids=str)
def test_the_training_forward_is_the_simulated_forward_of_the_converted_model(form, scheme, weight):
    model = prepared(scheme, layer(form), weight=weight)
    assert type(model.experts) is QATExperts
    train(model)
    qmodel = convert(model)
    assert type(qmodel.experts) is QuantizedExperts
    assert repr(qmodel.experts).startswith("QuantizedExperts(\n  Experts, 4 experts")
    with simulate(), torch.no_grad():
        assert_identical(qmodel(X), model(X))
    for part in parts_of(model):
        trained, int8 = model.experts.form(part), qmodel.experts.get_submodule(part)
        expected = QuantizedLinear.from_float(
            model.experts.matrix(part), per_channel=weight == "per_channel", channel_scale=trained.channel_scale
        )
        assert_identical(int8.weight_int8, expected.weight_int8)
        assert int8.input_qparams == trained.input_range.qparams()
        assert (int8.input_qparams is None) == (scheme == "dynamic")


@pytest.mark.parametrize("form", FORMS)
def test_gradients_reach_all_that_trains_and_names_stay(form):
    model = prepared(model=layer(form))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ends = {f"experts.qat_parts.{part.replace('.', '_')}.input_range.ends" for part in parts_of(model)}
    own = {name for name, _ in layer(form).named_parameters()} | {"router.input_range.ends"}
    if "router.input_range.ends" not in before:  # too small a layer to become int8
        own.remove("router.input_range.ends")
    assert set(before) == own | ends
    train(model, steps=1)
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []


def test_training_lowers_the_loss():
    losses = train(prepared(), steps=30)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("scheme", ["learned", "observed"])
def test_experts_that_no_data_reaches_have_ranges_per_token(scheme):
    """Training may not reach them either, and the int8 module needs a scheme for each."""
    model = prepared(scheme, layer(reached=2))
    kinds = [type(model.experts.form(part).input_range) for part in parts_of(model)]
    known = LearnedRange if scheme == "learned" else ObservedRange
    assert kinds == [known] * 4 + [PerToken] * 4
    train(model)
    qmodel = convert(model)
    dynamic = [qmodel.experts.get_submodule(part).input_qparams is None for part in parts_of(model)]
    assert dynamic == [False] * 4 + [True] * 4
    with simulate(), torch.no_grad():
        assert_identical(qmodel(X), model(X))


def test_without_data_all_of_them_have():
    model = prepare_qat(layer())
    assert {type(model.experts.form(part).input_range) for part in parts_of(model)} == {PerToken}


def test_an_expert_that_is_left_out_stays_float_then_and_after():
    model = prepared(exclude=("experts.1",))
    train(model)
    assert "1_down_proj" not in model.experts.qat_parts
    qmodel = convert(model)
    assert qmodel.torchq_plan.layers["experts.1.down_proj"].reason == "excluded by 'experts.1'"
    with simulate(), torch.no_grad():
        assert_identical(qmodel(X), model(X))
    back = convert(model, config=QConfig(exclude=("experts",)))
    assert type(back.experts) is Experts
    assert set(back.experts.state_dict()) == set(layer().experts.state_dict())


def test_states_and_copies():
    model = prepared("observed")
    train(model)
    other = prepared("observed").eval()
    other.load_state_dict(model.state_dict(), strict=True)
    for twin in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_identical(twin(X), model(X))
        train(twin)
        assert not torch.equal(twin(X), model(X))


def test_a_converted_one_is_saved_and_loaded():
    model = prepared("dynamic")
    qmodel = convert(model.eval())
    for twin in (copy.deepcopy(qmodel), pickle.loads(pickle.dumps(qmodel))):
        assert_identical(twin(X), qmodel(X))
    other = convert(prepared("dynamic", layer("gated")).eval())
    other.load_state_dict(qmodel.state_dict(), strict=True)
    assert_identical(other(X), qmodel(X))


def test_bad_input():
    model = prepared()
    ids, weights = torch.zeros(64, 2, dtype=torch.long), torch.ones(64, 2)
    with pytest.raises(IndexError, match=r"the id of an expert is 5, but there are 4 experts"):
        model.experts(X, ids + 5, weights)
    with pytest.raises(TypeError, match=r"x must be float32, bfloat16 or float16, got torch.float64"):
        model.experts(X.double(), ids, weights)
    with pytest.raises(ValueError, match=r"the model is already prepared \('.*' is a QAT"):
        prepare_qat(model)
