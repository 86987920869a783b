"""WeightReads: layers whose weight the runs read past a call of their module, as `F.linear(x, self.proj.weight)`."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn

from torchq.calibration.isolation import own_thread
from torchq.calibration.lookups import OF_LOOKUPS
from torchq.modules.registry import Layer
from torchq.watching import gives_views, name_of, storage_key


class WeightReads:
    """Watches runs of a model: `read` has the layers whose weight was read while their module did not run.

    Layers that share a weight read it for each other. Look-ups in a table that a layer shares are no such reads.
    """

    def __init__(self, layers: Mapping[str, Layer]) -> None:
        self._modules = {layer.path: layer.module for layer in layers.values()}
        self._layers: dict[int | None, list[Layer]] = {}
        for layer in layers.values():
            key = storage_key(layer.kind.weight(layer.module, layer.part))
            if key in map(storage_key, layer.module.parameters()):  # a computed weight is another one in each call
                self._layers.setdefault(key, []).append(layer)
        self._running: list[str] = []
        self.read: set[str] = set()

    @contextmanager
    def watching(self) -> Iterator[bool]:
        """Installs the hooks, and says whether there are weights to be told of operations for."""
        with ExitStack() as stack:
            for path, module in self._modules.items():
                stack.enter_context(module.register_forward_pre_hook(own_thread(partial(self._enters, path))))
                stack.enter_context(
                    module.register_forward_hook(own_thread(partial(self._leaves, path)), always_call=True)
                )
            yield bool(self._layers)

    def sees(self, func: Any, args: Any, kwargs: Any, keys: list[int | None]) -> Callable[[Any], None] | None:
        """Notes the weights whose values an operation reads."""
        for key in keys:
            if key not in self._layers or gives_views(func) or name_of(func) in OF_LOOKUPS:
                continue
            layers = self._layers[key]
            if not any(layer.path in self._running for layer in layers):
                self.read.update(layer.name for layer in layers)
        return None

    def _enters(self, path: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._running.append(path)

    def _leaves(self, path: str, module: nn.Module, args: tuple[Any, ...], y: Any) -> None:
        if self._running[-1:] == [path]:  # not where a hook before ours failed: then it did not enter
            self._running.pop()
