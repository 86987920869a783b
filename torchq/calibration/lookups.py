"""Lookups: which embeddings the runs call, and which tables something else reads as well."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn

from torchq.calibration.isolation import own_thread
from torchq.calibration.sharing import storage_key
from torchq.watching import Watch, name_of, tensors_in

_OF_LOOKUPS = ("aten::embedding", "aten::_embedding_bag", "aten::_embedding_bag_forward_only", "aten::detach")


class Lookups(Watch):
    """Watches runs of a model for its embeddings: `called`, and `read` by other operations than look-ups, by name.

    A table that a layer multiplies by is read for that. So `alone` names those for which it counts.
    """

    def __init__(self, embeddings: Mapping[str, nn.Module], alone: set[str]) -> None:
        super().__init__()
        self._embeddings = embeddings
        self._tables = {storage_key(embeddings[name]._parameters.get("weight")): name for name in alone}
        self._tables.pop(None, None)
        self.called: set[str] = set()
        self.read: set[str] = set()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Installs the hooks, and the mode if there are tables to watch."""
        with ExitStack() as stack:
            for name, module in self._embeddings.items():
                stack.enter_context(module.register_forward_pre_hook(own_thread(partial(self._note, name))))
            if self._tables:
                stack.enter_context(self)
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation, and notes the tables that it reads."""
        if name_of(func) not in _OF_LOOKUPS:
            keys = {storage_key(tensor) for tensor in tensors_in((args, kwargs))}
            self.read.update(self._tables[key] for key in keys & self._tables.keys())
        return func(*args, **(kwargs or {}))

    def _note(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.called.add(name)
