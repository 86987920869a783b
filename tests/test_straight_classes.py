"""Straight modules whose classes have ways of their own, and code that is replaced after it was read."""

import abc
import copy
from typing import ClassVar

import pytest
import torch
from torch import nn

from helpers.compare import assert_identical
from helpers.numbers import normal
from torchq import QConfig, convert
from torchq.modules.straight import line_of
from torchq.modules.straight_forms import Form, Residual, Row

K, N = 48, 100


def give_children(module):
    nn.Module.__init__(module)
    module.dense, module.norm = nn.Linear(K, N), nn.LayerNorm(N)


def forward_of_sum(module, hidden, residual):
    return module.norm(module.dense(hidden) + residual)


class Output(nn.Module):
    """The plain one, and code for all the others."""

    def __init__(self, *sizes):
        give_children(self)

    forward = forward_of_sum


class Tagged(nn.Module):
    """Takes a tag of each subclass."""

    kinds: ClassVar[list[type]] = []

    def __init_subclass__(cls, *, tag):
        cls.kinds.append(cls)


class OfTagged(Tagged, tag="one"):
    __init__, forward = give_children, forward_of_sum


class Registry(type):
    """Of which each class is known by its name."""

    known: ClassVar[dict[str, type]] = {}

    def __init__(cls, name, bases, names):
        super().__init__(name, bases, names)
        assert Registry.known.setdefault(name, cls) is cls


class OfRegistry(nn.Module, metaclass=Registry):
    __init__, forward = give_children, forward_of_sum


def rebuilt(state):
    module = Reduced.__new__(Reduced)
    vars(module).update(state)
    return module


class Reduced(Output):
    def __reduce__(self):
        return rebuilt, (dict(vars(self)),)


class NewWithSizes(Output):
    def __new__(cls, k, n):
        return super().__new__(cls)

    def __getnewargs__(self):
        return K, N


class ClassHidden(Output):
    @property
    def __class__(self):
        return Output


class Reads(Output):
    counted = 0

    def __getattribute__(self, name):
        Reads.counted += name == "dense"
        return super().__getattribute__(name)


def converted(module, **settings):
    torch.manual_seed(0)
    for child in module.children():
        if not isinstance(child, nn.GELU):
            child.reset_parameters()
    return convert(module.eval(), config=QConfig(**settings)).requires_grad_(False)


def inputs():
    return normal(9, K, seed=1), normal(9, N, seed=2)


@pytest.mark.parametrize("kind", [OfTagged, OfRegistry, Reduced, NewWithSizes, ClassHidden, Reads])
def test_a_class_that_would_notice_keeps_its_modules(kind):
    module = converted(kind(K, N) if issubclass(kind, Output) else kind())
    assert type(module) is kind
    expected, before = converted(Output(), fuse=False)(*inputs()), Reads.counted
    assert_identical(module(*inputs()), expected)
    assert Reads.counted - before == (kind is Reads)
    assert_identical(copy.deepcopy(module)(*inputs()), expected)
    assert Tagged.kinds == [OfTagged]


def test_an_abstract_class_and_a_setattr_of_its_own_are_usual():
    class Abstract(Output, abc.ABC):
        def __setattr__(self, name, value):
            assert name != "__class__"
            super().__setattr__(name, value)

    module = converted(Abstract())
    assert isinstance(module, Form)
    assert_identical(module(*inputs()), converted(Output(), fuse=False)(*inputs()))


class Activated(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.act = nn.Linear(K, N), nn.GELU()

    def forward(self, x):
        return self.act(self.dense(x))


def test_a_row_takes_the_arguments_of_its_code():
    class Masked(Activated):
        def forward(self, mask, x):
            return self.act(self.dense(x))

    x, mask = normal(9, K, seed=1), torch.zeros(9, K)
    module = convert(Masked().eval())
    assert_identical(module(mask, x), module.act(module.dense(x)))
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
        module(mask)


def named(form, *names):
    """A class of modules like Output or Activated with these names for their children."""
    first, second = names

    def give(module):
        nn.Module.__init__(module)
        setattr(module, first, nn.Linear(K, N))
        setattr(module, second, nn.LayerNorm(N) if form is Residual else nn.GELU())

    code = (
        f"self, x, r: self.{second}(self.{first}(x) + r)"
        if form is Residual
        else f"self, x: self.{second}(self.{first}(x))"
    )
    return type("Named", (nn.Module,), {"__init__": give, "forward": eval(f"lambda {code}")})


@pytest.mark.parametrize("form", [Residual, Row])
@pytest.mark.parametrize("names", [("line", "form"), ("_run", "original"), ("adopt", "reads")])
def test_children_may_have_the_names_of_a_forms_attributes(form, names):
    args = inputs()[: 2 if form is Residual else 1]
    module, plain = converted(named(form, *names)()), converted(named(form, "a", "b")(), fuse=False)
    assert_identical(module(*args), plain(*args))
    assert all(module.get_submodule(name) is getattr(module, name) for name in names)


def test_attributes_may_have_the_names_of_a_forms_attributes():
    class Named(Activated):
        line = "line"

        def computes(self):
            return "computed"

    module = Named()
    module._known = "known"
    qmodule = converted(module)
    assert (qmodule.line, qmodule.computes(), qmodule._known) == ("line", "computed", "known")
    assert_identical(qmodule(*inputs()[:1]), converted(Activated(), fuse=False)(*inputs()[:1]))


def read(kind):
    """A class of its own for a test to change, whose code is read, and a converted module of it; and its inputs."""
    made = type("Made", (kind,), {"forward": lambda *args: None})
    if kind is Output:
        made.forward = lambda self, x, residual: self.norm(self.dense(x) + residual)
        args = inputs()
    else:
        made.forward = lambda self, x: self.act(self.dense(x))
        args = inputs()[:1]
    module = convert(made().eval()).requires_grad_(False)
    assert isinstance(module, Form)
    return made, module, args


@pytest.mark.parametrize("kind", [Output, Activated])
def test_code_that_is_replaced_counts(kind):
    """As IPython's autoreload does it: the function stays, with other code."""
    made, module, args = read(kind)
    line = line_of(made)
    made.forward.__code__ = (lambda self, *args: self.dense(args[0]).neg()).__code__
    assert_identical(module(*args), module.dense(args[0]).neg())
    assert line_of(made) is None
    made.forward.__code__ = line.code
    assert line_of(made) == line


@pytest.mark.parametrize("kind", [Output, Activated])
def test_a_call_that_the_class_gets_later_counts(kind):
    made, module, args = read(kind)
    made.__call__ = lambda self, *args: "called"
    assert module(*args) == "called"


@pytest.mark.parametrize("kind", [Output, Activated])
def test_a_subclass_of_a_converted_modules_class_has_code_of_its_own(kind):
    _, module, args = read(kind)

    class Negative(type(module)):
        def forward(self, *args):
            return super().forward(*args).neg()

    expected = module.original.forward(module, *args).neg()
    object.__setattr__(module, "__class__", Negative)
    assert_identical(module(*args), expected)


@pytest.mark.parametrize("kind", [Output, Activated])
def test_the_class_of_a_converted_module_makes_float_ones(kind):
    """As user's code does that makes another module by `type(module)(...)`."""
    module, args = kind().eval(), inputs()[: 2 if kind is Output else 1]
    made = type(converted(module))().eval()
    made.load_state_dict(module.state_dict())
    assert_identical(made(*args), module(*args))
    qmade = convert(made).requires_grad_(False)
    assert_identical(qmade(*args), converted(module, fuse=False)(*args))
