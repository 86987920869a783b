"""prepare_qat: each kind of bad input gets an error that says what is wrong and what to do; the model is as before."""

import re
import threading

import pytest
import torch
from torch import nn

from helpers import ROOT
from helpers.numbers import normal
from torchq import QConfig, convert, prepare_qat
from torchq.modules.qat_linear import QATLinear

X = normal(6, 8)
DYNAMIC = QConfig(activation="dynamic")


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def uncopyable():
    made = model()
    made.lock = threading.Lock()
    return made


CASES = {
    "not a module": (lambda: X, {}, TypeError, r"torchq.prepare_qat: model must be an nn.Module, got Tensor"),
    "not a config": (
        model,
        {"config": {}},
        TypeError,
        r"torchq.prepare_qat: config must be a torchq.QConfig, got dict",
    ),
    "no Linear": (lambda: nn.ReLU(), {}, ValueError, r"torchq.prepare_qat: the model has no nn.Linear"),
    "prepared": (lambda: prepare_qat(model()), {}, ValueError, r"already prepared \('0' is a QATLinear\)\. Train it"),
    "converted": (lambda: convert(model()), {}, ValueError, r"torchq.prepare_qat: the model is already converted"),
    "meta": (
        lambda: model().to("meta"),
        {},
        ValueError,
        r"torchq.prepare_qat: layer '0' is on device meta, expected cpu",
    ),
    "ranges": (
        model,
        {"ranges": "fixed"},
        ValueError,
        r"ranges must be one of \('auto', 'learned', 'observed'\), got 'fi",
    ),
    "learned, no data": (
        model,
        {"ranges": "learned"},
        ValueError,
        r"'learned' needs a calib_loader, one batch or more",
    ),
    "dynamic": (model, {"config": DYNAMIC, "ranges": "observed"}, ValueError, r"activation='dynamic' has none"),
    "exclude": (
        model,
        {"config": QConfig(exclude=("x",))},
        ValueError,
        r"torchq.prepare_qat: exclude pattern 'x' matches",
    ),
    "nothing left": (
        model,
        {"config": QConfig(exclude=("*",))},
        ValueError,
        r"can be quantized; '0': excluded by '\*'\.",
    ),
    "no batch": (model, {"calib_loader": []}, ValueError, r"torchq.prepare_qat: calib_loader yielded no batch"),
    "not a loader": (model, {"calib_loader": 3}, TypeError, r"torchq.prepare_qat: calib_loader must be an iterable"),
    "not a batch": (
        model,
        {"calib_loader": ["text"]},
        TypeError,
        r"torchq.prepare_qat: batch 0 of calib_loader is of type str",
    ),
    "too few elements": (
        model,
        {"calib_loader": [()]},
        ValueError,
        r"torchq.prepare_qat: Sequential.forward requires 1 inputs, batch 0 of calib_loader has 0",
    ),
    "nan": (
        model,
        {"calib_loader": [X, X / 0]},
        ValueError,
        r"torchq.prepare_qat: layer '0' got an input that is not finite in batch 1",
    ),
    "not copyable": (uncopyable, {}, TypeError, r"torchq.prepare_qat: this Sequential cannot be copied .*inplace=True"),
}


@pytest.mark.parametrize(("make", "kwargs", "error", "message"), CASES.values(), ids=CASES)
def test_bad_input(make, kwargs, error, message):
    given = make()
    types = [type(module) for module in given.modules()] if isinstance(given, nn.Module) else None
    for inplace in (False,) if make is uncopyable else (False, True):
        with pytest.raises(error, match=message):
            prepare_qat(given, **kwargs, inplace=inplace)
        assert types is None or [type(module) for module in given.modules()] == types


def test_what_a_copy_cannot_do_inplace_can():
    assert type(prepare_qat(uncopyable(), inplace=True)[0]) is QATLinear


def test_a_weight_that_diverged_is_named_when_it_runs_and_stays_float():
    qat_model = prepare_qat(model(), [X])
    with torch.no_grad():
        qat_model[0].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="1 NaN or Inf"):
        qat_model(X)
    assert convert(qat_model).torchq_plan.layers["0"].reason == "its weight has NaN or infinity"


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float64], ids=str)
def test_input_of_another_dtype(dtype):
    with pytest.raises(TypeError, match=rf"x must be float32, bfloat16 or float16, got {dtype}. Pass x.float\(\)"):
        prepare_qat(model())(X.to(dtype))


@pytest.mark.parametrize("calib_loader", [None, [X]])
def test_constant_and_empty_activations(calib_loader):
    """All zeros give scale 1, and an empty batch does not move a range."""
    qat_model = prepare_qat(model(), calib_loader and [torch.zeros(4, 8)])
    for x in (torch.zeros(4, 8), X[:0]):
        y = qat_model.train()(x)
        y.sum().backward()
        assert y.shape == (len(x), 2)
    assert qat_model[0].input_range.qparams() == (1.0, 0)
    assert all(p.grad.isfinite().all() for p in qat_model.parameters())
    assert torch.equal(convert(qat_model)(torch.zeros(1, 8)).isfinite(), torch.ones(1, 2, dtype=torch.bool))


def test_the_example_of_the_page_runs(capsys):
    """Runs the example in docs/qat.md."""
    page = (ROOT / "docs" / "qat.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(code, "docs/qat.md", "exec"), {})
    assert "trained, learned range" in capsys.readouterr().out
