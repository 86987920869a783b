"""SmoothQuant moves activation outliers into the weights; the function stays the same (arXiv 2211.10438).

A few channels of a transformer's activations are 50 times as large as the others. With one scale for all channels, the
others are left with a few codes. So channel j is divided by s_j, and column j of the next weights is multiplied by it:

    y = (x / s) · (w · s)ᵀ        s_j = max|x_j|^alpha / max|w_j|^(1 - alpha)

The product is the same, but the range is now shared between the activations and the weights, which have a scale per
output channel. The division costs nothing at run time: it is folded into the weight and bias of the module that
computes x (a LayerNorm, RMSNorm or layer). That is done only where `dataflow` has proven that nothing else reads x.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from torchq.calibration.dataflow import NORMS, owns_weight
from torchq.modules.base import Matrix
from torchq.modules.registry import type_of
from torchq.planning.plan import Smoothing

ALPHAS = (0.35, 0.5, 0.65, 0.8, 0.95)
"""The migration strengths tried: the larger, the more of the range moves into the weights."""

MIN_GAIN_DB = 0.5
"""Up to this gain in mean output SQNR, not smoothing is preferred; smooth_search says when."""

_PART_WEIGHTS = 2**18  # 1 MiB of float32

_LIMIT = 2.0**12  # the largest scale: beyond it, either the activations or the weights of the channel are only noise


def smoothing_scales(x_peak: Tensor, weights: Sequence[Tensor], alpha: float) -> Tensor:
    """`s_j = max|x_j|^alpha / max|w_j|^(1 - alpha)`, divided by their geometric mean.

    Dividing by the mean changes no int8 code, since all ranges change by the same factor. It keeps the folded weights
    near their old size. In a 16-bit model the scales are rounded to powers of two, so that folding is exact.

    Args:
        x_peak: max|x_j| over the calibration data, float32 (K,).
        weights: the weights of all readers, (N, K) each.
        alpha: in [0, 1].

    Returns:
        float32 (K,). Channels that are zero in x or in all weights get the scale 1.

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


def scaled(matrix: Matrix, *, into: Tensor | None = None, out: Tensor | None = None) -> Matrix:
    """A new matrix, of the same dtype, that maps x / `into` (K,) to y / `out` (N,).

    >>> weight, s = torch.ones(2, 4), torch.tensor([1.0, 2.0, 4.0, 0.5])
    >>> x = torch.ones(1, 4)
    >>> (x / s) @ scaled(Matrix(weight, None), into=s).weight.T
    tensor([[4., 4.]])
    """
    weight, bias = matrix.weight.detach(), None if matrix.bias is None else matrix.bias.detach()
    values = _scaled({"weight": weight} if bias is None else {"weight": weight, "bias": bias}, into, out)
    return Matrix(values["weight"], values.get("bias"))


def scaled_parts(
    matrix: Matrix, *, per_channel: bool = True, into: Tensor | None = None, out: Tensor | None = None
) -> Iterator[tuple[slice, Matrix]]:
    """`scaled`, for some output channels at a time: a scaled copy of a whole large layer would double its memory.

    Without `per_channel` all channels come at once, because the caller then needs one scale for all weights.

    >>> matrix = Matrix(torch.zeros(5, 2**17), None)
    >>> [(channels, len(part.weight)) for channels, part in scaled_parts(matrix)]
    [(slice(0, 2, None), 2), (slice(2, 4, None), 2), (slice(4, 5, None), 1)]
    """
    count, depth = matrix.weight.shape
    part_channels = max(1, _PART_WEIGHTS // max(1, depth)) if per_channel else max(1, count)
    for start in range(0, max(1, count), part_channels):
        channels = slice(start, min(start + part_channels, count))
        part = Matrix(matrix.weight[channels], None if matrix.bias is None else matrix.bias[channels])
        yield channels, scaled(part, into=into, out=None if out is None else out[channels])


def scaled_parameters(model: nn.Module, smoothings: Mapping[str, Smoothing], name: str) -> dict[str, nn.Parameter]:
    """New parameters for the norm or layer `name`, with the smoothings of its input and of its output folded in."""
    module = model.get_submodule(name)
    kind = type_of(module)
    held = module._parameters if kind is None else kind.matrices(module)[""]._asdict()
    values = {key: value.detach() for key in ("weight", "bias") if (value := held.get(key)) is not None}
    values = _scaled(values, *scales_around(smoothings, name))
    if kind is not None:
        values = kind.parameters(module, "", values)
    trained = {key for key, value in module._parameters.items() if value is not None and value.requires_grad}
    return {key: nn.Parameter(value, requires_grad=key in trained) for key, value in values.items()}


def scales_around(smoothings: Mapping[str, Smoothing], name: str) -> tuple[Tensor | None, Tensor | None]:
    """The scales that divide this module's input (K,), and those that divide its output (N,); None where none do."""
    into = next((_tensor(s.scales) for s in smoothings.values() if name in s.layers), None)
    return into, _tensor(smoothings[name].scales) if name in smoothings else None


def channels_of(module: nn.Module | None) -> int | None:
    """How many output channels a module has, if its weight and bias can rescale them; None if they can't."""
    kind = None if module is None else type_of(module)
    if module is not None and kind is not None:
        matrices = kind.matrices(module)
        whole = list(matrices) == [""] and owns_weight(module, matrices[""].weight)
        return len(matrices[""].weight) if whole else None
    weight = module._parameters.get("weight") if module is not None and type(module) in NORMS else None
    return None if weight is None else len(weight)


def _scaled(values: Mapping[str, Tensor], into: Tensor | None, out: Tensor | None) -> dict[str, Tensor]:
    dtype = values["weight"].dtype
    new = {key: value.float() for key, value in values.items()}
    if into is not None:
        new["weight"] = new["weight"] * into
    if out is not None:
        new = {key: value / _column(out, value) for key, value in new.items()}
    return {key: value.to(dtype) for key, value in new.items()}


def _tensor(scales: Sequence[float]) -> Tensor:
    return torch.tensor(scales, dtype=torch.float32, device="cpu")


def _column(scales: Tensor, value: Tensor) -> Tensor:
    return scales.unsqueeze(1) if value.dim() == 2 else scales
