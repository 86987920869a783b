"""SmoothQuant: activation outliers move into the weights, without a change of the function (arXiv 2211.10438).

A few channels of a transformer's activations are 50 times as large as the others, and one scale for all of them leaves
the others a few codes. Dividing channel j by s_j and multiplying column j of the next weights by it changes nothing,

    y = (x / s) · (w · s)ᵀ        s_j = max|x_j|^alpha / max|w_j|^(1 - alpha)

but shares the difficulty between activations and weights, which have a scale per output channel. The division costs
nothing at run time: it is folded into the weight and bias of the module that makes x, a LayerNorm, RMSNorm or Linear,
and only where `dataflow` has proven that nobody else reads it.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from torchq.calibration.dataflow import NORMS
from torchq.planning.plan import Smoothing

ALPHAS = (0.35, 0.5, 0.65, 0.8, 0.95)
"""The migration strengths tried: the larger, the more of the range moves into the weights."""


MIN_GAIN_DB = 0.5
"""What smoothing must gain over leaving the model as it is."""


_PART_WEIGHTS = 2**18  # 1 MiB of float32


_LIMIT = 2.0**12  # of a scale: beyond it, the channel is noise on one side or the other


def smoothing_scales(x_peak: Tensor, weights: Sequence[Tensor], alpha: float) -> Tensor:
    """`s_j = max|x_j|^alpha / max|w_j|^(1 - alpha)`, divided by their geometric mean.

    The mean changes no int8 code, as all ranges scale with it, and keeps the folded weights near the old ones. In a
    16-bit model the scales are rounded to powers of two, so that folding rounds nothing.

    Args:
        x_peak: max|x_j| over the calibration data, float32 (K,).
        weights: those of all readers, (N, K) each.
        alpha: in [0, 1].

    Returns:
        float32 (K,); 1 where a channel is zero in x or in all weights.

    >>> smoothing_scales(torch.tensor([16.0, 1.0]), [torch.ones(3, 2)], alpha=0.5)
    tensor([2.0000, 0.5000])
    """
    ends = [end for w in weights for end in (w.detach().amax(dim=0), -w.detach().amin(dim=0))]  # abs() would copy w
    w_peak = torch.stack(ends).amax(dim=0).float()
    used = (x_peak > 0) & (w_peak > 0)
    logs = torch.where(used, alpha * x_peak.double().log2() - (1 - alpha) * w_peak.double().log2(), 0.0)
    logs = torch.where(used, logs - logs.sum() / max(1, int(used.sum())), 0.0)
    logs = logs.clamp(-math.log2(_LIMIT), math.log2(_LIMIT))
    if any(weight.dtype != torch.float32 for weight in weights):
        logs = logs.round()
    return logs.exp2().float()


def scaled_linear(linear: nn.Linear, *, into: Tensor | None = None, out: Tensor | None = None) -> nn.Linear:
    """The layer for inputs divided by `into` (K,), its outputs divided by `out` (N,): a new one, the same dtype.

    >>> linear, s = nn.Linear(4, 2), torch.tensor([1.0, 2.0, 4.0, 0.5])
    >>> x = torch.ones(1, 4)
    >>> torch.allclose(scaled_linear(linear, into=s)(x / s), linear(x))
    True
    """
    scaled = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    for key, value in _scaled(linear, into, out).items():
        setattr(scaled, key, nn.Parameter(value, requires_grad=False))
    return scaled


def scaled_parts(
    linear: nn.Linear, *, per_channel: bool = True, into: Tensor | None = None, out: Tensor | None = None
) -> Iterator[tuple[slice, nn.Linear]]:
    """`scaled_linear`, some output channels at a time: a scaled copy of all of a large layer would double its memory.

    All at once without `per_channel`, for who looks for a scale of all weights.

    >>> linear = nn.Linear(2**17, 5)
    >>> [(channels, part.out_features) for channels, part in scaled_parts(linear)]
    [(slice(0, 2, None), 2), (slice(2, 4, None), 2), (slice(4, 5, None), 1)]
    """
    weight, bias = linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
    count = weight.shape[0]
    step = max(1, _PART_WEIGHTS // max(1, weight.shape[1])) if per_channel else max(1, count)
    for start in range(0, max(1, count), step):
        channels = slice(start, min(start + step, count))
        part = nn.Linear(weight.shape[1], channels.stop - start, bias is not None, device="meta")
        part.weight = nn.Parameter(weight[channels], requires_grad=False)
        if bias is not None:
            part.bias = nn.Parameter(bias[channels], requires_grad=False)
        yield channels, scaled_linear(part, into=into, out=None if out is None else out[channels])


def scaled_parameters(model: nn.Module, smoothings: Mapping[str, Smoothing], name: str) -> dict[str, nn.Parameter]:
    """New parameters of this module of `model`, a norm or a Linear, with all smoothings that touch it folded in."""
    module = model.get_submodule(name)
    trained = {key for key, value in module._parameters.items() if value is not None and value.requires_grad}
    values = _scaled(module, *scales_around(smoothings, name))
    return {key: nn.Parameter(value, requires_grad=key in trained) for key, value in values.items()}


def scales_around(smoothings: Mapping[str, Smoothing], name: str) -> tuple[Tensor | None, Tensor | None]:
    """The scales this module's input is divided by, and those its output is; None for neither."""
    into = next((torch.tensor(s.scales) for s in smoothings.values() if name in s.layers), None)
    return into, torch.tensor(smoothings[name].scales) if name in smoothings else None


def can_scale(module: nn.Module | None) -> bool:
    """Whether a factor can be folded into this module's weight and bias."""
    kind = module is not None and (isinstance(module, nn.Linear) or type(module) in NORMS)
    return kind and cast(nn.Module, module)._parameters.get("weight") is not None


def _scaled(module: nn.Module, into: Tensor | None, out: Tensor | None) -> dict[str, Tensor]:
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    assert weight is not None  # can_scale
    parameters = {"weight": weight.detach().float()}
    if bias is not None:
        parameters["bias"] = bias.detach().float()
    if into is not None:
        parameters["weight"] = parameters["weight"] * into
    if out is not None:
        parameters = {key: value / _column(out, value) for key, value in parameters.items()}
    return {key: value.to(weight.dtype) for key, value in parameters.items()}


def _column(scales: Tensor, value: Tensor) -> Tensor:
    return scales.unsqueeze(1) if value.dim() == 2 else scales
