"""Conversions in one thread while others serve the same model, or convert: nobody sees or disturbs the other.

What a conversion switches is shared by all threads: torch's fused attention, whether compiled parts run compiled, the
modules' training flags, and hooks, which fire for every thread's calls. So switches are counted under a lock, and
undone by the last to leave; hooks act on the calls of the thread that set them only; and conversions that share a
module take turns.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec

import torch
from torch import nn

from torchq.imports import when_imported

P = ParamSpec("P")

_LOCK = threading.Condition()
_no_fast_path: list[bool] = []  # one entry for each that has it off: what it was when the first came
_eager: list[Any] = []  # the stance by which compiled parts run uncompiled, while it is set
_running_eager = 0  # how many want that; code that they run may be the first to import the compiler
_has_compiler = False
_evaluated: dict[int, tuple[nn.Module, bool]] = {}  # by id: the module, and the flag the first found
_evaluations: Counter[int] = Counter()
_converted: dict[int, tuple[int, int]] = {}  # by the module's id: the thread that converts it, and how often


@contextmanager
def without_fast_path() -> Iterator[None]:
    """No fused attention path, which would bypass the layers' own forward; as before when the last thread leaves."""
    with _LOCK:
        _no_fast_path.append(_no_fast_path[0] if _no_fast_path else torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        with _LOCK:
            before = _no_fast_path.pop()
            if not _no_fast_path:
                torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Compiled parts run uncompiled, or hooks would be traced; as before when the last thread leaves."""
    global _running_eager
    with _LOCK:
        _running_eager += 1
        _set_stance()
    try:
        yield
    finally:
        with _LOCK:
            _running_eager -= 1
            if _eager and not _running_eager:
                _eager.pop().__exit__(None, None, None)


def _compiler_came(_: Any) -> None:
    global _has_compiler
    with _LOCK:
        _has_compiler = True
        _set_stance()


def _set_stance() -> None:
    """Under the lock. Without a compiler nothing is compiled, and this would import it."""
    if _has_compiler and _running_eager and not _eager:
        _eager.append(torch.compiler.set_stance("force_eager"))


when_imported("torch._dynamo", _compiler_came)


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode; each module's training flag is as before when the last thread leaves it."""
    modules = list(model.modules())
    with _LOCK:
        for module in modules:
            _evaluated.setdefault(id(module), (module, module.training))
            _evaluations[id(module)] += 1
        model.eval()
    try:
        yield
    finally:
        with _LOCK:
            for module in modules:
                _evaluations[id(module)] -= 1
                if not _evaluations[id(module)]:
                    del _evaluations[id(module)]
                    _, module.training = _evaluated.pop(id(module))


@contextmanager
def taking_turns(model: nn.Module) -> Iterator[None]:
    """Waits while another thread converts a module of this model: its hooks, or half its layers, would be seen here."""
    modules = model.modules() if isinstance(model, nn.Module) else ()  # convert says what is wrong with others
    me, keys = threading.get_ident(), {id(module) for module in modules}
    with _LOCK:
        _LOCK.wait_for(lambda: all(_converted.get(key, (me, 0))[0] == me for key in keys))
        for key in keys:
            _converted[key] = me, _converted.get(key, (me, 0))[1] + 1
    try:
        yield
    finally:
        with _LOCK:
            for key in keys:
                _, times = _converted.pop(key)
                if times > 1:
                    _converted[key] = me, times - 1
            _LOCK.notify_all()


def own_thread(hook: Callable[P, None]) -> Callable[P, None]:
    """The hook, for the calls of this thread only.

    >>> seen = []
    >>> hook = own_thread(seen.append)
    >>> thread = threading.Thread(target=hook, args=("another's",))
    >>> thread.start(), thread.join(), hook("own")
    (None, None, None)
    >>> seen
    ['own']
    """
    owner = threading.get_ident()

    @wraps(hook, assigned=())
    def guarded(*args: Any, **kwargs: Any) -> None:
        if threading.get_ident() == owner:
            hook(*args, **kwargs)

    return guarded
