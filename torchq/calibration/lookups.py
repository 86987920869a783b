"""Lookups: which embeddings the runs call, and which tables something else reads as well."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn

from torchq.calibration.isolation import own_thread
from torchq.watching import name_of, storage_key

OF_LOOKUPS = ("aten::embedding", "aten::_embedding_bag", "aten::_embedding_bag_forward_only", "aten::detach")


class Lookups:
    """Watches runs of a model for its embeddings: `called`, and `read` by other operations than look-ups, by name.

    A table that a layer multiplies by is read for that. So `alone` names those for which it counts.
    """

    def __init__(self, embeddings: Mapping[str, nn.Module], alone: set[str]) -> None:
        self._embeddings = embeddings
        self._tables = {storage_key(embeddings[name]._parameters.get("weight")): name for name in alone}
        self._tables.pop(None, None)
        self.called: set[str] = set()
        self.read: set[str] = set()

    @contextmanager
    def watching(self) -> Iterator[bool]:
        """Installs the hooks, and says whether there are tables to be told of operations for."""
        with ExitStack() as stack:
            for name, module in self._embeddings.items():
                stack.enter_context(module.register_forward_pre_hook(own_thread(partial(self._note, name))))
            yield bool(self._tables)

    def sees(self, func: Any, args: Any, kwargs: Any, keys: list[int | None]) -> Callable[[Any], None] | None:
        """Notes the tables that an operation reads."""
        for key in keys:
            if key in self._tables and name_of(func) not in OF_LOOKUPS:
                self.read.add(self._tables[key])
        return None

    def _note(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.called.add(name)
