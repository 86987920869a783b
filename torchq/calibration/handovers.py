"""Handovers: finds the convolutions whose output nothing but convolutions, and operations on single values, reads.

Or a view that puts the channels last, as before layers that work on rows, such as the encoder of Whisper.

Such an output may keep the memory format that it was computed in (`modules.channels_last`). It watches the operations
of the calibration runs, and tells tensors by their storage. No wrong value can come of what it finds: it decides
whether handing over pays.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from torchq.calibration.isolation import own_thread
from torchq.modules.channels_last import keeps, turns
from torchq.modules.norms import is_foldable
from torchq.modules.registry import Layer
from torchq.modules.writes import written_by
from torchq.watching import gives_views, may_write, storage_key

_aten = torch.ops.aten
_ADD = (_aten.add.Tensor, _aten.add_.Tensor)
_BY_STRIDES = (
    *(_aten.view.default, _aten.view.dtype, _aten._reshape_alias.default, _aten.as_strided.default),
    *(_aten.reshape.default, _aten.flatten.using_ints, _aten.ravel.default),  # whole, as in torch.inference_mode
)
"""Views that not all strides have."""
_COPIES = (_aten.clone.default, _aten._to_copy.default)


_Names = frozenset[str]
_NOBODY: _Names = frozenset()


class _Value(NamedTuple):
    """A tensor that exists now: the convolutions whose output it is, those whose output it may be, and its storage.

    A sum is the output of the summand's convolution that ran last. But either may compute it: `summands` are those
    whose own outputs, and no sums, were added. `turned`: a view has its channels last, or it comes of such a one, and
    its strides, too, will be others.
    """

    origins: _Names
    maybe: _Names
    storage: StorageWeakRef
    summands: _Names = _NOBODY
    turned: bool = False


class _Copy(NamedTuple):
    """Rows that were copied, or their copy: both will be one tensor, as `contiguous()` gives what is so as it is.

    Args:
        origins: the convolutions that they come of.
        storages: of all of these.
        old: those that others of them were written behind, and which nobody may read then.
    """

    origins: _Names
    storages: dict[int, StorageWeakRef]
    old: set[int]


class Handovers:
    """Watches runs of a model, and finds for a convolution the convolutions that alone read its output.

    Or what operations that keep the format (`keeps`) have made of it, together with other such outputs.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, Layer]) -> None:
        self._model = model
        self._norms = [module for module in model.modules() if is_foldable(module)]
        self._convolutions = {n: layer.module for n, layer in layers.items() if layer.kind.absorbs and not layer.part}
        self._values: dict[int, _Value] = {}  # by storage
        self._copies: dict[int, _Copy] = {}  # by storage
        self._order: list[str] = []  # of their last calls
        self._owners = {name: _owner_of(model, name) for name in self._convolutions}
        self._running: Counter[int] = Counter()  # calls of these, by their ids
        self._inside = 0  # how many calls of convolutions and norms are running
        self._readers: dict[str, set[str]] = {name: set() for name in self._convolutions}
        self._takers: dict[str, set[str]] = {name: set() for name in self._convolutions}  # of sums of its output
        self._turned: set[str] = set()
        self._read_by_others: set[str] = set()
        self._normed: set[str] = set()  # a norm read it, which may become a part of the convolution

    def found(self, norms: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
        """By convolution: those that alone read its output, given the norms that become a part of a convolution."""
        lost = self._lost(norms)
        return {name: tuple(sorted(found)) for name, found in self._readers.items() if found and name not in lost}

    def turned(self, norms: Mapping[str, str]) -> set[str]:
        """Those whose output is turned so that its channels lie last, and read by nobody but the former otherwise.

        All in the call of the module that they are in.
        """
        return self._turned - self._lost(norms)

    def _lost(self, norms: Mapping[str, str]) -> set[str]:
        return self._read_by_others | {name for name in self._normed if name not in norms}

    def sums(self) -> dict[str, tuple[str, ...]]:
        """By convolution: those that took the sum of its output with another one, or its activation, as their input."""
        return {name: tuple(sorted(found)) for name, found in self._takers.items() if found}

    @contextmanager
    def watching(self) -> Iterator[bool]:
        """Installs the hooks, if the model has at least two convolutions, and says whether it has.

        If so, it is to be told of operations.
        """
        if len(self._convolutions) < 2:
            yield False
            return
        with ExitStack() as stack:
            stack.enter_context(self._model.register_forward_hook(own_thread(self._left)))
            for name, module in self._convolutions.items():
                stack.enter_context(module.register_forward_pre_hook(own_thread(partial(self._takes, name))))
                stack.enter_context(module.register_forward_hook(own_thread(partial(self._gave, name))))
            for owner in set(self._owners.values()):
                stack.enter_context(owner.register_forward_pre_hook(own_thread(self._begins)))
                stack.enter_context(owner.register_forward_hook(own_thread(self._ends)))
            for norm in self._norms:
                stack.enter_context(norm.register_forward_pre_hook(own_thread(self._enters)))
                stack.enter_context(norm.register_forward_hook(own_thread(self._leaves)))
            yield True

    def end_batch(self) -> None:
        """Forgets the tensors, and a batch that failed."""
        self._values.clear()
        self._copies.clear()
        self._running.clear()
        self._inside = 0

    def sees(self, func: Any, args: Any, kwargs: Any, keys: list[int | None]) -> Callable[[Any], None] | None:
        """Notes what an operation makes of outputs of convolutions."""
        if self._inside or not self._values:
            return None
        self._reads_copies(func, args, kwargs, keys)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        rows = self._sees_rows(func, kwargs, tensors)
        values = [self._value(tensor) for tensor in tensors]
        origins = [_NOBODY if value is None else value.origins for value in values]
        every = _NOBODY.union(*origins)
        if not every:
            return rows
        if turns(func, args) and all(self._running[id(self._owners[name])] for name in every):
            self._turned |= every
            self._values[cast(int, storage_key(tensors[0]))] = cast(_Value, values[0])._replace(turned=True)
            return None
        late = any(value is not None and value.turned for value in values)  # its memory is no longer torch's then
        if late or not all(origins) or not keeps(func, args, kwargs, tensors):
            self._read_by_others |= every
            return None
        if func in _ADD and len(origins) == 2:
            summands = _NOBODY.union(*(value.maybe for value in values if value and not value.summands))
            last = self._summed(*origins)
            return lambda y: self._register(y, last, every, summands)
        maybe = _NOBODY.union(*(value.maybe for value in values if value))
        alone, shape = values[0] if len(values) == 1 else None, tensors[0].shape

        def note(y: Any) -> None:
            result = y[0] if isinstance(y, tuple) else y
            self._register(result, every, maybe, alone.summands if alone and result.shape == shape else _NOBODY)

        return note

    def _sees_rows(self, func: Any, kwargs: Any, tensors: list[Tensor]) -> Callable[[Any], None] | None:
        """Notes an operation on what was turned: what it makes of it may have strides that are no longer torch's.

        Where a later view, or the order of random numbers, depends on these, the convolution has another reader.
        """
        held = [(tensor, value) for tensor in tensors if (value := self._held(tensor)) and value.turned]
        held = [(tensor, value) for tensor, value in held if not tensor.is_contiguous()]
        if not held:
            return None
        origins = _NOBODY.union(*(value.origins for _, value in held))
        views, random = gives_views(func), torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())
        if func in _BY_STRIDES:
            whole = func is not _aten.as_strided.default and all(_are_rows(tensor) for tensor, _ in held)
        else:
            whole = views or (not random and all(_lie_as_rows(tensor) for tensor, _ in held))
        if not whole:
            self._read_by_others |= origins
        source = held[0][0]
        copies = views or (func in _COPIES and kwargs.get("memory_format") is torch.contiguous_format)

        def note(y: Any) -> None:
            if copies and storage_key(y) not in (None, storage_key(source)):
                self._note_copy(source, y, origins)
            for each in () if views else tree_leaves(y):
                key = storage_key(each)
                if key is not None and not each.is_contiguous() and self._held(each) is None:
                    self._values[key] = _Value(origins, _NOBODY, StorageWeakRef(each.untyped_storage()), turned=True)

        return note

    def _note_copy(self, source: Tensor, y: Tensor, origins: _Names) -> None:
        copy = self._copies.get(cast(int, storage_key(source))) or _Copy(origins, {}, set())
        for each in (source, y):
            key = cast(int, storage_key(each))
            copy.storages[key] = StorageWeakRef(each.untyped_storage())
            self._copies[key] = copy

    def _reads_copies(self, func: Any, args: Any, kwargs: Any, keys: list[int | None]) -> None:
        """Notes who reads rows, or a copy of them, behind a write to the other: it will be a write to both."""
        if not self._copies or gives_views(func):
            return
        for key in keys:
            self._reads_copy(key)
        if may_write(func):
            for key in map(storage_key, written_by(func, args, kwargs)):
                if key in self._copies:
                    copy = self._copies[key]
                    copy.old.update(copy.storages.keys() - {key})

    def _reads_copy(self, key: int | None) -> None:
        if key in self._copies and key in self._copies[key].old:
            self._read_by_others |= self._copies[key].origins

    def _summed(self, one: _Names, other: _Names) -> _Names:
        """The convolutions that ran last, of two summands, which then read the other one."""
        first, last = sorted((one, other), key=lambda origins: max(map(self._order.index, origins)))
        for origin in first:
            self._readers[origin] |= last - {origin}
        return last

    def _value(self, x: Any) -> _Value | None:
        """What a tensor is; None of one that was turned, and of what no convolution gave."""
        value = self._held(x)
        return None if value is None or (value.turned and not x.is_contiguous()) else value

    def _held(self, x: Any) -> _Value | None:
        key = storage_key(x)
        value = None if key is None else self._values.get(key)
        return None if value is None or value.storage.expired() else value

    def _register(self, y: Any, origins: _Names, maybe: _Names, summands: _Names = _NOBODY) -> None:
        key = storage_key(y)
        if key is not None and y.is_contiguous():
            self._values[key] = _Value(origins, maybe, StorageWeakRef(y.untyped_storage()), summands)
        else:
            self._read_by_others |= origins

    def _takes(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        value = self._value(args[0]) if args else None
        self._reads_back(args)
        for origin in () if value is None else value.maybe:
            self._readers[origin].add(name)
        for summand in () if value is None else value.summands:
            self._takers[summand].add(name)
        self._inside += 1

    def _reads_back(self, args: tuple[Any, ...]) -> None:
        """A convolution reads this. An image that was turned has another format, and so would its output have."""
        value = self._held(args[0]) if args else None
        self._reads_copy(storage_key(args[0]) if args else None)
        if value is not None and value.turned and args[0].dim() > 3:
            self._read_by_others |= value.origins

    def _gave(self, name: str, module: nn.Module, args: tuple[Any, ...], y: Any) -> None:
        self._inside -= 1
        if name in self._order:
            self._order.remove(name)
        self._order.append(name)
        own = frozenset({name})
        self._register(y, own, own)

    def _begins(self, owner: nn.Module, args: tuple[Any, ...]) -> None:
        self._running[id(owner)] += 1

    def _ends(self, owner: nn.Module, args: tuple[Any, ...], y: Any) -> None:
        self._running[id(owner)] -= 1

    def _enters(self, norm: nn.Module, args: tuple[Any, ...]) -> None:
        self._reads_copy(storage_key(args[0]) if args else None)
        self._inside += 1

    def _leaves(self, norm: nn.Module, args: tuple[Any, ...], y: Any) -> None:
        self._inside -= 1
        value = self._value(args[0]) if args else None
        if value is not None:
            self._normed |= value.origins
            self._register(y, value.origins, value.maybe)

    def _left(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """What the model returns, others read."""
        for leaf in tree_leaves(output):
            value = self._held(leaf)
            self._reads_copy(storage_key(leaf))
            self._read_by_others |= _NOBODY if value is None else value.origins


def _are_rows(x: Tensor) -> bool:
    """Whether this is a whole tensor whose channels are first in memory and last here.

    >>> x = torch.zeros(2, 3, 4, 5)
    >>> _are_rows(x.permute(0, 2, 3, 1)), _are_rows(x.permute(0, 2, 3, 1)[:, 1:]), _are_rows(x)
    (True, False, False)
    """
    return x.dim() >= 3 and x.movedim(-1, 1).is_contiguous()


def _lie_as_rows(x: Tensor) -> bool:
    """Whether nothing but the batch has a larger stride than the channels, which are last.

    >>> x = torch.zeros(2, 3, 4, 5).permute(0, 2, 3, 1)
    >>> _lie_as_rows(x), _lie_as_rows(x[:, 1:, 0]), _lie_as_rows(x[0].permute(2, 0, 1)[:, 1:])
    (True, True, False)
    """
    strides = [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]
    last = strides[-1] if strides else 0
    return sum(stride > last for stride in strides) <= (x.shape[-1] > 1 and len(strides) > 1)


def _owner_of(model: nn.Module, name: str) -> nn.Module:
    """The innermost module whose code calls this one."""
    *path, _ = name.split(".")
    while path and isinstance(model.get_submodule(".".join(path)), (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
        path.pop()
    return model.get_submodule(".".join(path))
