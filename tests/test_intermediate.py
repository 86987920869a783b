"""Fusing is never seen: hooks, slices, new heads, training mode and other ways through a model get the float values.

The float model's values are the yardstick: int8 is within 10 % of them, and what an activation, a code or a smoothed
value in their place would be is far outside. `alone` is exact: the children of a converted model called one by one.
"""

import copy
import io

import pytest
import torch
from torch import nn

from helpers.models import DATA, X
from torchq import QConfig, convert, simulate
from torchq.modules.int8_sequential import Int8Sequential

pytestmark = pytest.mark.usefixtures("seeded")
SCHEMES = pytest.mark.parametrize("scheme", ["static", "dynamic"])


def chain():
    return nn.Sequential(
        nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 40), nn.ReLU(), nn.Dropout(0.5), nn.Linear(40, 8)
    ).eval()


def converted(model, scheme="static", **options):
    return convert(model, DATA, config=QConfig(activation=scheme, smoothing="none", **options))


def error(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def alone(qmodel, x):
    for child in qmodel:
        x = child(x)
    return x


@SCHEMES
def test_slices_children_and_the_whole(scheme):
    model = chain()
    qmodel = converted(model, scheme)
    assert type(qmodel) is Int8Sequential
    with torch.no_grad():
        for end in range(1, 7):
            for got in (qmodel[:end](X), nn.Sequential(*list(qmodel.children())[:end])(X), alone(qmodel[:end], X)):
                assert got.dtype == torch.float32
                assert error(got, model[:end](X)) < 0.1, end
            assert error(qmodel[:end](X), alone(qmodel[:end], X)) < 0.01
        for start in range(1, 6):
            x = model[:start](X)
            assert error(qmodel[start:](x), model[start:](x)) < 0.1, start
        assert error(qmodel[0](X), model[0](X)) < 0.1
        assert torch.equal(qmodel[1](X), model[1](X))
    assert type(qmodel[:-1]) is Int8Sequential
    assert isinstance(qmodel, nn.Sequential)
    assert [type(child) for child in qmodel[1::2]] == [nn.GELU, nn.ReLU, type(qmodel[0])]


@SCHEMES
def test_a_new_head(scheme):
    model, head = chain(), nn.Linear(40, 3)
    qmodel = converted(model, scheme)
    with torch.no_grad():
        expected = head(model[:-1](X))
        assert error(nn.Sequential(qmodel[:-1], head)(X), expected) < 0.1
        assert error(nn.Sequential(*qmodel[:-1], head)(X), expected) < 0.1
        qmodel[5] = head
        assert error(qmodel(X), expected) < 0.1
        before = qmodel(X)
        del qmodel[1]
        assert error(qmodel(X), before) > 0.1
        assert error(qmodel(X), alone(qmodel, X)) < 0.01
        qmodel.append(nn.ReLU()).insert(0, nn.Tanh())
        assert error(qmodel(X), alone(qmodel, X)) < 0.01
        if scheme == "dynamic":  # a static range is that of the GELU's output
            assert error(qmodel(X), nn.Sequential(nn.Tanh(), model[0], *model[2:5], head, nn.ReLU())(X)) < 0.1


@SCHEMES
@pytest.mark.parametrize("index", range(6))
def test_hooks_see_the_float_models_values(scheme, index):
    model = chain()
    qmodel = converted(model, scheme)
    expected, seen = qmodel(X), []
    for network in (model, qmodel):
        network[index].register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
        network[index].register_forward_hook(lambda module, args, y: seen.append(y.detach()))
        y = network(X)
    assert error(y, expected) < 0.01
    assert {value.dtype for value in seen} == {torch.float32}
    for got, want in zip(seen[2:], seen[:2], strict=True):
        assert error(got, want) < 0.1


def test_a_hook_may_change_what_it_sees():
    model = chain()
    qmodel = converted(model, "dynamic")
    for network in (model, qmodel):
        network[1].register_forward_hook(lambda module, args, y: 1 - y)
        network[5].register_forward_pre_hook(lambda module, args: (2 * args[0],))
    with torch.no_grad():
        assert error(qmodel(X), model(X)) < 0.1


def test_hooks_on_the_container_and_on_all_modules():
    model = chain()
    qmodel = converted(model)
    expected, seen = qmodel(X), []
    with qmodel.register_forward_hook(lambda module, args, y: seen.append((args[0], y))):
        qmodel(X)
    assert torch.equal(seen[0][0], X)
    assert torch.equal(seen[0][1], expected)
    types = []
    with nn.modules.module.register_module_forward_hook(lambda module, args, y: types.append((type(module), y.dtype))):
        assert error(qmodel(X), expected) < 0.01
    assert types == [(type(module), torch.float32) for module in [*qmodel, qmodel]]


def test_monte_carlo_dropout():
    """In training a Dropout samples as in the float model; with p = 0, or in eval, all is as before."""
    model = chain()
    qmodel = converted(model)
    expected = qmodel(X)

    def spread(network):
        with torch.no_grad():
            return torch.stack([network(X) for _ in range(64)]).std(0).mean().item()

    ratio = spread(qmodel.train()) / spread(model.train())
    assert 0.9 < ratio < 1.1
    qmodel[4].p = 0.0
    assert torch.equal(qmodel(X), expected)
    qmodel[4].p = 0.5
    assert torch.equal(qmodel.eval()(X), expected)


def test_gradients_and_simulation_have_the_same_values():
    qmodel = converted(chain())
    expected = qmodel(X)
    with torch.enable_grad():
        y = qmodel(X.clone().requires_grad_())
    assert y.requires_grad
    assert torch.equal(y.detach(), expected)
    with simulate():
        assert error(qmodel(X), expected) < 0.01
    with torch.profiler.profile() as profile:
        assert torch.equal(qmodel(X), expected)
    names = [event.name for event in profile.events()]
    assert names.count("torchq::linear_static") == 3
    assert not {"aten::gelu", "aten::relu"} & set(names)


COPIES = {
    "deepcopy": copy.deepcopy,
    "saved": lambda qmodel: torch.load(io.BytesIO(saved(qmodel)), weights_only=False),
}


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copies(duplicate):
    qmodel = converted(chain())
    expected, twin = qmodel(X), duplicate(qmodel)
    assert type(twin) is Int8Sequential
    assert torch.equal(twin(X), expected)
    twin[1].register_forward_hook(lambda module, args, y: 0 * y)
    assert not torch.equal(twin(X), expected)
    assert torch.equal(qmodel(X), expected)


def test_a_shared_activation_and_a_shared_layer():
    """One GELU in three places, one Linear in two Sequentials: each fused where it is, and each its own self."""
    gelu, linear = nn.GELU(), nn.Linear(24, 24)
    first = nn.Sequential(linear, gelu, nn.Linear(24, 24), gelu)
    model = nn.Sequential(first, nn.Sequential(linear, nn.Tanh(), linear), gelu).eval()
    qmodel = converted(model)
    assert qmodel[0][0] is qmodel[1][0]
    assert qmodel[0][1] is qmodel[2]
    with torch.no_grad():
        assert error(qmodel(X), model(X)) < 0.1
        assert error(qmodel[1](X), model[1](X)) < 0.1


def test_a_traced_graph_has_the_children_as_leaves():
    qmodel = converted(chain())
    traced = torch.fx.symbolic_trace(qmodel)
    assert [node.op for node in traced.graph.nodes] == ["placeholder", *["call_module"] * 6, "output"]
    assert error(traced(X), qmodel(X)) < 0.01


def test_bad_input_is_refused_as_by_a_layer():
    qmodel = converted(chain())
    with pytest.raises(TypeError, match="got uint8"):
        qmodel(torch.zeros(3, 24, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="24 input features, but x has 23"):
        qmodel(torch.zeros(3, 23))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("duplicate", [lambda model: model, copy.deepcopy])
def test_a_setting_of_an_activation_that_is_changed_afterwards_counts(duplicate):
    torch.manual_seed(0)
    qmodel = convert(nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32)))
    qmodel, x = duplicate(qmodel), torch.randn(8, 32) * 3
    before = qmodel(x)
    for approximate in ("tanh", "none"):
        qmodel[1].approximate = approximate
        one_by_one = qmodel[2](qmodel[1](qmodel[0](x)))
        for _ in range(2):
            assert torch.equal(qmodel(x), one_by_one)
        assert torch.allclose(before, one_by_one, atol=1e-5) == (approximate == "none")
        torch.compiler.reset()
        assert torch.allclose(torch.compile(qmodel, backend="aot_eager")(x), one_by_one, atol=1e-5)
    qmodel[1].approximate = "tanh"
    assert torch.equal(torch.compile(qmodel, backend="aot_eager")(x), qmodel(x))
