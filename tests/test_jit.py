"""torch.jit: modules that it compiled, inside a model, and int8 modules that it traces."""

import copy
import io

import pytest
import torch
from torch import nn

from helpers.compare import assert_identical
from helpers.numbers import normal
from torchq import QConfig, QuantizedLinear, convert, load, report, save, sqnr_db

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

FINE = QConfig(embeddings=True)
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


# ---- Traced -------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(100, 64), nn.Linear(64, 100, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids):
        return self.head(self.words(ids))


class Reads(nn.Module):
    """Uses the weight of a layer, its bias and a table beside the layer itself."""

    def __init__(self):
        super().__init__()
        self.product, self.rows = nn.Linear(64, 64), nn.Embedding(100, 64)

    def forward(self, x):
        x = nn.functional.linear(self.product(x), self.product.weight.t(), self.product.bias)
        return x * self.product.weight.abs().max() + self.rows.weight.sum(0)


def block():
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.GELU(), layer)


def image():
    return nn.Sequential(nn.Conv2d(4, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3))


CASES = {
    "block": (block, [normal(2, 5, 64)]),
    "convolutions": (image, [normal(2, 4, 9, 9)]),
    "lstm": (lambda: nn.LSTM(64, 64), [normal(5, 2, 64)]),
    "bilinear": (lambda: nn.Bilinear(16, 16, 32), [normal(3, 16), normal(3, 16, seed=1)]),
    "tied": (Tied, [torch.arange(12).reshape(3, 4)]),
    "reads": (Reads, [normal(3, 64)]),
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_a_traced_model_is_saved_and_loaded(name, grad):
    """With a gradient wanted by parameters in float too: its checks run without one, and must see the same program."""
    torch.manual_seed(0)
    make, inputs = CASES[name]
    model = make().eval()
    qmodel = convert(model, config=FINE)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(qmodel, tuple(inputs))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    with torch.no_grad():
        expected, found = qmodel(*inputs), torch.jit.load(file)(*inputs)
        for y, z in zip(*[each if isinstance(each, tuple) else (each,) for each in (expected, found)], strict=True):
            if isinstance(y, torch.Tensor):
                torch.testing.assert_close(z, y, rtol=1e-5, atol=1e-5)
    held = sum(tensor.nbytes for tensor in qmodel.state_dict().values() if isinstance(tensor, torch.Tensor))
    if name != "reads":  # which has floats beside its int8
        assert len(file.getvalue()) < 1.5 * held + 2**16


def test_int8_modules_are_not_scripted():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(64, 64), nn.ReLU())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x)

    with pytest.raises(RuntimeError, match=r"torch.jit.script can't compile a QuantizedLinear.*torch.jit.trace"):
        torch.jit.script(convert(Model()))
