"""The border between a converted convolution and foreign code: what nn.Conv2d would do, or an error that says so."""

import copy
import re

import pytest
import torch
from torch import nn

from helpers.compare import assert_identical
from helpers.numbers import normal
from torchq import QConfig, convert
from torchq.numerics.metrics import sqnr_db

pytestmark = pytest.mark.usefixtures("seeded")

DATA = [normal(4, 8, 20, 20, seed=i) for i in range(4)]
X = normal(2, 8, 20, 20, seed=9)


def network():
    return nn.Sequential(nn.Conv2d(8, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 16, 3)).eval()


@pytest.fixture(params=["static", "dynamic"])
def models(request):
    torch.manual_seed(0)
    model = network()
    config = QConfig(activation=request.param, rounding="nearest", smoothing="none")
    return model, convert(model, DATA, config=config)


def test_calls(models):
    model, qmodel = models
    y = qmodel(X)
    assert_identical(qmodel[0](input=X), qmodel[0](X))
    assert_identical(torch.func.functionalize(qmodel)(X), y)
    assert_identical(qmodel(torch._neg_view(-X)), y)
    assert_identical(qmodel(torch._efficientzerotensor(X.shape)), qmodel(torch.zeros_like(X)))
    for part in (slice(0, 1), slice(0, 2)):
        given = qmodel[part](X)
        assert given.dtype == torch.float32
        assert sqnr_db(model[part](X), given) > 35


@pytest.mark.filterwarnings("ignore")  # torch has no batching rule for ops of others
def test_transforms(models):
    model, qmodel = models
    assert sqnr_db(model(X), torch.vmap(qmodel)(X)) > 30
    assert_identical(torch.fx.symbolic_trace(qmodel)(X), qmodel(X))
    with torch.autocast("cpu"):
        assert qmodel(X).dtype == model(X).dtype == torch.bfloat16


def test_tensors_that_are_refused(models):
    _, qmodel = models
    freed = X.clone()
    freed.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"the storage of x .* holds only 0 bytes"):
        qmodel(freed)
    refused = {
        "QuantizedConv2d: x must be dense, got torch.sparse_coo": X.to_sparse(),
        "QuantizedConv2d: x must be dense, got a nested tensor": torch.nested.as_nested_tensor(X, layout=torch.jagged),
        "QuantizedConv2d: x must be float32, bfloat16 or float16, got torch.int32": X.int(),
        "QuantizedConv2d: x must be float32, bfloat16 or float16, got uint8": X.byte(),
    }
    for message, x in refused.items():
        with pytest.raises(TypeError, match=re.escape(message)):
            qmodel(x)
    with pytest.raises(RuntimeError, match=r"x must be \(N, 8, height, width\) or without N, got \[1, 1, 1"):
        qmodel(torch.zeros([1] * 70))
    with pytest.raises(RuntimeError, match="x is on meta"):
        qmodel(X.to("meta"))


def test_out_of_memory_is_a_memory_error(models):
    with pytest.raises(MemoryError, match="torchq::convolution: out of memory"):
        models[1](torch.zeros(1).expand(1 << 30, 8, 64, 64))


def test_state_from_outside(models):
    model, qmodel = models
    with pytest.raises(RuntimeError, match="the weight of an int8 layer can't be written"):
        torch.func.functional_call(qmodel, {"0.bias": 2 * model[0].bias}, (X,))
    with pytest.raises(RuntimeError, match="can't be written"):
        qmodel[0].weight.data.mul_(2)
    empty = copy.deepcopy(qmodel).to("meta")
    empty.load_state_dict(qmodel.state_dict(), assign=True)
    assert_identical(empty(X), qmodel(X))
    found = model.load_state_dict(qmodel.state_dict(), strict=False)
    assert {"0.weight", "2.weight"} <= set(found.missing_keys)


def test_bad_checkpoints_name_the_key(models):
    _, qmodel = models
    y, good = qmodel(X), qmodel.state_dict()
    changes = {"weight_scale": [torch.nan, -1.0, 0.0], "input_scale": [0.0, torch.inf], "input_zero_point": [256, -1]}
    for name, values in changes.items():
        for value in values if f"2.{name}" in good else ():
            state = {**good, f"2.{name}": torch.full_like(good[f"2.{name}"], value)}
            with pytest.raises(RuntimeError, match=rf"nothing of it was:\n\s*2\.{name}: "):
                qmodel.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"0\.weight_int8: expected torch.int8 \(32, 8, 3, 3\), got"):
        qmodel.load_state_dict({**good, "0.weight_int8": good["0.weight_int8"][:, :4]})
    assert_identical(qmodel(X), y)
