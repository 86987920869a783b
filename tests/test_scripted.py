"""Modules that torch.jit compiled, inside a model: they stay as they are, and the report says so."""

import copy

import pytest
import torch
from torch import nn

from helpers.compare import assert_identical
from helpers.numbers import normal
from torchq import QuantizedLinear, convert, load, report, save, sqnr_db

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

X, IDS = normal(8, 64, seed=9), torch.arange(8)
DATA = [(normal(32, 64, seed=i), torch.arange(32) % 10) for i in range(3)]


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.product, self.rows = nn.Linear(64, 64), nn.Embedding(10, 64)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.product(x)) + self.rows(ids)


class Model(nn.Module):
    """Scripted and traced children, in a sequence with others, too."""

    def __init__(self):
        super().__init__()
        self.inner = torch.jit.script(Inner())
        self.traced = torch.jit.trace(nn.Linear(64, 64), X)
        self.own = nn.Sequential(nn.Linear(64, 64), torch.jit.script(nn.ReLU()), nn.Linear(64, 64))
        self.image = nn.Sequential(
            nn.Conv2d(4, 32, 1), torch.jit.script(nn.BatchNorm2d(32)), torch.jit.script(nn.ReLU())
        )

    def forward(self, x, ids):
        x = self.own(self.traced(self.inner(x, ids)))
        return self.image(x.reshape(-1, 4, 4, 4))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model().eval()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("data", [None, DATA], ids=["no data", "data"])
@torch.no_grad()
def test_what_is_beside_them_becomes_int8(model, data, inplace, tmp_path):
    y = model(X, IDS)
    qmodel = convert(model, data, inplace=inplace)
    assert [type(child) for child in qmodel.own][::2] == [QuantizedLinear] * 2
    assert sqnr_db(y, qmodel(X, IDS)) > 35
    assert_identical(copy.deepcopy(qmodel)(X, IDS), qmodel(X, IDS))
    save(qmodel, tmp_path / "m.safetensors")
    assert_identical(load(tmp_path / "m.safetensors", Model().eval())(X, IDS), qmodel(X, IDS))


def test_what_they_hold_is_counted_and_named(model):
    whole = report(convert(model)).model
    inside = 2 * 64 * 64
    assert (whole.int8_weights, whole.weights) == (inside + 32 * 4, 2 * inside + 32 * 4)
    (scripted,) = [left for left in whole.left if left.matrices]
    assert scripted.matrices == ("inner.product.weight", "traced.weight")
    assert scripted.advice == "torch.jit compiled it; convert the model before torch.jit.script or torch.jit.trace"


def test_a_whole_one_is_an_error_that_says_so():
    with pytest.raises(ValueError, match=r"no nn.Linear.*torch.jit compiled it; convert it before that"):
        convert(torch.jit.script(Inner()))
