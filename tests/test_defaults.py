"""torch's process-wide defaults (dtype, device, denormals) change no bit of what torchq computes."""

import ast
import copy
import re
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

import torchq
from helpers.numbers import normal
from torchq import QConfig, observers
from torchq.numerics.metrics import sqnr_db
from torchq.numerics.qparams import choose_qparams, dequantize, fake_quantize, quantize

X = normal(600, 32)
X[:, 3] *= 40  # something to smooth
X[5, 7], X[6, 8], X[7] = 1e-40, -1e-41, 2e-39  # denormals, and a row of nothing else
BATCHES = X.split(100)
torch.manual_seed(0)
MODEL = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32), nn.GELU(), nn.Linear(32, 20))
with torch.no_grad():
    MODEL[3].weight[2] = 3e-39
    MODEL[3].weight[4, 5] = -1e-40
MODEL.eval()
# "all" is float64, the meta device and flushed denormals. A tensor that takes one of them by default shows there too.
WHATEVER = pytest.mark.parametrize("default", ["all", "bfloat16", "meta as a context"])


@contextmanager
def defaults(name):
    before = torch.get_default_dtype()
    try:
        if name == "all":
            torch.set_default_dtype(torch.float64)
            torch.set_default_device("meta")
            torch.set_flush_denormal(True)  # where the CPU can
        if name == "bfloat16":
            torch.set_default_dtype(torch.bfloat16)
        if name == "meta as a context":
            with torch.device("meta"):
                yield
        else:
            yield
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)
        torch.set_flush_denormal(False)


def converted(config, data=BATCHES):
    qmodel = torchq.convert(copy.deepcopy(MODEL), data, config=config, progress=False)
    with torchq.simulate(), torch.no_grad():
        simulated = qmodel(X)
    result = dict(qmodel.state_dict()) | {"y": qmodel(X), "simulated": simulated}
    return result, qmodel.torchq_plan, str(torchq.report(qmodel)), torchq.report(qmodel).to_dict()


def trained(ranges):
    model = torchq.prepare_qat(copy.deepcopy(MODEL), None if ranges == "observed" else BATCHES, ranges=ranges)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for batch in BATCHES[:2]:
        model.train()(batch).square().mean().backward()
        optimizer.step()
    state = {f"trained.{name}": value.detach().clone() for name, value in model.state_dict().items()}
    return state | dict(torchq.convert(model.eval(), BATCHES, progress=False).state_dict())


def observed(name):
    observer = observers.make_observer(name)
    per_channel = type(observer)(channels=32)
    for batch in BATCHES:
        observer.observe(batch)
        per_channel.observe(batch)
    ranges = [*observer.range(), *per_channel.range(), *observer.qparams(dtype=torch.uint8, symmetric=False)]
    return [*ranges, *observer.state_dict().values(), *per_channel.state_dict().values()]


def numbers():
    scale, zero_point = choose_qparams(X, dtype=torch.uint8, symmetric=False)
    codes = quantize(X, scale, zero_point, dtype=torch.uint8)
    by_row = choose_qparams(X, axis=0)
    values = [codes, dequantize(codes, scale, zero_point), fake_quantize(X, 0.1, 3, dtype=torch.uint8), *by_row]
    return values, sqnr_db(X, dequantize(codes, scale, zero_point))


WORK = {
    "convert": lambda: converted(QConfig()),
    "convert static, gptq": lambda: converted(QConfig(activation="static", rounding="gptq")),
    "convert per tensor": lambda: converted(QConfig(weight="per_tensor", rounding="nearest")),
    "convert without data": lambda: converted(QConfig(), None),
    "convert to a budget": lambda: torchq.convert(
        MODEL, BATCHES, evaluate=lambda model: float(model(X).mean()), max_drop=1e-4, progress=False
    ).state_dict(),
    "qat learned": lambda: trained("learned"),
    "qat observed": lambda: trained("observed"),
    "numbers": numbers,
    **{name: lambda name=name: observed(name) for name in ("minmax", "moving_average", "percentile", "mse", "entropy")},
}


def same(a, b):
    if isinstance(a, torch.Tensor):
        return (a.dtype, a.device) == (b.dtype, b.device) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@cache
def as_ever(work):
    return WORK[work]()


@WHATEVER
@pytest.mark.parametrize("work", WORK)
@pytest.mark.filterwarnings("ignore")
def test_defaults_change_no_bit(work, default):
    expected = as_ever(work)
    with defaults(default):
        got = WORK[work]()
    assert same(expected, got)


@WHATEVER
def test_times_can_be_taken_under_any_default(default):
    qmodel = torchq.convert(MODEL, BATCHES, progress=False)
    with defaults(default):
        assert set(torchq.profile_layers(qmodel, rounds=1)) == set(qmodel.torchq_plan.int8_layers())
        qmodel.half()
        assert {module.dtype for module in qmodel.modules() if isinstance(module, torchq.QuantizedLinear)} == {
            torch.float16
        }


FACTORIES = re.compile(
    "zeros|ones|empty|empty_strided|full|tensor|as_tensor|asarray|scalar_tensor|rand|randn|randint|randperm|normal|eye"
    "|arange|range|linspace|logspace|tril_indices|triu_indices|Linear|Embedding|LayerNorm"
)


def unnamed(tree):
    """The factory calls of torch that leave dtype or device to a default, by line."""
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        owner = ast.unparse(node.func.value)
        missing = {"dtype", "device"} - {keyword.arg for keyword in node.keywords}
        if owner in ("torch", "nn", "torch.nn") and FACTORIES.fullmatch(node.func.attr) and missing:
            yield node.lineno, f"{owner}.{node.func.attr}", sorted(missing)
        if owner == "torch" and node.func.attr == "Generator" and "device" in missing:
            yield node.lineno, "torch.Generator", ["device"]


def test_every_factory_call_names_dtype_and_device():
    for path in sorted(Path(torchq.__file__).parent.rglob("*.py")):
        assert list(unnamed(ast.parse(path.read_text()))) == [], path


def test_what_the_search_for_factory_calls_finds():
    text = "torch.zeros(2)\nnn.Linear(2, 2, device='cpu')\nx.new_zeros(2)\ntorch.full((2,), 1, dtype=d, device=c)"
    assert [(line, missing) for line, _, missing in unnamed(ast.parse(text))] == [
        (1, ["device", "dtype"]),
        (2, ["dtype"]),
    ]
