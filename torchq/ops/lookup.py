"""Rows of an int8 table as floats: the op `embedding`, with its fake, and how a table lies in memory.

A table of its own is a uint8 matrix (V, D + 4): each row has its D codes and behind them its scale, a float32, so that
a look-up reads memory in one place. The table of a tied head is the head's packed weight (`ops.pack`), and a look-up
gathers the row out of it. Beside either may lie residuals: 4 more bits for each code, two in a byte, which products
leave alone.
"""

import torch
from torch import Tensor, nn

from torchq.ops.elsewhere import check_devices

__all__ = ["embedding", "pack_residuals", "pack_table", "residual_width", "unpack_residuals", "unpack_table"]

_SCALE = 4  # bytes
_embedding = torch.ops.torchq.embedding.default


def pack_table(codes: Tensor, scale: Tensor) -> Tensor:
    """int8 codes (V, D) and their scales, float32 (V,), as uint8 (V, D + 4).

    >>> pack_table(torch.tensor([[1, -1]], dtype=torch.int8), torch.ones(1)).tolist()
    [[1, 255, 0, 0, 128, 63]]
    """
    return torch.cat([codes.view(torch.uint8), scale.contiguous().view(torch.uint8).reshape(-1, _SCALE)], dim=1)


def unpack_table(table: Tensor) -> tuple[Tensor, Tensor]:
    """The codes (V, D) and scales (V,) of such a matrix, as new tensors.

    >>> unpack_table(pack_table(torch.tensor([[1, -1]], dtype=torch.int8), torch.tensor([0.5])))
    (tensor([[ 1, -1]], dtype=torch.int8), tensor([0.5000]))
    """
    new = torch.contiguous_format  # contiguous() would give a single row as it is, at any offset
    codes, scale = (part.clone(memory_format=new) for part in (table[:, :-_SCALE], table[:, -_SCALE:]))
    return codes.view(torch.int8), scale.view(torch.float32).reshape(-1)


def residual_width(dim: int) -> int:
    """The bytes of a row's residuals, for a row of this length."""
    return (dim + 1) // 2


def pack_residuals(residuals: Tensor) -> Tensor:
    """Residuals in [-8, 7], int8 (V, D), as uint8 (V, ceil(D / 2)): the first of two in the low bits.

    >>> pack_residuals(torch.tensor([[1, -1, 7]], dtype=torch.int8)).tolist()
    [[241, 7]]
    """
    even = nn.functional.pad(residuals, (0, residuals.shape[1] % 2))
    return (even[:, ::2] & 15 | even[:, 1::2] << 4).view(torch.uint8)


def unpack_residuals(packed: Tensor, dim: int) -> Tensor:
    """The inverse: int8 (V, dim).

    >>> unpack_residuals(torch.tensor([[241, 7]], dtype=torch.uint8), 3)
    tensor([[ 1, -1,  7]], dtype=torch.int8)
    """
    both = packed.view(torch.int8)
    return torch.stack([both << 4 >> 4, both >> 4], dim=2).flatten(1)[:, :dim]


def embedding(packed: Tensor, indices: Tensor, dim: int, dtype: torch.dtype, residual: Tensor | None = None) -> Tensor:
    """`y = (code + residual / 16) * scale` for each value of these rows, in float32 and rounded once to `dtype`.

    Args:
        packed: from `pack_table`; or from `ops.pack`: then the values are also multiplied by its channel_scale, if any.
        indices: int64 or int32, any shape.
        dim: D, the length of a row.
        dtype: float32, bfloat16 or float16.
        residual: from `pack_residuals`; None for the codes alone.

    Returns:
        (*indices.shape, D).

    Raises:
        IndexError: an index is out of range.
        RuntimeError: another dtype, shape or device.

    >>> table = pack_table(torch.tensor([[1, 2], [3, 4]], dtype=torch.int8), torch.tensor([0.5, 1.0]))
    >>> embedding(table, torch.tensor([1, 0]), 2, torch.float32)
    tensor([[3.0000, 4.0000],
            [0.5000, 1.0000]])
    """
    try:
        return _embedding(packed, indices, dim, dtype, residual)  # type: ignore[no-any-return]
    except RuntimeError as error:
        if ": index out of range: " in str(error):
            raise IndexError(str(error)) from None
        raise


@torch.library.register_fake("torchq::embedding")
def _(packed: Tensor, indices: Tensor, dim: int, dtype: torch.dtype, residual: Tensor | None = None) -> Tensor:
    for name, other in (("indices", indices), ("residual", residual)):
        if other is not None:
            check_devices("embedding", name, other, "the table", packed)
    return packed.new_empty((*indices.shape, dim), dtype=dtype)
