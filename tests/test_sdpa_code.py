"""Which code calls torch's attention, and copies of it that call another function."""

import types
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.functional import scaled_dot_product_attention as renamed

from torchq.modules.sdpa_code import names_of_sdpa, with_other_sdpa

FACTOR = 2.0
COUNT = 0


def of_functional(x):
    return F.scaled_dot_product_attention(x, x, x)


def of_torch(x):
    return torch.nn.functional.scaled_dot_product_attention(x, x, x)


def by_name(x):
    return scaled_dot_product_attention(x, x, x)


def by_another_name(x):
    return renamed(x, x, x)


def by_a_local(x):
    attend = F.scaled_dot_product_attention
    return attend(x, x, x)


def within(x):
    return next(F.scaled_dot_product_attention(each, each, each) for each in [x])


def helped(x, *, more=0):
    return of_functional(x) + more


def helped_twice(x):
    return helped(x, more=0)


CALLING = {
    of_functional: {"F"},
    of_torch: {"torch"},
    by_name: {"scaled_dot_product_attention"},
    by_another_name: {"renamed"},
    by_a_local: {"F"},
    within: {"F"},
    helped: {"of_functional"},
    helped_twice: {"helped"},
}


def other(q, k, v):
    return q + 1


@pytest.mark.parametrize("function", CALLING, ids=lambda each: each.__name__)
def test_the_copy_calls_the_other(function):
    x = torch.arange(24.0).view(1, 2, 3, 4)
    expected = function(x)
    assert names_of_sdpa(function) == CALLING[function]
    assert torch.equal(with_other_sdpa(function, other)(x), x + 1)
    assert torch.equal(function(x), expected)
    assert torch.equal(expected, F.scaled_dot_product_attention(x, x, x))


def no_attention(x):
    return F.softmax(x, -1) * FACTOR


def counts(x):
    global COUNT
    COUNT += 1
    return F.scaled_dot_product_attention(x, x, x)


def reads_globals(x):
    return F.scaled_dot_product_attention(x, x, x) * globals()["FACTOR"]


def recursive(x):
    return recursive(x - 1) if x.sum() > 0 else F.softmax(x, -1)


@pytest.mark.parametrize("function", [no_attention, counts, reads_globals, recursive], ids=lambda each: each.__name__)
def test_other_code_stays(function):
    assert names_of_sdpa(function) == frozenset()
    assert with_other_sdpa(function, other) is function


def test_another_function_of_this_name_is_not_torchs():
    mine = types.FunctionType(of_functional.__code__, {"F": types.SimpleNamespace(scaled_dot_product_attention=other)})
    assert with_other_sdpa(mine, partial(other)) is mine


def times_factor(x):
    return F.scaled_dot_product_attention(x, x, x) * FACTOR


def test_globals_are_as_they_are_when_they_are_read(monkeypatch):
    copied = with_other_sdpa(times_factor, other)
    assert copied(torch.ones(1)) == 4
    monkeypatch.setitem(globals(), "FACTOR", 5.0)
    assert copied(torch.ones(1)) == 10
    monkeypatch.delitem(globals(), "FACTOR")
    with pytest.raises(NameError, match="FACTOR"):
        copied(torch.ones(1))


def test_whoever_replaces_torchs_function_is_asked(monkeypatch):
    copied = with_other_sdpa(of_functional, other)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: q * 7)
    assert copied(torch.ones(1)) == 7


def test_a_helper_that_is_replaced_is_called(monkeypatch):
    copied = with_other_sdpa(helped, other)
    monkeypatch.setitem(globals(), "of_functional", lambda x: x * 7)
    assert copied(torch.ones(1), more=1) == 8


def defaults(x, power=2, *, more=3):
    return F.scaled_dot_product_attention(x, x, x) ** power + more


def test_what_a_function_has_its_copy_has(monkeypatch):
    copied = with_other_sdpa(defaults, other)
    assert copied(torch.ones(1)) == 7
    monkeypatch.setattr(defaults, "__defaults__", (3,))
    monkeypatch.setattr(defaults, "__kwdefaults__", {"more": 0})
    assert with_other_sdpa(defaults, other)(torch.ones(1)) == 8
    defaults.seen = True
    assert copied.seen
    assert (copied.__name__, copied.__module__) == ("defaults", __name__)


def test_closures_are_shared():
    def outer():
        factor = 2.0

        def change(value):
            nonlocal factor
            factor = value

        return (lambda x: F.scaled_dot_product_attention(x, x, x) * factor), change

    function, change = outer()
    copied = with_other_sdpa(function, other)
    assert copied(torch.ones(1)) == 4
    change(3.0)
    assert copied(torch.ones(1)) == 6


def imports_and_warns(x):
    from .helpers import numbers  # noqa: F401

    return F.scaled_dot_product_attention(x, x, x)


def warns(x):
    warnings.warn("as ever", stacklevel=1)
    return F.scaled_dot_product_attention(x, x, x)


def test_imports_and_warnings_know_their_module():
    with pytest.warns(UserWarning, match="as ever") as found:
        with_other_sdpa(warns, other)(torch.ones(1))
    assert found[0].filename == __file__
    with pytest.raises(ImportError) as expected:
        imports_and_warns(torch.ones(1))  # pytest imports this file as no part of a package
    with pytest.raises(ImportError, match=str(expected.value)):
        with_other_sdpa(imports_and_warns, other)(torch.ones(1))
