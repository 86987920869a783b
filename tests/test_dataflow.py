"""The proof that nothing else reads an output: models for which it succeeds, and models for which it fails."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.smoothable import DATA, Block, K, X, only_smoothed, read, readers
from torchq import QConfig, QuantizedLinear, convert
from torchq.calibration.dataflow import Dataflow
from torchq.numerics.metrics import sqnr_db

pytestmark = pytest.mark.usefixtures("seeded")


# ---- what is not smoothed ----


def test_readers_are_found():
    assert readers(Block()) == {"norm": ("a", "b")}


class Returns(nn.Module):
    """Returns the norm's output; its caller passes it to another Linear."""

    def __init__(self):
        super().__init__()
        self.norm = Block().norm

    def forward(self, x):
        return self.norm(x)


def residual(m, x):
    y = m.norm(x)
    return m.a(y) + m.b(y) + y[..., :24]


def kept(m, x):
    y = m.norm(x)
    m.last = y
    return m.a(y) + m.b(y)


def in_place(m, x):
    y = m.norm(x)
    z = m.a(y)
    y.add_(1)
    return z + m.b(y)


def moved(m, x):
    y = m.norm(x)
    return m.a(y) + m.b(y.roll(1, -1))


def other_input(m, x):
    y = m.norm(x)
    return m.a(y) + m.b(y) + m.a(x)


def sometimes(m, x):
    y = m.norm(x)
    return m.a(y) + m.b(y) + (y.mean() if x[0, 0, 0] == DATA[2][0, 0, 0] else 0)


def numpy_read(m, x):
    y = m.norm(x)
    return m.a(y) + m.b(y) + float(y.numpy().mean())


def with_hook(on):
    model = Block()
    model.get_submodule(on).register_forward_hook(lambda module, args, y: y + 0)
    return model


def with_two_names():
    model = Block()
    model.again = model.norm
    return model


def shared_between_blocks():
    first, second = Block(lambda m, x: m.norm(x) + x), Block()
    first.norm = second.norm
    return nn.Sequential(first, second)


UNSAFE = {
    "residual": lambda: Block(residual),
    "returned beside": lambda: Block(lambda m, x: (lambda y: (m.a(y) + m.b(y), y))(m.norm(x))),
    "kept as an attribute": lambda: Block(kept),
    "changed in place": lambda: Block(in_place),
    "read with its channels moved": lambda: Block(moved),
    "read through a view": lambda: Block(
        lambda m, x: (lambda y: m.a(y) + m.b(y.view(-1, K)).view(4, 16, 24))(m.norm(x))
    ),
    "a reader has another input": lambda: Block(other_input),
    "read otherwise in one batch": lambda: Block(sometimes),
    "read by numpy": lambda: Block(numpy_read),
    "read by a function": lambda: Block(
        lambda m, x: (lambda y: m.a(y) + m.b(y) + nn.functional.softmax(y, -1).sum())(m.norm(x))
    ),
    "read by another module": lambda: Block(
        lambda m, x: (lambda y: m.a(y) + m.b(y) + m.c(y))(m.norm(x)), c=nn.Conv1d(16, 16, 9)
    ),
    "read by a Linear's function": lambda: Block(
        lambda m, x: (lambda y: m.a(y) + nn.functional.linear(y, m.b.weight))(m.norm(x))
    ),
    "an activation between": lambda: Block(lambda m, x: (lambda y: m.a(y) + m.b(y))(nn.functional.gelu(m.norm(x)))),
    "mean over channels": lambda: Block(lambda m, x: (lambda y: m.a(y) + m.b(y) + y.mean(-1, keepdim=True))(m.norm(x))),
    "mean over all": lambda: Block(lambda m, x: (lambda y: m.a(y) + m.b(y) + y.mean())(m.norm(x))),
    "one channel": lambda: Block(lambda m, x: (lambda y: m.a(y) + m.b(y) + y[..., 3].unsqueeze(-1))(m.norm(x))),
    "some channels": lambda: Block(lambda m, x: (lambda y: m.a(y) + m.b(y) + y[..., :24])(m.norm(x))),
    "one token returned": lambda: Block(lambda m, x: (lambda y: (m.a(y) + m.b(y), y[:, 0]))(m.norm(x))),
    "one token read": lambda: Block(lambda m, x: (lambda y: m.a(y) + m.b(y) + y[:, :1].square().sum())(m.norm(x))),
    "relu returned": lambda: Block(lambda m, x: (lambda y: (m.a(y) + m.b(y), y.relu()))(m.norm(x))),
    "mean read": lambda: Block(lambda m, x: (lambda y: m.a(y) + m.b(y) + y.mean(1).exp().sum())(m.norm(x))),
    "hook on the norm": lambda: with_hook("norm"),
    "hook on a reader": lambda: with_hook("a"),
    "norm with two names": with_two_names,
    "norm shared between blocks": shared_between_blocks,
    "norm's weight read": lambda: Block(lambda m, x: read(m, x) + m.norm.weight.sum()),
    "norm's forward called": lambda: Block(lambda m, x: read(m, x) + m.norm.forward(x).sum()),
    "no weight": lambda: nn.Sequential(nn.LayerNorm(K, elementwise_affine=False), nn.Linear(K, 8)),
    "several dimensions": lambda: nn.Sequential(nn.LayerNorm((16, K)), nn.Linear(K, 8)),
    "reader outside of the norm's owner": lambda: nn.Sequential(Returns(), nn.Linear(K, 8)),
    "no reader": lambda: Block(lambda m, x: m.a(x) + m.norm(x).sum()),
}


@pytest.mark.parametrize("case", UNSAFE)
def test_nothing_is_smoothed_that_others_see(case):
    model = UNSAFE[case]().eval()
    assert not any(isinstance(model.get_submodule(source), (nn.LayerNorm, nn.RMSNorm)) for source in readers(model))


def through(f, g=None):
    """Both layers read f(the norm's output), or one reads f of it and the other g."""
    return Block(lambda m, x: (lambda y: m.a(f(y)).mean() + m.b((g or f)(y)).sum())(m.norm(x)))


SAFE = {
    "relu": lambda: through(torch.relu),
    "relu in place": lambda: through(lambda y: y.relu_()),
    "mean over tokens": lambda: through(lambda y: y.mean(1)),
    "mean over all rows": lambda: through(lambda y: y.mean((0, -2), keepdim=True)),
    "one token": lambda: through(lambda y: y[:, 0]),
    "some tokens and some more": lambda: through(lambda y: y[:, :8], lambda y: y[1, ::2]),
    "relu of a mean of some": lambda: through(lambda y: y[:, 1:].mean(1).relu(), lambda y: y),
}


@pytest.mark.parametrize("case", SAFE)
def test_what_keeps_the_channels_may_lie_between(case):
    model = SAFE[case]().eval()
    assert readers(model) == {"norm": ("a", "b")}
    scales = torch.rand(K) * 10 + 0.01
    torch.testing.assert_close(only_smoothed(model, scales)(X), model(X), rtol=1e-4, atol=1e-4)


def test_an_excluded_reader_prevents_it():
    qmodel = convert(Block(), DATA, config=QConfig(exclude=("b",)))
    assert qmodel.torchq_plan.smoothings == {}
    assert [type(qmodel.a), type(qmodel.b)] == [QuantizedLinear, nn.Linear]


def test_a_norm_called_twice_for_the_same_readers_is_fine():
    model = Block(lambda m, x: read(m, x) + read(m, -x))
    assert readers(model) == {"norm": ("a", "b")}
    assert sqnr_db(model(X), convert(model, DATA)(X)) > 30


def test_calibration_leaves_no_hooks():
    model = Block()
    readers(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Watch(TorchDispatchMode):
    """A dispatch mode that the model itself enters."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def read_watched(m, x):
    with Watch():
        return read(m, x)


@pytest.mark.parametrize(("run", "unseen"), [(read, True), (read_watched, False)])
def test_recording_an_input_is_not_watched(run, unseen, monkeypatch):
    """Watching an operation takes tens of microseconds, so recording is not watched.

    If the model enters a mode of its own, recording is watched, and the proof is still the same.
    """
    seen, dispatch = set(), Dataflow.__torch_dispatch__

    def spy(self, func, *args, **kwargs):
        seen.add(func)
        return dispatch(self, func, *args, **kwargs)

    monkeypatch.setattr(Dataflow, "__torch_dispatch__", spy)
    assert readers(Block(run)) == {"norm": ("a", "b")}
    assert torch.ops.aten.native_layer_norm.default in seen
    assert (torch.ops.aten.bincount.default not in seen) is unseen
