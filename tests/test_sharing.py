"""Layers used twice, weights used twice, and layers that no batch reaches: their plans and their outputs."""

import copy

import pytest
import torch
from torch import nn

from helpers.covers import pairs_of
from helpers.models import with_own_norms
from helpers.numbers import normal
from torchq import QConfig, QuantizedLinear, convert
from torchq.calibration.calibrate import calibrate
from torchq.modules.registry import find_layers
from torchq.numerics.metrics import sqnr_db

pytestmark = pytest.mark.usefixtures("seeded")

K = 32
STATIC, DYNAMIC = QConfig(activation="static", observer="minmax"), QConfig(activation="dynamic")
inplace_or_not = pytest.mark.parametrize("inplace", [False, True])
ROUNDINGS = ["nearest", "gptq", "auto"]
by_rounding = pytest.mark.parametrize("rounding", ROUNDINGS)


def correlated(rows, seed):
    """Inputs with most of their energy in a few directions, which depend on `seed`. GPTQ gains on them."""
    return normal(rows, 4, seed=seed) @ normal(4, K, seed=seed + 50) + 0.2 * normal(rows, K, seed=seed + 1)


DATA, X = [correlated(200, 1), correlated(60, 1)], correlated(100, 1)


def outliers(norm, *readers):
    """Makes channels 3 and 7 of the norm 50 times as large, and undoes it in the readers: a case for smoothing."""
    norm.weight[[3, 7]] *= 50
    for reader in readers:
        reader.weight[:, [3, 7]] /= 50


# ---- a layer used twice in one forward ----


class Twice(nn.Module):
    """`fc` reads the norm's output and, 100 times as large, its own."""

    def __init__(self):
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(K), nn.Linear(K, K)
        outliers(self.norm, self.fc)

    def forward(self, x):
        return self.fc(100 * self.fc(self.norm(x)))


@inplace_or_not
@by_rounding
def test_a_layer_used_twice_is_one_layer_that_saw_both_inputs(inplace, rounding):
    model = Twice().eval()
    record = calibrate(model, DATA, find_layers(model), QConfig()).records["fc"]
    first = model.norm(torch.cat(DATA))
    both = torch.cat([first, 100 * model.fc(first)])
    assert (record.calls, record.sample.rows_seen) == (4, len(both))
    torch.testing.assert_close(record.extremes, torch.stack(torch.aminmax(both, dim=0)), rtol=1e-5, atol=1e-4)

    qmodel = convert(copy.deepcopy(model), DATA, inplace=inplace, config=QConfig(rounding=rounding))
    assert list(qmodel.torchq_plan.layers) == ["fc"]
    assert torch.equal(qmodel.norm.weight, model.norm.weight)
    assert type(qmodel.fc) is QuantizedLinear
    assert sqnr_db(model(X), qmodel(X)) > 15  # one 8-bit range for two different inputs, of which one has outliers


class SharedInSequential(nn.Sequential):
    """fc, relu, fc: one layer at two places. Nothing may be folded into it."""

    def __init__(self):
        fc = nn.Linear(K, K)
        super().__init__(nn.LayerNorm(K), fc, nn.ReLU(), fc)
        outliers(self[0], fc)


@inplace_or_not
@by_rounding
def test_a_layer_at_two_places_is_swapped_at_both(inplace, rounding):
    model = SharedInSequential().eval()
    qmodel = convert(copy.deepcopy(model), DATA, inplace=inplace, config=QConfig(rounding=rounding))
    (plan,) = qmodel.torchq_plan.layers.values()
    assert qmodel[1] is qmodel[3]
    assert (type(qmodel[1]), type(qmodel[2])) == (QuantizedLinear, nn.ReLU)
    assert (plan.activation, plan.feeds) == (None, None)
    assert torch.equal(qmodel[0].weight, model[0].weight)
    assert sqnr_db(model(X), qmodel(X)) > 15


# ---- a weight used twice ----


class TiedLinears(nn.Module):
    """One Parameter in two layers. Each has its own norm before it, and differently correlated inputs."""

    def __init__(self):
        super().__init__()
        self.norm, self.mix, self.other = nn.LayerNorm(K), nn.Linear(K, K), nn.LayerNorm(K)
        self.a, self.b = nn.Linear(K, K), nn.Linear(K, K)
        self.b.weight = self.a.weight
        self.norm.weight[[3, 7]] *= 50
        self.a.weight[:, [3, 7]] /= 50

    def forward(self, x):
        return self.a(self.norm(x)), self.b(self.other(self.mix(x)))


@pytest.mark.parametrize(("inplace", "rounding", "smoothing"), pairs_of([False, True], ROUNDINGS, ["none", "auto"]))
def test_linears_that_share_a_weight_are_quantized_each_by_its_own_inputs(inplace, rounding, smoothing):
    """The smoothed layer gets its own scales. The other layer, and the Parameter, do not change."""
    model = TiedLinears().eval()
    weight = model.a.weight.clone()
    config = QConfig(activation="dynamic", rounding=rounding, smoothing=smoothing)
    given = copy.deepcopy(model)
    parameter = given.a.weight
    qmodel = convert(given, DATA, inplace=inplace, config=config)
    assert torch.equal(parameter, weight)
    for (name, expected), actual in zip(zip("ab", model(X), strict=True), qmodel(X), strict=True):
        assert sqnr_db(expected, actual) > (15 if smoothing == "none" and name == "a" else 35)
        # As if nothing were shared: a copy of the weight in each layer, and the same codes and scales.
    untied = copy.deepcopy(model)
    untied.b.weight = nn.Parameter(weight.clone())
    alone = convert(untied, DATA, config=config)
    assert (qmodel.torchq_plan.layers["a"].channel_scale is not None) == (smoothing == "auto")
    for name in ("a", "b"):
        assert qmodel.torchq_plan.layers[name] == alone.torchq_plan.layers[name]
        values = zip(
            qmodel.get_submodule(name).state_dict().values(),
            alone.get_submodule(name).state_dict().values(),
            strict=True,
        )
        assert all(torch.equal(actual, expected) for actual, expected in values)
    if rounding == "gptq":
        assert not torch.equal(qmodel.a.weight, qmodel.b.weight)  # the inputs differ, so the rounding does too


class Language(nn.Module):
    """A language model whose embedding and head share a weight. The head reads a norm that is worth smoothing."""

    def __init__(self):
        super().__init__()
        self.emb, self.fc, self.norm = nn.Embedding(50, K), nn.Linear(K, K), nn.LayerNorm(K)
        self.head = nn.Linear(K, 50, bias=False)
        self.head.weight = self.emb.weight
        self.norm.weight[[3, 7]] *= 50
        self.head.weight[:, [3, 7]] /= 50

    def forward(self, tokens):
        return self.head(self.norm(self.fc(self.emb(tokens))))


@inplace_or_not
@by_rounding
@pytest.mark.parametrize("activation", ["auto", "dynamic"])
def test_a_head_that_shares_the_weight_of_an_embedding_stays_as_it_is(inplace, rounding, activation):
    model = Language().eval()
    tokens = [torch.randint(50, (8, 16), generator=torch.Generator().manual_seed(i)) for i in range(4)]
    qmodel = convert(
        copy.deepcopy(model),
        tokens[:3],
        inplace=inplace,
        config=QConfig(activation=activation, rounding=rounding),
    )
    assert torch.equal(qmodel.emb.weight, model.emb.weight)
    assert torch.equal(qmodel.norm.weight, model.norm.weight)
    assert qmodel.head.weight is qmodel.emb.weight
    assert sqnr_db(model(tokens[3]), qmodel(tokens[3])) > 30


# ---- a layer no batch reaches ----


class Auxiliary(nn.Module):
    """A second head, used in training or on request, reads the first one's input, possibly flattened."""

    def __init__(self, flat=False):
        super().__init__()
        self.flat = flat
        self.norm, self.head, self.aux = nn.LayerNorm(K), nn.Linear(K, 24), nn.Linear(K * (5 if flat else 1), 3)
        outliers(self.norm, self.head)

    def forward(self, x, aux=False):
        y = self.norm(x)
        if self.training or aux:
            return self.head(y), self.aux(y.reshape(-1, 5 * K) if self.flat else y)
        return self.head(y)


@inplace_or_not
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("exclude", [(), ("aux",)])
def test_a_head_used_only_in_training_stays_float_and_exact(inplace, flat, exclude):
    """Its input must not be rescaled, although no batch showed that it reads it."""
    model = Auxiliary(flat).eval()
    qmodel = convert(copy.deepcopy(model), DATA, inplace=inplace, config=QConfig(exclude=exclude))
    plan = qmodel.torchq_plan
    assert plan.layers["aux"].kind == "float"
    assert plan.layers["aux"].reason.startswith("excluded by" if exclude else "calib_loader never reached it")
    assert plan.layers["head"].channel_scale is not None
    model = with_own_norms(model)
    assert torch.equal(qmodel(X, aux=True)[1], model(X, aux=True)[1])
    assert torch.equal(qmodel.train()(X)[1], model.train()(X)[1])
    reached = convert(Auxiliary(flat).eval(), DATA, forward=lambda m, x: m(x, aux=True))
    assert [layer.is_int8 for layer in reached.torchq_plan.layers.values()] == [True, True]


def test_a_head_used_only_in_training_when_the_scheme_is_asked_for():
    """With "static", there is no range for it. With "dynamic", none is needed."""
    with pytest.raises(ValueError, match=r"calib_loader never reached 'aux'. Pass data that runs .*, exclude them, or"):
        convert(Auxiliary().eval(), DATA, config=STATIC)
    model = Auxiliary().eval()
    qmodel = convert(model, DATA, config=DYNAMIC)
    assert qmodel.torchq_plan.layers["aux"].kind == "int8 dynamic"
    assert sqnr_db(model(X, aux=True)[1], qmodel(X, aux=True)[1]) > 15


class Experts(nn.Module):
    """Runs one of two experts, by the sign of the input. Both read the norm's output."""

    def __init__(self):
        super().__init__()
        self.norm, self.experts = nn.LayerNorm(K), nn.ModuleList([nn.Linear(K, 24) for _ in range(2)])
        outliers(self.norm, *self.experts)

    def forward(self, x):
        return self.experts[int(x[0, 0] > 0)](self.norm(x))


def test_an_expert_that_no_batch_chose_gets_the_input_it_was_trained_on():
    model = Experts().eval()
    x = X * X[0, 0].sign()
    qmodel = convert(model, [-x])
    assert [layer.kind == "float" for layer in qmodel.torchq_plan.layers.values()] == [False, True]
    assert torch.equal(qmodel(x), with_own_norms(model)(x))
    both = convert(model, [-x, x])
    assert all(layer.channel_scale for layer in both.torchq_plan.layers.values())
    assert sqnr_db(model(x), both(x)) > 35


def test_beside_attention_layers_are_smoothed():
    """Layers that nn.MultiheadAttention never calls are no concern of the others."""
    block = nn.TransformerEncoderLayer(K, 4, 48, batch_first=True, norm_first=True).eval()
    outliers(block.norm2, block.linear1)
    plan = convert(block, [x.reshape(2, -1, K) for x in DATA]).torchq_plan
    assert plan.layers["linear1"].channel_scale is not None
