"""Straight modules: what their code is proven to be, and that their forms give what the code gives, whoever looks."""

import copy
import dataclasses
import pickle

import pytest
import torch
from torch import nn

import torchq
from helpers.compare import assert_identical
from helpers.numbers import normal
from torchq import _C, QConfig, convert, kernels
from torchq.modules.folding import IDLE
from torchq.modules.layer_norm import LayerNorm
from torchq.modules.quantized_linear import QuantizedLinear
from torchq.modules.straight import line_of
from torchq.modules.straight_forms import Form, Residual, Row

KERNELS = [kernel for kernel in kernels.names() if kernel in kernels.runnable()]


class Output(nn.Module):
    """As transformers' BertOutput."""

    def __init__(self, k=48, n=100):
        super().__init__()
        self.dense, self.norm, self.dropout = nn.Linear(k, n), nn.LayerNorm(n), nn.Dropout(0.5)

    def forward(self, hidden, residual):
        hidden = self.dense(hidden)
        hidden = self.dropout(hidden)
        return self.norm(hidden + residual)


class Swapped(Output):
    def forward(self, residual, hidden):
        return self.norm(residual + self.dense(hidden))


class Intermediate(nn.Module):
    """As transformers' BertIntermediate."""

    def __init__(self, k=48, n=100):
        super().__init__()
        self.dense, self.act = nn.Linear(k, n), nn.GELU()

    def forward(self, hidden):
        hidden = self.dense(hidden)
        return self.act(hidden)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = Intermediate(48, 100), Output(100, 48)

    def forward(self, x):
        return self.down(self.up(x), x)


class MLP(nn.Module):
    """As transformers' ViTMLP."""

    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(48, 100), nn.ReLU(), nn.Linear(100, 48)

    def forward(self, x):
        x = self.fc1(x)
        x = self.act(x)
        return self.fc2(x)


def converted(module):
    torch.manual_seed(0)
    return convert(module.eval()).requires_grad_(False)


def is_fused(module, *args):
    """Whether a call of this Residual would be one product."""
    line, kinds = module.line, (QuantizedLinear, LayerNorm, IDLE)
    x, residual = args[line.source], args[1 - line.source]
    y = _C.call_residual(module, type(module), line.calls, line.last, kinds, x, residual)
    return y is not NotImplemented


def by_code(module, *args):
    """What the user's code gives."""
    with torch.no_grad():
        return module.original.forward(module, *args)


# ---- The proof ------------------------------------------------------------------------------------------------------


def forward_of(source):
    """A class of modules with this forward."""
    scope = {"torch": torch}
    exec(f"def forward{source}", scope)
    return type("Made", (nn.Module,), {"forward": scope["forward"]})


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("(self, x, r): return self.n(self.d(x) + r)", (0, ("d",), "n")),
        ("(self, r, x): return self.n(r + self.o(self.d(x)))", (1, ("d", "o"), "n")),
        ("(self, x): return self.a(self.d(x))", (0, ("d", "a"), None)),
        ("(self, x):\n  'Says what.'\n  y = self.d(x)\n  return y", (0, ("d",), None)),
    ],
)
def test_straight_lines_are_found(source, expected):
    assert line_of(forward_of(source))[2:] == expected


@pytest.mark.parametrize(
    "source",
    [
        "(self, x): return x",
        "(self, x): return self.n(self.d(x) + x)",  # the residual is the input: another line
        "(self, x, r): return self.d(x) + r",
        "(self, x, r): return self.n(self.d(x) - r)",
        "(self, x, r): return self.n(self.d(x) + self.d(r))",
        "(self, x, r): return self.n(self.d(x) + 1)",
        "(self, x, r): return self.m(self.n(self.d(x) + r))",
        "(self, x, r): return self.n(x + r)",
        "(self, x, r=None): return self.n(self.d(x) + r)",
        "(self, x, *r): return self.d(x)",
        "(self, x):\n  self.d(x)\n  return self.d(x)",  # a call whose output is dropped
        "(self, x, r):\n  y = self.d(x)\n  y += r\n  return self.n(y)",  # writes
        "(self, x):\n  self.last = x\n  return self.d(x)",
        "(self, x):\n  print(x)\n  return self.d(x)",
        "(self, x): return self.d(x) if x is not None else x",
        "(self, x):\n  for _ in x: pass\n  return self.d(x)",
        "(self, x): return self.d(torch.relu(x))",
        "(self, x): return self.d(x.relu())",
        "(self, x): return self.d(x, x)",
        "(self, x): return self.zero_grad(x)",  # a method, not a child
        "(self, x): return (self.d(x),)",
        "(self, x): yield self.d(x)",
    ],
)
def test_all_else_is_no_straight_line(source):
    assert line_of(forward_of(source)) is None


def test_a_call_or_an_attribute_of_its_own_is_no_straight_line():
    line = "(self, x): return self.d(x)"
    for name in ("__call__", "__getattr__"):
        assert line_of(type("Odd", (forward_of(line),), {name: lambda *args: args})) is None
    hidden = type("Odd", (forward_of(line),), {"d": property(lambda self: torch.relu)})
    assert line_of(hidden) is None
    assert line_of(nn.Linear) is line_of(nn.TransformerEncoderLayer) is None


# ---- The forms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_residual_gives_the_bits_of_its_code(kernel, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with kernels.use(kernel):
            for rows, k, n in [(1, 48, 100), (16, 48, 96), (7, 8, 1), (70, 100, 37), (300, 64, 768)]:
                module = converted(Output(k, n))
                x, residual = normal(rows, k, seed=1), 3 * normal(rows, n, seed=2)
                assert is_fused(module, x, residual)
                assert_identical(module(x, residual), by_code(module, x, residual))
                assert_identical(module(x[None], residual[None]), by_code(module, x[None], residual[None]))
    finally:
        torch.set_num_threads(before)


def test_work_for_two_threads_gives_the_same_bits():
    """By columns, where the norm waits for all parts, and by rows."""
    for rows in (16, 256):
        module = converted(Output(768, 768))
        x, residual = normal(rows, 768, seed=1), normal(rows, 768, seed=2)
        torch.set_num_threads(2)
        try:
            assert_identical(module(x, residual), by_code(module, x, residual))
        finally:
            torch.set_num_threads(1)


def test_the_arguments_may_come_in_either_order():
    module, x, residual = converted(Swapped()), normal(9, 48, seed=1), normal(9, 100, seed=2)
    assert type(module).__mro__[1] is Residual
    assert is_fused(module, residual, x)
    assert_identical(module(residual, x), by_code(module, residual, x))


def test_static_layers_and_convert_with_data():
    block, x = Block().eval(), normal(64, 48, seed=1)
    qmodel = convert(block, [x], config=QConfig(activation="static")).requires_grad_(False)
    assert qmodel.torchq_plan.layers["down.dense"].sum_norm == "down.norm"
    assert (qmodel.torchq_plan.layers["up.dense"].activation, qmodel.up.dense.scope) == ("up.act", None)
    hidden = qmodel.up.dense.fused(x, qmodel.up.dense.fold.activation)
    assert is_fused(qmodel.down, hidden, x)
    assert_identical(qmodel(x), by_code(qmodel.down, hidden, x))


def test_an_activated_computes_its_activation_in_the_epilogue():
    module, x = converted(Intermediate()), normal(3, 9, 48, seed=1)
    assert type(module).__mro__[1] is Row
    assert_identical(module(x), module.dense.fused(x, module.dense.fold.activation))
    torch.testing.assert_close(module(x), by_code(module, x), rtol=1e-5, atol=1e-6)


def test_a_row_hands_codes_to_a_static_layer():
    mlp, x = MLP().eval(), normal(64, 48, seed=1)
    sequential = nn.Sequential(mlp.fc1, mlp.act, mlp.fc2)
    qmlp, qsequential = (convert(each, [x], config=QConfig(activation="static")) for each in (mlp, sequential))
    planned = qmlp.torchq_plan.layers["fc1"]
    assert (planned.activation, planned.feeds) == ("act", "fc2")
    assert "passes=uint8" in repr(qmlp.fc1)
    calls, product = [], _C.call_fused
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_C, "call_fused", lambda *args: (calls.append(args[7]), product(*args))[1])
        y = qmlp(x)
    assert calls == [qmlp.fc2, None]
    assert_identical(y, qsequential(x))
    unfused = by_code(qmlp, x)
    torch.testing.assert_close(y, unfused, rtol=1e-5, atol=1e-5)
    qmlp.act = nn.Tanh()
    assert_identical(qmlp(x), by_code(qmlp, x))
    qmlp.act = torch.nn.Hardshrink()
    assert_identical(qmlp(x), by_code(qmlp, x))


def test_gradients_flow_through_a_row():
    mlp, x = MLP().eval(), normal(9, 48, seed=1).requires_grad_()
    other = x.detach().clone().requires_grad_()
    qmlp = converted(mlp)
    qmlp(x).sum().backward()
    qmlp.original.forward(qmlp, other).sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-5, atol=1e-5)


def test_the_class_keeps_its_name_and_the_model_its_words():
    module, plain = converted(Output()), Output()
    assert isinstance(module, Output)
    assert isinstance(module, Form)
    kind = type(module)
    names = (kind.__name__, kind.__qualname__, kind.__module__)
    assert names == ("Output", Output.__qualname__, Output.__module__)
    assert repr(module).startswith("Output(")
    assert list(module.state_dict())[-2:] == list(plain.state_dict())[-2:]
    assert type(plain) is Output


def test_copies_and_pickles_are_forms_too():
    block, x = converted(Block()), normal(5, 48, seed=1)
    for copied in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert type(copied.down) is type(block.down)
        assert type(copied.up) is type(block.up)
        assert copied.up._known[0][0] is copied.up.dense
        assert copied.down.dense is not block.down.dense
        assert_identical(copied(x), block(x))


def test_fuse_false_and_an_edited_plan_leave_the_class_alone():
    assert type(convert(Output(), config=QConfig(fuse=False))) is Output
    assert type(convert(Intermediate(), config=QConfig(fuse=False))) is Intermediate
    plan = torchq.plan_of(convert(Output()))
    assert torchq.Plan.from_dict(plan.to_dict()) == plan
    planned = plan.layers["dense"]
    plan.layers["dense"] = dataclasses.replace(planned, kind="float")
    assert type(torchq.apply_plan(Output(), plan)) is Output
    plan.layers["dense"] = dataclasses.replace(planned, sum_norm="dropout")
    with pytest.raises(ValueError, match="has the sum_norm 'dropout', which is no nn"):
        torchq.apply_plan(Output(), plan)


# ---- Whoever looks --------------------------------------------------------------------------------------------------


def noted(child):
    """A hook on a child of the module that notes what it saw."""

    def change(module, seen):
        getattr(module, child).register_forward_hook(lambda _, args, y: seen.append((args[0].clone(), y.clone())))

    return change


@pytest.mark.parametrize("child", ["dense", "dropout", "norm"])
def test_a_hook_sees_what_the_code_gives(child):
    module, x, residual = converted(Output()), normal(9, 48, seed=1), normal(9, 100, seed=2)
    expected, seen = module(x, residual), []
    noted(child)(module, seen)
    assert not is_fused(module, x, residual)
    assert_identical(module(x, residual), expected)
    before = {"dense": x, "dropout": module.dense(x), "norm": module.dense(x) + residual}[child]
    assert_identical(seen[0][0], before)


def test_a_hook_on_the_activation_sees_the_layers_output():
    module, x, seen = converted(Intermediate()), normal(9, 48, seed=1), []
    noted("act")(module, seen)
    module(x)
    assert_identical(seen[0][0], module.dense(x))


def changed_forward(module):
    type(module).forward = lambda self, hidden, residual: self.norm(residual)


CHANGES = {
    "another norm": lambda module: setattr(module, "norm", nn.Identity()),
    "a float layer": lambda module: setattr(module, "dense", nn.Linear(48, 100)),
    "dropout in training": lambda module: module.dropout.train(),
    "another dropout": lambda module: setattr(module, "dropout", nn.Hardtanh()),
    "a forward of its own": lambda module: setattr(module, "forward", lambda hidden, residual: residual),
    "another forward of the class": changed_forward,
    "a child behind an attribute": lambda module: vars(module).update(dropout=torch.relu),
    "a forward pre-hook": lambda module: module.register_forward_pre_hook(lambda _, args: (args[0], -args[1])),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_changed_afterwards_counts(change):
    module, x, residual = converted(Output()), normal(9, 48, seed=1), normal(9, 100, seed=2)
    unfused = convert(Output().eval(), config=QConfig(fuse=False)).requires_grad_(False)
    unfused.load_state_dict(module.state_dict())
    try:
        change(module)
        assert not is_fused(module, x, residual)
        if change is not changed_forward:
            change(unfused)
        if type(module.dense) is nn.Linear:
            unfused.dense = module.dense
        torch.manual_seed(1)
        got = module(x, residual)
        torch.manual_seed(1)
        expected = unfused.norm(residual) if change is changed_forward else unfused(x, residual)
        assert_identical(got.detach(), expected.detach())
    finally:
        vars(type(module)).get("forward") and delattr(type(module), "forward")


def test_inputs_that_only_the_code_takes():
    module, x, residual = converted(Output()), normal(9, 48, seed=1), normal(9, 100, seed=2)
    wide = normal(9, 200, seed=4)
    wide[:, ::2] = residual
    for args in [
        (x, residual[:1]),
        (x, residual[0]),
        (x, wide[:, ::2]),
        (x.double(), residual),
        (x.clone().requires_grad_(), residual),
        (x, residual.clone().requires_grad_()),
        (x[:0], residual[:0]),
    ]:
        assert not is_fused(module, *args)
        if args[0].dtype == torch.float32:
            y = module(*args)
            expected = by_code(module, *(each.detach() for each in args))
            torch.testing.assert_close(y.detach(), expected, rtol=1e-5, atol=1e-5)
            assert y.requires_grad == any(each.requires_grad for each in args)
    with pytest.raises(RuntimeError, match="x must be float32, bfloat16 or float16, got float64"):
        module(x.double(), residual)
    assert_identical(module(x, residual=residual), module(x, residual))
    assert_identical(module(hidden=x, residual=residual), module(x, residual))
    assert_identical(module(x, x.new_zeros(()).expand(9, 100)), by_code(module, x, torch.zeros(9, 100)))


def test_nothing_is_fused_where_torch_watches():
    module, x, residual = converted(Output()), normal(9, 48, seed=1), normal(9, 100, seed=2)
    expected = module(x, residual)
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_fused(module, x, residual)
    with torchq.simulate():
        assert not is_fused(module, x, residual)
        assert not torch.equal(module(x, residual), expected)
    with torch.inference_mode():
        assert is_fused(module, x, residual)
        assert_identical(module(x, residual), expected)
    graph = torch.fx.symbolic_trace(module)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["dense", "dropout", "norm"]
    assert_identical(graph(x, residual), expected)


@pytest.mark.parametrize("change", [None, "hook", "forward"])
def test_compiled_models_hold_activations_and_the_code_of_sums(change):
    block, x, graphs, seen = converted(Block()), normal(5, 48, seed=1), [], []
    if change == "hook":
        noted("act")(block.up, seen)
    if change == "forward":
        block.up.forward = lambda hidden: block.up.dense(hidden).relu()
    torch.compiler.reset()
    with torch.no_grad():
        y = torch.compile(block, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)(x)
    torch.testing.assert_close(y, block(x), rtol=1e-5, atol=1e-5)
    linears = [node for node in graphs[0].graph.nodes if node.target is torch.ops.torchq.linear_dynamic.default]
    assert [node.args[2] for node in linears] == [0 if change else torchq.ops.Activation.GELU, 0]
    torch.compiler.reset()
