"""What code has read, so that each call can compare whether reading again gives the same."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torchq import _C


class Fact(NamedTuple):
    """Something that code has read: `read(of, name)` gave this very value."""

    read: Callable[..., Any]
    of: Any
    name: str
    value: Any


class Facts:
    """What code has read. It may grow while others look at it."""

    def __init__(self) -> None:
        self._names: set[tuple[int, str]] = set()
        self._known: tuple[Fact, ...] = ()

    def add(self, read: Callable[..., Any], of: Any, name: str, value: Any) -> None:
        """One more. Who has read the same before goes by what was read then."""
        if (id(of), name) not in self._names:
            self._known = (*self._known, Fact(read, of, name, value))
            self._names.add((id(of), name))

    def join(self, others: "Facts") -> None:
        """All those of others."""
        for fact in others._known:
            self.add(*fact)

    def objects(self) -> tuple[object, ...]:
        """Where they are noted."""
        return self, self._known, *self._known

    def hold(self) -> bool:
        """Whether reading again gives the same."""
        return _C.facts_hold(self._known, MISSING)


MISSING = object()
"""What a name has that nobody has set."""


def look_up(scope: dict[str, Any], name: str, missing: Any) -> Any:
    """What a dict has under a name."""
    return scope.get(name, missing)
