"""ChannelsLast: a contiguous tensor behind an int8 convolution, whose values lie with the channels last.

Convolutions compute with the channels last. With an image whose channels are first, torch's outputs have them first,
too, and each layer would turn its input and its output. Where calibration has seen that nothing reads an output but
convolutions, operations on single values, and views that turn it so that its channels lie last, it stays as it was
computed, behind a tensor that has torch's strides. Whatever else reads that gets it as torch would have given it. After
such a view, which shares its memory, that is a copy, or a `ViewOfTurned`. It lives no longer than the call of the
innermost module that holds the convolution and its readers (`Scope`).
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from torchq.modules.convolving import in_format, is_zero_padding
from torchq.modules.made import taken_apart
from torchq.modules.pending import Deferred, Scope
from torchq.modules.writes import run_on_values
from torchq.watching import gives_views, may_write

_aten = torch.ops.aten
_ACTIVATIONS = (
    *(_aten.relu.default, _aten.relu_.default, _aten.relu6.default, _aten.relu6_.default, _aten.gelu.default),
    *(_aten.silu.default, _aten.silu_.default, _aten.hardswish.default, _aten.hardswish_.default),
    *(_aten.hardtanh.default, _aten.hardtanh_.default, _aten.sigmoid.default, _aten.tanh.default),
    *(_aten.leaky_relu.default, _aten.leaky_relu_.default, _aten.hardsigmoid.default, _aten.hardsigmoid_.default),
    torch.ops.torchq.activate.default,
)
KEEPING = frozenset(
    {
        *_ACTIVATIONS,
        *(
            _aten.add.Tensor,
            _aten.add_.Tensor,
            _aten.sub.Tensor,
            _aten.mul.Tensor,
            _aten.div.Tensor,
            _aten.clamp.default,
        ),
        *(_aten.glu.default, _aten.cat.default, _aten.constant_pad_nd.default, _aten.pad.default),
        *(_aten.max_pool2d_with_indices.default, _aten.avg_pool2d.default, _aten.upsample_nearest2d.default),
    }
)
"""Operations that give the same values in either format, and in the format of their input."""


def keeps(func: Any, args: Any, kwargs: Any, tensors: list[Any]) -> bool:
    """Whether an operation on these tensors, all of one format, gives that format: each value comes of its own place.

    >>> x = torch.zeros(1, 2, 3, 3)
    >>> keeps(_aten.add.Tensor, (x, x), {}, [x, x]), keeps(_aten.add.Tensor, (x, x[:, :, :1]), {}, [x, x[:, :, :1]])
    (True, False)
    >>> [keeps(_aten.pad.default, (x, [1, 1], *mode), {}, [x]) for mode in ((), ("constant", 0.0), ("reflect",))]
    [True, True, False]
    """
    if func not in KEEPING or tensors[0].dim() < 3:
        return False
    if func in (_aten.glu.default, _aten.cat.default):
        dimension = args[1] if len(args) > 1 else kwargs.get("dim", 0 if func is _aten.cat.default else -1)
        return dimension == 1 and all(each.dim() == tensors[0].dim() for each in tensors)
    if func in (_aten.constant_pad_nd.default, _aten.pad.default):
        return is_zero_padding(func, args, kwargs)
    return all(each.shape == tensors[0].shape for each in tensors)


def turns(func: Any, args: Any) -> bool:
    """Whether an operation is a view of a tensor that puts its channels last, and leaves all else in order.

    >>> x = torch.zeros(1, 2, 3, 3)
    >>> turns(_aten.permute.default, (x, [0, 2, 3, -3])), turns(_aten.transpose.int, (x[0], 1, 2))
    (True, True)
    >>> turns(_aten.permute.default, (x, [0, 1, 3, 2])), turns(_aten.transpose.int, (x, 1, 3))
    (False, False)
    """
    if func not in (_aten.permute.default, _aten.transpose.int):
        return False
    dimensions = args[0].dim()
    order = list(range(dimensions))
    if func is _aten.permute.default:
        order = [dimension % dimensions for dimension in args[1]]
    elif dimensions:
        one, other = (each % dimensions for each in args[1:3])
        order[one], order[other] = order[other], order[one]
    return dimensions >= 3 and order == [0, *range(2, dimensions), 1]


class ChannelsLast(Deferred):
    """A contiguous tensor (N, C, *spatial) of these values, which lie with the channels last."""

    @staticmethod
    def __new__(cls, values: Tensor, scope: Scope) -> Any:
        """In whose call it is made, and ends."""
        return torch.Tensor._make_wrapper_subclass(
            cls, values.shape, dtype=values.dtype, device=values.device, storage_size=0
        )

    def __init__(self, values: Tensor, scope: Scope) -> None:
        self._last: Tensor | None = values
        self._value: Tensor | None = None
        self._scope = scope
        self._is_turned = False

    def make(self) -> Tensor:
        """The values as torch would have them. Every call gives the same tensor."""
        last = self._last
        if last is not None:
            self._value = in_format(last, False)
            self._last = None
        return self._value  # type: ignore[return-value]

    def values(self) -> Tensor:
        """The values as they lie: with the channels last, until something else has read them."""
        last = self._last
        return self.make() if last is None else last

    def turned(self) -> Tensor:
        """The values for a view that has the channels last. From now on all writers share them as they lie."""
        if self._last is not None:
            self._value, self._last, self._is_turned = self._last, None, True
        return self.make()

    def _for(self, func: Any) -> Tensor:
        """What an operation gets. After a view that was turned, all but writes and such views get what torch has."""
        value = self.make()
        if not self._is_turned or may_write(func):
            return value
        if not gives_views(func):
            return in_format(value, False)
        if self._scope.deferred() is None:  # its call has ended, and who read it turned
            self._value, self._is_turned = in_format(value, False), False
            return self.make()
        return ViewOfTurned(value, self._scope)

    def held(self) -> "ChannelsLast":
        """Itself, to be made at the end of the call that it belongs to."""
        self._scope.deferred().append(weakref.ref(self))  # type: ignore[union-attr]
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Runs an operation that keeps the format on the values as they lie, and any other on those that torch has."""
        if any(kind is not cls and issubclass(kind, Deferred) for kind in types):
            return NotImplemented
        kwargs = kwargs or {}
        if args and type(args[0]) is cls and turns(func, args) and args[0]._scope.deferred() is not None:
            return run_on_values(func, (args[0].turned(), *args[1:]), kwargs)
        flat = not kwargs and func is not _aten.cat.default  # then there is nothing to search through
        leaves = args if flat else tree_leaves((args, kwargs))
        tensors: list[Any] = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        kept = all(type(each) is cls and each._last is not None for each in tensors)
        if kept and keeps(func, args, kwargs, tensors) and tensors[0]._scope.deferred() is not None:
            if flat:
                args = tuple(each.values() if type(each) is cls else each for each in args)
            else:
                args, kwargs = tree_map_only(cls, lambda each: each.values(), (args, kwargs))
            return _given(run_on_values(func, args, kwargs), tensors[0], func._schema.is_mutable)
        parts = taken_apart(func, args, kwargs)
        if parts is not NotImplemented:
            return parts
        args, kwargs = tree_map_only(cls, lambda each: each._for(func), (args, kwargs))
        return run_on_values(func, args, kwargs)


class ViewOfTurned(Deferred):
    """A view, with torch's strides, of an output that was turned: its values are made anew for each operation.

    What is written to it goes to the output as it lies, which the turned view shares.
    """

    @staticmethod
    def __new__(cls, lying: Tensor, scope: Scope, steps: tuple[Callable[[Tensor], Tensor], ...] = ()) -> Any:
        """The output, in whose call it is, and the views of it that this one is, one after the other."""
        like = _viewed(torch.empty(lying.shape, dtype=lying.dtype, device="meta"), steps)
        return torch.Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=lying.device, storage_size=0
        )

    def __init__(self, lying: Tensor, scope: Scope, steps: tuple[Callable[[Tensor], Tensor], ...] = ()) -> None:
        self._lying, self._scope, self._steps = lying, scope, steps
        if (deferred := scope.deferred()) is not None:  # what the call returns is an ordinary tensor
            deferred.append(weakref.ref(self))

    def make(self) -> Tensor:
        """The values as they are now."""
        return _viewed(in_format(self._lying, False), self._steps)

    def end(self) -> None:
        """Nothing has waited."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Gives a view of it, or runs an operation on the values, and takes over what that writes."""
        if any(kind not in (cls, ChannelsLast) and issubclass(kind, Deferred) for kind in types):
            return NotImplemented
        kwargs = kwargs or {}
        parts = taken_apart(func, args, kwargs)
        if parts is not NotImplemented:
            return parts
        if gives_views(func):
            return args[0]._view(func, args[1:], kwargs)
        copies: dict[int, Tensor] = {}
        lying: dict[int, Tensor] = {}
        given: dict[int, ViewOfTurned] = {}

        def values(each: ViewOfTurned) -> Tensor:
            key = id(each._lying)
            if key not in copies:
                lying[key], copies[key] = each._lying, in_format(each._lying, False)
            view = _viewed(copies[key], each._steps)
            given[id(view)] = each
            return view

        args, kwargs = tree_map_only(cls, values, (args, kwargs))
        y = run_on_values(func, args, kwargs)
        if not may_write(func):
            return y
        for key, copy in copies.items():
            run_on_values(_aten.copy_.default, (lying[key], copy), {})
        return tree_map_only(Tensor, lambda each: given.get(id(each), each), y)

    def _view(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What a view of it gives: one, or several."""
        like = func(torch.empty_strided(self.shape, self.stride(), dtype=self.dtype, device="meta"), *args, **kwargs)
        if isinstance(like, Tensor):
            return self._behind(lambda x: func(x, *args, **kwargs))
        return [self._behind(lambda x, i=i: func(x, *args, **kwargs)[i]) for i in range(len(like))]  # type: ignore[misc]

    def _behind(self, step: Callable[[Tensor], Tensor]) -> "ViewOfTurned":
        return ViewOfTurned(self._lying, self._scope, (*self._steps, step))


def _viewed(x: Tensor, steps: tuple[Callable[[Tensor], Tensor], ...]) -> Tensor:
    for step in steps:
        x = step(x)
    return x


def _given(y: Any, first: ChannelsLast, in_place: bool) -> Any:
    """What an operation gave. The indices of a max pooling, too, are turned for who reads them, and few do."""
    if in_place:
        return first
    if isinstance(y, tuple):
        return tuple(_given(each, first, False) for each in y)
    if not y.movedim(1, -1).is_contiguous():
        return y.contiguous()
    return ChannelsLast(y, first._scope).held()
