"""What computes as nn.Linear does is proven, and not known by its name; what does more stays in float and says why."""

import pytest
import torch
from torch import nn

from helpers.compare import snapshot
from helpers.linear_like import Conv1D, FalconLinear, twin_of
from helpers.numbers import normal
from torchq import convert
from torchq.modules.linear_proof import Proof, proof_of
from torchq.modules.registry import find_layers
from torchq.numerics.metrics import sqnr_db

pytestmark = pytest.mark.usefixtures("seeded")


class Plain(nn.Linear):
    """As timm's."""

    def forward(self, input):
        if torch.jit.is_scripting():
            return nn.functional.linear(input, self.weight.to(dtype=input.dtype), self.bias)
        return nn.functional.linear(input, self.weight, self.bias)


# As text, since pytest rewrites assertions.
CHECKED = """
class Checked(nn.Linear):
    def forward(self, x):
        assert x.shape[-1] == self.in_features, f"expected {self.in_features} features"
        return torch.matmul(x, self.weight.transpose(0, 1)).add(self.bias)
"""
exec(CHECKED)


class Bare(nn.Module):
    """No nn.Linear, no bias, and its weight in nn.Linear's own orientation."""

    def __init__(self, k, n):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(n, k) / k**0.5), None

    def forward(self, x):
        return nn.functional.linear(x, self.weight)


class Transposed(Bare):
    def forward(self, x):
        return x @ self.weight


class Upcast(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x.float(), self.weight.float(), self.bias.float()).to(x.dtype)


class FollowsInput(nn.Linear):
    """As that of openai-whisper."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


LINEAR = {
    "Conv1D": (lambda: Conv1D(48, 32), True),
    "square Conv1D": (lambda: Conv1D(32, 32), True),
    "FalconLinear": (lambda: FalconLinear(32, 48), False),
    "without bias": (lambda: FalconLinear(32, 48, bias=False), False),
    "square": (lambda: FalconLinear(32, 32, bias=False), False),
    "Plain": (lambda: Plain(32, 48), False),
    "Checked": (lambda: globals()["Checked"](32, 48), False),
    "Bare": (lambda: Bare(32, 48), False),
    "Transposed": (lambda: Transposed(48, 32), True),
    "square Transposed": (lambda: Transposed(32, 32), True),
    "Upcast": (lambda: Upcast(32, 48), False),
    "FollowsInput": (lambda: FollowsInput(32, 48), False),
    "FollowsInput without bias": (lambda: FollowsInput(32, 48, bias=False), False),
}


@pytest.mark.parametrize(("make", "transposed"), LINEAR.values(), ids=LINEAR)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_what_multiplies_by_its_weight_is_linear(make, transposed, mode):
    module = getattr(make(), mode)()
    before, random = snapshot(module), torch.get_rng_state()
    assert proof_of(module) == Proof(transposed)
    assert snapshot(module) == before
    assert torch.equal(torch.get_rng_state(), random)
    x = normal(5, 32)
    assert torch.equal(convert(module)(x), convert(twin_of(module))(x))


@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [Upcast, FollowsInput])
def test_code_that_follows_the_dtype_of_its_input_is_followed(kind, own, given):
    layer, x = kind(32, 48).to(own), normal(5, 32).to(given)
    exact, got = layer(x), convert(layer)(x)
    assert got.dtype == exact.dtype == given
    assert sqnr_db(exact.float(), got.float()) > 35


# ---- What stays in float ------------------------------------------------------------------------------------------


class Scaled(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x * 2, self.weight, self.bias)


class Cast(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x.to(self.weight.dtype), self.weight, self.bias)


class Half(nn.Linear):
    def forward(self, x):
        half = torch.bfloat16
        return nn.functional.linear(x.to(half), self.weight.to(half), self.bias.to(half)).to(x.dtype)


class Counts(nn.Linear):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return nn.functional.linear(x, self.weight, self.bias)


SEEN = []


class Records(nn.Linear):
    def forward(self, x):
        SEEN.append(x)
        return nn.functional.linear(x, self.weight, self.bias)


class Noise(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias) + torch.randn(())


class LoRA(nn.Linear):
    def __init__(self, k, n):
        super().__init__(k, n)
        self.a, self.b = nn.Parameter(torch.zeros(4, k)), nn.Parameter(torch.zeros(n, 4))

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias) + nn.functional.linear(
            nn.functional.linear(x, self.a), self.b
        )


class TwiceInTraining(nn.Linear):
    def forward(self, x):
        y = nn.functional.linear(x, self.weight, self.bias)
        return y + y if self.training else y


class Decides(nn.Linear):
    def forward(self, x):
        y = nn.functional.linear(x, self.weight, self.bias)
        return y if x.sum() < 1e9 else y.abs()


class Two(nn.Linear):
    def forward(self, x, scale=None):
        return nn.functional.linear(x, self.weight, self.bias)


class HalfBias(nn.Linear):
    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, self.in_features), self.weight.t(), beta=0.5)


class NoBias(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight)


class Activated(nn.Linear):
    def forward(self, x):
        return nn.functional.relu(nn.functional.linear(x, self.weight, self.bias))


class InPlace(nn.Linear):
    def forward(self, x):
        x += 0
        return nn.functional.linear(x, self.weight, self.bias)


class Fails(nn.Linear):
    def forward(self, x):
        return x @ self.weight


class Flat(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias).flatten()


class Called(nn.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


class Router(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight).softmax(-1), 1


class Inherits(nn.Linear):
    def forward(self, x):
        return super().forward(x)


OTHERS = {
    Inherits: "uses 'super'",
    Scaled: "takes other operations than a product and a sum: aten::mul",
    Cast: "converts its input",
    Half: "gives other values than F.linear",
    Counts: "uses 'calls'",
    Records: "uses 'SEEN'",
    Noise: "uses 'randn'",
    LoRA: "uses 'a'",
    TwiceInTraining: "takes other operations than a product and a sum: 1 of products, 2 of sums",
    Decides: "uses 'sum'",
    Two: "takes other arguments than one input",
    HalfBias: "gives other values than F.linear",
    NoBias: "takes other operations than a product and a sum: 1 of products, 0 of sums",
    Activated: "takes other operations than a product and a sum: aten::relu",
    InPlace: "takes other operations than a product and a sum: 1 of products, 2 of sums",
    Fails: "fails on an input of shape (32,) (RuntimeError)",
    Flat: "gives another output than F.linear",
    Router: "uses 'softmax'",
}


@pytest.mark.parametrize(("kind", "why"), OTHERS.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_what_does_more_stays_in_float_and_says_why(kind, why):
    model = nn.Sequential(nn.Linear(32, 32), kind(32, 48)).eval()
    before, random, values = snapshot(model), torch.get_rng_state(), model[1].weight.clone()
    qmodel = convert(model)
    assert type(qmodel[1]) is kind
    assert qmodel.torchq_plan.layers["1"].reason == f"{kind.__name__} has a forward of its own, which {why}"
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(model[1].weight, values)
    assert getattr(model[1], "calls", 0) == 0
    assert SEEN == []


def test_a_call_of_its_own_stays_in_float():
    assert proof_of(Called(32, 48)).reason == "Called is called in a way of its own"


def test_a_forward_on_the_instance():
    """A method bound to the module is read as a class's is; a closure may do anything."""
    module = nn.Linear(32, 48)
    module.forward = FalconLinear.forward.__get__(module)
    assert proof_of(module) == Proof()
    module.forward = Scaled.forward.__get__(module)
    assert proof_of(module).reason.endswith("aten::mul")
    other = nn.Linear(32, 48)
    module.forward = lambda x: other(x)
    assert proof_of(module).reason == "Linear has a forward of its own, which takes other arguments than one input"
    module.forward = torch.jit.ignore
    assert "Linear has a forward of its own" in proof_of(module).reason


def test_numbers_of_the_instance_count():
    class Powered(nn.Linear):
        beta = 1.0

        def forward(self, x):
            return torch.addmm(self.bias, x.view(-1, self.in_features), self.weight.t(), beta=self.beta)

    module = Powered(32, 48)
    assert proof_of(module).reason == "Powered has a forward of its own, which gives another output than F.linear"
    modules = [FalconLinear(32, 48), FalconLinear(32, 48)]
    modules[1].beta = 0.5
    assert [proof_of(each) for each in modules] == [Proof(), Proof()]


def test_what_it_holds_beside_is_not_dropped():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    model[1].register_buffer("mask", torch.ones(32))
    reason = "it holds 'mask' beside its weight and bias, which a swap would drop"
    assert convert(model).torchq_plan.layers["1"].reason == reason


def test_what_is_not_linear_is_no_layer():
    others = [nn.Embedding(48, 32), nn.PReLU(), nn.ConvTranspose1d(4, 4, 1), nn.LayerNorm(32)]
    model = nn.ModuleList([nn.Linear(32, 32), *others])
    assert list(find_layers(model)) == ["0"]
    assert list(find_layers(convert(model))) == []


def test_a_weight_without_values_is_proven_too():
    with torch.device("meta"):
        module = Conv1D(48, 32)
    assert proof_of(module) == Proof(transposed=True)


class Sized(nn.Linear):
    """Where it is large, it does something else."""

    def forward(self, x):
        y = nn.functional.linear(x, self.weight, self.bias)
        return y if self.in_features < 200 else nn.functional.relu(y)


class Fixed(nn.Linear):
    """Its size stands in its code."""

    def forward(self, x):
        return torch.addmm(self.bias, x.reshape(-1, 300), self.weight.t()).reshape(*x.shape[:-1], 48)


def test_a_large_weight_is_proven_without_one():
    with torch.device("meta"):
        module = Conv1D(1 << 20, 1 << 18)  # a terabyte
    assert proof_of(module) == Proof(transposed=True)
    assert proof_of(Sized(100, 48)) == Proof()
    assert proof_of(Sized(300, 48)).reason.endswith("takes other operations than a product and a sum: aten::relu")
    assert proof_of(Fixed(300, 48)) == Proof()
    assert "fails on an input" in proof_of(Fixed(400, 48)).reason


def test_hooks_keep_it_in_float():
    model = nn.Sequential(nn.Linear(32, 32), Conv1D(48, 32))
    model[1].register_forward_hook(lambda *args: None)
    assert convert(model).torchq_plan.layers["1"].reason == "it has forward hooks, which a swap would drop"
