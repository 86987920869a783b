"""Which modules are activations: known by what they compute, and run only if nobody can notice."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from helpers.compare import snapshot
from torchq.modules.activations import activation_of
from torchq.modules.plain_code import is_plain
from torchq.ops import Activation


class NewGELU(nn.Module):
    """As GPT-2's."""

    def forward(self, input):
        return 0.5 * input * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (input + 0.044715 * torch.pow(input, 3.0))))


class ByAttribute(nn.Module):
    """As transformers' GELUActivation: the work is done by a function, a partial or a method that it holds."""

    def __init__(self, act=None):
        super().__init__()
        self.act = act or self._gelu

    def _gelu(self, input):
        return input * 0.5 * (1.0 + torch.erf(input / math.sqrt(2.0)))

    def forward(self, input):
        return self.act(input)


class QuickGELU(nn.Module):
    def __init__(self, rate=1.702):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        return x * torch.sigmoid(self.rate * x)


class SquaredReLU(nn.Module):
    def forward(self, x):
        positive = nn.functional.relu(x)
        return torch.square(positive)


class Upcast(nn.Module):
    def forward(self, x):
        return nn.functional.silu(x.float()).to(x.dtype)


def swish(x):
    return x * x.sigmoid()


class ByFunction(nn.Module):
    def forward(self, x):
        return swish(x)


class Inherited(nn.ReLU):
    pass


KNOWN = [
    (nn.ReLU(), Activation.RELU),
    (nn.ReLU(inplace=True), Activation.RELU),
    (Inherited(), Activation.RELU),
    (nn.GELU(), Activation.GELU),
    (nn.GELU("tanh"), Activation.GELU_TANH),
    (nn.SiLU(inplace=True), Activation.SILU),
    (nn.Hardswish(), Activation.HARDSWISH),
    (nn.Tanh(), Activation.TANH),
    (nn.Sigmoid(), Activation.SIGMOID),
    (nn.ReLU6(), Activation.RELU6),
    (nn.Hardtanh(0.0, 6.0), Activation.RELU6),
    (NewGELU(), Activation.GELU_TANH),
    (ByAttribute(), Activation.GELU),
    (ByAttribute(nn.functional.gelu), Activation.GELU),
    (ByAttribute(partial(nn.functional.gelu, approximate="tanh")), Activation.GELU_TANH),
    (QuickGELU(), Activation.QUICK_GELU),
    (QuickGELU(1.0), Activation.SILU),
    (SquaredReLU(), Activation.RELU2),
    (Upcast(), Activation.SILU),
    (ByFunction(), Activation.SILU),
]


@pytest.mark.parametrize(("module", "activation"), KNOWN, ids=lambda value: str(value))
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_known_by_what_it_computes(module, activation, training):
    module.train(training)
    before, random = snapshot(module), torch.get_rng_state()
    assert activation_of(module) == activation
    assert activation_of(module) == activation
    assert snapshot(module) == before
    assert torch.equal(torch.get_rng_state(), random)


def test_none():
    assert activation_of(None) == Activation.NONE


class Clipped(nn.Module):
    """GELU up to 10, as transformers' gelu_10."""

    def forward(self, x):
        return torch.clip(nn.functional.gelu(x), -10, 10)


class OnlyInEval(nn.Module):
    def forward(self, x):
        return nn.functional.gelu(x) if not self.training else x


class Softmaxed(nn.Module):
    def forward(self, x):
        return nn.functional.softmax(x, -1)


class Summed(nn.Module):
    def forward(self, x):
        return nn.functional.relu(x) + 0 * x.sum()


class TwoInputs(nn.Module):
    def forward(self, x, y=None):
        return nn.functional.relu(x)


class Raises(nn.Module):
    def forward(self, x):
        return torch.tanh(x, x, x, x)


class HasParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return nn.functional.relu(x)


class HasChild(nn.Module):
    def __init__(self):
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(x)


class Half(nn.Module):
    def forward(self, x):
        return nn.functional.relu(x).to(torch.float16)


@pytest.mark.parametrize(
    "module",
    [
        *(Clipped(), OnlyInEval(), Softmaxed(), Summed(), TwoInputs(), Raises(), HasParameter(), HasChild(), Half()),
        *(
            QuickGELU(1.7),
            nn.Identity(),
            nn.Dropout(),
            nn.RReLU(),
            nn.Hardtanh(),
            nn.Mish(),
            nn.LeakyReLU(),
            nn.PReLU(),
        ),
        *(nn.Linear(3, 3), nn.Sequential(nn.ReLU()), nn.BatchNorm1d(3), nn.GLU(), nn.Softmax(-1), nn.Threshold(0.1, 0)),
    ],
    ids=lambda module: type(module).__name__,
)
def test_anything_else_is_none(module):
    before, random = snapshot(module), torch.get_rng_state()
    assert activation_of(module) == Activation.NONE
    assert snapshot(module) == before
    assert torch.equal(torch.get_rng_state(), random)


def test_hooks_keep_a_module():
    for register in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
        module = nn.GELU()
        handle = getattr(module, register)(lambda *args: None)
        assert activation_of(module) == Activation.NONE
        handle.remove()
        assert activation_of(module) == Activation.GELU


def test_a_forward_of_the_instance_counts():
    module = nn.ReLU()
    module.forward = lambda x: x
    assert activation_of(module) == Activation.NONE


# ---- What is never run --------------------------------------------------------------------------------------------

CALLS = []


class Records(nn.Module):
    def forward(self, x):
        CALLS.append(x)
        return nn.functional.relu(x)


class Counts(nn.Module):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return nn.functional.relu(x)


class Counts2(nn.Module):
    def forward(self, x):
        global CALLS
        CALLS = [*CALLS, 1]
        return nn.functional.relu(x)


class Noise(nn.Module):
    def forward(self, x):
        return nn.functional.relu(x + 0 * torch.randn(1))


class Seeds(nn.Module):
    def forward(self, x):
        torch.manual_seed(0)
        return nn.functional.relu(x)


class Prints(nn.Module):
    def forward(self, x):
        print("called")
        return nn.functional.relu(x)


class Imports(nn.Module):
    def forward(self, x):
        import helpers.numbers  # noqa: F401

        return nn.functional.relu(x)


class Loops(nn.Module):
    def forward(self, x):
        while True:
            x = nn.functional.relu(x)


class Recurs(nn.Module):
    def forward(self, x):
        return self.forward(x)


class Super(nn.ReLU):
    def forward(self, x):
        return super().forward(x)


def loud_relu(x):
    CALLS.append(x)
    return nn.functional.relu(x)


class CallsLoud(nn.Module):
    def forward(self, x):
        return loud_relu(x)


class Property(nn.Module):
    @property
    def rate(self):
        CALLS.append("rate")
        return 1.0

    def forward(self, x):
        return x * torch.sigmoid(self.rate * x)


class Watched(nn.ReLU):
    def __getattr__(self, name):
        CALLS.append(name)
        return super().__getattr__(name)


def closure():
    seen = []

    class Closure(nn.Module):
        def forward(self, x):
            seen.append(x)
            return nn.functional.relu(x)

    return Closure()


NEVER_RUN = [
    Records,
    Counts,
    Counts2,
    Noise,
    Seeds,
    Prints,
    Imports,
    Loops,
    Recurs,
    Super,
    CallsLoud,
    Property,
    closure,
]


@pytest.mark.parametrize("make", NEVER_RUN, ids=lambda make: make.__name__)
def test_code_that_somebody_could_notice_is_not_run(make, monkeypatch):
    module = make()
    monkeypatch.setattr("torchq.modules.activations._forward", lambda *args: pytest.fail("it was run"))
    assert not is_plain(module)
    assert activation_of(module) == Activation.NONE
    assert CALLS == []


def test_an_activation_that_watches_its_attributes_is_not_run():
    module = Watched()
    CALLS.clear()
    assert activation_of(module) == Activation.NONE
    CALLS.clear()


def test_a_partial_with_a_tensor_is_not_run():
    assert activation_of(ByAttribute(partial(torch.add, torch.ones(1)))) == Activation.NONE


# ---- transformers -------------------------------------------------------------------------------------------------

OF_TRANSFORMERS = {
    "gelu": Activation.GELU,
    "gelu_10": Activation.NONE,
    "gelu_accurate": Activation.GELU_TANH,
    "gelu_fast": Activation.GELU_TANH,
    "gelu_new": Activation.GELU_TANH,
    "gelu_python": Activation.GELU,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "linear": Activation.NONE,
    "mish": Activation.NONE,
    "quick_gelu": Activation.QUICK_GELU,
    "relu": Activation.RELU,
    "relu2": Activation.RELU2,
    "relu6": Activation.RELU6,
    "sigmoid": Activation.SIGMOID,
    "silu": Activation.SILU,
    "tanh": Activation.TANH,
}


@pytest.mark.parametrize(("name", "activation"), OF_TRANSFORMERS.items())
def test_activations_of_transformers(name, activation):
    activations = pytest.importorskip("transformers.activations", reason="transformers is not installed")
    assert activation_of(activations.ACT2FN[name]) == activation


def test_torchs_own_are_found_once_for_each_setting(monkeypatch):
    """Networks have hundreds of them. Other settings are others, and a class may get another forward."""
    runs = []
    clamp = torch.nn.functional.hardtanh
    monkeypatch.setattr(torch.nn.functional, "hardtanh", lambda *args: runs.append(1) or clamp(*args))
    module = nn.Hardtanh(0.0, 6.0)
    assert activation_of(module) == Activation.RELU6
    first = len(runs)
    assert [activation_of(nn.Hardtanh(0.0, 6.0)) for _ in range(9)] == 9 * [Activation.RELU6]
    assert len(runs) == first
    module.max_val = 5.0
    assert activation_of(module) == Activation.NONE
    module.max_val = 6.0
    module.register_forward_hook(lambda *_: None)
    assert activation_of(module) == Activation.NONE
    monkeypatch.setattr(nn.Hardtanh, "forward", lambda self, x: nn.functional.silu(x))
    assert activation_of(nn.Hardtanh(0.0, 6.0)) == Activation.SILU
