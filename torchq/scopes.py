"""Scoped: a setting that a `with` block makes for its own thread or task, and for no other. And torch's own such."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class _Entry(Generic[T]):
    """One `with` block that has been entered. `live` until it is left, wherever that happens."""

    __slots__ = ("live", "value")

    def __init__(self, value: T) -> None:
        self.value, self.live = value, True


class Scoped(Generic[T]):
    """What the innermost `with setting.of(value)` of this context says, in any order of entering and leaving.

    A context is that of `contextvars`: each thread has its own, each asyncio task a copy of its creator's. Blocks need
    not be nested: generators that were suspended inside may be resumed in any order, or be closed by another thread.
    So leaving ends the block's own entry, and restores nothing else. An entry ends in every context that copied it.

    Args:
        name: of the context variable.
        on_use: called with whether any block is entered, in any thread, when that changes.

    >>> setting = Scoped("setting")
    >>> with setting.of(1):
    ...     setting.get()
    1
    >>> setting.get() is None
    True
    """

    def __init__(self, name: str, on_use: Callable[[bool], None] = lambda used: None) -> None:
        self._entries: ContextVar[tuple[_Entry[T], ...]] = ContextVar(name, default=())
        self._on_use = on_use
        # Reentrant: the garbage collector may close a generator here that was suspended inside a block. It only ever
        # takes an entry away, so at worst `on_use` was told of one that is over.
        self._lock = threading.RLock()
        self._entered: set[_Entry[T]] = set()

    def get(self) -> T | None:
        """The value in this context, or None outside of all blocks."""
        return next((entry.value for entry in reversed(self._entries.get()) if entry.live), None)

    @contextmanager
    def of(self, value: T) -> Iterator[None]:
        """Inside, `get()` gives this value, here and in what copies this context."""
        entry = _Entry(value)
        self._entries.set((*self._entries.get(), entry))
        with self._lock:
            self._entered.add(entry)
            self._on_use(True)
        try:
            yield
        finally:
            entry.live = False
            self._entries.set(tuple(other for other in self._entries.get() if other.live))
            with self._lock:
                self._entered.discard(entry)
                self._on_use(bool(self._entered))


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Where models are made: their tensors would else be of no use where gradients are wanted, once the mode is over.

    >>> with torch.inference_mode(), outside_inference_mode():
    ...     torch.ones(2).is_inference(), torch.is_grad_enabled()
    (False, False)
    """
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


_CALLERS: Scoped[tuple[bool, torch.dtype]] = Scoped("torchq_callers_autocast")


@contextmanager
def outside_autocast() -> Iterator[None]:
    """Where torchq measures and rounds: its products would else be those of 16 bits.

    >>> with torch.autocast("cpu"), outside_autocast():
    ...     torch.is_autocast_enabled("cpu")
    ...     with callers_autocast():
    ...         torch.is_autocast_enabled("cpu")
    False
    True
    """
    callers = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
    with _CALLERS.of(callers), torch.autocast("cpu", enabled=False):
        yield


def callers_autocast() -> AbstractContextManager[object]:
    """Within `outside_autocast`, where the user's model is called: as it was before. Elsewhere nothing."""
    callers = _CALLERS.get()
    return nullcontext() if callers is None else torch.autocast("cpu", dtype=callers[1], enabled=callers[0])
