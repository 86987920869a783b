"""What the self-attention of a model of transformers computes, proven by its code.

Three children of one input, a head for each `size` columns, the function that transformers' registry has, and perhaps
children behind it: that is the forward of most encoders. Decoders turn queries and keys by the angles of positions, and
give keys and values to a cache, too. The code is run on symbols (`attention_symbols.py`), in a world that holds nothing
else, so nothing can happen that isn't seen: no globals but the registry and the function that turns, no builtins but
getattr, no loops, no stores but to locals. A branch that depends on a symbol is unknown.
"""

import functools
import inspect
import itertools
import sys
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from torchq.modules.attention_symbols import (
    Argument,
    CacheCall,
    Input,
    Joined,
    Module,
    Registry,
    Something,
    Turn,
    Turning,
    Weights,
    get_attribute,
)
from torchq.modules.others import apart, hands_on
from torchq.modules.plain_code import forward_of, runs_straight
from torchq.modules.rotary_code import RotaryCode, rotary_of
from torchq.modules.straight import UnknownError, is_usual
from torchq.modules.wrappers import unwrapped

REGISTRY = "ALL_ATTENTION_FUNCTIONS"
"""The name under which every modeling file of transformers knows its attention functions."""

MASK = "attention_mask"
"""What transformers calls the mask, of a model and of the function."""


class Found(NamedTuple):
    """What a run of the code has computed.

    Args:
        projections: the children called on the input: those of query, key and value.
        norms: of each of these three, the children called on its heads, one after the other.
        size: the attribute that holds the columns of a head.
        scale: the attribute that is its `scaling`.
        behind: the children called on what the heads give, one after the other.
        turn: how queries and keys are turned; None if they aren't.
        cache: how keys and values are given to a cache; None if they aren't.
        handed: what else the attention function is given, which has no effect there: names, and paths of attributes.
    """

    projections: tuple[str, str, str]
    norms: tuple[tuple[str, ...], ...]
    size: str
    scale: str
    behind: tuple[str, ...]
    turn: Turn | None
    cache: CacheCall | None
    handed: tuple[tuple[str, str], ...]

    def called(self) -> tuple[str | CacheCall, ...]:
        """The children, and the cache, in the order of their calls."""
        rows = zip(self.projections, self.norms, strict=True)
        products = (name for projection, norms in rows for name in (projection, *norms))
        return *products, *(() if self.cache is None else (self.cache,)), *self.behind

    def attributes_handed(self) -> tuple[str, ...]:
        """The attributes of the module itself that the attention function is given beside."""
        return tuple(path for _, path in self.handed if "." not in path)

    def children(self) -> tuple[str, ...]:
        """The children alone."""
        return tuple(each for each in self.called() if type(each) is str)


class SelfAttentionCode(NamedTuple):
    """What the code of a self-attention computes.

    Args:
        forward: the function.
        code: its code, which may be replaced.
        inner: what a decorator of transformers' has wrapped; without one `forward`.
        inner_code: its code.
        found: what it computes.
        children: those that it calls.
        numbers: the attributes that are the columns of a head, the scale, and, of one with a cache, the layer's number.
        is_of_products: whether attention is all that happens between projections and what is behind.
        rotary: the function by which it turns queries and keys; None if it doesn't.
        names: of its arguments, the first of which is the input.
        required: those that a call must give.
        refused: names that a call may not have: the code, or the attention function, would do something else.
        takes_more: whether it takes arguments by other names, which it only hands on to the attention function.
    """

    forward: types.FunctionType
    code: types.CodeType
    inner: types.FunctionType
    inner_code: types.CodeType
    found: Found
    children: tuple[str, ...]
    numbers: tuple[str, ...]
    is_of_products: bool
    rotary: RotaryCode | None
    names: tuple[str, ...]
    required: frozenset[str]
    refused: frozenset[str]
    takes_more: bool

    def attributes(self) -> tuple[str, ...]:
        """The names that it looks up in the module, and the one that the attention function does."""
        return *self.children, *self.numbers, "config", "torchq_attention"

    def turns(self) -> bool:
        """Whether the function by which it turns queries and keys, if it does, is still what was read."""
        turn, rotary = self.found.turn, self.rotary
        inner: Any = self.inner  # for mypy, a function in a tuple is a method
        if turn is None or rotary is None:
            return True
        return inner.__globals__.get(turn.function) is rotary.function and rotary.facts.hold()

    def registry(self) -> Any:
        """The attention functions that it asks; none if they are not transformers', or its code was replaced."""
        inner: Any = self.inner  # for mypy, a function in a tuple is a method
        registry = inner.__globals__.get(REGISTRY)
        return registry if is_registry(registry) and inner.__code__ is self.inner_code else {}


def self_attention_of(kind: type[nn.Module]) -> SelfAttentionCode | None:
    """What modules of a class compute, if that is a self-attention of transformers."""
    known: Any = kind  # for mypy, a class of torch has no hash
    forward = forward_of(kind)
    if "transformers" not in sys.modules or not isinstance(forward, types.FunctionType) or not is_usual(kind):
        return None
    inner, deprecated = unwrapped(forward)
    if not is_registry(inner.__globals__.get(REGISTRY)):
        return None
    return _read(known, forward, forward.__code__, inner, inner.__code__, deprecated)


def is_registry(value: Any) -> bool:
    """Whether these are attention functions, as transformers has them."""
    return "transformers" in sys.modules and type(value) is _registry_class()


@functools.cache
def _registry_class() -> Any:
    from transformers.modeling_utils import AttentionInterface

    return AttentionInterface


@functools.lru_cache(maxsize=256)
def _read(
    kind: type[nn.Module],
    forward: types.FunctionType,
    code: types.CodeType,
    inner: types.FunctionType,
    inner_code: types.CodeType,
    deprecated: frozenset[str],
) -> SelfAttentionCode | None:
    if not _is_harmless(inner):
        return None
    _, first, *parameters = inspect.signature(inner).parameters.values()
    named = [each for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
    more = [each for each in parameters if each.kind is each.VAR_KEYWORD]
    if len(parameters) != len(named) + len(more) or any(each.default not in (None, each.empty) for each in named):
        return None
    names = tuple(each.name for each in named)
    if MASK not in names or "is_causal" in names:
        return None
    found = _found(kind, inner, names)
    if found is None:
        return None
    rotary = None if found.turn is None else rotary_of(inner.__globals__[found.turn.function])
    required = frozenset(each.name for each in named if each.default is each.empty)
    handed = (name for name, _ in found.handed)
    refused = frozenset({next(iter(inspect.signature(inner).parameters)), *_TAKEN, *handed, *deprecated})
    plain = found.turn is None and found.cache is None and not any(found.norms)
    numbers = (found.size, found.scale, *(() if found.cache is None else (found.cache.place,)))
    facts = (found, found.children(), numbers, plain, rotary, (first.name, *names), required, refused, bool(more))
    return SelfAttentionCode(forward, code, inner, inner_code, *facts)


_TAKEN = ("module", "query", "key", "value", "dropout", "scaling")
"""What the code gives the attention function itself."""


def _is_harmless(function: types.FunctionType) -> bool:
    code = function.__code__
    if not hands_on(code):
        return False
    usual = inspect.CO_OPTIMIZED | inspect.CO_NEWLOCALS | inspect.CO_VARKEYWORDS | inspect.CO_NESTED
    if code.co_flags & ~usual or code.co_freevars or code.co_cellvars or code.co_kwonlyargcount:
        return False
    return code.co_argcount >= 3 and not any(name.startswith("__") for name in code.co_names) and runs_straight(code)


def _found(kind: type[nn.Module], inner: types.FunctionType, names: tuple[str, ...]) -> Found | None:
    """What the code computes, with a mask and without, and with a cache and without, if there is one."""
    masks = (None, Something())
    plain = [_run(kind, inner, dict.fromkeys(names) | {MASK: mask}) for mask in masks]
    if plain[0] is not None:
        return plain[0] if plain[0] == plain[1] else None
    most = _run(kind, inner, {name: masks[1] if name == MASK else Argument for name in names})
    if most is None or most.turn is None:
        return None
    caches = (None,) if most.cache is None else (None, most.cache.argument)
    for mask, cache in itertools.product(masks, caches):
        given = {name: Argument if name in (most.turn.argument, cache) else None for name in names}
        expected = most._replace(cache=None if cache is None else most.cache)
        if _run(kind, inner, given | {MASK: mask}) != expected:
            return None
    return most


def _run(kind: type[nn.Module], function: types.FunctionType, given: Mapping[str, Any]) -> Found | None:
    """With these arguments, of which `Argument` stands for one of those; None if the code is unknown."""
    scope, module, mask = function.__globals__, Module(kind), given[MASK]
    world: dict[str, Any] = {name: _named(scope, name) for name in function.__code__.co_names if name in scope}
    world |= {"getattr": get_attribute} if "getattr" not in scope else {}
    world[REGISTRY] = Registry(module, mask, function)
    arguments = {name: Argument(module, name) if value is Argument else value for name, value in given.items()}
    try:
        y = apart(function, world)(module, Input(module), **arguments)
    except (UnknownError, ArithmeticError, AssertionError, AttributeError, LookupError, NameError):
        return None
    except (TypeError, ValueError):
        return None
    if type(y) is not tuple or len(y) != 2 or type(y[0]) is not Joined or type(y[1]) is not Weights:
        return None
    heads = y[0].heads_
    q, k, v = heads.products_
    if y[1].heads_ is not heads or q.angles_ != k.angles_ or v.angles_ or q.cached_ or k.cached_ != v.cached_:
        return None
    children, norms = (q.child_, k.child_, v.child_), (q.norms_, k.norms_, v.norms_)
    cache = k.cached_
    found = Found(children, norms, str(q.size_), heads.scale_, y[0].behind_, q.angles_, cache, heads.handed_)
    if module.called_ != [*found.called()]:
        return None
    used = {*found.children(), found.size, found.scale, *(() if cache is None else (cache.place,))}
    paths = {path for _, path in found.handed}
    if any("." in path for path in used):
        return None
    return found if module.read_ <= {*used, *paths, *_above(paths), "config", "config._attn_implementation"} else None


def _above(paths: set[str]) -> set[str]:
    """What is read on the way to these."""
    return {path[:at] for path in paths for at, letter in enumerate(path) if letter == "."}


def _named(scope: dict[str, Any], name: str) -> Something:
    """What stands for a global name."""
    return Something() if rotary_of(scope[name]) is None else Turning(name)
