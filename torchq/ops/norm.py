"""LayerNorm and RMSNorm in float32: the ops `layer_norm` and `rms_norm`, with their fakes."""

import torch
from torch import Tensor

from torchq.ops.elsewhere import check_devices

__all__ = ["layer_norm", "rms_norm"]

_layer_norm = torch.ops.torchq.layer_norm.default
_rms_norm = torch.ops.torchq.rms_norm.default


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """`y = (x - mean) · (1 / sqrt(variance + eps)) · weight + bias` of each row, in float32; as torch's, to rounding.

    The variance is the mean square of the differences from the mean. All kernels give the same bits.

    Args:
        x: float32 (..., N).
        weight: float32 (N,).
        bias: float32 (N,), or None.
        eps: rounded to float32.

    Returns:
        (..., N), contiguous. It has no gradient.

    Raises:
        RuntimeError: another dtype, shape or device.

    >>> layer_norm(torch.tensor([[1.0, 3.0]]), torch.ones(2), torch.ones(2), eps=0.0)
    tensor([[0., 2.]])
    """
    return _layer_norm(x, weight, bias, eps)  # type: ignore[no-any-return]


@torch.library.register_fake("torchq::layer_norm")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    for name, other in (("weight", weight), ("bias", bias)):
        if other is not None:
            check_devices("layer_norm", name, other, "x", x)
    return x.new_empty(x.shape)


def rms_norm(x: Tensor, weight: Tensor, gain: float = 0.0, eps: float = 1e-6) -> Tensor:
    """`y = x · (1 / sqrt(mean(x²) + eps)) · (gain + weight)` of each row, in float32; as torch's, to rounding.

    All kernels give the same bits.

    Args:
        x: float32 (..., N).
        weight: float32 (N,).
        gain: added to each weight, rounded to float32: 1 in Gemma's norms.
        eps: rounded to float32.

    Returns:
        (..., N), contiguous. It has no gradient.

    Raises:
        RuntimeError: another dtype, shape or device.

    >>> rms_norm(torch.tensor([[1.0, 7.0]]), torch.ones(2), eps=0.0)
    tensor([[0.2000, 1.4000]])
    """
    return _rms_norm(x, weight, gain, eps)  # type: ignore[no-any-return]


@torch.library.register_fake("torchq::rms_norm")
def _(x: Tensor, weight: Tensor, gain: float, eps: float) -> Tensor:
    check_devices("rms_norm", "weight", weight, "x", x)
    return x.new_empty(x.shape)
