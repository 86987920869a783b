"""RMSNorm: which code is one, its values, the same bits by every way in and on every kernel, and what is the user's."""

import copy
import pickle

import pytest
import torch
from torch import nn

import torchq
from helpers.compare import assert_identical
from helpers.numbers import normal
from torchq import QuantizedLinear, kernels, ops
from torchq.modules.rms_norm import RMSNorm, rms_norm_of

KERNELS = [kernel for kernel in kernels.names() if kernel in kernels.runnable()]


class Llama(nn.Module):
    """As transformers' LlamaRMSNorm."""

    def __init__(self, n=100):
        super().__init__()
        self.weight = nn.Parameter(normal(n, seed=1), requires_grad=False)
        self.variance_epsilon = 1e-6

    def forward(self, hidden_states):
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


class Gemma(nn.Module):
    """As transformers' GemmaRMSNorm."""

    def __init__(self, n=100):
        super().__init__()
        self.eps = 1e-5
        self.weight = nn.Parameter(normal(n, seed=1), requires_grad=False)

    def _norm(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x):
        output = self._norm(x.float())
        output = output * (1.0 + self.weight.float())
        return output.type_as(x)


class T5(Llama):
    """As transformers' T5LayerNorm."""

    def forward(self, hidden_states):
        variance = hidden_states.to(torch.float32).pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        if self.weight.dtype in [torch.float16, torch.bfloat16]:
            hidden_states = hidden_states.to(self.weight.dtype)
        return self.weight * hidden_states


class Torch(nn.RMSNorm):
    """nn.RMSNorm of random numbers. Not the class itself, so that its code is another one's."""


def of_torch(n=100, eps=1e-6):
    norm = nn.RMSNorm(n, eps=eps).requires_grad_(False)
    norm.weight.copy_(normal(n, seed=1))
    return norm


KINDS = {
    "Llama": Llama,
    "Gemma": Gemma,
    "T5": T5,
    "torch": of_torch,
    "torch without eps": lambda n=100: of_torch(n, None),
}


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def make(request):
    """Makes one of the norms."""
    return request.param


def adopted(norm):
    RMSNorm.adopt(norm)
    assert isinstance(norm, RMSNorm)
    return norm


def same_class(norm):
    """A norm of the user's class with the same numbers."""
    plain = copy.deepcopy(norm)
    object.__setattr__(plain, "__class__", norm.original)
    return plain


# ---- Recognition ----------------------------------------------------------------------------------------------------


def test_norms_are_known_by_what_they_compute():
    found = {kind: rms_norm_of(kind)[3:] for kind in (Llama, Gemma, T5)}
    eps = "variance_epsilon"
    assert found == {Llama: (eps, None, 0.0), Gemma: ("eps", None, 1.0), T5: (eps, None, 0.0)}


def with_forward(source):
    scope = {"torch": torch}
    exec(f"def forward{source}", scope)
    return type("Made", (nn.Module,), {"forward": scope["forward"]})


SCALE = "torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)"


def test_such_code_is_one():
    assert rms_norm_of(with_forward(f"(self, x): return self.weight * (x * {SCALE})"))[3:] == ("eps", None, 0.0)
    divided = "(self, x): return x / (x.square().mean(-1, True) + self.eps).sqrt() * (self.weight + 1)"
    assert rms_norm_of(with_forward(divided))[3:] == ("eps", None, 1.0)


@pytest.mark.parametrize(
    "source",
    [
        f"(self, x): return x * {SCALE}",  # without a weight
        f"(self, x): return self.weight * (x * {SCALE}) + self.bias",
        f"(self, x): return self.weight * ((x - x.mean(-1, keepdim=True)) * {SCALE})",
        f"(self, x): return (self.weight + 2) * (x * {SCALE})",
        f"(self, x): return (self.weight * (x * {SCALE})).clamp(-5, 5)",
        f"(self, x): return self.weight * (x * {SCALE.replace('-1', '0')})",
        f"(self, x): return self.weight * (x * {SCALE.replace('self.eps', '1e-6')})",
        f"(self, x): return self.weight * (x * {SCALE.replace(' + self.eps', '.clamp(min=self.eps)')})",
        "(self, x): return self.weight * (x / (x.pow(2).mean(-1, True).sqrt() + self.eps))",
        f"(self, x): return self.weight * (x * {SCALE}) if self.training else x",
        f"(self, x): return self.weight * x.mul_({SCALE})",  # writes
        f"(self, x):\n  print(x)\n  return self.weight * (x * {SCALE})",
        f"(self, x):\n  self.last = x\n  return self.weight * (x * {SCALE})",
        f"(self, x, gate): return self.weight * (x * {SCALE})",
        f"(self, x): return (self.weight * (x * {SCALE})).double()",
        f"(self, x): return self.weight * (x.bfloat16().float() * {SCALE})",
    ],
)
def test_all_else_is_none(source):
    assert rms_norm_of(with_forward(source)) is None


def test_classes_with_a_call_or_a_weight_of_their_own_are_none():
    assert rms_norm_of(type("Made", (Llama,), {"__call__": lambda module, x: -x})) is None
    assert rms_norm_of(type("Made", (Llama,), {"weight": property(lambda _: torch.ones(8))})) is None
    assert rms_norm_of(Torch) is None  # and whatever else the subclass of a class of torch does
    assert rms_norm_of(nn.LayerNorm) is None


def test_other_weights_are_left_alone():
    for norm in (nn.RMSNorm((5, 64)), nn.RMSNorm(64, elementwise_affine=False), Llama()):
        if isinstance(norm, Llama):
            norm.weight = nn.Parameter(torch.ones(1, 100))
        kind = type(norm)
        RMSNorm.adopt(norm)
        assert type(norm) is kind


# ---- Values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3, 64, 100, 768])
def test_values_are_those_of_the_code(make, n):
    norm, x = adopted(make(n)), 3 * normal(2, 7, n, seed=3) + 1
    torch.testing.assert_close(norm(x), same_class(norm)(x), rtol=1e-6, atol=1e-6)
    assert not isinstance(same_class(norm), RMSNorm)


def test_values_are_as_near_to_the_exact_ones_as_torchs(make):
    norm, x = adopted(make(768)), 3 * normal(64, 768, seed=3) + 1
    gain = norm.line.gain + norm.weight.double()
    eps = vars(norm)[norm.line.eps]
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    exact = x.double() * (x.double().square().mean(-1, keepdim=True) + eps).rsqrt() * gain
    ours, theirs = ((y.double() - exact).square().mean() for y in (norm(x), same_class(norm)(x)))
    assert ours < 1.2 * theirs


def test_all_ways_in_give_the_same_bits(make):
    norm, x = adopted(make()), normal(9, 100, seed=3)
    y = norm(x)
    eps = vars(norm)[norm.line.eps]
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    assert_identical(ops.rms_norm(x, norm.weight, norm.line.gain, eps), y)
    assert_identical(norm.forward(x), y)
    handle = norm.register_forward_hook(lambda module, args, output: None)
    assert_identical(norm(x), y)
    handle.remove()
    wide = normal(9, 200, seed=4)
    wide[:, ::2] = x
    assert_identical(norm(wide[:, ::2]), y)
    assert not torch.equal(y, same_class(norm)(x))  # so that the others are known to be the op's


def test_simulated_values_are_those_of_the_code_to_the_bit(make):
    norm, x = adopted(make()), normal(9, 100, seed=3)
    with torchq.simulate():
        assert_identical(norm(x), same_class(norm)(x))
        assert_identical(norm.forward(x), same_class(norm)(x))


@pytest.mark.parametrize("kernel", KERNELS)
def test_all_kernels_give_the_same_bits(make, kernel):
    norm, x = adopted(make()), normal(9, 100, seed=3)
    expected = norm(x)
    with kernels.use(kernel):
        assert_identical(norm(x), expected)
        assert kernels.last_used() == kernel


def test_threads_give_the_same_bits():
    norm, x = adopted(Llama(768)), normal(130, 768, seed=3)
    one = norm(x)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert_identical(norm(x), one)
    finally:
        torch.set_num_threads(threads)


def test_special_values_are_those_of_the_code(make):
    norm, x = adopted(make(64)), normal(6, 64, seed=3)
    x[1, 3], x[3, 60], x[4], x[5] = float("nan"), float("-inf"), 0.0, 1e30
    x[5, ::2] = -0.0
    torch.testing.assert_close(norm(x), same_class(norm)(x), rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("shape", [(0, 64), (3, 0, 64), (64,)])
def test_shapes(make, shape):
    norm, x = adopted(make(64)), normal(*shape, seed=3)
    torch.testing.assert_close(norm(x), same_class(norm)(x), rtol=1e-6, atol=1e-6)


# ---- What stays the user's ------------------------------------------------------------------------------------------


def test_gradients_are_the_codes(make):
    norm = adopted(make(64)).requires_grad_()
    x = normal(5, 64, seed=3).requires_grad_()
    for inputs in ((x, norm.weight), (norm.weight,)):
        y = norm(x)
        assert_identical(y.detach(), same_class(norm)(x).detach())
        assert all(gradient.abs().sum() > 0 for gradient in torch.autograd.grad(y.sin().sum(), inputs))
    with torch.no_grad():
        assert not norm(x).requires_grad


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_other_dtypes_and_autocast_are_the_codes(make):
    norm, x = adopted(make(64)), normal(5, 64, seed=3)
    half = copy.deepcopy(norm).bfloat16()
    assert_identical(half(x.bfloat16()), same_class(half)(x.bfloat16()))
    with torch.autocast("cpu"):
        assert_identical(norm(x.bfloat16()), same_class(norm)(x.bfloat16()))


def test_a_wrong_width_is_the_codes_error(make):
    with pytest.raises(RuntimeError):
        adopted(make(64))(torch.zeros(2, 65))


def test_arguments_by_name_and_too_many(make):
    norm, x = adopted(make()), normal(9, 100, seed=3)
    name = next(iter(type(norm).original.forward.__code__.co_varnames[1:]))
    torch.testing.assert_close(norm(**{name: x}), norm(x), rtol=1e-6, atol=1e-6)
    with pytest.raises(TypeError):
        norm(x, x)


def test_numbers_may_change(make):
    norm, x = adopted(make()), 0.01 * normal(9, 100, seed=3)
    before = norm(x)
    setattr(norm, norm.line.eps, 0.5)
    norm.weight.mul_(2)
    torch.testing.assert_close(norm(x), same_class(norm)(x), rtol=1e-6, atol=1e-6)
    assert (norm(x).abs().sum() < before.abs().sum()).item()
    setattr(norm, norm.line.eps, "large")
    with pytest.raises(TypeError):
        norm(x)


def test_only_torchs_norm_knows_an_eps_of_none():
    norm = adopted(Llama())
    norm.variance_epsilon = None
    with pytest.raises(TypeError):
        norm(normal(9, 100, seed=3))


def changed(forward):
    return lambda module, x: forward(module, -x)


@pytest.mark.parametrize(("kind", "name"), [(Llama, "forward"), (Gemma, "forward"), (Gemma, "_norm")])
def test_what_a_class_gets_later_counts(monkeypatch, kind, name):
    norm, x = adopted(kind()), normal(9, 100, seed=3)
    before = norm(x)
    with monkeypatch.context() as patch:
        patch.setattr(kind, name, changed(getattr(kind, name)))
        assert_identical(norm(x), same_class(norm)(x))
        torch.testing.assert_close(norm(x), -before, rtol=1e-6, atol=1e-6)
    assert_identical(norm(x), before)


@pytest.mark.parametrize(("kind", "name"), [(Llama, "forward"), (Gemma, "forward"), (Gemma, "_norm")])
def test_code_that_is_put_into_a_function_counts(monkeypatch, kind, name):
    def other(self, x):
        return x + self.weight

    norm, x = adopted(kind()), normal(9, 100, seed=3)
    before = norm(x)
    with monkeypatch.context() as patch:
        patch.setattr(getattr(kind, name), "__code__", other.__code__)
        assert_identical(norm(x), same_class(norm)(x))
        handle = norm.register_forward_hook(lambda module, args, output: None)
        assert_identical(norm(x), same_class(norm)(x))
        handle.remove()
    assert_identical(norm(x), before)


def test_functions_of_torch_that_are_replaced_count(monkeypatch):
    norm, x = adopted(Llama()), normal(9, 100, seed=3)
    before = norm(x)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "rsqrt", lambda x: -(x**-0.5))
        torch.testing.assert_close(norm(x), -before, rtol=1e-6, atol=1e-6)
    assert_identical(norm(x), before)


# ---- The op ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 4, dtype=torch.float64), torch.ones(4)), "x must be float32, got float64"),
        ((torch.tensor(1.0), torch.ones(1)), "x must have 1 to 64 dimensions, got 0"),
        ((torch.zeros(2, 4), torch.ones(5)), r"weight must be float32 \(4,\), .* got float32 \(5\)"),
    ],
)
def test_bad_input_of_the_op(arguments, message):
    with pytest.raises(RuntimeError, match=f"^torchq::rms_norm: {message}"):
        ops.rms_norm(*arguments)


def test_opcheck():
    torch.library.opcheck(torch.ops.torchq.rms_norm, (normal(5, 7, seed=1), torch.ones(7), 1.0, 1e-5))


# ---- In a model -----------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.other, self.last = Llama(64), Gemma(64), nn.RMSNorm(64)
        self.linear = nn.Linear(64, 64)

    def forward(self, x):
        return self.last(self.other(self.linear(self.norm(x))))


def test_convert_adopts_norms_and_leaves_the_float_model():
    model = Block().eval().requires_grad_(False)
    converted = torchq.convert(model)
    for name in ("norm", "other", "last"):
        assert isinstance(getattr(converted, name), RMSNorm)
        assert not isinstance(getattr(model, name), RMSNorm)
        assert type(getattr(converted, name)).__name__ == type(getattr(model, name)).__name__
    assert str(converted.norm) == str(model.norm)
    assert converted.state_dict().keys() >= {"norm.weight", "other.weight", "last.weight"}
    x = normal(2, 5, 64, seed=3)
    assert torchq.sqnr_db(model(x), converted(x)) > 35
    expected = converted(x)
    for other in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        assert isinstance(other.norm, RMSNorm)
        assert isinstance(other.last, RMSNorm)
        assert_identical(other(x), expected)
    loaded = torchq.apply_plan(Block().eval().requires_grad_(False), torchq.plan_of(converted))
    loaded.load_state_dict(converted.state_dict())
    assert_identical(loaded(x), expected)


def test_a_model_without_int8_layers_keeps_its_own():
    config = torchq.QConfig(exclude=("linear",))
    assert type(torchq.convert(Block().eval(), config=config).norm) is Llama


def test_export_and_compiled_graphs_have_the_users_code():
    converted = torchq.convert(Block().eval().requires_grad_(False))
    x = normal(2, 5, 64, seed=3)
    program = torch.export.export(converted, (x,))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count("aten.rsqrt.default") == 2
    assert not any("torchq.rms_norm" in target for target in targets)
    torch._dynamo.reset()
    compiled = torch.compile(converted, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), converted(x), rtol=1e-2, atol=1e-2)


def test_trained_models_have_them_too():
    prepared = torchq.prepare_qat(Block(), [normal(8, 64, seed=5)])
    converted = torchq.convert(prepared.eval())
    assert isinstance(converted.linear, QuantizedLinear)
    assert isinstance(converted.norm, RMSNorm)
