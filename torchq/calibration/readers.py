"""Readers: finds the layers whose output nothing reads but one module, and what reads the output of that in its turn.

It watches the operations of the calibration runs, and tells tensors by their storage. A wrong value can't come of
most of what it finds: a layer that is told to wait for its activation gives its output to whoever else asks
(`Pending`). So it decides whether waiting pays. Only a norm that becomes a part of the layer before it must always be
called as it was seen here.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from torchq.calibration.isolation import own_thread
from torchq.modules.activations import activation_of
from torchq.modules.convolving import is_zero_padding
from torchq.modules.norms import full_row, is_foldable
from torchq.modules.registry import Layer
from torchq.ops import Activation
from torchq.watching import may_write, storage_key

ADDITION = "+"
"""In a chain: the output is one of two summands of the same shape."""

PADDING = "0"
"""In a chain: zeros are added around the output."""

_ADD = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)

Chain = tuple[str, ...]
"""A layer, and the modules, additions and paddings behind it that each alone read the output of what stands before."""


class _Output(NamedTuple):
    """An output that exists now: of which chain, and its storage."""

    chain: Chain
    storage: StorageWeakRef


class Readers:
    """Watches runs of a model, and finds for a layer what alone reads its output: an activation, a norm, a convolution.

    In every call of the layer, the module took the whole output as its input, and no operation outside of the module's
    call touched it; inside, none that writes, unless both are parts of a convolution's chain.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, Layer]) -> None:
        self._layers = {name: layer.module for name, layer in layers.items() if not layer.part}
        self._convolutions = {name for name in self._layers if layers[name].kind.absorbs}
        modules = dict(model.named_modules())
        self._activations = {name: m for name, m in modules.items() if activation_of(m) != Activation.NONE}
        self._norms = {name: m for name, m in modules.items() if self._convolutions and is_foldable(m)}
        self._outputs: dict[int, _Output] = {}  # that exist now, by storage
        self._taken: set[int] = set()  # those of them that a module took
        self._inside: list[int | None] = []  # a stack: the output that each running module took
        self._found: dict[Chain, set[str | None]] = {}  # who took the outputs of a chain; None for anything else
        self._takers: dict[str, set[Chain | None]] = {}  # by norm: whose outputs it took

    @property
    def activations(self) -> dict[str, str]:
        """For each layer with a single reader that is an activation module: the name of that module."""
        found = {name: self.only_reader((name,)) for name in self._layers}
        return {name: reader for name, reader in found.items() if reader in self._activations and reader is not None}

    @property
    def norms(self) -> dict[str, str]:
        """For each convolution whose only reader is a norm that reads nothing else: the name of that norm."""
        found = {name: self.only_reader((name,)) for name in self._convolutions}
        return {
            name: reader
            for name, reader in found.items()
            if reader is not None and self._takers.get(reader) == {(name,)}
        }

    @property
    def chains(self) -> dict[str, Chain]:
        """For each convolution, what follows it as the only reader each time, up to another convolution."""
        rows = {name: full_row(name, norm) for name, norm in self._norms.items()}
        found = {name: self._chain((name,))[1:] for name in self._convolutions}
        return {
            name: tuple(each for step in chain for each in rows.get(step, (step,))) for name, chain in found.items()
        }

    def _chain(self, chain: Chain) -> Chain:
        reader = self.only_reader(chain)
        if reader is None:
            return chain
        return (*chain, reader) if reader in self._layers else self._chain((*chain, reader))

    def only_reader(self, chain: Chain) -> str | None:
        """What alone reads the outputs of this chain."""
        found = self._found.get(chain, set())
        return next(iter(found)) if len(found) == 1 else None

    @contextmanager
    def watching(self) -> Iterator[bool]:
        """Installs the hooks, if the model has layers and something that may read them alone, and says whether it has.

        If so, it is to be told of operations.
        """
        if not (self._layers and (self._activations or self._convolutions)):
            yield False
            return
        with ExitStack() as stack:
            for name, module in {**self._activations, **self._norms, **self._layers}.items():
                stack.enter_context(module.register_forward_pre_hook(own_thread(partial(self._takes, name))))
                stack.enter_context(module.register_forward_hook(own_thread(partial(self._gave, name))))
            yield True

    def end_batch(self) -> None:
        """Forgets what is left of the outputs, and of a batch that failed. An output that nobody took has no reader."""
        for key in list(self._outputs):
            self._forget(key)
        self._inside.clear()

    def sees(self, func: Any, args: Any, kwargs: Any, keys: list[int | None]) -> Callable[[Any], None] | None:
        """Notes which outputs an operation touches outside of a module that takes them."""
        if not self._outputs:
            return None
        step, key_taken = self._step(func, args, kwargs)
        allowed = self._inside[-1] if self._inside else None
        for key in keys:
            output = self._alive(key)
            if output is None or key == key_taken:
                continue
            writes = may_write(func) and output.chain[0] not in self._convolutions
            if key != allowed or writes:
                self._found[output.chain].add(None)
        return None if key_taken is None else partial(self._take, key_taken, step)

    def _step(self, func: Any, args: tuple[Any, ...], kwargs: Any) -> tuple[str, int | None]:
        """What this operation is in a chain, and the output of a convolution that it takes, if it takes one."""
        if is_zero_padding(func, args, kwargs):
            key = storage_key(args[0])
            output = self._alive(key)
            taken = output is not None and output.chain[0] in self._convolutions and PADDING not in output.chain
            return PADDING, key if taken else None
        return ADDITION, self._summand(func, args, kwargs)

    def _summand(self, func: Any, args: tuple[Any, ...], kwargs: Any) -> int | None:
        """The output of a convolution that this operation adds another tensor of the same shape to."""
        if func not in _ADD or kwargs or len(args) != 2 or not all(isinstance(each, Tensor) for each in args):
            return None
        if args[0].shape != args[1].shape or args[0].dtype != args[1].dtype or args[0] is args[1]:
            return None
        waiting: list[int] = []
        for x in args if func is _ADD[0] else args[:1]:
            key = storage_key(x)
            output = self._alive(key)
            if output is not None and output.chain[0] in self._convolutions and ADDITION not in output.chain:
                waiting.append(cast(int, key))
        unread = [key for key in waiting if key not in self._taken]  # the input of a block has been read by its layers
        return next(iter((*unread, *waiting)), None)

    def _alive(self, key: int | None) -> _Output | None:
        output = None if key is None else self._outputs.get(key)
        return None if output is None or output.storage.expired() else output

    def _take(self, key: int, step: str, y: Any) -> None:
        """Notes that an operation took an output, and gave y."""
        chain = self._outputs[key].chain
        self._found[chain].add(step)
        self._taken.add(key)
        self._register((*chain, step), y)

    def _register(self, chain: Chain, y: Any) -> None:
        if chain[0] not in self._convolutions and None in self._found.get(chain, ()):
            return  # nothing changes that, and each output that is registered costs time
        key = storage_key(y)
        if key is not None:
            self._found.setdefault(chain, set())
            self._forget(key)
            self._outputs[key] = _Output(chain, StorageWeakRef(y.untyped_storage()))

    def _forget(self, key: int) -> None:
        output = self._outputs.pop(key, None)
        if output is not None and key not in self._taken:
            self._found[output.chain].add(None)
        self._taken.discard(key)

    def _takes(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        key = storage_key(args[0]) if args else None
        output = self._alive(key)
        takes = output is not None and (name not in self._layers or name in self._convolutions)
        if takes and output is not None and key is not None:
            self._found[output.chain].add(name)
            self._taken.add(key)
        if name in self._norms:
            self._takers.setdefault(name, set()).add(None if output is None else output.chain)
        self._inside.append(key if takes else None)

    def _gave(self, name: str, module: nn.Module, args: tuple[Any, ...], y: Any) -> None:
        key = self._inside.pop()
        if name in self._layers:
            self._register((name,), y)
        elif key is not None and (output := self._alive(key)) is not None and output.chain[0] in self._convolutions:
            self._register((*output.chain, name), y)
