"""What the self-attention of a model of transformers computes, proven by its code.

Three children of one input, a head for each `size` columns, the function that transformers' registry has, and perhaps
children behind it: that is the forward of most encoders. It is run on symbols, in a world that holds nothing else, so
nothing can happen that isn't seen: no globals but the registry, no builtins, no loops, no stores but to locals. A
branch that depends on a symbol is unknown.
"""

import functools
import inspect
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from torchq.modules.others import ANY_NAME, Others, apart, hands_on, takes_others, unknown
from torchq.modules.plain_code import forward_of, runs_straight
from torchq.modules.straight import UnknownError, is_usual
from torchq.modules.wrappers import unwrapped

REGISTRY = "ALL_ATTENTION_FUNCTIONS"
"""The name under which every modeling file of transformers knows its attention functions."""

MASK = "attention_mask"
"""What transformers calls the mask, of a model and of the function."""


class SelfAttentionCode(NamedTuple):
    """What the code of a self-attention computes.

    Args:
        forward: the function.
        code: its code, which may be replaced.
        inner: what a decorator of transformers' has wrapped; without one `forward`.
        inner_code: its code.
        projections: the children called on the input: those of query, key and value.
        size: the attribute that holds the columns of a head.
        scale: the attribute that is its `scaling`.
        behind: the children called on what the heads give, one after the other.
        names: of its arguments, the first of which is the input.
        refused: names that a call may not have: the code, or the attention function, would do something else.
        takes_more: whether it takes arguments by other names, which it only hands on to the attention function.
    """

    forward: types.FunctionType
    code: types.CodeType
    inner: types.FunctionType
    inner_code: types.CodeType
    projections: tuple[str, str, str]
    size: str
    scale: str
    behind: tuple[str, ...]
    names: tuple[str, ...]
    refused: frozenset[str]
    takes_more: bool

    def attributes(self) -> tuple[str, ...]:
        """The names that it looks up in the module, and the one that the attention function does."""
        return *self.projections, *self.behind, self.size, self.scale, "config", "torchq_attention"

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
    parameters = list(inspect.signature(inner).parameters.values())
    optional = [each for each in parameters[2:] if each.kind is each.POSITIONAL_OR_KEYWORD]
    more = [each for each in parameters if each.kind is each.VAR_KEYWORD]
    if len(parameters) != 2 + len(optional) + len(more) or any(each.default is not None for each in optional):
        return None
    names = tuple(each.name for each in optional)
    if MASK not in names or "is_causal" in names:
        return None
    found = [_run(kind, inner, names, mask) for mask in (None, _Symbol())]
    if found[0] is None or found[0] != found[1]:
        return None
    projections, size, scale, behind = found[0]
    refused = frozenset({parameters[0].name, *_TAKEN, *deprecated})
    facts = (projections, size, scale, behind, (parameters[1].name, *names), refused, bool(more))
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


def _run(kind: type[nn.Module], function: types.FunctionType, names: tuple[str, ...], mask: Any) -> Any:
    """(projections, size, scale, behind), with this mask; None if the code is unknown."""
    world: dict[str, Any] = {name: _Symbol() for name in function.__code__.co_names if name in function.__globals__}
    module = _Module(kind)
    world[REGISTRY] = _Registry(module, mask, function)
    try:
        y = apart(function, world)(module, _Input(module), **{name: mask if name == MASK else None for name in names})
    except (UnknownError, ArithmeticError, AssertionError, AttributeError, LookupError, NameError):
        return None
    except (TypeError, ValueError):
        return None
    if type(y) is not tuple or len(y) != 2 or type(y[0]) is not _Joined or type(y[1]) is not _Weights:
        return None
    joined, heads = y[0], y[0].heads_
    if y[1].heads_ is not heads or module.called_ != [*heads.projections_, *joined.behind_]:
        return None
    used = {*module.called_, heads.size_, heads.scale_}
    if any("." in path for path in used) or not module.read_ <= {*used, "config", "config._attn_implementation"}:
        return None
    return heads.projections_, heads.size_, heads.scale_, joined.behind_


# ---- Symbols --------------------------------------------------------------------------------------------------------
# Their own attributes end in an underscore. What they have without one is what the code may do with them.


class _Symbol:
    """Something that is not None, and of which nothing else is known."""

    __bool__ = __call__ = __getattr__ = __getitem__ = __iter__ = __len__ = __contains__ = unknown
    __eq__ = __ne__ = unknown
    __hash__ = object.__hash__


class _Attribute(_Symbol):
    """An attribute of the module, or of one, by its path: a number, the config, or a child that is called."""

    def __init__(self, module: "_Module", path: str) -> None:
        self.module_, self.path_ = module, path

    def __getattr__(self, name: str) -> "_Attribute":  # type: ignore[override]
        return self.module_.attribute_(f"{self.path_}.{name}")

    def __call__(self, x: Any) -> Any:
        if type(x) is _Input:
            y: Any = _Product(self.path_, x.shape)
        elif type(x) is _Joined:
            y = _Joined(x.heads_, (*x.behind_, self.path_))
        else:
            raise UnknownError
        self.module_.called_.append(self.path_)
        return y


class _Module(_Symbol):
    """Stands for a module of a class in eval mode. Notes which children are called, and all that is read."""

    training = False

    def __init__(self, kind: type[nn.Module]) -> None:
        self.kind_ = kind
        self.called_: list[str] = []
        self.read_: set[str] = set()

    def attribute_(self, path: str) -> _Attribute:
        self.read_.add(path)
        return _Attribute(self, path)

    def __getattr__(self, name: str) -> _Attribute:  # type: ignore[override]
        if inspect.getattr_static(self.kind_, name, None) is not None:
            raise UnknownError
        return self.attribute_(name)


class _Input(_Symbol):
    """The tensor of three dimensions."""

    def __init__(self, module: _Module) -> None:
        self.module_ = module
        self.shape = (_Symbol(), _Symbol(), _Symbol())


class _Product(_Symbol):
    """What a child gives for the input, as it is, then with a dimension for the columns of a head, then turned."""

    def __init__(
        self, child: str, shape: tuple[_Symbol, ...], size: str | None = None, *, turned: bool = False
    ) -> None:
        self.child_, self.shape_, self.size_, self.turned_ = child, shape, size, turned

    def view(self, *shape: Any) -> "_Product":
        *rows, heads, size = shape[0] if len(shape) == 1 and type(shape[0]) is tuple else shape
        if self.size_ is not None or not _are_same(rows, self.shape_[:2]) or not _is_rest(heads):
            raise UnknownError
        if type(size) is not _Attribute:
            raise UnknownError
        return _Product(self.child_, self.shape_, size.path_)

    def transpose(self, one: Any, other: Any) -> "_Product":
        if self.size_ is None or self.turned_ or (one, other) != (1, 2):
            raise UnknownError
        return _Product(self.child_, self.shape_, self.size_, turned=True)


class _Registry(_Symbol):
    """transformers' attention functions."""

    def __init__(self, module: _Module, mask: Any, function: types.FunctionType) -> None:
        self.module_, self.mask_ = module, mask
        self.others_ = {ANY_NAME: Others.VALUE} if takes_others(function.__code__) else {}

    def get_interface(self, name: Any, default: Any) -> Callable[..., Any]:
        if type(name) is not _Attribute or name.path_ != "config._attn_implementation" or type(default) is not _Symbol:
            raise UnknownError
        return self.attend_

    def attend_(self, *args: Any, scaling: Any, dropout: Any = 0.0, **others: Any) -> Any:
        module, *products, mask = args
        right = module is self.module_ and mask is self.mask_ and type(scaling) is _Attribute
        known = right and len(products) == 3 and all(type(each) is _Product and each.turned_ for each in products)
        if not known or type(dropout) is not float or dropout != 0.0:
            raise UnknownError
        if others.keys() != self.others_.keys() or any(others[name] is not self.others_[name] for name in others):
            raise UnknownError
        if len({each.size_ for each in products}) != 1:
            raise UnknownError
        heads = _Heads(tuple(each.child_ for each in products), products[0].shape_, products[0].size_, scaling.path_)
        return heads, _Weights(heads)


class _Heads(_Symbol):
    """What the attention function gives: (batch, rows, heads, columns)."""

    def __init__(self, projections: tuple[str, ...], shape: tuple[_Symbol, ...], size: str, scale: str) -> None:
        self.projections_, self.shape_, self.size_, self.scale_ = projections, shape, size, scale

    def reshape(self, *shape: Any) -> "_Joined":
        *rows, columns = shape
        if not _are_same(rows, self.shape_[:2]) or not _is_rest(columns):
            raise UnknownError
        return _Joined(self, ())


class _Joined(_Symbol):
    """The same as (batch, rows, heads · columns), and what children make of it."""

    def __init__(self, heads: _Heads, behind: tuple[str, ...]) -> None:
        self.heads_, self.behind_ = heads, behind

    def contiguous(self) -> "_Joined":
        if self.behind_:
            raise UnknownError
        return self


class _Weights(_Symbol):
    """What the function gives beside: None."""

    def __init__(self, heads: _Heads) -> None:
        self.heads_ = heads


def _are_same(one: Any, other: Any) -> bool:
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


def _is_rest(size: Any) -> bool:
    return type(size) is int and size == -1
