"""Dataflow: finds which layers read a module's output, and proves that nothing else does.

A module's output may be rescaled, `y -> y / s`, if every reader is a layer whose weight can be multiplied by s. One
overlooked reader, such as a residual sum or a second return value, would silently get wrong numbers. So `Dataflow`
watches every torch operation of the calibration runs (it is a TorchDispatchMode). It identifies tensors by their
storage, which all views share. It refuses an output at the first operation outside its readers that touches it.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode, _pop_mode_temporarily
from torch.utils._pytree import tree_leaves

from torchq.calibration.isolation import own_thread
from torchq.modules.registry import Layer, type_of

NORMS = (nn.LayerNorm, nn.RMSNorm)

_aten = torch.ops.aten
_EACH_VALUE = (_aten.relu.default, _aten.relu_.default)  # f(y / s) = f(y) / s for positive s
_OTHER_DIMS = (_aten.mean.dim, _aten.select.int, _aten.slice.Tensor)  # linear, and they combine no two channels


class Dataflow(TorchDispatchMode):
    """Watches runs of a model, and finds the modules whose output is read by known layers only.

    A source is a module whose output may be rescaled: a layer, or a LayerNorm or RMSNorm with a weight over the last
    dimension. Its owner is the module whose forward calls it. An output counts as proven if all of this held in every
    call of every batch:

    * No operation touched its storage outside the calls of `layers`, and those took the whole tensor as their input.
      Exceptions are ReLU, and mean, select and slice over dims other than the channels. Their results are treated as
      outputs of the same source.
    * It was freed by the time the owner returned, so nothing kept it or returned it.
    * Its readers belong to the same owner, appear nowhere else in the model, and had no other input.
    * Nothing else read the source's weight, and the source has no hooks.
    * The owner has no other layer that no batch reached and whose number of inputs would fit the output: a head used in
      training only, say, or an expert that was never chosen.

    It cannot see what other operations a branch would run that no batch took, or operations in other threads.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, Layer]) -> None:
        super().__init__()
        self._model = model
        places = Counter(id(child) for module in model.modules() for child in module._modules.values())
        unshared = {
            name: module for name, module in model.named_modules() if places[id(module)] == 1 and _is_plain(module)
        }
        self._layers = {name: layer for name, layer in layers.items() if not layer.part}  # whole modules
        self._readable = {
            name for name, layer in self._layers.items() if name in unshared and owns_weight(layer.module, layer.weight)
        }
        self._sources = {
            name: module for name, module in unshared.items() if name in self._readable or _is_norm(module)
        }
        self._owners = {name: _owner(model, name) for name in self._sources}
        self._weights = {
            storage_key(parameter): name for name, module in self._sources.items() for parameter in module.parameters()
        }
        self._unreached = {} if not layers else dict(_matrices_called(model))
        self._refused: set[str] = set()
        self._inputs: dict[str, set[str | None]] = {}  # by layer: the sources of its inputs, None for any other input
        self._outputs: dict[int, _Output] = {}  # the outputs that exist now, by storage
        self._calls: list[set[int]] = []  # a stack of the running calls: the storages that each may touch

    @property
    def readers(self) -> dict[str, tuple[str, ...]]:
        """For each source whose readers are proven: the layers that read it, in model order."""
        proven_readers: dict[str, tuple[str, ...]] = {}
        for source in self._sources:
            readers = tuple(name for name, inputs in self._inputs.items() if source in inputs)
            inside = f"{self._owners[source]}." if self._owners[source] else ""
            proven = source not in self._refused and all(
                self._inputs[name] == {source} and name in self._readable and name.startswith(inside)
                for name in readers
            )
            if readers and proven and not self._may_be_read_unseen(source, inside):
                proven_readers[source] = tuple(name for name in self._layers if name in readers)
        return proven_readers

    def _may_be_read_unseen(self, source: str, inside: str) -> bool:
        """Whether a matrix that no batch reached could read this output, as it is or flattened."""
        layer = self._layers.get(source)
        channels = len(cast(Tensor, self._sources[source].weight)) if layer is None else layer.out_features
        return any(
            name.startswith(inside) and depth % max(1, channels) == 0
            for name, depths in self._unreached.items()
            for depth in depths
        )

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Installs the hooks and the dispatch mode for the runs inside; call `end_batch` after each batch."""
        handles = []
        for name in self._layers | self._sources:
            module = self._model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(own_thread(partial(self._enter, name)), with_kwargs=True))
            handles.append(module.register_forward_hook(own_thread(partial(self._leave, name))))
        for owner in set(self._owners.values()):
            module = self._model.get_submodule(owner)
            handles.append(module.register_forward_hook(own_thread(partial(self._close, owner))))
        for name in self._unreached:
            module = self._model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(own_thread(partial(self._reach, name))))
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, operations are not watched and run at full speed; watching one costs tens of microseconds.

        If the model has entered a dispatch mode of its own on top of this one, both go on watching.
        """
        if _get_current_dispatch_mode() is self:
            with _pop_mode_temporarily():
                yield
        else:
            yield

    def end_batch(self) -> None:
        """Refuses the outputs still tracked: their owner never returned, so something else called their source."""
        self._refused.update(output.source for output in self._outputs.values())
        self._outputs.clear()
        self._calls.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation; refuses every source whose output or weight it touches outside a known reader."""
        if func in _EACH_VALUE or func in _OTHER_DIMS:
            output = self._output(args[0])
            if output is not None and not self._calls and (func in _EACH_VALUE or _keeps_channels(func, args)):
                y = func(*args, **(kwargs or {}))
                self._track(output.source, y)
                return y
        if self._sources:
            allowed = self._calls[-1] if self._calls else set()
            for tensor in tree_leaves((args, kwargs)):
                key = storage_key(tensor)
                if key is not None and key not in allowed:
                    self._refuse(key)
        return func(*args, **(kwargs or {}))

    def _refuse(self, key: int) -> None:
        if key in self._outputs:
            self._refused.add(self._outputs[key].source)
        if key in self._weights:
            self._refused.add(self._weights[key])

    def _enter(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        allowed = {key for parameter in module.parameters() if (key := storage_key(parameter)) is not None}
        if name in self._layers:
            x = self._layers[name].kind.inputs(module, args, kwargs).get("")
            output = self._output(x)
            self._inputs.setdefault(name, set()).add(output and output.source)
            if output is not None:
                allowed.add(cast(int, storage_key(x)))
        self._calls.append(allowed)

    def _reach(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._unreached.pop(name, None)

    def _leave(self, name: str, module: nn.Module, args: tuple[Any, ...], y: Any) -> None:
        self._calls.pop()
        if name in self._sources and storage_key(y) is not None:
            self._track(name, y)

    def _output(self, x: Any) -> "_Output | None":
        """The output that x is the whole of; None for other tensors, and for unknown views of an output."""
        key = storage_key(x)
        output = None if key is None else self._outputs.get(key)
        return output if output is not None and geometry(x) in output.geometries else None

    def _track(self, source: str, y: Tensor) -> None:
        key = cast(int, storage_key(y))
        if key not in self._outputs:
            self._outputs[key] = _Output(source, StorageWeakRef(y.untyped_storage()), set())
        self._outputs[key].geometries.add(geometry(y))

    def _close(self, owner: str, module: nn.Module, args: tuple[Any, ...], y: Any) -> None:
        """The owner returns: refuses the outputs of its sources that still exist.

        (While the weak reference to a storage exists, no other storage gets its address.)
        """
        for key, output in list(self._outputs.items()):
            if self._owners[output.source] == owner:
                if not output.storage.expired():
                    self._refused.add(output.source)
                del self._outputs[key]


class _Output(NamedTuple):
    """A storage that holds an output of `source`, and the geometries of the views of it that may be read."""

    source: str
    storage: StorageWeakRef
    geometries: set[tuple[Any, ...]]


def _keeps_channels(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether this mean, select or slice leaves the last dim, which holds the channels, alone."""
    rank, dims = args[0].dim(), args[1] if len(args) > 1 else 0
    if dims is None:
        return False
    dims = dims if isinstance(dims, (list, tuple)) else [dims]
    return len(dims) > 0 and rank - 1 not in [dim % rank for dim in dims]


def _matrices_called(model: nn.Module) -> Iterator[tuple[str, list[int]]]:
    """The modules of a registered type, under all their names, with the numbers of inputs of their matrices.

    Children of an nn.MultiheadAttention are left out: it reads their weights without calling them.
    """
    for name, module in model.named_modules(remove_duplicate=False):
        kind, parent = type_of(module), model.get_submodule(name.rpartition(".")[0])
        if kind is not None and not isinstance(parent, nn.MultiheadAttention):
            yield name, [matrix.weight.shape[1] for matrix in kind.matrices(module).values()]


def _is_plain(module: nn.Module) -> bool:
    """Whether the module runs its class's forward and has no hooks."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def owns_weight(module: nn.Module, weight: Tensor) -> bool:
    """Whether this weight is a parameter of the module itself, rather than computed (by a parametrization)."""
    return storage_key(weight) in {storage_key(parameter) for parameter in module._parameters.values()}


def _is_norm(module: nn.Module) -> bool:
    """Whether this is a norm over the last dimension, with a weight of its own."""
    has_weight = module._parameters.get("weight") is not None
    return has_weight and type(module) in NORMS and len(module.normalized_shape) == 1  # type: ignore[arg-type]


def _owner(model: nn.Module, name: str) -> str:
    """The module whose forward calls this one: the nearest parent that has a forward."""
    owner = name.rpartition(".")[0]
    while owner and isinstance(model.get_submodule(owner), (nn.ModuleList, nn.ModuleDict)):
        owner = owner.rpartition(".")[0]
    return owner


def storage_key(value: Any) -> int | None:
    """A key that identifies a tensor's storage; None for values without one."""
    if not isinstance(value, Tensor):
        return None
    try:
        return int(value.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse, meta-like and other tensors without a storage
        return None


def geometry(tensor: Any) -> tuple[Any, ...]:
    """How a tensor views its storage: dtype, shape, strides and offset."""
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()
