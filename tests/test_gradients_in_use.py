"""Gradients through int8 layers as people use them: adapters, saliency, torch.compile, torch.export."""

import copy

import pytest
import torch
from torch import nn
from torch.func import grad, jacrev, jvp, vjp, vmap

import torchq
from helpers.compare import assert_identical
from helpers.gradients import (
    SCHEMES,
    K,
    N,
    build,
    each_mode,
    error,
    input_gradient,
    inputs,
)
from torchq import QuantizedLinear
from torchq.modules.int8_sequential import Int8Sequential

pytestmark = [  # torch.func and torch.compile use parts of torch that torch itself has deprecated
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


class Block(nn.Module):
    """A residual block, as of a transformer."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class LoRA(nn.Module):
    """An adapter beside a frozen layer, as PEFT puts it."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.a, self.b = nn.Linear(base.in_features, 4, bias=False), nn.Linear(4, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


@pytest.mark.parametrize("activation", ["auto", "static", "dynamic"])
def test_residual_blocks_and_saliency(activation):
    """Against the float model: within 10 %, which no error of quantization comes near, and a missing path exceeds."""
    torch.manual_seed(0)
    head = [nn.Linear(32, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8)]
    model, x = nn.Sequential(Block(), Block(), *head).eval(), torch.randn(256, 32)
    qmodel = torchq.convert(model, [x], config=torchq.QConfig(activation=activation, observer="minmax"), progress=False)
    assert sum(isinstance(m, QuantizedLinear) for m in qmodel.modules()) == 7
    if activation == "static":
        assert any(m.fold.codes for m in qmodel.modules() if isinstance(m, QuantizedLinear))
    dy = torch.randn(256, 8)
    assert error(input_gradient(qmodel, x, dy), input_gradient(model, x, dy)) < 0.1


class MLP(nn.Module):
    """Not an nn.Sequential, so that an adapter may sit beside each layer."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 4)

    def forward(self, x):
        return self.down(nn.functional.silu(self.up(x)))


@pytest.mark.parametrize("activation", ["static", "dynamic"])
def test_adapters_train(activation):
    """In front of the int8 layers and beside them: their gradients are those beside the float layers."""
    torch.manual_seed(0)
    model, x = MLP().eval().requires_grad_(False), torch.randn(64, 32)
    qmodel = torchq.convert(model, [x], config=torchq.QConfig(activation=activation, observer="minmax"), progress=False)
    front, up, down = nn.Linear(32, 32), LoRA(model.up), LoRA(model.down)

    def gradients(frozen):
        adapted = copy.deepcopy(frozen)
        adapted.up, adapted.down = copy.deepcopy(up), copy.deepcopy(down)
        adapted.up.base, adapted.down.base = frozen.up, frozen.down
        adapters = nn.Sequential(copy.deepcopy(front), adapted)
        adapters(x).pow(2).sum().backward()
        return {name: p.grad for name, p in adapters.named_parameters() if p.requires_grad}

    got, expected = gradients(qmodel), gradients(model)
    assert len(got) == 6
    for name, gradient in expected.items():
        assert error(got[name], gradient) < 0.1, name


def test_adapters_learn():
    """A few steps of training in front of a frozen chain of codes reach what the float model reaches."""
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)).eval(),
        torch.randn(128, 16),
    )
    qmodel = torchq.convert(model, [x], config=torchq.QConfig(activation="static", observer="minmax"), progress=False)
    target = model(x @ torch.linalg.qr(torch.randn(16, 16))[0]).detach()
    losses = []
    for frozen in (model, qmodel):
        front = nn.Linear(16, 16)
        nn.init.eye_(front.weight), nn.init.zeros_(front.bias)
        optimizer = torch.optim.Adam(front.parameters(), 0.01)
        for _ in range(150):
            optimizer.zero_grad()
            loss = (frozen(front(x)) - target).pow(2).mean()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[1] < 1.5 * losses[0]
    assert losses[1] < 0.2 * (qmodel(x) - target).pow(2).mean().item()


# ---- torch.compile, torch.export ------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@each_mode
@pytest.mark.parametrize("scheme", SCHEMES)
def test_compiled(generator, mode, scheme):
    """In one graph, and inference is compiled beside it."""
    model = build(scheme, generator)
    x, dy = inputs(generator, 9, K), torch.randn(9, N, generator=generator)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with mode():
        expected, values = input_gradient(model, x, dy), model(x)
        for _ in range(2):
            assert_identical(compiled(x), values)
            assert_identical(compiled(x.clone().requires_grad_()).detach(), values)
            assert error(input_gradient(compiled, x, dy), expected) < 1e-6


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:.*that is not a leaf Tensor:UserWarning")  # by torch.compile itself
@pytest.mark.parametrize(
    ("transform", "scheme"),
    [
        *[(name, "chain") for name in ("grad", "vmap of grad", "grad of vmap", "jacrev", "vjp", "jvp")],
        *[("grad of vmap", scheme) for scheme in ("dynamic", "static")],
    ],
)
def test_compiled_transforms(generator, transform, scheme):
    """torch.compile leaves them to eager mode, or says so: its graph would be without these gradients."""
    model = build(scheme, generator)
    x, dy = inputs(generator, 4, K), torch.randn(4, N, generator=generator)
    f = {
        "grad": grad(lambda v: model(v).pow(2).sum()),
        "vmap of grad": vmap(grad(lambda v: model(v).pow(2).sum())),
        "grad of vmap": grad(lambda v: vmap(model)(v).pow(2).sum()),
        "jacrev": jacrev(model),
        "vjp": lambda v: vjp(model, v)[1](dy)[0],
        "jvp": lambda v: jvp(model, (v,), (v,))[1],
    }[transform]
    assert error(torch.compile(f, backend="aot_eager")(x), f(x)) < 1e-6
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="would trace it without its gradient"):
        torch.compile(f, backend="aot_eager", fullgraph=True)(x)


@pytest.mark.slow(seconds=10)
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.subprocess
def test_inductor(generator):
    model = build("chain", generator)
    x, dy = inputs(generator, 9, K), torch.randn(9, N, generator=generator)
    assert error(input_gradient(torch.compile(model, fullgraph=True), x, dy), input_gradient(model, x, dy)) < 1e-6


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("strict", [False, True])
def test_exported_programs_are_for_inference(generator, strict):
    """Behind a float layer with parameters, too, they hold the ops and codes, as without gradients."""
    model = Int8Sequential(nn.Linear(K, K), *build("chain", generator))
    x = inputs(generator, 9, K)
    exported = torch.export.export(model, (x,), strict=strict)
    static = [node for node in exported.graph.nodes if node.target == torch.ops.torchq.linear_static.default]
    assert [node.meta["val"].dtype for node in static] == [torch.uint8, torch.float32]
    assert_identical(exported.module()(x).detach(), model(x).detach())
