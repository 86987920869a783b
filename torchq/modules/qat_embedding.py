"""QATEmbedding and QATEmbeddingBag: embeddings that train with the rows that their int8 tables will have."""

import functools
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.functional import embedding

from torchq.modules.embedding import OF_TRAINING, TABLES, bagged
from torchq.modules.ranges import fake_quantize_finely, fake_quantize_rows
from torchq.ops.weights import weight_scale


class QATTable(nn.Module):
    """What both have in common: `ŵ = (rne(w / s) + r / 16) · s` of the rows that are looked up, `s = max|w| / 127`.

    r are the residuals that their int8 tables will have, if they will (`numerics.residual`).

    The gradient passes straight through to the table, which stays the module's own parameter: rows that are not looked
    up, and the `padding_idx`, get none.
    """

    weight: Any
    by_row: bool
    finely: bool = False  # as in what torchq 0.2 pickled
    float_class: type[nn.Module]

    @staticmethod
    def adopt(module: nn.Module, *, by_row: bool = True, finely: bool = False) -> None:
        """Turns an nn.Embedding or nn.EmbeddingBag itself into its training form.

        Args:
            module: a subclass keeps its own forward, whose `super().forward` looks up rounded rows.
            by_row: whether s is one for each row, or one for all, as a head that shares the table may have it.
            finely: whether look-ups have residuals.

        >>> table = nn.Embedding(10, 4)
        >>> QATTable.adopt(table)
        >>> type(table).__name__, table.weight.requires_grad
        ('QATEmbedding', True)
        """
        source = type(module)
        vars(module).update(float_class=source, by_row=by_row, finely=finely)
        module.__class__ = _class_for(source)  # type: ignore[arg-type]

    def release(self) -> None:
        """Turns it back into the float module that it was: the inverse of `adopt`."""
        kind = self.float_class
        for name in OF_TRAINING:
            vars(self).pop(name, None)
        self.__class__ = kind  # type: ignore[assignment]

    def look_up(self, indices: Tensor) -> Tensor:
        """The rows (*indices.shape, embedding_dim), rounded, in the table's dtype.

        Raises:
            ValueError: one of them has NaN or infinity.
        """
        own = cast(nn.Embedding, self)
        rows = embedding(
            indices, self.weight, own.padding_idx, scale_grad_by_freq=own.scale_grad_by_freq, sparse=own.sparse
        )
        flat = rows.reshape(-1, rows.shape[-1])
        if self.by_row:
            scale = weight_scale(flat, per_channel=True)
        else:
            scale = weight_scale(self.weight, per_channel=False)[:1].expand(len(flat))
        rounded = (fake_quantize_finely if self.finely else fake_quantize_rows)(flat, scale)
        return rounded.reshape(rows.shape).to(rows.dtype)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _new, (self.float_class,), vars(self).copy()


class QATEmbedding(QATTable, nn.Embedding):
    """The training form of nn.Embedding, which only `prepare_qat` makes."""

    def forward(self, input: Tensor) -> Tensor:
        """Indices of any shape -> (*shape, embedding_dim)."""
        return self.look_up(input)


class QATEmbeddingBag(QATTable, nn.EmbeddingBag):
    """The training form of nn.EmbeddingBag, which only `prepare_qat` makes."""

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """As nn.EmbeddingBag: bags of indices, (B, N) or flat with `offsets`, to (B, embedding_dim)."""
        return bagged(self, self.look_up(input.reshape(-1)), input, offsets, per_sample_weights)


@functools.cache
def _class_for(source: type[nn.Module]) -> type[QATTable]:
    """The training class for this class: where it overrides the base's methods, they go on with rounded rows."""
    base: type[QATTable] = QATEmbedding if issubclass(source, nn.Embedding) else QATEmbeddingBag
    if source in TABLES:
        return base
    return type(f"QAT{source.__name__}", (source, base), {"__module__": source.__module__, "__doc__": source.__doc__})


def _new(source: type[nn.Module]) -> nn.Module:
    """A module of the training class, without anything in it. (By a function: a class made here can't be pickled.)"""
    kind = _class_for(source)  # type: ignore[arg-type]
    table = kind.__new__(kind)
    nn.Module.__init__(table)
    return table
