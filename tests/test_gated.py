"""Gated feed forwards: what their code is proven to be, and that their form gives what it gives, whoever looks."""

import copy
import pickle

import pytest
import torch
from torch import nn

import torchq
from helpers.compare import assert_identical
from helpers.numbers import normal
from torchq import QConfig, QuantizedLinear, convert, kernels
from torchq.modules.gated import Gated, gated_of

pytestmark = pytest.mark.usefixtures("seeded")

KERNELS = [kernel for kernel in kernels.names() if kernel in kernels.runnable()]
NEAREST = QConfig(activation="dynamic", smoothing="none", rounding="nearest")


class MLP(nn.Module):
    """As transformers' LlamaMLP."""

    def __init__(self, act=nn.SiLU):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(48, 100), nn.Linear(48, 100), nn.Linear(100, 48)
        self.act = act()

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


class UpFirst(MLP):
    def forward(self, x):
        up = self.up(x)
        x = self.gate(x)
        x = self.act(x)
        return self.down(up * x)


class Tanh(nn.Module):
    """As transformers' GELUTanh, which is no single operation of torch here."""

    def forward(self, x):
        return 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * (x + 0.044715 * torch.pow(x, 3.0))))


def converted(module=None, **options):
    module = MLP() if module is None else module
    return convert(module.eval(), config=NEAREST, **options).requires_grad_(False)


def by_parts(module, x):
    """What the form should compute: the gate with its activation, the other products, and their product."""
    activation = module.gate.fold.activation
    return module.down(module.gate.fused(x, activation) * module.up(x))


def by_code(module, x):
    """What the user's code gives."""
    return module.original.forward(module, x)


# ---- The proof ------------------------------------------------------------------------------------------------------


def with_forward(source):
    scope = {"torch": torch}
    exec(f"def forward{source}", scope)
    return type("Made", (nn.Module,), {"forward": scope["forward"]})


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("(self, x): return self.d(self.a(self.g(x)) * self.u(x))", ("g", "a", "u", "d", True)),
        ("(self, x): return self.d(self.u(x) * self.a(self.g(x)))", ("g", "a", "u", "d", False)),
        ("(self, x):\n  y = self.d(self.a(self.g(x)) * self.u(x))\n  return y", ("g", "a", "u", "d", True)),
    ],
)
def test_gated_feed_forwards_are_found(source, expected):
    assert gated_of(with_forward(source))[2:] == expected


@pytest.mark.parametrize(
    "source",
    [
        "(self, x): return self.a(self.g(x)) * self.u(x)",
        "(self, x): return self.d(self.g(x) * self.u(x))",
        "(self, x): return self.d(self.a(self.g(x)) + self.u(x))",
        "(self, x): return self.d(self.a(self.g(x)) * x)",
        "(self, x): return self.d(self.a(self.g(x)) * 2)",
        "(self, x): return self.d(self.o(self.a(self.g(x)) * self.u(x)))",
        "(self, x): return self.d(self.a(self.g(x)) * self.b(self.u(x)))",
        "(self, x): return self.d(self.a(self.g(x * x)) * self.u(x))",
        "(self, x):\n  self.o(x)\n  return self.d(self.a(self.g(x)) * self.u(x))",
        "(self, x):\n  g = self.g(x)\n  u = self.u(x)\n  return self.d(self.a(g) * u)",  # another order
        "(self, x, y): return self.d(self.a(self.g(x)) * self.u(y))",
        "(self, x):\n  print(x)\n  return self.d(self.a(self.g(x)) * self.u(x))",
        "(self, x): return self.d(torch.relu(self.g(x)) * self.u(x))",
        "(self, x): return self.d(self.a(self.g(x)) * self.u(x), x)",
        "(self, x): return self.zero_grad(self.a(self.g(x)) * self.u(x))",
        "(self, x): return self.d(self.a(self.g(x)) * self.u(x)) if x is not None else x",
    ],
)
def test_all_else_is_none(source):
    assert gated_of(with_forward(source)) is None


def test_a_call_of_its_own_is_none():
    assert gated_of(type("Made", (MLP,), {"__call__": lambda module, x: -x})) is None


# ---- Values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [MLP, UpFirst])
@pytest.mark.parametrize("act", [nn.SiLU, nn.GELU, nn.ReLU, Tanh])
def test_values_are_those_of_the_parts(kind, act):
    module = converted(kind(act))
    assert isinstance(module, Gated)
    assert not module._forward_hooks
    for shape in ((48,), (1, 1, 48), (2, 5, 48), (0, 48), (1500, 48)):
        x = normal(*shape, seed=1)
        assert_identical(module(x), by_parts(module, x))
        torch.testing.assert_close(module(x), by_code(module, x), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kernel", KERNELS)
def test_all_kernels_give_the_same_bits(kernel):
    module, x = converted(), normal(5, 48, seed=1)
    expected = module(x)
    with kernels.use(kernel):
        assert_identical(convert_again(module)(x), expected)


def convert_again(module):
    """The same module, with its weights packed for the kernel of this moment."""
    again = converted()
    again.load_state_dict(module.state_dict())
    return again


def test_static_layers_and_bfloat16():
    module = MLP().eval()
    data = [normal(32, 48, seed=seed) for seed in range(4)]
    static = convert(module, data, config=QConfig(activation="static", smoothing="none", rounding="nearest"))
    x = normal(5, 48, seed=9)
    with torch.no_grad():
        assert isinstance(static, Gated)
        assert_identical(static(x), by_parts(static, x))
        half = converted()
        assert_identical(half(x.bfloat16()), by_parts(half, x.bfloat16()))


def test_it_is_as_near_to_float_as_the_parts_by_torch():
    module = MLP().eval().requires_grad_(False)
    x = normal(64, 48, seed=1)
    form = converted(copy.deepcopy(module))
    exact = module(x)
    assert torchq.sqnr_db(exact, form(x)) > torchq.sqnr_db(exact, by_code(form, x)) - 0.1


# ---- The plan -------------------------------------------------------------------------------------------------------


def test_the_plan_names_the_activation_with_and_without_data():
    for data in (None, [normal(64, 48, seed=seed) for seed in range(2)]):
        module = convert(MLP().eval(), data, config=NEAREST)
        assert module.torchq_plan.layers["gate"].activation == "act"
        assert module.torchq_plan.layers["up"].activation is None
        assert isinstance(module, Gated)


def test_fuse_false_turns_it_off():
    module = convert(MLP().eval(), config=QConfig(fuse=False))
    assert type(module) is MLP
    assert module.torchq_plan.layers["gate"].activation is None


@pytest.mark.parametrize("name", ["gate", "up"])
def test_layers_in_float_leave_the_users_code(name):
    module = convert(MLP().eval(), config=QConfig(exclude=(name,), activation="dynamic"))
    assert type(module) is MLP
    x = normal(5, 48, seed=1)
    assert_identical(module(x), module.down(module.act(module.gate(x)) * module.up(x)))


def test_down_may_stay_in_float():
    module = convert(MLP().eval(), config=QConfig(exclude=("down",), activation="dynamic")).requires_grad_(False)
    assert isinstance(module, Gated)
    assert type(module.down) is nn.Linear
    x = normal(5, 48, seed=1)
    assert_identical(module(x), by_parts(module, x))


def test_copies_pickles_plans_and_checkpoints():
    module, x = converted(), normal(5, 48, seed=1)
    expected = module(x)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), convert_again(module)):
        assert isinstance(other, Gated)
        assert type(other).__name__ == "MLP"
        assert_identical(other(x), expected)
    again = torchq.apply_plan(MLP().eval(), torchq.plan_of(module)).requires_grad_(False)
    again.load_state_dict(module.state_dict())
    assert_identical(again(x), expected)


# ---- Who looks ------------------------------------------------------------------------------------------------------


def test_hooks_see_what_the_code_gives():
    x = normal(5, 48, seed=1)
    for name in ("", "gate", "act", "up"):
        module, seen = converted(), []
        child = module.get_submodule(name)
        child.register_forward_hook(lambda module, args, y, seen=seen: seen.append((args[0].clone(), y.clone())))
        y = module(x)
        assert_identical(y, by_code(module, x))
        expected = {"": x, "gate": x, "up": x, "act": module.gate(x)}[name]
        assert_identical(seen[0][0], expected)


def test_a_hook_on_down_sees_its_input():
    module, seen, x = converted(), [], normal(5, 48, seed=1)
    module.down.register_forward_hook(lambda module, args, y: seen.append(args[0]))
    module(x)
    assert_identical(seen[0], module.gate.fused(x, module.gate.fold.activation) * module.up(x))


CHANGES = {
    "another activation": lambda module: setattr(module, "act", nn.Tanh()),
    "an activation with other settings": lambda module: setattr(module.act, "approximate", "tanh"),
    "another layer": lambda module: setattr(module, "up", nn.Linear(48, 100).requires_grad_(False)),
    "another down": lambda module: setattr(module, "down", nn.Linear(100, 7).requires_grad_(False)),
    "a forward": lambda module: setattr(module, "forward", lambda x: x + 1),
    "a forward of up": lambda module: setattr(module.up, "forward", lambda x: x[..., :1] + 1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_what_is_replaced_counts(change):
    module, x = converted(MLP(nn.GELU)), normal(5, 48, seed=1)
    before = module(x)
    change(module)
    y = module(x)
    assert y.shape != before.shape or not torch.equal(y, before)
    by_user = module.forward(x) if "forward" in vars(module) else by_code(module, x)
    torch.testing.assert_close(y, by_user, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [
        (MLP, "forward", lambda module, x: module.down(module.up(x))),
        (MLP, "up", property(lambda _: nn.Identity())),
        (nn.SiLU, "forward", lambda _, x: x.tanh()),
        (nn.functional, "silu", lambda x, inplace=False: x.tanh()),
        (nn.Module, "__call__", lambda module, *args: nn.Module._call_impl(module, *args) + 1),
    ],
    ids=["forward", "property", "activation", "function", "call"],
)
def test_what_a_class_or_torch_gets_later_counts(monkeypatch, where, name, value):
    module, x = converted(), normal(5, 100 if name == "up" else 48, seed=1)[:, :48]
    before = module(x)
    with monkeypatch.context() as patch:
        patch.setattr(where, name, value, raising=False)
        if name == "up":
            with pytest.raises(RuntimeError):
                module(x)
            return
        assert not torch.equal(module(x), before)
    assert_identical(module(x), before)


@torch.enable_grad()
def test_gradients_reach_the_input():
    module, x = converted(), normal(5, 48, seed=1).requires_grad_()
    y = module(x)
    assert y.requires_grad
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    (expected,) = torch.autograd.grad(by_code(module, x).square().sum(), x)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
def test_simulated_traced_exported_and_compiled():
    module, x = converted(), normal(5, 48, seed=1)
    with torchq.simulate():
        assert_identical(module(x), by_code(module, x))
    assert torchq.sqnr_db(module(x), torch.jit.trace(module, (x,))(x)) > 40
    assert torchq.sqnr_db(module(x), torch.export.export(module, (x,)).module()(x)) > 40
    torch._dynamo.reset()
    assert torchq.sqnr_db(module(x), torch.compile(module, backend="eager", fullgraph=True)(x)) > 40
    names = [node.target for node in torch.fx.symbolic_trace(module).graph.nodes if node.op == "call_module"]
    assert names == ["gate", "act", "up", "down"]


def test_arguments_by_name():
    module, x = converted(), normal(5, 48, seed=1)
    assert_identical(module(x=x), by_code(module, x))
    with pytest.raises(TypeError):
        module(x, x)


def test_a_wrong_width_is_the_layers_error():
    with pytest.raises(RuntimeError, match="47"):
        converted()(torch.zeros(2, 47))


def test_a_trained_one_becomes_it():
    prepared = torchq.prepare_qat(MLP(), [normal(64, 48, seed=5)])
    module = convert(prepared.eval()).requires_grad_(False)
    assert isinstance(module, Gated)
    assert type(module.gate) is QuantizedLinear
    x = normal(5, 48, seed=1)
    assert_identical(module(x), by_parts(module, x))


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma"])
def test_families_of_transformers_have_it(family):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 64, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = getattr(transformers, f"{family}Config")(**sizes, **heads)
    model = getattr(transformers, f"{family}Model")(config).eval()
    qmodel = convert(model, config=NEAREST)
    mlp = qmodel.layers[0].mlp
    assert isinstance(mlp, Gated)
    x = normal(1, 1, 32, seed=1)
    with torch.no_grad():
        y = mlp.gate_proj.fused(x, mlp.gate_proj.fold.activation) * mlp.up_proj(x)
        assert_identical(mlp(x), mlp.down_proj(y))
