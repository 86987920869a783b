"""Errors that name the public function the user called.

Errors are often found far below that function, in code that several public functions share. Such code raises
`BadValueError` or `BadTypeError` and says only what is wrong. The public function is decorated with
`@door("torchq.convert")`, which adds its name in front and raises the plain ValueError or TypeError that the user sees.
`PeerError`, of another process, leaves it as a RuntimeError.
"""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class BadValueError(ValueError):
    """A bad value. The message still lacks the name of the public function that was called."""


class BadTypeError(TypeError):
    """A value of a bad type. The message still lacks the name of the public function that was called."""


class PeerError(RuntimeError):
    """Another process failed, or was lost. The message still lacks the name of the public function that was called."""


_PLAIN = {BadValueError: ValueError, BadTypeError: TypeError, PeerError: RuntimeError}


def door(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates a public function: the errors above leave it as plain errors that start with `name`.

    Args:
        name: the function's name as the user writes it.

    >>> @door("half")
    ... def half(x: int) -> int:
    ...     if x % 2:
    ...         raise BadValueError(f"x must be even, got {x}.")
    ...     return x // 2
    >>> half(3)
    Traceback (most recent call last):
    ValueError: half: x must be even, got 3.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return function(*args, **kwargs)
            except tuple(_PLAIN) as error:
                plain = next(plain for kind, plain in _PLAIN.items() if isinstance(error, kind))
                raise plain(f"{name}: {error}").with_traceback(error.__traceback__) from error.__cause__

        return wrapper

    return decorate
