"""QuantizedEmbedding and QuantizedEmbeddingBag: nn.Embedding and nn.EmbeddingBag with an int8 table.

Each row has its own scale, `max|row| / 127`, and is dequantized as it is looked up. Beside the codes may lie residuals,
4 more bits for each (`numerics.residual`). A table that is the weight of a head too is there once: the head's packed
weight, whose codes the products read, and look-ups the residuals too. Such a module only refers to its `owner`, and has
no tensors.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.nn.functional import embedding_bag

from torchq import ops
from torchq.modules.base import MODULE_OWN, Int8Module, float_class
from torchq.modules.float_view import FloatView, FloatViews
from torchq.modules.packed_weights import RESIDUAL, PackedWeights
from torchq.numerics.qparams import dequantize
from torchq.numerics.residual import with_residuals
from torchq.ops.lookup import embedding, pack_table, unpack_residuals, unpack_table
from torchq.ops.weights import quantize_weight

TABLES = (nn.Embedding, nn.EmbeddingBag)
"""The float modules that become int8 here."""

OF_TRAINING = frozenset(("float_class", "by_row", "finely"))
"""What a training form (`qat_embedding`) has beside what the float module has."""


def is_prepared(module: nn.Module) -> bool:
    """Whether this is the training form of an embedding."""
    return isinstance(module, TABLES) and "by_row" in vars(module)


class QuantizedTable(PackedWeights):
    """What both modules have in common: the table (num_embeddings, embedding_dim), as memory and as a checkpoint.

    The state keys are `weight_int8` and `weight_scale`, and `weight_residual` with residuals; a tied table has none. To
    foreign code `weight` is a read-only float tensor, with the values of look-ups: `F.embedding(ids, module.weight)`
    looks up only these rows. That of a head has the values of its products, the codes alone.
    """

    _source: type[nn.Module]  # the float module's class
    float_key = "weight"
    fixed = (*PackedWeights.fixed, "max_norm")
    has_bias = had_bias = False
    input_qparams = None
    _owner: tuple[PackedWeights] | None = None  # in a tuple, so that it is no child

    @classmethod
    def from_float(
        cls, module: nn.Module, owner: PackedWeights | None = None, *, finely: bool = False, scaled: bool = False
    ) -> "QuantizedTable":
        """The int8 form of an nn.Embedding or nn.EmbeddingBag; if its table is the weight of `owner`, tied to that.

        Args:
            module: the float module.
            owner: the int8 module of a head or another embedding that has the table.
            finely: whether look-ups have residuals. Those of a tied table are added to the owner.
            scaled: whether a table of its own has a channel_scale, as the head had that it shared it with. It is ones
                here; a checkpoint has it.

        A subclass keeps its own forward and whatever else it has: its `super().forward` looks up in int8.
        """
        table, weight = cls.empty(module, owner), cast(Tensor, module.weight).detach()
        if owner is None:
            ones = torch.ones(weight.shape[1], dtype=torch.float32, device=weight.device) if scaled else None
            table._set_packed(_formed(*quantize_weight(weight, per_channel=True), ones))
        holder = table if owner is None else owner
        if finely and holder.residual is None:
            holder.add_residual(weight)
        return table

    @classmethod
    def empty(
        cls, module: nn.Module, owner: PackedWeights | None = None, *, finely: bool = False, scaled: bool = False
    ) -> "QuantizedTable":
        """The same on the meta device, without the table's values. A table that is its owner's has the owner's."""
        table = cast(QuantizedTable, _new(float_class(module)))
        kept = {key: value for key, value in vars(module).items() if key not in MODULE_OWN | OF_TRAINING}
        table.__dict__.update(copy.deepcopy(kept))  # the modules and tensors in it are the float model's
        table._modules.update(copy.deepcopy(module._modules))
        table._buffers.update(copy.deepcopy(module._buffers))
        table._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
        weight = cast(Tensor, module.weight)
        table.out_features, table.in_features = weight.shape
        table.dtype = weight.dtype
        table.training = module.training
        if owner is None:
            shape = (table.out_features, table.in_features)
            codes = torch.empty(shape, dtype=torch.int8, device="meta")
            scale, channels = (torch.empty(size, dtype=torch.float32, device="meta") for size in shape)
            table._set_packed(_formed(codes, scale, channels if scaled else None))
        else:
            table._owner = (owner,)
            table._present()
        if finely:
            (table if owner is None else owner).await_residual()
        return table

    @property
    def owner(self) -> PackedWeights | None:
        """The module whose weight this table is; None if it has one of its own."""
        return None if self._owner is None else self._owner[0]

    def table(self) -> tuple[Tensor, Tensor | None]:
        """What look-ups read: its own table and residuals, or the owner's."""
        owner = self.owner
        return super().table() if owner is None else owner.table()

    def look_up(self, indices: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The rows (*indices.shape, embedding_dim), in the model's dtype or another."""
        packed, residual = self.table()
        return embedding(packed, indices, self.in_features, dtype or self.dtype, residual)

    @property
    def float_bytes(self) -> int:
        """The bytes of the table in the model's dtype; a tied one is counted by its owner."""
        return 0 if self._owner else self.out_features * self.in_features * self.dtype.itemsize

    @property
    def weight(self) -> Tensor:
        """The table in float, read only: a `FloatView`."""
        if is_dynamo_compiling():  # which can't trace a tensor subclass: it gets the values
            return self._float_table()
        return self._parameters["weight"]  # type: ignore[return-value]

    @property
    def channel_scale(self) -> Tensor | None:
        """What each value of a row is multiplied by, of a table of its own; None for most. A head has its own."""
        return None if self._owner is not None else super().channel_scale

    def replace_weight(self, weight_int8: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> None:
        """Takes other codes and scales. Residuals, which were those of the codes before, become zeros.

        Raises:
            RuntimeError: the table is its owner's.
        """
        if self._owner is not None:
            raise RuntimeError(f"torchq: this table is the weight of a {type(self.owner).__name__}: replace it there.")
        self._set_packed(_formed(weight_int8, weight_scale, self.channel_scale), self._no_residual())

    # ---- What PackedWeights asks for -------------------------------------------------------------------------------

    def _float_table(self) -> Tensor:
        packed, residual = self.table()
        codes, scale, _, channel_scale = self._unpacked(packed)
        if residual is None:
            values = dequantize(codes, scale, axis=0)
        else:
            values = with_residuals(codes, unpack_residuals(residual, self.in_features), scale)
        return (values * channel_scale if channel_scale.numel() else values).to(self.dtype)

    def _weight_view(self, packed: Tensor | None) -> FloatView:
        like = torch.empty(self.out_features, self.in_features, dtype=self.dtype, device="meta")
        view = FloatView(lambda: self._float_table() + 0, like, torch.device("cpu"))
        view.look_up = self.look_up
        return view

    def _present(self) -> None:
        """The view of a table that is its owner's."""
        self.__dict__["_parameters"] = FloatViews(weight=self._weight_view(None))

    def _unpacked(self, packed: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if self.owner is not None:
            return self.owner._unpacked(packed)
        packed = self.packed if packed is None else packed
        if self._scales_channels(packed):
            return super()._unpacked(packed)
        none = torch.empty(0, dtype=torch.float32, device="cpu")
        return *unpack_table(packed), none, none

    def _scales_channels(self, packed: Tensor) -> bool:
        return packed.dim() == 1

    def _canonical(self) -> dict[str, Tensor]:
        if self._owner is not None:
            return {}
        packed, residual = self.table()
        weight, scale, _, channel_scale = self._unpacked(packed)
        tensors = {"weight_int8": weight, "weight_scale": scale}
        if channel_scale.numel():
            tensors["channel_scale"] = channel_scale
        return tensors if residual is None else {**tensors, RESIDUAL: residual}

    def expected(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of each tensor of a checkpoint."""
        return {} if self._owner is not None else super().expected()

    def _adopt(self, tensors: dict[str, Tensor]) -> None:
        if self._owner is None:
            packed = _formed(tensors["weight_int8"], tensors["weight_scale"], tensors.get("channel_scale"))
            self._set_packed(packed, tensors.get(RESIDUAL))
        else:
            self._present()

    def _other_scheme(self, name: str) -> str:
        if self._owner is None:
            return super()._other_scheme(name)
        return (
            f"the saved table has tensors of its own, and this one is the weight of a {type(self.owner).__name__}. "
            "Make the model by the saved one's plan first: torchq.apply_plan(model, plan)."
        )

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantizedTable":
        if self._owner is None:
            return super()._apply(fn, recurse)  # type: ignore[return-value]
        self.__dict__["_parameters"] = {}
        nn.Module._apply(self, fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device="cpu")).dtype
        self._present()
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _new, (self._source,), self.__getstate__()


def _formed(codes: Tensor, scale: Tensor, channel_scale: Tensor | None) -> Tensor:
    """A table of its own as it lies in memory: rows with their scales, or as a head has it, with a channel_scale."""
    return pack_table(codes, scale) if channel_scale is None else ops.pack(codes, scale, None, channel_scale)


class QuantizedEmbedding(QuantizedTable, nn.Embedding):  # type: ignore[override]
    """nn.Embedding with an int8 table: `y = (code + residual / 16) * scale` of each row, or without residuals.

    >>> table = QuantizedEmbedding.from_float(nn.Embedding(10, 4))
    >>> table(torch.tensor([[1, 2, 9]])).shape, table.weight_int8.dtype
    (torch.Size([1, 3, 4]), torch.int8)
    """

    _source = nn.Embedding

    def forward(self, input: Tensor) -> Tensor:
        """Indices of any shape -> (*shape, embedding_dim).

        Raises:
            IndexError: an index is out of range.
        """
        state = self.__dict__
        if is_dynamo_compiling() and "_owner" not in state:  # with few guards
            buffers = state["_buffers"]
            return embedding(buffers["packed"], input, state["in_features"], state["dtype"], buffers.get("residual"))
        return self.look_up(input)

    def extra_repr(self) -> str:
        """Sizes and scheme, for `repr`."""
        return f"{nn.Embedding.extra_repr(self)}, int8{', tied' if self._owner else ''}"


class QuantizedEmbeddingBag(QuantizedTable, nn.EmbeddingBag):  # type: ignore[override]
    """nn.EmbeddingBag with an int8 table. The rows are added, averaged or compared in float by torch's own operation.

    >>> bag = QuantizedEmbeddingBag.from_float(nn.EmbeddingBag(10, 4))
    >>> bag(torch.tensor([1, 2, 4, 5]), torch.tensor([0, 2])).shape
    torch.Size([2, 4])
    """

    _source = nn.EmbeddingBag

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """As nn.EmbeddingBag: bags of indices, (B, N) or flat with `offsets`, to (B, embedding_dim).

        Raises:
            IndexError: an index is out of range.
        """
        return bagged(self, self.look_up(input.reshape(-1)), input, offsets, per_sample_weights)

    def extra_repr(self) -> str:
        """Sizes and scheme, for `repr`."""
        return f"{nn.EmbeddingBag.extra_repr(self)}, int8{', tied' if self._owner else ''}"


def bagged(
    bag: nn.EmbeddingBag, rows: Tensor, input: Tensor, offsets: Tensor | None, per_sample_weights: Tensor | None
) -> Tensor:
    """What an nn.EmbeddingBag gives for the rows (B, embedding_dim) of all indices of `input`, in their order."""
    kept, places = None, torch.arange(len(rows), dtype=torch.long, device=rows.device)
    if bag.padding_idx is not None:  # rows that count for nothing: all of them are the last one, of zeros
        kept = len(rows)
        rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
        places = torch.where(input.reshape(-1) == bag.padding_idx, kept, places)
    return embedding_bag(
        places.reshape(input.shape),
        rows,
        offsets if offsets is None else offsets.long(),
        mode=bag.mode,
        per_sample_weights=per_sample_weights,
        include_last_offset=bag.include_last_offset,
        padding_idx=kept,
    )


@functools.cache
def _class_for(source: type[nn.Module]) -> type[QuantizedTable]:
    """The int8 class for this class: where it overrides the base's methods, they go on with the int8 ones."""
    base: type[QuantizedTable] = QuantizedEmbedding if issubclass(source, nn.Embedding) else QuantizedEmbeddingBag
    if source in TABLES:
        return base
    names = {"_source": source, "__module__": source.__module__, "__doc__": source.__doc__}
    return type(f"Quantized{source.__name__}", (source, base), names)


def _new(source: type[nn.Module]) -> nn.Module:
    """An int8 module for this class, without a table yet. (By a function: a class made here can't be pickled.)"""
    int8 = _class_for(source)  # type: ignore[arg-type]
    table = int8.__new__(int8)
    nn.Module.__init__(table)
    return table


# ---- What stays in float ---------------------------------------------------------------------------------------------

_PROBES, _PROBED_ROWS = 3, 64


def why_float(module: nn.Module) -> str | None:
    """Why this nn.Embedding or nn.EmbeddingBag must stay in float, whatever the table holds; None if it need not."""
    source = float_class(module)
    kind = source.__name__
    if getattr(module, "max_norm", None) is not None:
        return "max_norm rescales rows of its table as they are looked up: an int8 table can't be written"
    if module._parameters.get("weight") is None:
        return "its table is computed, by a parametrization for one"
    if module._parameters.keys() != {"weight"}:
        return f"{kind} has parameters beside its table"
    if "forward" in vars(module) or isinstance(module, Int8Module):
        return f"{kind} has a forward of its own"
    base = nn.Embedding if isinstance(module, nn.Embedding) else nn.EmbeddingBag
    if source.forward is base.forward or is_prepared(module):
        return None
    return None if _is_proven(module) else f"{kind} has a forward of its own, which can't be proven to look up rows"


@torch.no_grad()
def _is_proven(module: nn.Module) -> bool:
    """Whether the module's own forward gives, with an int8 table, exactly what it gives with the table's values."""
    weight = cast(Tensor, module.weight)
    rows = _PROBED_ROWS + max(0, getattr(module, "padding_idx", None) or 0)
    some = nn.Parameter(weight.detach()[:rows].clone(), requires_grad=False)
    try:
        exact = copy.deepcopy(module, {id(weight): some})
        int8 = QuantizedTable.from_float(exact)
        exact._parameters["weight"] = nn.Parameter(int8._float_table(), requires_grad=False)
        return all(torch.equal(probe(exact), probe(int8)) for probe in _probes(len(some)))
    except Exception:  # it takes other arguments, say
        return False


def _probes(count: int) -> list[Callable[[nn.Module], Tensor]]:
    """Calls of an embedding: a few rows in each."""
    ids = torch.arange(2 * _PROBES, dtype=torch.long, device="cpu").reshape(2, _PROBES) % max(1, min(count, _PROBES))
    return [lambda module: module(ids), lambda module: module(ids.clamp(max=1))]
