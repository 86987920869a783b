"""What trains beside int8 layers under DistributedDataParallel, which sends every parameter from process 0 at first."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import torchq
from helpers.numbers import normal
from helpers.processes import together

X = normal(64, 48)


class Adapted(nn.Module):
    """An int8 layer, an adapter beside it, and a head."""

    def __init__(self, linear):
        super().__init__()
        self.linear, self.adapter, self.head = linear, nn.Linear(48, 96), nn.Linear(96, 8)

    def forward(self, x):
        return self.head(self.linear(x) + self.adapter(x))


def adapted(seed=0):
    torch.manual_seed(seed)
    return Adapted(torchq.convert(nn.Sequential(nn.Linear(48, 96), nn.ReLU()), X.split(16)))


def loss(y):
    return y.square().mean()


def scenarios(rank):
    model = adapted()
    before = model.linear(X).detach()
    ddp = DistributedDataParallel(model)
    loss(ddp(X.chunk(2)[rank])).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    other = adapted(seed=rank)
    try:
        DistributedDataParallel(other)
        error = None
    except RuntimeError as raised:
        error = str(raised)
    return gradients, torch.equal(model.linear(X), before), error, other.linear(X).detach()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return together(scenarios, 2, tmp_path_factory.mktemp("group"))


def test_gradients_are_those_of_one_process_on_all_rows(found):
    model = adapted()
    loss(model(X)).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert sorted(expected) == ["adapter.bias", "adapter.weight", "head.bias", "head.weight"]
    for gradients, unchanged, *_ in found:
        assert unchanged
        torch.testing.assert_close(gradients, expected, atol=1e-6, rtol=1e-4)


def test_other_int8_weights_are_an_error_or_become_those_of_process_0(found):
    # DDP sends parameters and buffers at once. Where the packed weight comes first, its float view gets the values that
    # are there; else it is a write.
    (*_, error, expected), (*_, other_error, got) = found
    assert error is None
    if other_error is None:
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    else:
        assert "the weight of an int8 layer can't be written (aten::copy_)" in other_error
