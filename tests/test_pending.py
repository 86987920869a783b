"""A layer that waits for its activation: whoever reads its output, and whenever, gets the right values or an error."""

import copy
import io
import threading

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from torchq import _C, QConfig, convert, kernels, simulate
from torchq.modules import pending
from torchq.modules.curve import Curve
from torchq.modules.pending import Pending

pytestmark = pytest.mark.usefixtures("seeded")
DATA = [torch.randn(64, 32, generator=torch.Generator().manual_seed(i)) for i in range(3)]
X = torch.randn(300, 32, generator=torch.Generator().manual_seed(9))


@pytest.fixture(autouse=True)
def defer_small_layers(monkeypatch):
    monkeypatch.setattr(pending, "MIN_VALUES", 1)


class Up(nn.Module):
    """A Linear and an activation called by name, in code that is no straight line (test_straight.py)."""

    def __init__(self, act):
        super().__init__()
        self.dense, self.act = nn.Linear(32, 48), act

    def forward(self, x):
        return self.act(self.dense(x)) if x is not None else x


class Net(nn.Module):
    """Its forward is `run(self, x, way)`. Calibration only knows the way "plain"."""

    def __init__(self, run=None, act=None):
        super().__init__()
        self.up, self.down, self.run = Up(act or nn.GELU()), nn.Linear(48, 8), run
        self.kept = None

    def forward(self, x, way="plain"):
        return self.down(self.up(x)) if self.run is None or way == "plain" else self.run(self, x)


def converted(model, **options):
    return convert(model.eval(), DATA, config=QConfig(smoothing="none", **options))


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def folds(qmodel, x=X):
    """How many activations ran fused while the model ran, and its output."""
    count, end = [], _C.end_linear
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_C, "end_linear", lambda begun, activation: (count.append(activation), end(begun, activation))[1])
        y = qmodel(x)
    return sum(activation != 0 for activation in count), y


def error(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def alone(qmodel, x):
    """What the modules give when they are called one by one, outside of every scope."""
    return qmodel.down(qmodel.up.act(qmodel.up.dense(x)))


@pytest.mark.parametrize("scheme", ["static", "dynamic"])
@pytest.mark.parametrize("act", [nn.ReLU(), nn.GELU(), nn.GELU(approximate="tanh"), nn.SiLU()], ids=repr)
def test_an_activation_called_by_name_is_folded(act, scheme):
    model = Net(act=act)
    qmodel = converted(model, activation=scheme)
    assert qmodel.torchq_plan.layers["up.dense"].activation == "up.act"
    count, y = folds(qmodel)
    assert count == 1
    assert type(y) is torch.Tensor
    assert error(y, alone(qmodel, X)) < 0.01
    with torch.no_grad():
        assert error(y, model(X)) < 0.1
    assert type(qmodel.up.act) is type(act)


def test_inference_mode_folds_as_well():
    qmodel = converted(Net())
    expected = folds(qmodel)[1]
    with torch.inference_mode():
        for x in (X, X.clone()):
            count, y = folds(qmodel, x)
            assert count == 1
            assert torch.equal(y, expected)


def test_it_can_be_switched_off():
    qmodel = converted(Net(), fuse=False)
    assert qmodel.torchq_plan.layers["up.dense"].activation is None
    assert qmodel.up.dense.scope is None
    assert not qmodel.up._forward_hooks
    assert folds(qmodel)[0] == 0


class Shared(Net):
    def forward(self, x):
        h = self.up.dense(x)
        return self.down(self.up.act(h)) + h.sum(-1, keepdim=True)


class Slowly(nn.GELU):
    def forward(self, x):
        return super().forward(x + 0)


@pytest.mark.parametrize("model", [Shared(), Net(act=nn.ReLU(inplace=True)), Net(act=Slowly())])
def test_where_another_reads_the_output_it_does_not_wait(model):
    expected = model.eval()(X)
    qmodel = converted(model)
    assert qmodel.torchq_plan.layers["up.dense"].activation is None
    count, y = folds(qmodel)
    assert count == 0
    assert error(y, expected) < 0.1


def test_little_work_is_not_worth_it(monkeypatch):
    qmodel = converted(Net())
    monkeypatch.setattr(pending, "MIN_VALUES", 1 << 15)
    assert folds(qmodel)[0] == 0  # 300 · 48 values
    assert folds(qmodel, X.repeat(3, 1))[0] == 1


def test_without_data_nothing_is_folded():
    assert convert(Net()).torchq_plan.layers["up.dense"].activation is None


def test_the_layer_alone_and_its_activation_alone():
    model = Net()
    qmodel = converted(model)
    with torch.no_grad():
        y = qmodel.up.dense(X)
        assert type(y) is torch.Tensor
        assert error(y, model.up.dense(X)) < 0.1
        assert torch.equal(qmodel.up.act(X), model.up.act(X))
        assert error(qmodel.up(X), model.up(X)) < 0.1


def returned_and_used(m, x):
    h = m.up.dense(x)
    return m.down(m.up.act(h)) + h.sum(-1, keepdim=True)


WAYS = {
    "the pre-activation is read as well": returned_and_used,
    "before": lambda m, x: (lambda h: m.down(h.abs() + m.up.act(h)))(m.up.dense(x)),
    "the activation twice on one": lambda m, x: (lambda h: m.down(m.up.act(h) + m.up.act(h)))(m.up.dense(x)),
    "the activation on its own result": lambda m, x: m.down(m.up.act(m.up.act(m.up.dense(x)))),
    "the activation on something else": lambda m, x: m.down(m.up.act(m.up.dense(x) + 1)),
    "no activation": lambda m, x: m.down(m.up.dense(x)),
    "another activation": lambda m, x: m.down(torch.relu(m.up.dense(x))),
    "written in place": lambda m, x: (lambda h: (h.mul_(2), m.down(m.up.act(h)))[1])(m.up.dense(x)),
    "a view is written": lambda m, x: (lambda h: (h[:, :3].zero_(), m.down(m.up.act(h)))[1])(m.up.dense(x)),
    "a view of it": lambda m, x: m.down(m.up.act(m.up.dense(x).view(2, -1, 48))).flatten(0, 1),
    "to numpy": lambda m, x: m.down(torch.from_numpy(m.up.dense(x).numpy().copy())),
    "copied": lambda m, x: m.down(m.up.act(copy.deepcopy(m.up.dense(x)))),
    "in a loop": lambda m, x: sum(m.down(m.up.act(m.up.dense(part))).sum() for part in x.split(100)).expand(1),
}


class Flat(Net):
    """The layers and the activation are in reach of one forward, which is their scope."""

    def forward(self, x, way="plain"):
        return self.run(self, x) if way != "plain" else self.down(self.up.act(self.up.dense(x)))


@pytest.mark.parametrize("way", WAYS)
def test_ways_that_calibration_did_not_take(way):
    """The scope is forced on the whole model, so that all of `run` is inside."""
    model = Flat(WAYS[way])
    qmodel = converted(model)
    outer = pending.Scope()
    outer.attach(qmodel)
    expected = WAYS[way](qmodel, X)
    qmodel.up.dense.scope = outer
    with torch.no_grad():
        y = qmodel(X, way)
        assert type(y) is torch.Tensor
        assert error(y, expected) < 0.01
        assert error(y, model(X, way)) < 0.1


def flat(run, **options):
    qmodel = converted(Flat(run), **options)
    outer = pending.Scope()
    outer.attach(qmodel)
    qmodel.up.dense.scope = outer
    return qmodel


@pytest.mark.parametrize("scheme", ["static", "dynamic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 300])
def test_an_input_written_before_the_output_is_read_does_not_matter(rows, dtype, scheme):
    def run(m, x):
        x = x.clone()
        h = m.up.dense(x)
        assert type(h) is Pending
        x.fill_(7)
        return m.up.act(h), h

    qmodel = flat(run, activation=scheme)
    x = X[:rows].to(dtype)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            y, h = qmodel(x, "other")
            assert y.dtype == h.dtype == dtype
            assert torch.equal(h, qmodel.up.dense(x))
            assert error(y, qmodel.up.act(h)) < (1e-6 if dtype == torch.float32 else 0.01)


def test_a_layer_that_changes_before_its_output_is_read_does_not_matter():
    def run(m, x):
        h = m.up.dense(x)
        m.up.dense.load_state_dict({k: v.clone().zero_() if k == "bias" else v for k, v in state.items()})
        with kernels.use("reference"):
            return h + 0

    qmodel = flat(run)
    state = qmodel.up.dense.state_dict()
    expected = qmodel.up.dense(X)
    y = qmodel(X, "other")
    assert torch.equal(y, expected)
    assert not torch.equal(qmodel.up.dense(X), expected)


def test_what_is_returned_or_kept_is_an_ordinary_tensor_or_has_its_value():
    def run(m, x):
        m.kept = m.up.dense(x)
        return {"h": m.kept, "y": [m.down(m.up.act(m.kept))]}

    qmodel = flat(run)
    x = X.clone()
    out = qmodel(x, "other")
    x.zero_()
    assert type(out["h"]) is torch.Tensor
    expected = qmodel.up.dense(X)
    assert torch.equal(out["h"], expected)
    assert torch.equal(qmodel.kept + 0, expected)


def test_an_error_inside_leaves_the_scope():
    def run(m, x):
        m.up.dense(x)
        raise KeyError

    qmodel = flat(run)
    for _ in range(3):
        with pytest.raises(KeyError):
            qmodel(X, "other")
    assert pending._calls.entered == []
    assert type(qmodel.up.dense(X)) is torch.Tensor
    assert folds(qmodel)[0] == 1


@pytest.mark.parametrize("where", ["up", "up.dense", "up.act", "down", ""])
def test_hooks_see_ordinary_values(where):
    model = Net()
    qmodel, seen = converted(model), []
    for network in (model, qmodel):
        module = network.get_submodule(where)
        module.register_forward_hook(lambda module, args, y: seen.append((args[0] + 0, y + 0)))
        with torch.no_grad():
            network(X)
    for got, want in zip(seen[1], seen[0], strict=True):
        assert type(got) is torch.Tensor
        assert error(got, want) < 0.1


def test_two_threads():
    """One is inside the model, the other calls its layer alone."""
    inside, go, types = threading.Event(), threading.Event(), []

    def run(m, x):
        inside.set()
        go.wait(30)
        types.append(type(m.up.dense(x)))
        return x

    qmodel = flat(run)
    thread = threading.Thread(target=lambda: qmodel(X, "other"))
    thread.start()
    assert inside.wait(30)
    assert type(qmodel.up.dense(X)) is torch.Tensor
    go.set()
    thread.join()
    assert types == [Pending]


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, saved])
def test_copies_fold_on_their_own(duplicate):
    qmodel = converted(Net())
    expected, twin = qmodel(X), duplicate(qmodel)
    assert twin.up.dense.scope is not qmodel.up.dense.scope
    count, y = folds(twin)
    assert count == 1
    assert torch.equal(y, expected)


def test_what_does_not_defer():
    """Gradients, simulation, modes, autocast, little work: right values all the same."""
    qmodel = converted(Net())
    plain = alone(qmodel, X)
    with torch.enable_grad():
        count, y = folds(qmodel, X.clone().requires_grad_())
    assert (count, y.requires_grad) == (0, True)
    with simulate():
        assert error(qmodel(X), plain) < 0.01
    with Seen() as mode:
        assert torch.equal(qmodel(X), plain)
    assert "aten::gelu" in mode.names
    with torch.autocast("cpu", torch.bfloat16):
        assert qmodel(X).dtype == torch.bfloat16
    qmodel.up.dense.register_forward_hook(lambda *_: None)
    assert folds(qmodel)[0] == 0


def test_gradients():
    model = Net()
    qmodel, x = converted(model), X.clone().requires_grad_()
    other = X.clone().requires_grad_()
    with torch.enable_grad():
        qmodel(x).sum().backward()
        model(other).sum().backward()
        assert folds(qmodel)[0] == 1  # x wants no gradient
    assert error(x.grad, other.grad) < 0.1


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_compile_and_export():
    qmodel = converted(Net())
    expected = alone(qmodel, X)
    torch.compiler.reset()
    assert torch.equal(torch.compile(qmodel, fullgraph=True, backend="aot_eager")(X), expected)
    for strict in (False, True):
        assert torch.equal(torch.export.export(qmodel, (X,), strict=strict).module()(X), expected)
    torch.compiler.reset()


# ---- Activations of several operations ----


class Formula(nn.Module):
    """As transformers' NewGELUActivation."""

    def forward(self, x):
        return 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * (x + 0.044715 * torch.pow(x, 3.0))))


def test_an_activation_of_several_operations_is_one_and_is_folded():
    model = Net(act=Formula()).eval()
    qmodel = converted(model)
    assert isinstance(qmodel.up.act, Curve)
    assert isinstance(model.up.act, Formula)
    count, y = folds(qmodel)
    assert count == 1
    assert error(y, model(X)) < 0.05
    assert error(qmodel.up.act(X), Formula()(X)) < 1e-6


def test_a_module_that_torch_computes_at_once_stays():
    assert type(converted(Net()).up.act) is nn.GELU
    assert type(converted(Net(act=Formula()), fuse=False).up.act) is Formula


def test_what_is_read_beside_such_an_activation_is_right():
    def both(net, x):
        hidden = net.up.dense(x)
        return net.down(net.up.act(hidden) + hidden)

    model = Net(both, act=Formula()).eval()
    qmodel = converted(model)
    assert error(qmodel(X, "both"), model(X, "both")) < 0.05


def test_a_setting_that_is_changed_afterwards_counts_or_is_refused():
    qmodel = converted(Net())
    expected = folds(qmodel)[1]
    qmodel.up.act.approximate = "tanh"
    count, y = folds(qmodel)
    assert count == 0
    assert not torch.equal(y, expected)
    assert torch.equal(y, alone(qmodel, X))
    qmodel = converted(Net(act=Formula()))
    with pytest.raises(AttributeError, match="'alpha' can't be set: torchq replaced this activation by one operation"):
        qmodel.up.act.alpha = 2.0
