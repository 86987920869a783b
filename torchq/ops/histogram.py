"""Counting values in the bins of a histogram: the op `count_bins`, with its fake."""

import torch
from torch import Tensor

__all__ = ["count_bins"]

_count_bins = torch.ops.torchq.count_bins.default


def count_bins(x: Tensor, per_value: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """How many values of each channel lie in each of `bins` equal bins around zero, and how many are zero.

    With `k = trunc(x * per_value)`, values from zero up are in bin `bins / 2 + k`, and those below one before it.
    So a value on an edge belongs to the bin farther from zero. Those beyond the bins are counted in the outermost ones.
    Values up to FLT_MIN are zero, which CPUs that flush denormals make of them, and so is NaN.

    Args:
        x: float32 (values, channels).
        per_value: float32 (channels,), bins for each unit of a value.
        bins: an even number.

    Returns:
        int64 (channels, bins) and (channels,).

    Raises:
        RuntimeError: another dtype, shape or device.

    >>> count_bins(torch.tensor([[-0.9], [0.0], [0.4], [1.0]]), torch.ones(1), 4)
    (tensor([[0, 1, 2, 1]]), tensor([1]))
    """
    return _count_bins(x, per_value, bins)  # type: ignore[no-any-return]


@torch.library.register_fake("torchq::count_bins")
def _(x: Tensor, per_value: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    return x.new_empty((x.shape[1], bins), dtype=torch.int64), x.new_empty((x.shape[1],), dtype=torch.int64)
