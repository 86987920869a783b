"""What transformers puts around the code of its modules: decorators, and a base class of layers.

They are known by their code. In eval mode, and without deprecated names, a call is one of what they wrap.
"""

import functools
import sys
import types
from typing import Any, NamedTuple

from torch import nn

from torchq.modules.straight import is_usual


class Wrapped(NamedTuple):
    """A forward without what is around it.

    Args:
        forward: the function inside.
        refused: names that a call may not have: they are deprecated.
    """

    forward: types.FunctionType
    refused: frozenset[str]


def unwrapped(forward: types.FunctionType) -> Wrapped:
    """What transformers has wrapped."""
    if "transformers" not in sys.modules:
        return Wrapped(forward, frozenset())
    name = "func" if forward.__code__ in _deprecating() else "forward" if forward.__code__ in _checkpointing() else None
    held = {} if name is None else dict(zip(forward.__code__.co_freevars, forward.__closure__ or (), strict=True))
    inner = held[name].cell_contents if name in held else None
    if not isinstance(inner, types.FunctionType):
        return Wrapped(forward, frozenset())
    within, refused = unwrapped(inner)
    return Wrapped(within, refused | {str(held["old_name"].cell_contents)} if "old_name" in held else refused)


@functools.cache
def _deprecating() -> tuple[types.CodeType, ...]:
    """The codes of what transformers' `deprecate_kwarg` gives."""
    from transformers.utils import deprecation

    return tuple(code for made in _inner(deprecation.deprecate_kwarg.__code__) for code in _inner(made))


def _checkpointing() -> tuple[types.CodeType, ...]:
    """The codes of what transformers' base class of layers makes of the forward of each."""
    layer = getattr(sys.modules.get(_LAYERS), "GradientCheckpointingLayer", object)
    subclassed = vars(layer).get("__init_subclass__")
    return _inner(subclassed.__func__.__code__) if isinstance(subclassed, classmethod) else ()


_LAYERS = "transformers.modeling_layers"


def _inner(code: types.CodeType) -> tuple[types.CodeType, ...]:
    return tuple(each for each in code.co_consts if isinstance(each, types.CodeType))


def is_usual_layer(kind: type[nn.Module]) -> bool:
    """Whether a class is a usual one, but for what that base class has: it may save memory in training."""
    return is_usual(kind, _OF_LAYERS) and all(_is_of_layers(kind, name) for name in _OF_LAYERS)


_OF_LAYERS = ("__init_subclass__", "__call__")
"""What the base class has: a forward of each subclass that may save memory, or a call."""


def _is_of_layers(kind: type[nn.Module], name: str) -> bool:
    known: Any = next(each for each in kind.__mro__ if name in vars(each))
    return known in nn.Module.__mro__ or known.__module__ == _LAYERS
