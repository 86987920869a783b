"""The arithmetic of torchq in plain torch operations: the oracle that the ops must equal, bit for bit.

It shares no code with the C++ kernels or with torchq.numerics.qparams. Each float operation is its own torch call in
float32, so it rounds once. Integers are summed in float64, where every sum here is exact: |Σ| < 2^31, far below 2^53.
"""

import torch
from torch import Tensor

from helpers.numbers import FLT_MIN

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor | int) -> Tensor:
    """`clamp(rne(x * (1 / scale)) + zero_point, 0, 255)`, NaN gives 0. int64."""
    steps = (x.float() * (torch.ones(()) / scale)).round()
    return (steps.double() + zero_point).clamp(0, 255).nan_to_num(nan=0.0).long()


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (..., K), scale (..., 1) and zero point (..., 1) of each row of x (..., K)."""
    values = torch.cat([x.float(), torch.zeros(*x.shape[:-1], 1)], dim=-1)  # 0 is always in the range
    lo, hi = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    full = torch.tensor(255.0)
    scale = hi / full - lo / full
    scale = torch.where(scale < FLT_MIN, 1.0, scale)
    zero_point = (-lo * (torch.ones(()) / scale)).round().clamp(0, 255)
    finite = values.isfinite().all(-1, keepdim=True)
    scale, zero_point = torch.where(finite, scale, torch.nan), torch.where(finite, zero_point, 0.0).int()
    return quantize(x, scale, zero_point).to(torch.uint8), scale, zero_point


def product(a: Tensor, weight: Tensor) -> Tensor:
    """Exact `a · wᵀ` of integers, int64."""
    return (a.double() @ weight.double().T).long()


def epilogue(acc: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    """`act(float(acc) * (x_scale * w_scale) + bias)`, float32. Without a bias, a bias of 0 is added."""
    y = acc.float() * (x_scale * w_scale) + (torch.zeros(()) if bias is None else bias)
    return torch.where(y < 0, 0.0, y) if relu else y


def gemm(a: Tensor, weight: Tensor) -> Tensor:
    return product(a, weight).int()


def linear_dynamic(x: Tensor, weight: Tensor, w_scale: Tensor, bias: Tensor | None, relu: bool = False) -> Tensor:
    codes, scale, zero_point = quantize_per_token(x)
    return epilogue(product(codes.long() - zero_point, weight), scale, w_scale, bias, relu).to(x.dtype)


def linear_fine(
    x: Tensor, weight: Tensor, w_scale: Tensor, bias: Tensor | None, channel_scale: Tensor | None = None
) -> Tensor:
    """The product of x, and that of what its codes leave less a bias. Without a channel_scale it is 1."""
    c = torch.ones(x.shape[-1]) if channel_scale is None else channel_scale
    codes, scale, zero_point = quantize_per_token(x * c)
    rest = x - (codes.int() - zero_point).float() * scale / c
    b = torch.zeros(()) if bias is None else bias
    return linear_dynamic(x * c, weight, w_scale, bias) + (linear_dynamic(rest * c, weight, w_scale, bias) - b)


def linear_static(
    x: Tensor,
    weight: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    x_qparams: tuple[float, int],
    out_dtype: torch.dtype,
    y_qparams: tuple[float, int] = (1.0, 0),
    relu: bool = False,
) -> Tensor:
    x_scale, y_scale = torch.tensor(x_qparams[0]), torch.tensor(y_qparams[0])
    codes = x if x.dtype == torch.uint8 else quantize(x, x_scale, x_qparams[1])
    y = epilogue(product(codes.long() - x_qparams[1], weight), x_scale, w_scale, bias, relu)
    return (quantize(y, y_scale, y_qparams[1]) if out_dtype == torch.uint8 else y).to(out_dtype)
