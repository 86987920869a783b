"""Readers: finds the layers whose output nothing reads but one activation module, wherever in the model the two are.

It watches the calibration runs, as a TorchDispatchMode, and tells tensors by their storage. A wrong value can't come
of what it finds: a layer that is told to wait for its activation gives its output to whoever else asks (`Pending`).
What it finds decides whether waiting pays.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchq.calibration.isolation import own_thread
from torchq.calibration.sharing import storage_key
from torchq.modules.activations import activation_of
from torchq.modules.registry import Layer
from torchq.ops import Activation


class Readers(TorchDispatchMode):
    """Watches runs of a model, and finds for a layer the activation module that alone reads its output.

    In every call of the layer, the module took the whole output as its input, and no operation outside of the module's
    call touched it; inside, none that writes.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, Layer]) -> None:
        super().__init__()
        self._layers = {name: layer.module for name, layer in layers.items() if not layer.part}
        modules = dict(model.named_modules())
        self._activations = {name: m for name, m in modules.items() if activation_of(m) != Activation.NONE}
        self._outputs: dict[int, tuple[str, StorageWeakRef]] = {}  # that exist now, by storage
        self._taken: set[int] = set()  # those of them that an activation took
        self._inside: list[int | None] = []  # a stack: the output that each running activation took
        self._found: dict[str, set[str | None]] = {}  # by layer: who took its outputs; None for anything else

    @property
    def activations(self) -> dict[str, str]:
        """For each layer with a single reader that is an activation module: the name of that module."""
        return {name: reader for name, found in self._found.items() for reader in found if len(found) == 1 and reader}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Installs the hooks and the mode, if the model has layers and activation modules."""
        if not (self._layers and self._activations):
            yield
            return
        handles = [
            module.register_forward_hook(own_thread(partial(self._gave, name))) for name, module in self._layers.items()
        ]
        for name, module in self._activations.items():
            handles.append(module.register_forward_pre_hook(own_thread(partial(self._takes, name))))
            handles.append(module.register_forward_hook(own_thread(self._took)))
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def end_batch(self) -> None:
        """Forgets what is left of the outputs, and of a batch that failed. An output that nobody took has no reader."""
        for key in list(self._outputs):
            self._forget(key)
        self._inside.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation, and notes which outputs it touches outside of an activation."""
        if self._outputs:
            allowed = self._inside[-1] if self._inside else None
            for tensor in tree_leaves((args, kwargs)):
                key = storage_key(tensor)
                fits = key == allowed and not func._schema.is_mutable
                if key in self._outputs and not fits and not self._outputs[key][1].expired():
                    self._found[self._outputs[key][0]].add(None)
        return func(*args, **(kwargs or {}))

    def _gave(self, name: str, module: nn.Module, args: tuple[Any, ...], y: Any) -> None:
        key = storage_key(y)
        if key is not None:
            self._found.setdefault(name, set())
            self._forget(key)
            self._outputs[key] = (name, StorageWeakRef(y.untyped_storage()))

    def _forget(self, key: int) -> None:
        name, _ = self._outputs.pop(key, (None, None))
        if name is not None and key not in self._taken:
            self._found[name].add(None)
        self._taken.discard(key)

    def _takes(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        key = storage_key(args[0]) if args else None
        if key in self._outputs and not self._outputs[key][1].expired():
            self._found[self._outputs[key][0]].add(name)
            self._taken.add(key)
        self._inside.append(key)

    def _took(self, module: nn.Module, args: tuple[Any, ...], y: Any) -> None:
        self._inside.pop()
