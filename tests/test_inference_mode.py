"""Convolutions that wait, in torch.inference_mode: no mode stays behind, no memory is taken for what it means.

And models that are made there, which are used outside.
"""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.compare import assert_identical
from helpers.convolutional import Basic, unfused
from helpers.numbers import normal
from torchq import QConfig, apply_plan, convert, load, plan_of, prepare_qat, save
from torchq.modules import writes

pytestmark = pytest.mark.usefixtures("seeded")

MODES = pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
STATIC = QConfig(activation="static", rounding="nearest", smoothing="none")
DATA = [normal(4, 32, 20, 20, seed=i) for i in range(4)]
X = normal(2, 32, 20, 20, seed=9)


class Fails(Basic):
    def forward(self, x):
        self.conv1(x)
        raise KeyError("of the model")


class Outer(nn.Module):
    """Another mode, or no_grad, in the middle of inference mode."""

    def __init__(self, mode):
        super().__init__()
        self.one, self.other, self.mode = Basic(32), Basic(32), mode

    def forward(self, x):
        with self.mode():
            y = self.one(x)
        return self.other(y)


class Sees(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Sees, torch.no_grad, partial(torch.inference_mode, False)])
def test_inference_mode_leaves_nothing_behind(mode):
    failing = convert(Basic(32).eval(), DATA, config=STATIC)
    failing.__class__ = Fails
    qmodel = convert(Outer(torch.no_grad).eval(), DATA, config=STATIC)
    y = qmodel(X)
    qmodel.mode = mode
    with torch.inference_mode():
        with pytest.raises(KeyError, match="of the model"):
            failing(X)
        assert torch._C._len_torch_dispatch_stack() == 0
        assert_identical(qmodel(X), y)
        assert torch._C._len_torch_dispatch_stack() == 0
        assert y.clone().add_(1).is_inference()


class Depth(nn.Module):
    """Notes how many modes see the operations where it is called."""

    def forward(self, x):
        self.found = torch._C._len_torch_dispatch_stack()
        return torch.sigmoid(x)


class Held(nn.Module):
    """What waits stays in a variable while the rest of the network runs, and may be read again at the end."""

    again = False

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.SiLU()
        self.rest = nn.Sequential(nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), Depth(), nn.Conv2d(32, 8, 1))

    def forward(self, x):
        y = self.act(self.norm(self.conv(x)))
        z = self.rest(y)
        if not self.again:
            return z
        x.zero_()
        return z.sum() + y.sum()


def test_the_mode_ends_with_what_waits():
    qmodel = convert(Held().eval(), DATA, config=STATIC)
    assert qmodel.torchq_plan.layers["conv"].feeds == "rest.0"
    y = qmodel(X)
    with torch.inference_mode():
        for x in (X, X + 0):
            assert_identical(qmodel(x), y)
            assert qmodel.rest[3].found == 0


def test_a_collectors_pass_while_a_holder_begins(monkeypatch):
    """It may let the last other holder go, which ends the mode, before this one has told that it needs it."""
    started = writes._started

    def ended():
        monkeypatch.setattr(writes, "_started", started)
        mode = started()
        writes.rest()
        return mode

    monkeypatch.setattr(writes, "_started", ended)
    with torch.inference_mode():
        x = torch.zeros(3)
        held = writes.Unwritten(x)
        assert held.is_unwritten()
        x.add_(1)
        assert not held.is_unwritten()


def test_what_has_served_can_be_read_again():
    qmodel = convert(Held().eval(), DATA, config=STATIC)
    qmodel.again = True
    twin = unfused(qmodel)
    with torch.inference_mode():
        assert_identical(qmodel(X + 0), twin(X + 0))


class Begins(Held):
    """Another mode begins while something waits, which ends inside of it."""

    def forward(self, x):
        y = self.act(self.norm(self.conv(x)))
        if not self.again:
            return self.rest(y)
        with Sees():
            assert torch._C._len_torch_dispatch_stack() == 2
            y = self.rest[0](y)
            assert torch._C._len_torch_dispatch_stack() == 2
        y = self.rest[1:3](y)
        assert torch._C._len_torch_dispatch_stack() == 0
        return self.rest[3:](y)


def test_a_mode_that_begins_while_something_waits():
    qmodel = convert(Begins().eval(), DATA, config=STATIC)
    y = qmodel(X)
    qmodel.again = True
    with torch.inference_mode():
        assert_identical(qmodel(X + 0), y)
        assert torch._C._len_torch_dispatch_stack() == 0


class Sums(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.act = nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()

    def forward(self, x, y):
        return self.act(self.conv(x) + y)


@MODES
def test_tensors_whose_memory_is_not_what_they_mean(mode):
    """A negated view, and zeros that have no memory."""
    qmodel = convert(Sums().eval(), [(x, x.roll(1)) for x in DATA], config=STATIC)
    assert qmodel.torchq_plan.layers["conv"].adds
    with mode():
        x, zeros = X + 0, torch.zeros_like(X)
        assert_identical(qmodel(torch._neg_view(x), x), qmodel(-x, x))
        assert_identical(qmodel(x, torch._neg_view(x)), qmodel(x, -x))
        nothing = torch._efficientzerotensor(X.shape)
        assert_identical(qmodel(nothing, x), qmodel(zeros, x))
        assert_identical(qmodel(x, nothing), qmodel(x, zeros))


# ---- Models that are made inside -----------------------------------------------------------------------------------


def model():
    torch.manual_seed(0)
    layers = nn.Conv2d(4, 32, 3), nn.GroupNorm(4, 32), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 36, 32), nn.LayerNorm(32)
    return nn.Sequential(*layers, nn.Linear(32, 32)).eval()


IMAGES = [normal(4, 4, 8, 8, seed=i) for i in range(4)]


def loaded(path):
    save(convert(model(), IMAGES), path / "m.safetensors")
    return load(path / "m.safetensors", model())


MADE = {
    "converted": lambda path: convert(model(), IMAGES),
    "converted without data": lambda path: convert(model()),
    "converted in place": lambda path: convert(model(), IMAGES, inplace=True),
    "by a plan": lambda path: apply_plan(model(), plan_of(convert(model(), IMAGES))),
    "loaded": loaded,
}


@pytest.mark.parametrize("name", MADE)
def test_a_model_made_in_inference_mode_is_of_use_outside(name, tmp_path):
    expected = MADE[name](tmp_path)
    float_model = model()  # outside: `inplace` keeps what it was made of
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "model", lambda: float_model)
        qmodel = MADE[name](tmp_path)
    assert not any(tensor.is_inference() for tensor in (*qmodel.parameters(), *qmodel.buffers()))
    x = IMAGES[0].clone().requires_grad_()
    with torch.enable_grad():
        y = qmodel(x)
        assert_identical(y, expected(x))
        y.sum().backward()
    assert x.grad.abs().sum() > 0


def test_a_model_prepared_in_inference_mode_is_trained_outside():
    float_model = model()
    with torch.inference_mode():
        prepared = prepare_qat(float_model, [x + 0 for x in IMAGES])
    optimizer = torch.optim.SGD(prepared.parameters(), lr=1e-3)
    before = [parameter.detach().clone() for parameter in prepared.parameters()]
    with torch.enable_grad():
        prepared.train()(IMAGES[0]).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(old, new) for old, new in zip(before, prepared.parameters(), strict=True))
