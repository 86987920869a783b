"""weight_norm and spectral_norm, old and new, pruning, and modules that several parents share."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from helpers.compare import snapshot
from helpers.covers import pairs_of
from helpers.linear_like import Conv1D, FalconLinear
from helpers.numbers import normal
from torchq import QConfig, QuantizedLinear, convert, prepare_qat
from torchq.modules.computed_weights import weight_of
from torchq.numerics.metrics import sqnr_db

pytestmark = [
    pytest.mark.usefixtures("seeded"),
    pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning"),
]

X = normal(64, 32)
DATA = [normal(64, 32, seed=i) for i in range(4)]
NORMS = {
    "old weight_norm": weight_norm,
    "old weight_norm of all": lambda layer: weight_norm(layer, dim=None),
    "old spectral_norm": spectral_norm,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "pruned twice": lambda layer: prune.ln_structured(
        prune.random_unstructured(layer, "weight", 0.2), "weight", 4, 2, 0
    ),
}


def network(norm):
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), norm(nn.Linear(48, 32)), nn.Tanh(), norm(FalconLinear(32, 32)))


def plain(model):
    """The same model with the weights that it uses in eval mode."""
    twin = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 32)).eval()
    model = copy.deepcopy(model).eval()
    model(X)  # a hook computes the weight in a call
    for ours, theirs in zip(twin, model, strict=True):
        if isinstance(ours, nn.Linear):
            ours.weight.copy_(theirs.weight), ours.bias.copy_(theirs.bias)
    return twin


@pytest.mark.parametrize(("name", "calibrated", "mode"), pairs_of(NORMS, [False, True], ["train", "eval"]))
def test_it_is_the_weight_of_eval_mode(name, calibrated, mode):
    model, data = network(NORMS[name]), DATA if calibrated else None
    for _ in range(3):
        model.train()(X)  # so that power iterations come near to the norm
    getattr(model, mode)()
    before, twin = snapshot(model), plain(model)
    qmodel, expected = convert(model, data, progress=False), convert(twin, data, progress=False)
    assert torch.equal(qmodel(X), expected(X))
    assert snapshot(model) == before
    assert sqnr_db(twin(X), qmodel(X)) > 30
    assert [type(layer) for layer in qmodel][::2] == [QuantizedLinear] * 3
    assert set(qmodel.state_dict()) == set(expected.state_dict())
    assert not any(layer._forward_pre_hooks for layer in qmodel)


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_in_place_copied_and_saved(norm):
    model = network(norm).eval()
    model(X)
    expected = convert(model)(X)
    qmodel = convert(model, inplace=True)
    file = io.BytesIO()
    torch.save(qmodel.state_dict(), file)
    file.seek(0)
    loaded = convert(network(norm).eval())
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for again in (qmodel, copy.deepcopy(qmodel), pickle.loads(pickle.dumps(qmodel)), loaded):
        assert torch.equal(again(X), expected)


def test_a_weight_that_is_stale_is_computed_anew():
    """The attribute that the hook sets is that of the last call."""
    layer = weight_norm(nn.Linear(32, 48)).eval()
    layer.weight_g.mul_(3)
    exact = 3 * nn.functional.linear(X, layer.weight)
    assert torch.allclose(nn.functional.linear(X, weight_of(layer)), exact, atol=1e-5)
    assert sqnr_db(exact + layer.bias, convert(layer)(X)) > 30


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("name", [name for name in NORMS if name != "orthogonal"])  # which takes matrices only
def test_of_a_bilinear_layer(name, calibrated):
    """What its weight is computed of has changed since its last call."""

    class Pairs(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair = NORMS[name](nn.Bilinear(32, 32, 48)).eval()

        def forward(self, x):
            return self.pair(x, x.flip(0))

    model = Pairs()
    model(X)
    for parameter in model.pair.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    qmodel = convert(model, DATA if calibrated else None, progress=False)
    assert sqnr_db(model(X), qmodel(X)) > 35
    assert set(qmodel.state_dict()) == {"pair.bias", "pair.product.weight_int8", "pair.product.weight_scale"}


def test_other_pruning_than_torchs_is_a_hook():
    class Doubling(prune.RandomUnstructured):
        def __call__(self, module, inputs):
            super().__call__(module, inputs)
            module.weight = 2 * module.weight

    layer = nn.Linear(32, 48)
    Doubling.apply(layer, "weight", 0.5)
    layer(X)
    assert convert(nn.Sequential(layer, nn.Linear(48, 32))).torchq_plan.layers["0"].kind == "float"


def test_pruned_weights_stay_zero_and_pruned_channels_too():
    layer = prune.ln_structured(nn.Conv2d(16, 32, 3), "weight", 8, 2, 0)
    model = nn.Sequential(layer, nn.ReLU(), nn.Conv2d(32, 16, 3)).eval()
    data = [normal(4, 16, 8, 8, seed=i) for i in range(4)]
    qmodel = convert(model, data, progress=False)
    assert sqnr_db(model(data[0]), qmodel(data[0])) > 35
    gone = layer.weight_mask.flatten(1).sum(1) == 0
    assert gone.sum() == 8
    assert not qmodel[0].weight_int8.flatten(1)[gone].any()


@pytest.mark.parametrize("make", [lambda: nn.Linear(32, 32), lambda: nn.Conv1d(32, 32, 1)], ids=["linear", "conv"])
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_an_int8_layer_refuses_it_and_stays_as_it_was(norm, make):
    layer = convert(nn.Sequential(make()))[0]
    x = X if isinstance(layer, QuantizedLinear) else X.t()[None]
    expected, names = layer(x), list(layer.state_dict())
    with pytest.raises(RuntimeError, match="the weight of an int8 layer can't be written"):
        norm(layer)
    with pytest.raises(RuntimeError, match=r"can't be written \(weight\)"):
        del layer.weight
    with pytest.raises(RuntimeError, match=r"can't be written \(bias\)"):
        layer._parameters.pop("bias")
    assert torch.equal(layer(x), expected)
    assert (list(layer.state_dict()), [name for name, _ in layer.named_parameters()]) == (names, ["weight", "bias"])
    assert layer.weight.shape[:2] == (32, 32)


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_it_is_not_trained(norm):
    model = network(norm)
    model(X)
    prepared = prepare_qat(model)
    how = "hook" if "weight" not in getattr(model[2], "parametrizations", {}) else "parametrization"
    assert prepared.torchq_plan.layers["2"].reason == f"its weight is computed by a {how}, not trained"


def test_other_hooks_still_keep_it_in_float():
    layer = weight_norm(nn.Linear(32, 48))
    layer.register_forward_pre_hook(lambda *args: None)
    pruned = prune.identity(nn.Linear(48, 32), "bias")
    model = nn.Sequential(nn.Linear(32, 32), layer, pruned)
    model(X)
    plan = convert(model).torchq_plan
    assert [plan.layers[name].reason for name in "12"] == ["it has forward hooks, which a swap would drop"] * 2


def test_a_parametrized_bias_is_taken_too():
    class Doubled(nn.Module):
        def forward(self, x):
            return 2 * x

    layer = nn.Linear(32, 48)
    parametrize.register_parametrization(layer, "bias", Doubled())
    assert torch.equal(convert(layer).bias, layer.bias)


# ---- Shared modules -----------------------------------------------------------------------------------------------


class Parent(nn.Module):
    def __init__(self, shared):
        super().__init__()
        self.inner, self.norm = shared, nn.LayerNorm(32)

    def forward(self, x):
        return self.norm(x + self.inner(x))


MAKES = {
    "nn.Linear": lambda: nn.Linear(32, 32),
    "Conv1D": lambda: Conv1D(32, 32),
    "FalconLinear": lambda: FalconLinear(32, 32),
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(32, 32)),
    "nested": lambda: nn.Sequential(nn.Linear(32, 64), nn.ReLU(), Conv1D(32, 64)),
}


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("data", [None, DATA], ids=["without data", "calibrated"])
def test_a_module_of_several_parents_is_one_int8_module(make, inplace, data):
    shared = make()
    model = nn.Sequential(Parent(shared), Parent(shared), nn.ModuleDict({"again": shared})["again"]).eval()
    exact, first = model(X), [name for name, _ in model.named_modules()]
    qmodel = convert(model, data, inplace=inplace, progress=False)
    assert qmodel[0].inner is qmodel[1].inner is qmodel[2]
    assert [name for name, module in qmodel.named_modules() if isinstance(module, QuantizedLinear)] == [
        name for name in first if name in qmodel.torchq_plan.layers
    ]
    assert sqnr_db(exact, qmodel(X)) > 30
    copied, state = copy.deepcopy(qmodel), qmodel.state_dict()
    assert copied[0].inner is copied[2]
    assert {key.removeprefix("0.inner") for key in state if key.startswith("0.inner")} == {
        key.removeprefix("2") for key in state if key.startswith("2")
    }
    again = convert(model, config=QConfig(exclude=("0.inner*",))) if not inplace else qmodel
    assert inplace or torch.equal(again(X), exact)
    copied.load_state_dict(state)
    assert torch.equal(copied(X), qmodel(X))
