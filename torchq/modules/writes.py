"""Whether a tensor was written since somebody took it.

torch counts the writes to a tensor, but not to those of torch.inference_mode. There `Writes` does, a mode that sees the
operations of its thread while somebody holds an `Unwritten` of such a tensor. To be seen costs an operation more than
most of them take, so the mode ends with the last of these, or as soon after as it can.
"""

import threading
import weakref
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from torchq import _C
from torchq.modules.made import MadeTensor
from torchq.watching import Watch


class Unwritten:
    """A tensor as it is now, which nobody may write to as long as this is held.

    Args:
        tensor: the values.
        given: what was given for it: itself, or one that was made of it. torch counts the writes to this one and to its
            views.
    """

    __slots__ = ("__weakref__", "_given", "_served", "_version", "_writes", "tensor")

    def __init__(self, tensor: Tensor, given: Tensor | None = None) -> None:
        self.tensor, self._given = tensor, tensor if given is None else given
        self._served = False
        self._writes: Writes | None = None
        if self.tensor.is_inference() or self._given.is_inference():
            while self._writes is not _active.writes or self._writes is None:  # a collector's pass may end the mode
                self._writes = _started()
                self._writes.holders[id(self)] = weakref.ref(self)
        self._version = self._now()

    def __del__(self) -> None:
        if (writes := getattr(self, "_writes", None)) is not None:
            writes.holders.pop(id(self), None)
            rest()

    def is_unwritten(self) -> bool:
        """Whether it is as it was."""
        return self._now() == self._version

    def values(self) -> Tensor:
        """The tensor, if it is as it was."""
        if not self.is_unwritten():
            raise RuntimeError(
                "torchq: a convolution waited for its activation, and its input or the other summand was written "
                "before it came. Calibration saw no such write. Convert with QConfig(fuse=False)."
            )
        return self.tensor

    def serve(self) -> None:
        """It has been read as the plan has it: nobody is expected to read it again."""
        self._served = True

    def keep(self) -> None:
        """Takes a copy of the values where it has served, so that no writes need be counted for it."""
        if self._writes is None or not self._served:
            return
        self._version = 0 if self.is_unwritten() else -1
        self.tensor = self._given = unseen(torch.clone, self.tensor)
        self._writes.holders.pop(id(self), None)
        self._writes = None

    def _now(self) -> int:
        return self._count(self.tensor) + self._count(self._given)

    def _count(self, tensor: Tensor) -> int:
        if not tensor.is_inference():
            return tensor._version
        return 0 if self._writes is None else self._writes.counts.get(tensor.untyped_storage()._cdata, 0)


class Private(NamedTuple):
    """A tensor that nobody else can have, and so write to: stands for an `Unwritten`.

    Args:
        tensor: the values.
    """

    tensor: Tensor

    def serve(self) -> None:
        """As there."""

    def values(self) -> Tensor:
        """The tensor."""
        return self.tensor


class Writes(Watch):
    """Counts the writes of this thread, by storage."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[int, int] = {}
        self.holders: dict[int, weakref.ref[Unwritten]] = {}  # who asks for them; any thread may let one go

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation, and notes what it writes to."""
        kwargs = kwargs or {}
        y = NotImplemented
        if len(types) == 1 and issubclass(types[0], MadeTensor):  # which the dispatcher would ask next
            y = types[0].__torch_dispatch__(func, types, args, kwargs)
        if y is NotImplemented:
            y = func(*args, **kwargs)
        self.note(written_by(func, args, kwargs))
        return y

    def note(self, tensors: Iterable[Tensor]) -> None:
        """These have been written."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            self.counts[key] = self.counts.get(key, 0) + 1


class _Active(threading.local):
    writes: Writes | None = None


_active = _Active()


def _started() -> Writes:
    """The mode, which sees the operations of this thread from now on."""
    if _active.writes is None:
        _active.writes = Writes().__enter__()
    return _active.writes


def rest() -> None:
    """Ends the mode where nobody needs it, unless another one began inside of it or an operation is being seen."""
    writes = _active.writes
    if writes is None or writes.holders:
        return
    depth = torch._C._len_torch_dispatch_stack()
    if depth and torch._C._get_dispatch_stack_at(depth - 1) is writes:
        stop()


def go_on() -> None:
    """Another layer begins. What has served and is still there may be so for long: a caller's variable has it."""
    if _active.writes is None:
        return
    for held in [holder() for holder in [*_active.writes.holders.values()]]:
        if held is not None:
            held.keep()
    rest()


def stop() -> None:
    """Nothing waits any longer."""
    writes, _active.writes = _active.writes, None
    if writes is not None:
        writes.__exit__(None, None, None)


def modes() -> int:
    """How many modes see the operations of this thread, without the one that counts writes, and default devices.

    Inside of an operation that this one sees, it is off.
    """
    depth: int = torch._C._len_torch_dispatch_stack() + _C.function_modes()
    return max(0, depth - (_active.writes is not None))


def is_eager(x: Tensor) -> bool:
    """Whether x is a plain tensor in a plain call, in which operations can be watched, and writes be told."""
    told = torch.is_inference_mode_enabled() or not x.is_inference()
    holds = not x.is_neg() and not x._is_zerotensor()  # its memory what it means, which not all ways to the op ask
    plain = type(x) is Tensor and told and holds and not modes() and not torch._C._get_tracing_state()
    return plain and not torch._C._are_functorch_transforms_active() and not _C.is_autocast_enabled()


def own_modes() -> int:
    """How many of the modes that see the operations of this thread are those that count writes."""
    return int(_active.writes is not None)


def unseen(op: Any, *args: Any) -> Any:
    """An operation that writes to nothing, past the mode that counts writes."""
    if _active.writes is None or modes():
        return op(*args)
    with torch._C._DisableTorchDispatch():
        return op(*args)


def run_on_values(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """An operation on the values of tensors that were made, inside of a dispatch, where the mode sees nothing."""
    y = func(*args, **kwargs)
    if _active.writes is not None:
        _active.writes.note(written_by(func, args, kwargs))
    return y


def written_by(func: Any, args: Any, kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that an operation writes to, by its schema; of an operator of functions, all that it is given."""
    if not hasattr(func, "_schema"):
        return [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    places, names = _written_places(func)
    if not places and not names:
        return []
    given = [args[i] for i in places if i < len(args)] + [kwargs[name] for name in names if name in kwargs]
    return [each for each in tree_leaves(given) if isinstance(each, Tensor)]


@cache
def _written_places(func: Any) -> tuple[tuple[int, ...], tuple[str, ...]]:
    written = [
        (i, argument.name)
        for i, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return tuple(i for i, _ in written), tuple(name for _, name in written)
