"""Weights in int8, symmetric: one scale for each output channel, or one for all. The op `quantize_weight` and its fake.

The arithmetic is that of `torchq.numerics.qparams`, bit for bit, in one op (csrc/weight_op.cpp). Training must trace
under `torch.compile`, so it uses `weight_scale` and the functions there.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from torchq.numerics.qparams import check_float, choose_qparams
from torchq.ops.elsewhere import check_devices

_quantize_weight = torch.ops.torchq.quantize_weight.default
_BLOCK_VALUES = 1 << 18  # 1 MiB of float32


def quantize_weight(weight: Tensor, *, per_channel: bool, channel_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The int8 codes and scales of a weight, symmetric: `codes = rne(w / scale)`, `scale = max|w| / 127`.

    Args:
        weight: float (N, K).
        per_channel: True for one scale per row (output channel), False for one for all.
        channel_scale: float32 (K,) or (N, 1), positive: w is the weight divided by it. None for the weight itself.

    Returns:
        int8 (N, K) and float32 (N,).

    Raises:
        TypeError: the weight is not floating point.
        ValueError: the weight, or its quotient, has NaN or infinity.

    >>> quantize_weight(torch.tensor([[127.0, 0.4], [1.27, 0.01]]), per_channel=True)
    (tensor([[127,   0],
            [127,   1]], dtype=torch.int8), tensor([1.0000, 0.0100]))
    """
    check_float(weight, "weight")
    weight = weight.detach()
    if channel_scale is not None and channel_scale.dim() == 2:
        codes, scale = quantize_rows(weight.float() / channel_scale, None, per_channel=per_channel)
    elif weight.dtype == torch.float32 or not per_channel:
        codes, scale = quantize_rows(weight.float(), channel_scale, per_channel=per_channel)
    else:  # a float32 copy of a whole large layer is large
        parts = [quantize_rows(weight[rows].float(), channel_scale, per_channel=True) for rows in weight_rows(weight)]
        codes, scale = (torch.cat(each) for each in zip(*parts, strict=True))
    if not scale.isfinite().all():
        for _, values in weight_blocks(weight, channel_scale):
            choose_qparams(values, axis=0)  # says how many of them are not finite
    return codes, scale


def weight_scale(weight: Tensor, *, per_channel: bool) -> Tensor:
    """The scales of `quantize_weight`, float32 (N,). Traces under `torch.compile`."""
    scale, _ = choose_qparams(weight, axis=0 if per_channel else None)
    return scale.expand(weight.shape[0])


def weight_blocks(weight: Tensor, channel_scale: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
    """The weight (N, K), or its quotient by `channel_scale` (K,) or (N, 1), some rows at a time.

    The quotient of a whole large layer would be a second copy of it.

    >>> [(rows, values.shape) for rows, values in weight_blocks(torch.zeros(3, 2**17), torch.ones(2**17))]
    [(slice(0, 2, None), torch.Size([2, 131072])), (slice(2, 3, None), torch.Size([1, 131072]))]
    """
    for rows in weight_rows(weight):
        if channel_scale is None:
            yield rows, weight[rows]
        else:
            yield rows, weight[rows].float() / (channel_scale if channel_scale.dim() == 1 else channel_scale[rows])


def weight_rows(weight: Tensor) -> list[slice]:
    """The rows of a weight (N, K) in pieces of about 1 MiB in float32.

    >>> weight_rows(torch.zeros(5, 2**17))
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    rows, depth = weight.shape
    count = max(1, _BLOCK_VALUES // max(1, depth))
    return [slice(start, min(start + count, rows)) for start in range(0, max(1, rows), count)]


def quantize_rows(weight: Tensor, channel_scale: Tensor | None, *, per_channel: bool) -> tuple[Tensor, Tensor]:
    """The int8 codes and scales of a weight, as `quantize_weight` gives them, in one pass.

    Every operation is rounded once, as torch's are: these are the bits of `choose_qparams` and `quantize`.

    Args:
        weight: float32 (rows, columns).
        channel_scale: float32 (columns,), positive: the weight is divided by it first. None for the weight itself.
        per_channel: True for one scale per row, False for one for all.

    Returns:
        int8 (rows, columns) and float32 (rows,). Where there is NaN or infinity the scale is NaN, and the codes are of
        no use.

    Raises:
        RuntimeError: another dtype, shape or device.

    >>> quantize_rows(torch.tensor([[127.0, 0.4], [1.27, 0.01]]), None, per_channel=True)
    (tensor([[127,   0],
            [127,   1]], dtype=torch.int8), tensor([1.0000, 0.0100]))
    """
    return _quantize_weight(weight, channel_scale, per_channel)  # type: ignore[no-any-return]


@torch.library.register_fake("torchq::quantize_weight")
def _(weight: Tensor, channel_scale: Tensor | None, per_channel: bool) -> tuple[Tensor, Tensor]:
    if channel_scale is not None:
        check_devices("quantize_weight", "channel_scale", channel_scale, "weight", weight)
    return weight.new_empty(weight.shape, dtype=torch.int8), weight.new_empty(weight.shape[:1])
