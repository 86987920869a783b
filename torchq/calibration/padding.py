"""Padding: rows of a batch that its mask says are no data. No range, rounding or figure is made of them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_HIDE = ("src_key_padding_mask", "key_padding_mask")


def real_rows(batch: Any) -> Tensor | None:
    """Where the mask (B, T) of a batch, a dict or (dict, label), has data, as bool; None: it says nothing.

    An `attention_mask` is a 1 for each row that is data and a 0 for the others. torch's own `src_key_padding_mask` and
    `key_padding_mask` are bool and True for the others. Any other mask, such as one to be added to the scores, says
    nothing here; nor does one without a row that is data.

    >>> real_rows({"input_ids": torch.tensor([[5, 0]]), "attention_mask": torch.tensor([[1, 0]])})
    tensor([[ True, False]])
    >>> real_rows({"src": torch.ones(1, 2, 4), "src_key_padding_mask": torch.tensor([[False, True]])})
    tensor([[ True, False]])
    """
    if isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    if not isinstance(batch, Mapping):
        return None
    mask, hides = batch.get("attention_mask"), next((batch[name] for name in _HIDE if name in batch), None)
    if mask is None and isinstance(hides, Tensor) and hides.dtype == torch.bool:
        mask = ~hides
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.is_complex():
        return None
    real = mask != 0
    return real if bool(real.any()) and bool(((mask == 1) | ~real).all()) else None


def without_padding(x: Tensor, real: Tensor | None) -> Tensor:
    """The rows of x (B, T, ..., K) that are data, (rows, ..., K); x as it is if it has no such leading dimensions.

    >>> without_padding(torch.tensor([[[1.0], [9.0]]]), torch.tensor([[True, False]]))
    tensor([[1.]])
    """
    if real is None or x.dim() <= real.dim() or x.shape[: real.dim()] != real.shape:
        return x
    return x if bool(real.all()) else x.detach()[real]
