"""Layers that are kept ask the system for huge pages; what is packed to be tried does not."""

import pytest
import torch
from torch import nn

from helpers.numbers import normal
from torchq import _C, apply_plan, convert, plan_of
from torchq.modules.packed_weights import PackedWeights

DATA = [normal(100, 64, seed=i) for i in range(4)]


@pytest.fixture
def settled(monkeypatch):
    """The memory for which huge pages were asked."""
    places = []
    monkeypatch.setattr(_C, "gather_into_huge_pages", lambda data, count: places.append((data, count)))
    return places


def places_of(model):
    layers = [module.packed for module in model.modules() if isinstance(module, PackedWeights)]
    return [(packed.data_ptr(), packed.nbytes) for packed in layers]


@pytest.mark.parametrize("settings", [{}, {"calib_loader": DATA}, {"calib_loader": DATA, "inplace": True}])
def test_the_layers_of_a_converted_model_settle_once(settled, settings):
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    qmodel = convert(model, **settings)
    assert len(settled) == 2
    assert settled == places_of(qmodel)


def test_so_do_those_of_a_plan(settled):
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    qmodel = convert(model, DATA)
    settled.clear()
    assert settled == places_of(apply_plan(model, plan_of(qmodel)))


def test_memory_keeps_its_values():
    """Also where the pages of other tensors are around it."""
    tensors = [torch.arange(300_000) + i for i in range(4)]
    expected = [each.clone() for each in tensors]
    for each in tensors:
        _C.gather_into_huge_pages(each.data_ptr(), each.nbytes)
    assert all(torch.equal(*pair) for pair in zip(tensors, expected, strict=True))
    _C.gather_into_huge_pages(0, 0)
