"""Scale and zero point: the only module that turns floats into 8-bit codes and back.

A tensor x is stored as codes q of 8 bits, a scale and a zero point:

    x  ~  (q - zero_point) * scale          q in [qmin, qmax]: int8 [-128, 127], uint8 [0, 255]

The range always contains 0.0, so zero is represented exactly (padding, ReLU and masks stay exact):

    lo = min(x.min(), 0)    hi = max(x.max(), 0)    an empty tensor: lo = hi = 0

    asymmetric  scale = hi / 255 - lo / 255     zero_point = qmin + clamp(round(-lo * (1 / scale)), 0, 255)
    symmetric   scale = max(hi, -lo) / 127      zero_point = 0 (int8) or 128 (uint8)

The textbook zero point `round(-lo / scale)` is for codes in [0, 255]. Signed codes start at -128, so theirs
is lower by 128; forgetting that shift is the classic int8 bug.

The C++ kernels repeat this arithmetic bit for bit, so its details matter: every operation is float32 and
rounded once (no fma, no double), rounding is half to even, and dividing by the scale means multiplying by
`1 / scale`, as in torch.quantize_per_tensor. The corner cases:

* `hi / 255 - lo / 255` divides twice so that [-3e38, 3e38] does not overflow. Dequantizing still can: a value
  within half a step of the largest float32, 3.4e38, may dequantize to Inf.
* A scale below FLT_MIN (all-zero, denormal or empty data) becomes 1. Every value then gets the code of the zero
  point, and `1 / scale` stays finite.
* A range with NaN or Inf has scale NaN. So a row of activations with a NaN dequantizes to NaN, and the fault
  stays visible. `choose_qparams` refuses such data instead.

All of it traces under `torch.compile(fullgraph=True)`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from torchq.errors import BadTypeError, BadValueError, door

_CODES = {torch.int8: (-128, 127), torch.uint8: (0, 255)}

FLT_MIN, FLT_MAX = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
"""The smallest and the largest scale: positive normal float32 numbers."""


class QParams(NamedTuple):
    """The affine map x = (code - zero_point) * scale of u8 codes."""

    scale: float
    zero_point: int


@door("torchq.choose_qparams")
def choose_qparams(
    x: Tensor, *, dtype: torch.dtype = torch.int8, symmetric: bool = True, axis: int | None = None
) -> tuple[Tensor, Tensor]:
    """The scale and zero point that cover every value of x: `qparams_from_range(min(x), max(x))`.

    `dequantize(quantize(x, ...), ...)` is then within scale / 2 of x, everywhere. Carries no gradient.

    Args:
        x: any float dtype and shape; taken as float32. Empty is allowed.
        dtype: of the codes, torch.int8 or torch.uint8.
        symmetric: True puts 0.0 in the middle of the codes (weights); False uses all codes (activations).
        axis: None for one scale and zero point, or i for one pair per index along dimension i (negative counts
            from the end).

    Returns:
        scale float32 and zero_point int32, both of shape () or [x.shape[axis]].

    Raises:
        TypeError: x is not floating point, or dtype is not int8 or uint8.
        ValueError: axis is out of range, or x has NaN or Inf. torch.compile can't check values, so there NaN
            and Inf give the scale NaN.

    >>> choose_qparams(torch.tensor([[-1.0, 0.5], [254.0, 2.0]]), axis=0)
    (tensor([0.0079, 2.0000]), tensor([0, 0], dtype=torch.int32))
    >>> choose_qparams(torch.tensor([-1.0, 1.55]), dtype=torch.uint8, symmetric=False)
    (tensor(0.0100), tensor(100, dtype=torch.int32))
    """
    check_float(x)
    lo, hi = _extremes(x.detach(), axis)
    if not torch.compiler.is_compiling() and not (lo.isfinite() & hi.isfinite()).all():
        bad = x.numel() - int(x.float().isfinite().sum())
        raise BadValueError(
            f"expected finite float32 values, got {bad} NaN or Inf "
            f"among the {x.numel()} of x. Find the layer that makes them, or clean x with torch.nan_to_num()."
        )
    return _from_range(lo, hi, dtype, symmetric)


@door("torchq.numerics.qparams.qparams_from_range")
def qparams_from_range(lo: Tensor, hi: Tensor, *, dtype: torch.dtype, symmetric: bool) -> tuple[Tensor, Tensor]:
    """The scale and zero point that cover [min(lo, 0), max(hi, 0)], elementwise.

    The module's docstring has the formulas.

    Args:
        lo: a float tensor, taken as float32. NaN or Inf is no error here: the scale is NaN and the zero point
            the lowest code or, if symmetric, the usual one.
        hi: likewise, of the same shape.
        dtype: of the codes, torch.int8 or torch.uint8.
        symmetric: see `choose_qparams`.

    Returns:
        scale float32 and zero_point int32, of that shape.

    Raises:
        TypeError: lo or hi is not floating point, or dtype is not int8 or uint8.

    >>> lo, hi = torch.tensor([0.0, -1.0]), torch.tensor([255.0, 0.0])
    >>> qparams_from_range(lo, hi, dtype=torch.int8, symmetric=False)
    (tensor([1.0000, 0.0039]), tensor([-128,  127], dtype=torch.int32))
    """
    check_float(lo, "lo")
    check_float(hi, "hi")
    return _from_range(lo, hi, dtype, symmetric)


@door("torchq.quantize")
def quantize(
    x: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int = 0,
    *,
    axis: int | None = None,
    dtype: torch.dtype = torch.int8,
) -> Tensor:
    """Rounds floats to 8-bit codes: `q = clamp(round(x * (1 / scale)) + zero_point, qmin, qmax)`.

    Rounds half to even, before it adds the zero point, and gives the codes of `torch.quantize_per_tensor`.
    (`torch.quantize_per_channel` adds first, so its ties can come out one code apart unless zero_point is 0.)
    Values outside the range, and Inf, saturate. NaN becomes the lowest code.

    Args:
        x: any float dtype and shape; taken as float32.
        scale: a number, or a float tensor of shape () or, with axis, [x.shape[axis]]. A Python number is
            checked. A tensor is not, because that would break tracing: keep it positive and not denormal.
        zero_point: the code of 0.0: an int (checked) or an integer tensor (not checked), shaped like scale.
        axis: the dimension a vector of scales runs along; negative counts from the end.
        dtype: of the codes, torch.int8 or torch.uint8.

    Returns:
        `dtype`, the shape of x.

    Raises:
        TypeError: x is not floating point, dtype is not int8 or uint8, or zero_point is a float tensor.
        ValueError: a shape, the axis, a Python scale or a Python zero point does not fit.

    >>> quantize(torch.tensor([-1.0, 0.0, 0.75, 99.0]), scale=0.5)
    tensor([ -2,   0,   2, 127], dtype=torch.int8)
    """
    check_float(x)
    qmin, qmax = _code_range(dtype)
    scale, zero_point = _broadcastable(x, scale, zero_point, axis, dtype)
    lowest, highest = (qmin - zero_point).float(), (qmax - zero_point).float()
    code = x.float() * scale.reciprocal()
    # Clamping comes before rounding, so that no value is too large for the integer type. The result is the same,
    # because both bounds are integers. `>` is False for NaN, which therefore gets the lowest code.
    code = torch.where(code > lowest, code, lowest).minimum(highest)
    return (code.round() + zero_point).to(dtype)


@door("torchq.dequantize")
def dequantize(q: Tensor, scale: Tensor | float, zero_point: Tensor | int = 0, *, axis: int | None = None) -> Tensor:
    """Turns 8-bit codes into floats: `x = (q - zero_point) * scale`. Only the multiplication rounds.

    Args:
        q: int8 or uint8, any shape.
        scale: as for `quantize`.
        zero_point: the code of 0.0, as for `quantize`.
        axis: the dimension a vector of scales runs along, as for `quantize`.

    Returns:
        float32, the shape of q.

    Raises:
        TypeError: q is not int8 or uint8, or zero_point is a float tensor.
        ValueError: as `quantize`.

    >>> dequantize(torch.tensor([-2, 0, 127], dtype=torch.int8), scale=0.5, zero_point=2)
    tensor([-2.0000, -1.0000, 62.5000])
    """
    _code_range(q.dtype, "q", "Make codes with torchq.quantize().")
    scale, zero_point = _broadcastable(q, scale, zero_point, axis, q.dtype)
    return (q.int() - zero_point).float() * scale


@door("torchq.fake_quantize")
def fake_quantize(
    x: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int = 0,
    *,
    axis: int | None = None,
    dtype: torch.dtype = torch.int8,
) -> Tensor:
    """The values of x after quantization, in float: `dequantize(quantize(x))`, cast to x's dtype.

    The arguments and errors are those of `quantize`. No gradient reaches x, because the codes are integers.

    >>> fake_quantize(torch.tensor([0.1, 0.3, 99.0], dtype=torch.bfloat16), scale=0.25)
    tensor([ 0.0000,  0.2500, 31.7500], dtype=torch.bfloat16)
    """
    q = quantize(x, scale, zero_point, axis=axis, dtype=dtype)
    return dequantize(q, scale, zero_point, axis=axis).to(x.dtype)


def row_qparams(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each row, as the kernels choose them: a row with NaN or infinity gets scale NaN."""
    if rows.shape[1] == 0:
        return rows.new_ones(rows.shape[0]), rows.new_zeros(rows.shape[0], dtype=torch.int32)
    lo, hi = rows.amin(dim=1).clamp(max=0), rows.amax(dim=1).clamp(min=0)
    return qparams_from_range(lo, hi, dtype=torch.uint8, symmetric=False)


def float32_qparams(pair: QParams | None) -> QParams | None:
    """The pair with its scale rounded to float32, as state_dict and the kernels hold it."""
    return pair and QParams(float(torch.tensor(pair.scale, dtype=torch.float32, device="cpu")), int(pair.zero_point))


def _extremes(x: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
    """min(x) and max(x), over everything or per index along axis: float32, () or [x.shape[axis]]."""
    if axis is not None:
        x = x.movedim(_normal_axis(x, axis), 0)
        channels = x.shape[0]
        x = x.reshape(channels, x.numel() // max(channels, 1))
    if x.numel() == 0:
        zeros = torch.zeros(x.shape[:1] if axis is not None else (), device=x.device, dtype=torch.float32)
        return zeros, zeros
    lo, hi = torch.aminmax(x) if axis is None else (x.amin(1), x.amax(1))
    return lo.float(), hi.float()


def _from_range(lo: Tensor, hi: Tensor, dtype: torch.dtype, symmetric: bool) -> tuple[Tensor, Tensor]:
    qmin, _ = _code_range(dtype)
    lo, hi = lo.float().clamp(max=0), hi.float().clamp(min=0)  # clamp keeps NaN
    scale = torch.maximum(hi, -lo) / 127 if symmetric else hi / 255 - lo / 255
    scale = torch.where(scale < FLT_MIN, 1.0, scale)
    scale = torch.where(scale.isfinite(), scale, math.nan)
    if symmetric:
        return scale, torch.full_like(scale, qmin + 128, dtype=torch.int32)
    steps = (-lo * scale.reciprocal()).round().clamp(0, 255).nan_to_num(nan=0.0)
    return scale, steps.to(torch.int32) + qmin


def _broadcastable(
    x: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int,
    axis: int | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Checks scale and zero point, and shapes them to broadcast against x: float32 and int32."""
    if not isinstance(scale, Tensor) and not FLT_MIN <= scale <= FLT_MAX:
        raise BadValueError(
            f"scale must be positive, finite and at least {FLT_MIN:.3g}, got {scale}. "
            "Choose one with torchq.choose_qparams()."
        )
    qmin, qmax = _CODES[dtype]
    if isinstance(zero_point, Tensor):
        if zero_point.is_floating_point():
            raise BadTypeError(
                f"zero_point must be an int or an integer tensor, got {zero_point.dtype}. "
                "Round it and cast it to torch.int32."
            )
    elif not qmin <= zero_point <= qmax:
        raise BadValueError(
            f"zero_point must be in [{qmin}, {qmax}] for {dtype}, got {zero_point}. "
            "An int8 zero point is the uint8 one minus 128."
        )
    if axis is not None:
        axis = _normal_axis(x, axis)
    scale = torch.as_tensor(scale, dtype=torch.float32, device=x.device)
    zero_point = torch.as_tensor(zero_point, dtype=torch.int32, device=x.device)
    return _along("scale", scale, x, axis), _along("zero_point", zero_point, x, axis)


def _along(name: str, value: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """Shapes a vector [C] to [C, 1, ..., 1], so that it runs along x's axis; leaves shape () alone."""
    if value.dim() == 0:
        return value
    if axis is None:
        raise BadValueError(
            f"without axis, {name} must be one number or have shape (), got shape "
            f"{list(value.shape)}. Pass axis= to say which dimension of x {list(x.shape)} it runs along."
        )
    if value.shape != (x.shape[axis],):
        raise BadValueError(
            f"with axis={axis}, {name} must have shape [{x.shape[axis]}] to match x "
            f"{list(x.shape)}, got {list(value.shape)}. Pass one value per index along that axis."
        )
    return value.reshape(-1, *[1] * (x.dim() - axis - 1))


def _normal_axis(x: Tensor, axis: int) -> int:
    if not -x.dim() <= axis < x.dim():
        raise BadValueError(
            f"axis must be one of the {x.dim()} dimensions of x {list(x.shape)}, got "
            f"{axis}. Pass axis=None for one scale for the whole tensor."
        )
    return axis % x.dim()


def check_float(x: Tensor, name: str = "x") -> None:
    """Raises BadTypeError for integers."""
    if not x.is_floating_point():
        raise BadTypeError(f"{name} must be floating point, got {x.dtype}. Pass {name}.float().")


def _code_range(dtype: torch.dtype, name: str = "dtype", advice: str = "Pass one of these two.") -> tuple[int, int]:
    if dtype not in _CODES:
        raise BadTypeError(f"{name} must be torch.int8 or torch.uint8, got {dtype}. {advice}")
    return _CODES[dtype]
