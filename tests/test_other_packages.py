"""What modules of other packages hold and do, and those of torch don't: none of it may stand in the way."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune, spectral_norm, weight_norm

import torchq
from helpers.numbers import normal
from torchq import QuantizedLinear, convert, prepare_qat, report

pytestmark = [
    pytest.mark.usefixtures("seeded"),
    pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning"),
]

X = normal(16, 64)


# ---- A parameter that is None ---------------------------------------------------------------------------------------


class Optional(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.body = nn.Parameter(normal(64, 64)), nn.Linear(64, 64)
        self.register_parameter("shift", None)
        self.register_buffer("mean", None)

    def forward(self, x):
        return self.body(x @ self.weight)


def test_what_stays_in_float_may_have_no_bias():
    model = nn.ModuleDict({"up": nn.ConvTranspose2d(8, 4, 2, bias=False), "own": Optional()})
    left = {each.kind: each for each in report(convert(model)).model.left}
    assert (left["ConvTranspose2d"].bytes, left["ConvTranspose2d"].matrices) == (8 * 4 * 2 * 2 * 4, ("up.weight",))
    assert (left["Optional's own parameters"].bytes, left["Optional's own parameters"].matrices) == (
        64 * 64 * 4,
        ("own.weight",),
    )


# ---- Sparse buffers, as openai-whisper's ---------------------------------------------------------------------------


class Heads(nn.Module):
    def __init__(self, persistent):
        super().__init__()
        self.body = nn.Linear(64, 64)
        heads = torch.zeros(8, 8)
        heads[2:5, 3] = 2.0
        self.register_buffer("heads", heads.to_sparse(), persistent=persistent)

    def forward(self, x):
        return self.body(x) * self.heads.sum()


@pytest.mark.parametrize("data", [None, [X, X]], ids=["without data", "calibrated"])
@pytest.mark.parametrize("persistent", [False, True])
def test_sparse_buffers_are_counted_copied_and_saved(persistent, data, tmp_path):
    model = Heads(persistent).eval()
    qmodel = convert(model, data, progress=False)
    assert isinstance(qmodel.body, QuantizedLinear)
    whole = report(qmodel).model
    assert whole.bytes_before == 64 * 64 * 4 + 64 * 4 + 3 * 4 + 3 * 2 * 8  # three values, each with two indices
    torchq.save(qmodel, tmp_path / "model.safetensors")
    other = Heads(persistent)
    other.heads = torch.ones(8, 8).to_sparse()
    for same in (copy.deepcopy(qmodel), torchq.load(tmp_path / "model.safetensors", other)):
        assert same.heads.is_sparse
        assert torch.equal(same.heads.to_dense(), model.heads.to_dense())
        assert torch.equal(same(X), qmodel(X))


# ---- Weights that a hook has computed where gradients are on -------------------------------------------------------

HOOKED = {
    "weight_norm": weight_norm,
    "spectral_norm": spectral_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}


@pytest.mark.small_layers_stay_float
@pytest.mark.parametrize("hooked", HOOKED.values(), ids=HOOKED)
@pytest.mark.parametrize("called", [False, True])
def test_a_model_with_hooks_that_was_just_made_is_copied(hooked, called, tmp_path):
    """A deepcopy of torch refuses the weights that such hooks left: they have a history."""

    def make():
        torch.manual_seed(3)
        with torch.enable_grad():
            model = nn.Sequential(hooked(nn.Linear(64, 64)), nn.Linear(64, 64), hooked(nn.Linear(64, 3))).eval()
            return (model(X), model)[1] if called else model

    model = make()
    qmodel = convert(model, [X, X], progress=False)
    assert isinstance(qmodel[0], QuantizedLinear)
    assert type(qmodel[2]) is nn.Linear  # too small
    assert torchq.sqnr_db(model(X), qmodel(X)) > 30
    again = make()
    assert torch.equal(qmodel[2](X), again[2](X))
    torchq.save(qmodel, tmp_path / "model.safetensors")
    assert torch.equal(torchq.load(tmp_path / "model.safetensors", make())(X), qmodel(X))
    with torch.enable_grad():
        prepared = prepare_qat(make())
        prepared(X).sum().backward()
    assert all(each.grad is not None for each in prepared[2].parameters())


# ---- A load_state_dict of its own, as that of demucs -----------------------------------------------------------------


class Older(nn.Module):
    """Reads checkpoints of an earlier version of it."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(64, 64)

    def forward(self, x):
        return self.body(x)

    def load_state_dict(self, state, strict=True):
        state = {key.replace("trunk.", "body."): value for key, value in state.items()}
        return super().load_state_dict(state, strict)


class Newer(Older):
    def load_state_dict(self, state, *args, **kwargs):
        self.asked = True
        return nn.Module.load_state_dict(self, state, *args, **kwargs)


@pytest.mark.parametrize("kind", [Older, Newer])
def test_a_load_state_dict_of_its_own(kind, tmp_path):
    qmodel = convert(kind())
    torchq.save(qmodel, tmp_path / "model.safetensors")
    loaded = torchq.load(tmp_path / "model.safetensors", kind())
    assert torch.equal(loaded(X), qmodel(X))
    assert hasattr(loaded, "asked") == (kind is Newer)
