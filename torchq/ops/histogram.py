"""Histograms: the ops `count_bins` and `squared_error`, with their fakes."""

import torch
from torch import Tensor

from torchq.ops.elsewhere import check_devices

__all__ = ["count_bins", "squared_error"]

_count_bins = torch.ops.torchq.count_bins.default
_squared_error = torch.ops.torchq.squared_error.default


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
    check_devices("count_bins", "per_value", per_value, "x", x)
    return x.new_empty((x.shape[1], bins), dtype=torch.int64), x.new_empty((x.shape[1],), dtype=torch.int64)


def squared_error(counts: Tensor, edges: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """The squared error of u8 codes for [lo, hi], summed over a histogram whose bins are evenly filled.

    With s and z the scale and zero point of `torchq.numerics.qparams` (in float64), x has the code z + k, where
    k = clamp(round(x / s), -z, 255 - z), and the error r = x - k s, whether rounded or saturated. So

        integral from 0 to x of r^2  =  k s^3 / 12 + r^3 / 3

    and the mean over a bin is the difference of this integral at its edges, divided by its width. If both edges have
    the same k, and errors a and b, the mean is (a^2 + a b + b^2) / 3, which holds for a bin of zero width too.

    Args:
        counts: float64 [C, bins].
        edges: float64 [C, bins + 1].
        lo: float64 [C, J] or [C, 1], at most 0.
        hi: likewise, at least 0.

    Returns:
        float64 [C, J]. Bins are added in their order.

    Raises:
        RuntimeError: another dtype, shape or device.

    >>> counts, edges = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[0.0, 1.0, 255.0]]).double()
    >>> squared_error(counts, edges, torch.zeros(1, 1).double(), torch.tensor([[255.0]]).double())
    tensor([[0.0833]], dtype=torch.float64)
    """
    return _squared_error(counts, edges, lo, hi)  # type: ignore[no-any-return]


@torch.library.register_fake("torchq::squared_error")
def _(counts: Tensor, edges: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    for name, other in (("edges", edges), ("lo", lo), ("hi", hi)):
        check_devices("squared_error", name, other, "counts", counts)
    return counts.new_empty((counts.shape[0], max(lo.shape[1], hi.shape[1])))
