"""SmoothQuant: activation outliers move into the weights, without a change of the function (arXiv 2211.10438).

A few channels of a transformer's activations are 50 times as large as the others, and one scale for all of them leaves
the others a few codes. Dividing channel j by s_j and multiplying column j of the next weights by it changes nothing,

    y = (x / s) · (w · s)ᵀ        s_j = max|x_j|^alpha / max|w_j|^(1 - alpha)

but shares the difficulty between activations and weights, which have a scale per output channel. The division costs
nothing at run time: it is folded into the weight and bias of the module that makes x, a LayerNorm, RMSNorm or layer,
and only where `dataflow` has proven that nobody else reads it.
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


def scaled(matrix: Matrix, *, into: Tensor | None = None, out: Tensor | None = None) -> Matrix:
    """The matrix that takes x / `into` (K,) and gives y / `out` (N,): a new one, of the same dtype.

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
    """`scaled`, a part of the output channels at a time: a scaled copy of a whole large layer would double its memory.

    All channels at once without `per_channel`, for a caller that needs one scale of all weights.

    >>> matrix = Matrix(torch.zeros(5, 2**17), None)
    >>> [(channels, len(part.weight)) for channels, part in scaled_parts(matrix)]
    [(slice(0, 2, None), 2), (slice(2, 4, None), 2), (slice(4, 5, None), 1)]
    """
    count, depth = matrix.weight.shape
    step = max(1, _PART_WEIGHTS // max(1, depth)) if per_channel else max(1, count)
    for start in range(0, max(1, count), step):
        channels = slice(start, min(start + step, count))
        part = Matrix(matrix.weight[channels], None if matrix.bias is None else matrix.bias[channels])
        yield channels, scaled(part, into=into, out=None if out is None else out[channels])


def scaled_parameters(model: nn.Module, smoothings: Mapping[str, Smoothing], name: str) -> dict[str, nn.Parameter]:
    """New parameters of this module of `model`, a norm or a layer, with all smoothings that touch it folded in."""
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
    """The scales this module's input is divided by, and those its output is; None for neither."""
    into = next((torch.tensor(s.scales) for s in smoothings.values() if name in s.layers), None)
    return into, torch.tensor(smoothings[name].scales) if name in smoothings else None


def channels_of(module: nn.Module | None) -> int | None:
    """The output channels of a module whose weight and bias can rescale its output; None where they can't."""
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


def _column(scales: Tensor, value: Tensor) -> Tensor:
    return scales.unsqueeze(1) if value.dim() == 2 else scales
