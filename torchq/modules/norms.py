"""Batch norms behind a layer: in eval mode a factor and an offset for each channel, which the layer's weight can have.

norm(x · wᵀ + b) = x · (w · g)ᵀ + (b - mean) · g + offset        g = gain / sqrt(variance + eps)
"""

from typing import Any

import torch
from torch import Tensor, nn

from torchq.modules.base import Matrix

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class IncludedNorm(nn.Identity):
    """What stands in the place of a norm that the layer before it includes."""


def is_foldable(module: nn.Module | None) -> bool:
    """Whether the module is a batch norm of torch whose statistics are fixed in eval mode, and that nobody watches.

    >>> is_foldable(nn.BatchNorm2d(4)), is_foldable(nn.BatchNorm2d(4, track_running_stats=False))
    (True, False)
    """
    if module is None or type(module) not in _NORMS or "forward" in vars(module):
        return False
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    tensors = {**module._parameters, **module._buffers}
    means = (tensors.get("running_mean"), tensors.get("running_var"))
    return not any(hooks) and not module._modules and all(tensor is not None for tensor in means)


def folded(matrix: Matrix, norm: nn.Module) -> Matrix:
    """The matrix of a layer together with the norm behind it, float32.

    >>> norm = nn.BatchNorm1d(2).eval()
    >>> _ = norm.running_mean.fill_(1.0)
    >>> [each.tolist() for each in folded(Matrix(torch.eye(2), None), norm)]
    [[[0.9999949932098389, 0.0], [0.0, 0.9999949932098389]], [-0.9999949932098389, -0.9999949932098389]]
    """
    gain, offset = factors(norm)
    bias = torch.zeros(len(gain), dtype=torch.float64, device="cpu") if matrix.bias is None else matrix.bias.detach()
    weight = (matrix.weight.detach() * gain.unsqueeze(1)).float()
    return Matrix(weight, (bias.double() * gain + offset).float())


def factors(norm: Any) -> tuple[Tensor, Tensor]:
    """What a norm in eval mode multiplies each channel by, and what it adds, float64."""
    gain = (norm.running_var.detach().double() + norm.eps).rsqrt()
    gain = gain if norm.weight is None else gain * norm.weight.detach().double()
    offset = -norm.running_mean.detach().double() * gain
    return gain, offset if norm.bias is None else offset + norm.bias.detach().double()
