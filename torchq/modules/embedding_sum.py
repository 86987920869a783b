"""EmbeddingSum: tables looked up, added and normalized at once, row by row (`embedding_code.py`)."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from torchq import _C
from torchq.modules import simulation
from torchq.modules.embedding import QuantizedEmbedding
from torchq.modules.embedding_code import EmbeddingCode, Parent, Rows, embedding_code_of
from torchq.modules.layer_norm import LayerNorm
from torchq.modules.straight_forms import Form, become, may_become

_KINDS = (QuantizedEmbedding, nn.Embedding, LayerNorm)
_PLAIN = (type(None), Tensor, bool, int)


class EmbeddingSum(Form):
    """`norm(words(ids) + positions(position_ids) + ...)`: what lies between the look-ups and the norm is never stored.

    The bits are those of the children called one by one. Wherever anybody could see a difference, the code of the user
    runs: hooks, gradients, modes, tracing, other children, an index out of range.
    """

    line: EmbeddingCode  # type: ignore[assignment]
    reads = staticmethod(embedding_code_of)  # type: ignore[assignment]

    @staticmethod
    def adopt(module: nn.Module) -> None:
        """Makes a module an EmbeddingSum, if its code comes to that for indices alone."""
        tables = sum(isinstance(child, nn.Embedding) for child in module._modules.values())
        code = embedding_code_of(type(module)) if tables else None
        if code is None or not may_become(EmbeddingSum, module):
            return
        with torch.no_grad():
            found = _found(module, code, *_first_arguments(code))
        if found is not None and len(found.terms) + (found.norm is not None) > 1:
            become(EmbeddingSum, module, code)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """forward(), in one call where that is all that happens."""
        if not is_dynamo_compiling() and not simulation.anywhere and _C.is_plain_eager():
            y = self._summed(args, kwargs)
            if y is not NotImplemented:
                return y
        return super().__call__(*args, **kwargs)

    def _summed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        line = self.line
        if not all(type(each) in _PLAIN for each in (*args, *kwargs.values())):
            return NotImplemented
        if not _C.is_plain(self, type(self)) or not _C.computes_as_known(type(self)) or not line.facts.hold():
            return NotImplemented
        rows = _found(self, line, args, kwargs)
        if rows is None:
            return NotImplemented
        terms = tuple(_read(table, ids) for table, ids in rows.terms)
        return _C.call_embedding_sum(terms, rows.norm, rows.sizes, _KINDS)


def _read(table: nn.Embedding, ids: Tensor) -> tuple[Any, ...]:
    """What C++ takes: a table, its indices, and what it has in place of a weight."""
    return (table, ids, *table.table()) if isinstance(table, QuantizedEmbedding) else (table, ids, None, None)


def _found(module: nn.Module, code: EmbeddingCode, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Rows | None:
    """What a call with these arguments comes to; None if not to a sum of rows, or to an error."""
    calls: list[Any] = []
    try:
        y = code.run(Parent(module, code, calls), *args, **kwargs)
    except Exception:  # the code of the user says what it is
        return None
    return y if type(y) is Rows and y.made_by(calls) else None


def _first_arguments(code: EmbeddingCode) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a call: indices for the first one, and for others that must be given."""
    _, *names = inspect.signature(code.forward).parameters.values()
    ids = torch.zeros((1, 2), dtype=torch.long, device="cpu")
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    given = [each for each in names if each.kind in positional]
    return tuple(ids for i, each in enumerate(given) if i == 0 or each.default is each.empty), {}
