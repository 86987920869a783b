"""Loaders that calibration refuses, and its messages. (`convert` adds its name in front: test_bad_input.py.)"""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from helpers.calibration import BATCHES, Many, Net, X, Y, recorded, state
from helpers.numbers import normal


def error_of(loader, model=None, **kwargs):
    model = model or Net().train()
    before = state(model)
    with pytest.raises((TypeError, ValueError)) as caught:
        recorded(model, loader, **kwargs)
    assert state(model) == before
    plain = "ValueError" if issubclass(caught.type, ValueError) else "TypeError"
    return f"{plain}: {caught.value}"


def test_errors_of_the_loader():
    assert error_of([]).startswith("ValueError: calib_loader yielded no batch. Pass a loader with data")
    used_up = iter(BATCHES)
    assert len(list(used_up)) == 3
    assert "(an iterator can be used up only once)" in error_of(used_up)
    assert error_of(7) == "TypeError: calib_loader must be an iterable of batches, got int."
    assert (
        "must be an iterable of batches, got TensorDataset. Wrap a dataset: torch.utils.data.DataLoader("
        in error_of(TensorDataset(X, Y))
    )
    assert error_of("abc") == "TypeError: calib_loader must be an iterable of batches, got str."


@pytest.mark.parametrize("batch", ["text", 3, None, X.numpy(), {1, 2}])
def test_a_batch_of_an_unknown_type(batch):
    message = error_of([X, batch])
    assert message.startswith(f"TypeError: batch 1 of calib_loader is of type {type(batch).__name__};")
    assert message.endswith("Pass forward=lambda model, batch: ... to say how to call the model with it.")


@pytest.mark.parametrize(("model", "batch", "required"), [(Net(), (), 1), (Net(), [], 1), (Many(), (X,), 2)])
def test_a_batch_with_too_few_elements(model, batch, required):
    assert error_of([batch], model).startswith(
        f"ValueError: {type(model).__name__}.forward requires {required} inputs, batch 0 of "
        f"calib_loader has {len(batch)} elements. Pass forward=lambda model, batch: ..."
    )


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_input_is_named_by_layer_and_batch(bad):
    poisoned = X.clone()
    poisoned[3, 2] = bad
    message = error_of([X, X, poisoned], nn.ModuleDict({"net": Net()}), forward=lambda model, x: model["net"](x))
    assert message.startswith("ValueError: layer 'net.fc' got an input that is not finite in batch 2 ")
    assert "got 1 NaN or Inf among the 120" in message


def not_dense():
    rows, model = [X[:3], X[3:]], nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8))
    yield "jagged", model, torch.nested.nested_tensor(rows, layout=torch.jagged), "a nested tensor. Pass it padded"
    yield "nested", model, torch.nested.nested_tensor(rows, layout=torch.strided), "a nested tensor. Pass it padded"
    yield "sparse", model, X.to_sparse(), "torch.sparse_coo. Pass x.to_dense() instead."


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype:UserWarning")
@pytest.mark.parametrize("number", range(3))
def test_input_that_is_not_dense_is_refused(number):
    _, model, batch, message = list(not_dense())[number]
    model(batch)  # in float it works
    for forward in (None, lambda model, batch: model(batch)):
        said = error_of([X, batch], model, forward=forward)
        assert said.startswith("TypeError: layer '0' in batch 1 of calib_loader: x must be dense, got " + message)


def test_an_error_about_a_nested_batch_names_it():
    batch = torch.nested.nested_tensor([X[:3], X[3:]], layout=torch.strided)
    with pytest.raises(RuntimeError, match="of its own") as caught:
        recorded(Net(), [batch], forward=lambda model, batch: fail())
    assert "batch 0 of calib_loader, a nested float32 tensor." in "".join(caught.value.__notes__)


def fail():
    raise RuntimeError("of its own")


@pytest.mark.parametrize(
    "batch",
    [normal(4, 5), torch.ones(4, 6, dtype=torch.long), normal(4, 6).double(), torch.empty(4, 6, device="meta")],
    ids=["inner size", "int64", "float64", "device"],
)
def test_a_batch_the_model_refuses_gives_the_models_own_error(batch):
    """The error is the model's own also after other batches, and not an internal one of the records."""
    model = Net()
    with pytest.raises(RuntimeError) as own:
        model(batch)
    for before in ([], [X]):
        with pytest.raises(RuntimeError) as caught:
            recorded(model, [*before, batch])
        assert str(own.value) in str(caught.value)
