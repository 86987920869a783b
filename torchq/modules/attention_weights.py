"""AttentionWeights: the weights of an attention, computed when something reads them.

nn.MultiheadAttention returns them unless it is told not to, and most callers drop them. To compute them costs more than
the attention.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from torchq.modules.made import MadeTensor


class Form(NamedTuple):
    """How the weights (N, H, L, S) are returned.

    Args:
        average: as their mean over the heads.
        batched: with the dimension N.
    """

    average: bool
    batched: bool

    def of(self, weights: Tensor) -> Tensor:
        """The weights in this form."""
        weights = weights.mean(dim=1) if self.average else weights
        return weights if self.batched else weights.squeeze(0)

    def shape(self, n: int, heads: int, rows: int, keys: int) -> tuple[int, ...]:
        """The shape in this form.

        >>> Form(average=True, batched=True).shape(2, 4, 5, 7)
        (2, 5, 7)
        """
        return (*([n] if self.batched else []), *([] if self.average else [heads]), rows, keys)


def weights_of(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """`softmax(q · kᵀ / √D + mask)`: (N, H, L, D) and (N, H, S, D) to (N, H, L, S)."""
    scores = (q * math.sqrt(1 / q.shape[-1])) @ k.transpose(-2, -1)
    return (scores if mask is None else scores + mask).softmax(dim=-1)


class AttentionWeights(MadeTensor):
    """`form.of(weights_of(q, k, mask))`, computed when it is read. It needs tensors that nobody else can write.

    >>> x = torch.zeros(1, 2, 3, 4)
    >>> weights = AttentionWeights(x, x, None, Form(average=True, batched=False))
    >>> weights.shape, round(float(weights.sum()), 4)
    (torch.Size([3, 3]), 3.0)
    """

    @staticmethod
    def __new__(cls, q: Tensor, k: Tensor, mask: Tensor | None, form: Form) -> Any:
        """In the dtype of q."""
        n, heads, rows, _ = q.shape
        shape = form.shape(n, heads, rows, k.shape[2])
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=q.dtype, device=q.device, storage_size=0)

    def __init__(self, q: Tensor, k: Tensor, mask: Tensor | None, form: Form) -> None:
        self._made_of: tuple[Tensor, Tensor, Tensor | None, Form] | None = (q, k, mask, form)
        self._value: Tensor | None = None

    def make(self) -> Tensor:
        """The weights. Every call gives the same tensor, so a write into it is seen by all later readers."""
        made_of = self._made_of
        if made_of is not None:
            with torch.autocast("cpu", enabled=False):
                self._value = made_of[3].of(weights_of(*made_of[:3]))
            self._made_of = None
        assert self._value is not None
        return self._value

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Runs an operation on the values."""
        args, kwargs = tree_map_only(AttentionWeights, lambda weights: weights.make(), (args, kwargs or {}))
        return func(*args, **kwargs)
