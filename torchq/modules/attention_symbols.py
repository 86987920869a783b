"""Symbols for what the code of a self-attention computes with (`attention_code.py`).

Their own attributes end in an underscore. What they have without one is what the code may do with them.
"""

import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import nn

from torchq.modules.others import ANY_NAME, Others, takes_others, unknown
from torchq.modules.straight import UnknownError

ASKED = ("softcap", "position_bias", "output_attentions", "is_causal")
"""What the attention function would do something else for."""


class CacheCall(NamedTuple):
    """How code gives keys and values to a cache, `cache.update(k, v, self.place)`, and gets all of them.

    Args:
        argument: the name of the argument that is the cache, or None.
        place: the attribute that holds the number of the layer.
        hands_on: whether `kwargs=` has the arguments by other names.
    """

    argument: str
    place: str
    hands_on: bool


class Turn(NamedTuple):
    """How code turns queries and keys by the angles of their positions.

    Args:
        function: the global name of the function that does (`rotary_code.py`).
        argument: the name of the argument that is `(cos, sin)`.
    """

    function: str
    argument: str


class Something:
    """Something that is not None, and of which nothing else is known."""

    __bool__ = __call__ = __getattr__ = __getitem__ = __iter__ = __len__ = __contains__ = unknown
    __eq__ = __ne__ = unknown
    __hash__ = object.__hash__


class Attribute(Something):
    """An attribute of the module, or of one, by its path: a number, the config, or a child that is called."""

    def __init__(self, module: "Module", path: str) -> None:
        self.module_, self.path_ = module, path

    def __getattr__(self, name: str) -> "Attribute":  # type: ignore[override]
        return self.module_.attribute_(f"{self.path_}.{name}")

    def __call__(self, x: Any) -> Any:
        """A child is called."""
        if type(x) is Input:
            y: Any = Product(self.path_, x.shape)
        elif type(x) is Product and x.size_ is not None and not x.turned_:
            y = x.with_(norms=(*x.norms_, self.path_))
        elif type(x) is Joined:
            y = Joined(x.heads_, (*x.behind_, self.path_))
        else:
            raise UnknownError
        self.module_.called_.append(self.path_)
        return y


def get_attribute(of: Any, name: Any, default: Any) -> Attribute:
    """Python's getattr, with None for what is not there."""
    if type(of) is not Attribute or type(name) is not str or default is not None:
        raise UnknownError
    return of.__getattr__(name)


class Module(Something):
    """Stands for a module of a class in eval mode. Notes what is called, caches too, and all that is read."""

    training = False

    def __init__(self, kind: type[nn.Module]) -> None:
        self.kind_ = kind
        self.called_: list[str | CacheCall] = []
        self.read_: set[str] = set()

    def attribute_(self, path: str) -> Attribute:
        """The attribute with this path, which is read."""
        self.read_.add(path)
        return Attribute(self, path)

    def __getattr__(self, name: str) -> Attribute:  # type: ignore[override]
        if inspect.getattr_static(self.kind_, name, None) is not None:
            raise UnknownError
        return self.attribute_(name)


class Input(Something):
    """The tensor of three dimensions."""

    def __init__(self, module: Module) -> None:
        self.module_ = module
        self.shape = (Something(), Something(), Something())


class Product(Something):
    """What a child gives for the input, as it is, then with a dimension for the columns of a head, then transposed.

    Before that, children may normalize each head; afterwards it may be turned, and then be joined to a cache.
    """

    def __init__(self, child: str, shape: tuple[Something, ...]) -> None:
        self.child_, self.shape_ = child, shape
        self.size_: str | None = None
        self.norms_: tuple[str, ...] = ()
        self.turned_ = False
        self.angles_: Turn | None = None
        self.cached_: CacheCall | None = None

    def with_(self, **changes: Any) -> "Product":
        """The same with other attributes."""
        made = Product(self.child_, self.shape_)
        vars(made).update(vars(self), **{f"{name}_": value for name, value in changes.items()})
        return made

    def view(self, *shape: Any) -> "Product":
        """Heads get a dimension of their own."""
        *rows, heads, size = shape[0] if len(shape) == 1 and type(shape[0]) is tuple else shape
        if self.size_ is not None or not are_same(rows, self.shape_[:2]) or not _is_rest(heads):
            raise UnknownError
        if type(size) is not Attribute:
            raise UnknownError
        return self.with_(size=size.path_)

    def transpose(self, one: Any, other: Any) -> "Product":
        """Heads get before rows."""
        if self.size_ is None or self.turned_ or (one, other) != (1, 2):
            raise UnknownError
        return self.with_(turned=True)


class Argument(Something):
    """An argument that may be `(cos, sin)`, or a cache."""

    def __init__(self, module: Module, name: str) -> None:
        self.module_, self.name_ = module, name

    def __iter__(self) -> Iterator["Angles"]:  # type: ignore[override]
        return iter((Angles(self.name_, "cos"), Angles(self.name_, "sin")))

    def update(self, k: Any, v: Any, place: Any, **more: Any) -> tuple[Product, Product]:
        """A cache gets keys and values, and gives all."""
        known = more.keys() <= {"kwargs"} and all(type(each) is Others for each in more.values())
        if not known or type(place) is not Attribute or not _are_heads((k, v)) or k.cached_ or v.cached_:
            raise UnknownError
        call = CacheCall(self.name_, place.path_, bool(more))
        self.module_.called_.append(call)
        return k.with_(cached=call), v.with_(cached=call)


class Angles(Something):
    """The cosines or the sines of an argument."""

    def __init__(self, argument: str, which: str) -> None:
        self.argument_, self.which_ = argument, which


class Turning(Something):
    """A function that turns q and k, by its global name."""

    def __init__(self, name: str) -> None:
        self.name_ = name

    def __call__(self, q: Any, k: Any, cos: Any, sin: Any) -> tuple[Product, Product]:  # type: ignore[override]
        """Queries and keys are turned."""
        angles = type(cos) is Angles and type(sin) is Angles and cos.argument_ == sin.argument_
        if not angles or (cos.which_, sin.which_) != ("cos", "sin") or not _are_heads((q, k)):
            raise UnknownError
        if any(each.angles_ or each.cached_ for each in (q, k)):
            raise UnknownError
        turn = Turn(self.name_, cos.argument_)
        return q.with_(angles=turn), k.with_(angles=turn)


class Registry(Something):
    """transformers' attention functions."""

    def __init__(self, module: Module, mask: Any, function: types.FunctionType) -> None:
        self.module_, self.mask_ = module, mask
        self.takes_others_ = takes_others(function.__code__)

    def get_interface(self, name: Any, default: Any) -> Callable[..., Any]:
        """The code asks for the function that the config names."""
        if type(name) is not Attribute or name.path_ != "config._attn_implementation" or type(default) is not Something:
            raise UnknownError
        return self.attend_

    def attend_(self, *args: Any, scaling: Any, dropout: Any = 0.0, **others: Any) -> Any:
        """It is called."""
        module, *products, mask = args
        right = module is self.module_ and mask is self.mask_ and type(scaling) is Attribute
        if not right or len(products) != 3 or not _are_heads(products) or type(dropout) is not float or dropout != 0.0:
            raise UnknownError
        if others.pop(ANY_NAME, None) is not (Others.VALUE if self.takes_others_ else None):
            raise UnknownError
        if any(type(each) is not Attribute for each in others.values()) or not others.keys().isdisjoint(ASKED):
            raise UnknownError
        if len({each.size_ for each in products}) != 1:
            raise UnknownError
        handed = tuple((name, each.path_) for name, each in others.items())
        heads = Heads(tuple(products), scaling.path_, handed)
        return heads, Weights(heads)


class Heads(Something):
    """What the attention function gives: (batch, rows, heads, columns)."""

    def __init__(self, products: tuple[Product, ...], scale: str, handed: tuple[tuple[str, str], ...]) -> None:
        self.products_, self.scale_, self.handed_ = products, scale, handed

    def reshape(self, *shape: Any) -> "Joined":
        """Heads lie side by side."""
        *rows, columns = shape
        if not are_same(rows, self.products_[0].shape_[:2]) or not _is_rest(columns):
            raise UnknownError
        return Joined(self, ())


class Joined(Something):
    """The same as (batch, rows, heads · columns), and what children make of it."""

    def __init__(self, heads: Heads, behind: tuple[str, ...]) -> None:
        self.heads_, self.behind_ = heads, behind

    def contiguous(self) -> "Joined":
        """They already are."""
        if self.behind_:
            raise UnknownError
        return self


class Weights(Something):
    """What the function gives beside: None."""

    def __init__(self, heads: Heads) -> None:
        self.heads_ = heads


def are_same(one: Any, other: Any) -> bool:
    """Whether two sequences have the same objects."""
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


def _are_heads(products: Any) -> bool:
    """Whether these are (batch, heads, rows, columns)."""
    return all(type(each) is Product and each.turned_ for each in products)


def _is_rest(size: Any) -> bool:
    return type(size) is int and size == -1
