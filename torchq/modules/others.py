"""Arguments that a call gives by names that code does not know: `**kwargs`, which may be handed on and nothing else."""

import dis
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, NoReturn

from torchq.modules.straight import UnknownError

ANY_NAME = "any other name"
"""What stands for such names."""


def unknown(*_: Any, **__: Any) -> NoReturn:
    """Code has done what nothing is known of."""
    raise UnknownError


class Others:
    """Stands for such arguments. Who takes it apart gets `VALUE` under `ANY_NAME`."""

    VALUE = object()

    def keys(self) -> tuple[str, ...]:
        """What a call with `**` asks for. Code that does so itself is not `hands_on`."""
        return (ANY_NAME,)

    def __getitem__(self, name: Any) -> Any:
        return self.VALUE if type(name) is str and name == ANY_NAME else unknown()

    __bool__ = __call__ = __getattr__ = __iter__ = __len__ = __contains__ = __eq__ = __ne__ = unknown
    __hash__ = unknown


@functools.lru_cache(maxsize=1024)
def hands_on(code: types.CodeType) -> bool:
    """Whether code has no way to see what is in its `**kwargs`, if it has any.

    >>> hands_on((lambda f, **more: f(**more)).__code__), hands_on((lambda **more: [*more.keys()]).__code__)
    (True, False)
    """
    return "keys" not in code.co_names and all(step.opname != "DICT_UPDATE" for step in dis.get_instructions(code))


def takes_others(code: types.CodeType) -> bool:
    """Whether it has `**kwargs`."""
    return bool(code.co_flags & inspect.CO_VARKEYWORDS)


def apart(function: types.FunctionType, world: dict[str, Any]) -> Callable[..., Any]:
    """The function in a world of its own, which has these names and nothing else. Its `**kwargs` are `Others`.

    >>> apart(lambda x, **more: dict(**more) if x else more["y"], {"dict": dict})(True, y=1) == {ANY_NAME: Others.VALUE}
    True
    """
    code, names, cells = function.__code__, {**world, "__builtins__": {}}, function.__closure__
    if not takes_others(code):
        return types.FunctionType(code, names, argdefs=function.__defaults__, closure=cells)
    plain = code.replace(co_flags=code.co_flags & ~inspect.CO_VARKEYWORDS, co_argcount=code.co_argcount + 1)
    alone, signature = (
        types.FunctionType(plain, names, closure=function.__closure__),
        inspect.Signature.from_callable(function),
    )

    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        *given, _ = bound.arguments.values()
        return alone(*given, Others())

    return call
