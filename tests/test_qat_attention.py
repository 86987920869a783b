"""Quantization-aware training of nn.MultiheadAttention: its four products train on int8's values."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import torchq
from helpers.compare import assert_identical
from helpers.covers import pairs_of
from helpers.multihead import FORMS, inputs
from helpers.numbers import normal
from torchq import QConfig, QuantizedLinear, convert, freeze_ranges, prepare_qat, simulate
from torchq.modules.attention_types import QATMultiheadAttention
from torchq.modules.encoder import Int8TransformerEncoder
from torchq.modules.multihead_attention import QuantizedMultiheadAttention
from torchq.numerics.metrics import sqnr_db

E, HEADS = 16, 4
PARTS = ["q_proj", "k_proj", "v_proj", "out_proj"]
EXACT = QConfig(attention="none")  # torch's own attention, as in training
SCHEMES = {"learned": ("static", "learned"), "observed": ("static", "observed"), "dynamic": ("dynamic", "auto")}


class Attends(nn.Module):
    """An nn.MultiheadAttention, called with all its arguments."""

    def __init__(self, **form):
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(E, HEADS, **form)
        with torch.no_grad():
            for name, parameter in self.attention.named_parameters():
                if "bias" in name:
                    parameter.normal_()

    def forward(self, query, key, value, **call):
        return self.attention(query, key, value, **call)


def prepared(scheme="learned", form=None, weight="per_channel", **config):
    model = Attends(**(form or {}))
    activation, ranges = SCHEMES[scheme]
    data = None if activation == "dynamic" else [inputs(model.attention)]
    return prepare_qat(model, data, config=QConfig(weight=weight, activation=activation, **config), ranges=ranges)


def train(model, *xs, steps=3):
    """Trains for a few steps on arbitrary targets; gives the losses."""
    optimizer, losses = torch.optim.Adam(model.train().parameters(), lr=3e-3), []
    for _ in range(steps):
        optimizer.zero_grad()
        y = model(*xs)
        y = y[0] if isinstance(y, tuple) else y
        loss = (y - normal(*y.shape, seed=5)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


@pytest.mark.parametrize(("form", "scheme", "weight"), pairs_of(FORMS, SCHEMES, ["per_channel", "per_tensor"]), ids=str)
def test_the_training_forward_is_the_simulated_forward_of_the_converted_model(form, scheme, weight):
    model = prepared(scheme, FORMS[form], weight)
    xs = inputs(model.attention)
    train(model, *xs)
    assert type(model.attention) is QATMultiheadAttention
    qmodel = convert(model, config=EXACT)
    assert type(qmodel.attention) is QuantizedMultiheadAttention
    with simulate(), torch.no_grad():
        for call in ({}, {"need_weights": False}, {"average_attn_weights": False}):
            for actual, expected in zip(qmodel(*xs, **call), model(*xs, **call), strict=True):
                assert (actual is None) == (expected is None)
                if actual is not None:
                    assert_identical(actual, expected)
    for part in PARTS:
        trained, int8 = model.attention.form(part), qmodel.attention.get_submodule(part)
        matrix = model.attention.matrix(part)
        expected = QuantizedLinear.from_float(
            matrix, per_channel=weight == "per_channel", channel_scale=trained.channel_scale
        )
        assert_identical(int8.weight_int8, expected.weight_int8)
        assert int8.input_qparams == trained.input_range.qparams()
        assert (int8.input_qparams is None) == (scheme == "dynamic")


def test_torchqs_own_attention_between_the_products_sums_in_another_order():
    """That moves a value by units of 2^-24, and so a few codes of out_proj's input by one."""
    model = prepared("dynamic")
    xs = inputs(model.attention)
    train(model, *xs)
    qmodel = convert(model)
    assert qmodel.torchq_plan.attentions["attention"].scheme == "float32"
    with simulate(), torch.no_grad():
        assert sqnr_db(model(*xs)[0], qmodel(*xs)[0]) > 50


@pytest.mark.parametrize("form", FORMS)
def test_gradients_reach_all_that_trains_and_names_stay(form):
    model = prepared(form=FORMS[form])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ranges = {f"attention.qat_parts.{part}.input_range.ends" for part in PARTS}
    assert set(before) == {name for name, _ in Attends(**FORMS[form]).named_parameters()} | ranges
    train(model, *inputs(model.attention), steps=1)
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []


def test_dropout_and_masks_are_as_in_torch():
    """With out_proj in float and identities for the others, torch's own module gives the same on rounded inputs."""
    xs = [normal(3, 6, E, seed=i).sign() for i in range(3)]
    form = {"batch_first": True, "dropout": 0.5, "bias": False}
    model, mask = Attends(**form), torch.ones(6, 6, dtype=torch.bool).triu(1)
    with torch.no_grad():
        model.attention.in_proj_weight.copy_(torch.eye(E).repeat(3, 1))
    model = prepare_qat(model, config=QConfig(activation="dynamic", exclude=("*.out_proj",)))
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[1, 4:] = True
    call = {"attn_mask": mask, "key_padding_mask": padding, "is_causal": True}
    assert model.attention.form("out_proj") is None
    rounded = [model.attention.multiplied("q_proj", x).detach() for x in xs]
    twin = copy.deepcopy(model)
    twin.attention.release()
    for mode in (True, False):
        torch.manual_seed(3)
        y, weights = model.train(mode)(*xs, **call)
        torch.manual_seed(3)
        expected, expected_weights = twin.train(mode)(*rounded, **call)
        torch.testing.assert_close(y, expected, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(weights, expected_weights, rtol=2e-6, atol=2e-7)


def encoder(**options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, HEADS, 2 * E, batch_first=True, dropout=0.0, **options)
    return nn.TransformerEncoder(layer, 2)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
@pytest.mark.parametrize("options", [{}, {"norm_first": True}], ids=str)
def test_a_transformer_encoder_trains_converts_and_skips_padding(options):
    x = normal(4, 6, E)
    model = prepare_qat(encoder(**options), [x])
    losses = train(model, x, steps=30)
    assert losses[-1] < 0.8 * losses[0]
    assert [type(layer.self_attn) for layer in model.layers] == [QATMultiheadAttention] * 2
    qmodel = convert(model, config=EXACT)
    padding = torch.arange(6) >= torch.tensor([6, 3, 5, 2])[:, None]
    with simulate(), torch.no_grad():
        assert_identical(qmodel(x), model(x))
        expected = model(x, src_key_padding_mask=padding)
        torch.testing.assert_close(qmodel(x, src_key_padding_mask=padding)[~padding], expected[~padding])
    assert (type(qmodel) is Int8TransformerEncoder) == (not options)  # where torch itself would skip padding


def test_states_and_copies():
    model = prepared("observed")
    xs = inputs(model.attention)
    train(model, *xs)
    other = prepared("observed").eval()
    other.load_state_dict(model.state_dict(), strict=True)
    for twin in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_identical(twin(*xs)[0], model(*xs)[0])
        train(twin, *xs)
        assert not torch.equal(twin(*xs)[0], model(*xs)[0])


def test_observed_ranges_move_in_training_and_hold_in_eval_and_frozen():
    model = prepared("observed")
    xs = [5 * x for x in inputs(model.attention)]
    ends = {part: model.attention.form(part).input_range.ends.clone() for part in PARTS}
    model.eval()(*xs)
    freeze_ranges(model)
    model.train()(*xs)
    assert all(torch.equal(model.attention.form(part).input_range.ends, ends[part]) for part in PARTS)
    model = prepared("observed")
    model.train()(*xs)
    assert not any(torch.equal(model.attention.form(part).input_range.ends, ends[part]) for part in PARTS)


@pytest.mark.parametrize("inplace", [False, True])
def test_parts_that_are_left_out_stay_float_then_and_after(inplace):
    model = prepared(exclude=("attention.k_proj",))
    xs = inputs(model.attention)
    train(model, *xs)
    assert list(model.attention.qat_parts) == ["q_proj", "v_proj", "out_proj"]
    expected = model(*xs)[0].detach()
    qmodel = convert(copy.deepcopy(model), config=EXACT)
    assert type(qmodel.attention.k_proj) is nn.Linear
    assert torchq.plan_of(qmodel).layers["attention.k_proj"].reason == "excluded by 'attention.k_proj'"
    with simulate():
        assert_identical(qmodel(*xs)[0].detach(), expected)
    weight = model.attention.in_proj_weight.detach().clone()
    back = convert(model, config=QConfig(exclude=("attention",)), inplace=inplace)
    assert type(back.attention) is nn.MultiheadAttention
    assert_identical(back.attention.in_proj_weight.detach(), weight)
    assert set(back.state_dict()) == set(Attends().state_dict())


def test_what_cannot_be_prepared_says_why():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(E, HEADS), "head": nn.Linear(E, E)})
    parametrizations.weight_norm(model["attention"], "in_proj_weight")
    plan = prepare_qat(model).torchq_plan.layers
    assert plan["attention.q_proj"].reason == "its weights are computed by a parametrization, not trained"
    assert plan["head"].kind == "int8 static"
    with pytest.raises(ValueError, match=r"the model is already prepared \('attention.q_proj' is a QATMultiheadAtt"):
        prepare_qat(prepared())


def test_bad_input():
    model = prepared()
    x = normal(2, 3, E)
    with pytest.raises(ValueError, match=r"nn.MultiheadAttention: key must be \(length, 16\)"):
        model(x, x[..., :4], x)
    with pytest.raises(ValueError, match="is_causal is a hint that attn_mask is the causal mask"):
        model(x, x, x, is_causal=True)
    with pytest.raises(TypeError, match=r"x must be float32, bfloat16 or float16, got torch.float64"):
        model(x.double(), x.double(), x.double())
    with torch.no_grad():
        model.attention.in_proj_weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="1 NaN or Inf"):
        model(x, x, x)
