"""FloatView: what `weight` and `bias` of an int8 layer are to code that knows nn.Linear.

Much code reads a layer's weight beside calling it: its dtype and device, its norm, `F.linear(x, layer.weight)`, a LoRA
adapter that merges. A FloatView has what such code expects, the float dtype of the model, the shape, the device, no
gradient, and costs nothing as long as only these are read. Where its values are used, the int8 weight is dequantized,
so they are those that the layer computes with. It is read only: a write would be lost, and so is an error, also through
a view of it (`weight[0] = 1`, `weight.data.mul_(2)`); but for a copy of the values that are there already.

It is a tensor subclass without memory of its own (a "wrapper subclass"): torch hands it every operation, and it runs
the operation on the dequantized values.
"""

import sys
from collections.abc import Callable, ItemsView
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from torchq.modules.made import MadeTensor
from torchq.modules.tracing import exporting
from torchq.numerics.qparams import dequantize
from torchq.ops.lookup import embedding
from torchq.scopes import outside_inference_mode


class FloatView(MadeTensor):
    """A read-only float tensor whose values are made when they are needed.

    >>> view = FloatView(lambda: torch.ones(2, 3), torch.empty(2, 3, device="meta"), torch.device("cpu"))
    >>> view.shape, view.dtype, float(view.sum())
    (torch.Size([2, 3]), torch.float32, 6.0)
    >>> view.mul_(2)
    Traceback (most recent call last):
    RuntimeError: torchq: the weight of an int8 layer can't be written (aten::mul_). ...
    """

    make: Callable[[], Tensor]
    look_up: Callable[[Tensor], Tensor] | None = None  # rows by their indices, without the rest of the table
    _like: Tensor
    _is_hf_initialized = True  # to transformers, which initializes the weights that no checkpoint had

    @staticmethod
    def __new__(cls, make: Callable[[], Tensor], like: Any = None, device: Any = None, **_: Any) -> Any:
        """A view that looks like `like`, a tensor on the meta device; `make()` gives its values.

        Raises:
            TypeError: a tensor in the place of `make`, as libraries call the class of a parameter to replace it.
        """
        if isinstance(make, Tensor):
            raise TypeError(
                "torchq: the weight of an int8 layer is computed from its packed one, and no other tensor can take its "
                "place: not to be offloaded to the CPU or a disk, either. It is a quarter of the float weight, and "
                "torchq.load maps its file, so that memory is used for what is read."
            )
        return torch.Tensor._make_wrapper_subclass(
            cls,
            like.shape,
            strides=like.stride(),
            storage_offset=like.storage_offset(),
            dtype=like.dtype,
            device=device,
            requires_grad=False,
            storage_size=0,
        )

    def __init__(self, make: Callable[[], Tensor], like: Tensor, device: torch.device) -> None:
        self.make = make
        self._like = like
        self._is_param = True  # isinstance(view, nn.Parameter), as for the weight of an nn.Linear

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Runs an operation on the values; refuses to write, and keeps a view of a view read only."""
        kwargs = kwargs or {}
        given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
        for argument in func._schema.arguments:
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and any(isinstance(leaf, FloatView) for leaf in tree_leaves(given.get(argument.name))):
                if func is _COPY and _is_same(*args[:2]):
                    return args[0]
                raise read_only(func._schema.name)
        first = args[0] if args else None
        if func is _EMBEDDING and isinstance(first, FloatView) and first.look_up is not None:
            return first.look_up(args[1])
        if isinstance(first, FloatView) and any(each.alias_info is not None for each in func._schema.returns):
            return _view(func, first, args[1:], kwargs)
        args, kwargs = tree_map_only(FloatView, lambda view: view.make(), (args, kwargs))
        return func(*args, **kwargs)

    @property
    def data(self) -> Tensor:
        """The view itself, detached; setting it is an error."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        raise read_only("data")

    @property
    def requires_grad(self) -> bool:
        """False. Setting it to True is an error, as `requires_grad_()` is: it would be trained in vain."""
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> "FloatView":
        """No gradient can be asked for: an int8 weight is not trained."""
        if requires_grad:
            raise RuntimeError(
                "torchq: the weight of an int8 layer gets no gradient. Train the float model with "
                "torchq.prepare_qat(model, loader) before it is converted, or adapters (LoRA) beside the int8 layers."
            )
        return self

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.detach()  # read only, so as good as a copy

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"FloatView of int8 ({self.make()!r})"


_EMBEDDING = torch.ops.aten.embedding.default
_COPY = torch.ops.aten.copy_.default


def _is_same(view: Tensor, source: Tensor) -> bool:
    """Whether a copy would change nothing, as where DistributedDataParallel sends all processes what they have."""
    values = view.make() if isinstance(view, FloatView) else view
    source = source.make() if isinstance(source, FloatView) else source
    return (source.shape, source.dtype, source.device) == (values.shape, values.dtype, values.device) and torch.equal(
        source, values
    )


def float_weight(packed: Tensor, k: int) -> Tensor:
    """The weight (N, K) of a packed matrix in float32, as the float layer had it: times the channel_scale, if any."""
    weight, scale, _, channel_scale = torch.ops.torchq.unpack(packed, k)
    values = dequantize(weight, scale, axis=0)
    return values * channel_scale if channel_scale.numel() else values


def weight_view(packed: Tensor, n: int, k: int, dtype: torch.dtype) -> FloatView:
    """The weight (N, K) of a packed matrix, as float."""

    def make() -> Tensor:
        return float_weight(packed, k).to(dtype)

    view = FloatView(make, torch.empty(n, k, dtype=dtype, device="meta"), packed.device)
    view.look_up = partial(_rows, packed, k, dtype)
    return view


def _rows(packed: Tensor, k: int, dtype: torch.dtype, indices: Tensor) -> Tensor:
    return embedding(packed, indices, k, dtype)


def bias_view(unpack: Callable[[], Any], n: int, dtype: torch.dtype, device: torch.device) -> FloatView:
    """The bias (N,) of a packed matrix, the third of what `unpack()` gives, as float."""

    def make() -> Tensor:
        bias: Tensor = unpack()[2]
        return bias.to(dtype)

    return FloatView(make, torch.empty(n, dtype=dtype, device="meta"), device)


_VIEWED = ("weight", "bias")


class FloatViews(dict[str, Any]):
    """The `_parameters` of an int8 layer: views only, so that no parameter given from outside is lost unnoticed.

    None goes either, and none comes beside them: pruning, weight_norm and the like would take the weight for their own.

    torch.export and torch.jit.trace take a model's parameters by name into their programs, used or not, and would store
    all of them in float, or as nothing. To them the layer has none; a model that reads `layer.weight` itself gets its
    values there as a constant.
    """

    def __setitem__(self, name: str, value: Any) -> None:
        if not isinstance(value, FloatView) or name not in _VIEWED:
            raise read_only(name)
        super().__setitem__(name, value)

    def __delitem__(self, name: str) -> None:
        raise read_only(name)

    def pop(self, name: str, *default: Any) -> Any:
        """An error, where there is one of this name."""
        if name in self:
            raise read_only(name)
        return super().pop(name, *default)

    def __getitem__(self, name: str) -> Any:
        view, state = super().__getitem__(name), torch._C._get_tracing_state()
        if not state:
            return view
        trace: Any = torch._C
        trace._set_tracing_state(None)
        try:
            return view.make()
        finally:
            trace._set_tracing_state(state)

    def get(self, name: str, default: Any = None) -> Any:
        """As the lookup."""
        try:
            return self[name]
        except KeyError:
            return default

    def items(self) -> ItemsView[str, Any]:  # type: ignore[override]
        """The views by name."""
        return {}.items() if _is_exporting() or _is_collecting() else super().items()


def _is_exporting() -> bool:
    """Whether torch.export is at work: it reads parameters before and after it says so itself (is_exporting)."""
    trace = sys.modules.get("torch.export._trace")
    return exporting() or getattr(trace, "_EXPORT_FLAGS", None) is not None


def _is_collecting() -> bool:
    """Whether torch.jit.trace is at work, and takes the tensors of a module: it does so before it traces its call."""
    trace = sys.modules.get("torch.jit._trace")
    return getattr(trace, "_trace_module_map", None) is not None and not torch._C._get_tracing_state()


def _view(func: Any, base: FloatView, args: Any, kwargs: Any) -> Any:
    """What a view operation gives: read-only views again, whose values come from the base's.

    In torch.inference_mode too torch takes a view of a tensor that was made outside of it for one that was.
    """
    with outside_inference_mode():
        return _views(func, base, args, kwargs)


def _views(func: Any, base: FloatView, args: Any, kwargs: Any) -> Any:
    meta = func(base._like, *args, **kwargs)

    def made(pick: Callable[[Any], Tensor], like: Tensor) -> FloatView:
        return FloatView(lambda: pick(func(base.make(), *args, **kwargs)), like, base.device)

    if isinstance(meta, Tensor):
        return made(lambda result: result, meta)
    return [made(itemgetter(i), each) for i, each in enumerate(meta)]


def read_only(what: str) -> RuntimeError:
    """The error of a write; `what` names it."""
    return RuntimeError(
        f"torchq: the weight of an int8 layer can't be written ({what}). Change, tie, resize or initialize the float "
        "model before it is converted, or leave this layer in float with QConfig(exclude=(name,)); a converted model "
        "takes other weights by load_state_dict(), and for one call by functional_call() with named_buffers() instead."
    )
