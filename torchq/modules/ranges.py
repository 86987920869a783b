"""Fake quantization for training: the same values as at inference, and straight-through gradients.

The forward pass is `qparams.fake_quantize` bit for bit, so a layer trains with the arithmetic it will run with. In the
backward pass, the derivative of rounding, which is 0 almost everywhere, is replaced by 1 (the straight-through
estimator; Bengio, Léonard and Courville, arXiv:1308.3432).

For u8 codes over a range [lo, hi], `s = (hi - lo) / 255` and `z = -lo / s`, the values are

    x̂ = (clamp(round(x / s) + z, 0, 255) - z) · s

LSQ (Esser et al., arXiv:1902.08153) learns the step s, LSQ+ (Bhalgat et al., arXiv:2004.09576) also the offset:

    ∂x̂/∂s = round(x / s) - x / s  inside,    -z below,    255 - z above;         ∂x̂/∂z = 0 inside, -s outside

Here the parameters are instead the two ends of the range, `lo = -z·s` and `hi = (255 - z)·s`, from which inference
computes s and z. The chain rule, with the rounding of z passed straight through, gives

              below      inside                         above
    ∂x̂/∂x     0          1                              0
    ∂x̂/∂lo    1          -(round(x / s) - x / s) / 255   0
    ∂x̂/∂hi    0          (round(x / s) - x / s) / 255    1

x is "inside" if its code needs no clamp, as in torch.fake_quantize_per_tensor_affine. NaN counts as none of the three,
so its gradient is 0. The range always contains 0 (`qparams_from_range`), so an end at 0 gets no gradient that would
push it past 0.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from torchq.numerics.qparams import FLT_MIN, QParams, fake_quantize, qparams_from_range, quantize, row_qparams
from torchq.numerics.residual import residuals_of, with_residuals
from torchq.ops.weights import weight_scale


class _StraightThrough(torch.autograd.Function):
    """Returns `rounded`; the gradient passes unchanged to x."""

    @staticmethod
    def forward(x: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _QuantizeInRange(torch.autograd.Function):
    """Static u8 fake quantization over the range ends = (lo, hi), by the formulas of the module's docstring."""

    @staticmethod
    def forward(x: Tensor, ends: Tensor) -> Tensor:
        return fake_quantize(x, *_codes_of(ends), dtype=torch.uint8)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        x, ends = ctx.saved_tensors
        scale, zero_point = _codes_of(ends)
        steps = x * scale.reciprocal()
        code = steps.round() + zero_point
        inside = (code >= 0) & (code <= 255)  # False for NaN
        to_x = torch.where(inside, gradient, 0.0)
        if not ctx.needs_input_grad[1]:
            return to_x, None
        rounding = (to_x * torch.where(inside, steps.round() - steps, 0.0)).sum() / 255
        below, above = (torch.where(outside, gradient, 0.0).sum() for outside in (code < 0, code > 255))
        to_lo, to_hi = below - rounding, above + rounding
        # The range always contains 0, so pushing an end past 0 would have no effect: it gets no such gradient.
        to_lo = torch.where((ends[0] >= 0) & (to_lo < 0), 0.0, to_lo)
        to_hi = torch.where((ends[1] <= 0) & (to_hi > 0), 0.0, to_hi)
        return to_x, torch.stack([to_lo, to_hi])


def fake_quantize_weight(weight: Tensor, *, per_channel: bool) -> Tensor:
    """The float32 values of a QuantizedLinear's weight: `ŵ = rne(w / s) · s`, `s = max|w| / 127`.

    The gradient passes straight through, ∂ŵ/∂w = 1, since no weight lies outside its own range; s carries none.

    Args:
        weight: float (out_features, in_features).
        per_channel: True for one s per row, False for one for all.

    Raises:
        ValueError: the weight has NaN or infinity.

    >>> w = torch.tensor([[127.0, 0.4], [1.27, 0.4]], requires_grad=True)
    >>> fake_quantize_weight(w, per_channel=True).tolist()
    [[127.0, 0.0], [1.2699999809265137, 0.3999999761581421]]
    """
    return fake_quantize_rows(weight, weight_scale(weight, per_channel=per_channel))


def fake_quantize_rows(rows: Tensor, scale: Tensor) -> Tensor:
    """The float32 values of some rows (N, K) of a weight in int8, by the scale (N,) of each: `rne(w / s) · s`."""
    rounded = fake_quantize(rows.detach().float(), scale, axis=0)
    return _StraightThrough.apply(rows.float(), rounded)  # type: ignore[no-any-return]


def fake_quantize_finely(rows: Tensor, scale: Tensor) -> Tensor:
    """The same with residuals, as look-ups in a table have them: `(rne(w / s) + r / 16) · s`."""
    exact = rows.detach().float()
    codes = quantize(exact, scale, axis=0)
    rounded = with_residuals(codes, residuals_of(exact, codes, scale), scale)
    return _StraightThrough.apply(rows.float(), rounded)  # type: ignore[no-any-return]


class LearnedRange(nn.Module):
    """Static fake quantization whose range is trained with the weights: LSQ+ with the two ends as parameters.

    The parameter `ends` is (lo, hi) divided by `unit`, a power of two for which the larger initial end is in [1, 2). So
    a step of Adam moves a range of 0.01 and a range of 100 by the same relative amount. The gradient of `ends` is
    `unit · (∂L/∂lo, ∂L/∂hi)`.

    LSQ multiplies the gradient of s by 1 / sqrt(K · 255), so that s moves as fast as the weights, relative to its size.
    That factor is left out here: with 8 bits the loss depends little on the range, and small steps are safer. Measured
    with SGD on a three-layer network: without the factor, a range moves 100 to 1000 times slower than the weights,
    relative to its size. With it, it moves as fast as they do, and at lr = 0.5 the range of inputs in [0, 1] diverged
    to [0, 70].

    Args:
        lo: the initial lower end, from calibration.
        hi: the initial upper end; lo <= 0 <= hi.

    >>> learned = LearnedRange(-1.0, 3.0)
    >>> learned.ends.tolist(), learned.range().tolist(), learned.qparams()
    ([-0.5, 1.5], [-1.0, 3.0], QParams(scale=0.01568627543747425, zero_point=64))
    """

    origin = "learned range"
    unit: Tensor

    def __init__(self, lo: float, hi: float) -> None:
        super().__init__()
        magnitude = max(-lo, hi)
        unit = 2.0 ** (math.frexp(magnitude)[1] - 1) if magnitude / 255 >= FLT_MIN else 1.0
        self.ends = nn.Parameter(torch.tensor([lo / unit, hi / unit], dtype=torch.float32, device="cpu"))
        self.register_buffer("unit", torch.tensor(unit, dtype=torch.float32, device="cpu"))

    def forward(self, rows: Tensor) -> Tensor:
        """float32 (..., K) -> float32 (..., K)."""
        return _QuantizeInRange.apply(rows, self.range())  # type: ignore[no-any-return]

    def range(self) -> Tensor:
        """(lo, hi), float32 (2,)."""
        return self.ends.float() * self.unit.float()

    def qparams(self) -> QParams:
        """The scale and zero point that inference uses."""
        return _static_qparams(self.range())

    def is_ready(self) -> bool:
        """Whether the range is finite."""
        return _is_finite(self.range())

    def freeze(self) -> None:
        """Stops training the range."""
        self.ends.requires_grad_(False)

    def extra_repr(self) -> str:
        """The range, for `repr`."""
        return _show(self.range())


class ObservedRange(nn.Module):
    """Static fake quantization over a moving average of the batches' ranges, as in MovingAverageObserver.

    In training, each batch first moves the range and is then quantized with it. In eval mode, or frozen, the range does
    not move. The first batch sets it; before that, eval mode uses the range of the present batch. A batch with NaN or
    infinity, which loss scaling can cause, does not move it. The range is a buffer, so DDP broadcasts rank 0's before
    each forward.

    Args:
        lo: the initial lower end; NaN, the default, lets the first batch set it.
        hi: the initial upper end, likewise.
        momentum: the weight of the old range when a batch arrives, in [0, 1).

    >>> observed = ObservedRange(momentum=0.75)
    >>> for batch in (torch.tensor([-1.0, 1.0]), torch.tensor([-1.0, 9.0])):
    ...     _ = observed(batch)
    >>> observed.range().tolist()
    [-1.0, 3.0]
    """

    origin = "observed range"
    ends: Tensor

    def __init__(self, lo: float = math.nan, hi: float = math.nan, *, momentum: float = 0.9) -> None:
        super().__init__()
        if not 0 <= momentum < 1:
            raise ValueError(f"ObservedRange: momentum must be in [0, 1), got {momentum}. Try 0.9.")
        self.momentum, self.frozen = momentum, False
        self.register_buffer("ends", torch.tensor([lo, hi], dtype=torch.float32, device="cpu"))

    def forward(self, rows: Tensor) -> Tensor:
        """float32 (..., K) -> float32 (..., K)."""
        if rows.numel() == 0:
            return rows
        batch = torch.stack(torch.aminmax(rows.detach()))
        if self.training and not self.frozen:
            ends = self.range()
            mixed = torch.where(ends.isnan(), batch, self.momentum * ends + (1 - self.momentum) * batch)
            self.ends.copy_(torch.where(batch.isfinite().all(), mixed, ends))
        ends = self.range()
        return _QuantizeInRange.apply(rows, torch.where(ends.isnan(), batch, ends))  # type: ignore[no-any-return]

    def range(self) -> Tensor:
        """(lo, hi), float32 (2,); NaN before the first batch."""
        return self.ends.float()

    def qparams(self) -> QParams:
        """The scale and zero point that inference uses."""
        return _static_qparams(self.range())

    def is_ready(self) -> bool:
        """Whether the range is set and finite."""
        return _is_finite(self.range())

    def freeze(self) -> None:
        """Stops batches from moving the range."""
        self.frozen = True

    def extra_repr(self) -> str:
        """The range, for `repr`."""
        return _show(self.range())


class PerToken(nn.Module):
    """Dynamic fake quantization: a scale and zero point per row. It has no parameters and no state.

    The gradient passes straight through, ∂x̂/∂x = 1, because the range of a row covers all its values.

    >>> PerToken()(torch.tensor([[0.0, 0.5, 255.0]])).tolist()
    [[0.0, 0.0, 255.0]]
    """

    origin = "ranges per token"

    def forward(self, rows: Tensor) -> Tensor:
        """float32 (M, K) -> float32 (M, K)."""
        values = rows.detach()
        rounded = fake_quantize(values, *row_qparams(values), axis=0, dtype=torch.uint8)
        return _StraightThrough.apply(rows, rounded)  # type: ignore[no-any-return]

    def qparams(self) -> None:
        """None, since inference chooses them per row."""

    def is_ready(self) -> bool:
        """Always."""
        return True

    def freeze(self) -> None:
        """Nothing to freeze."""


InputRange = LearnedRange | ObservedRange | PerToken


def _codes_of(ends: Tensor) -> tuple[Tensor, Tensor]:
    return qparams_from_range(ends[0], ends[1], dtype=torch.uint8, symmetric=False)


def _static_qparams(ends: Tensor) -> QParams:
    scale, zero_point = _codes_of(ends.detach())
    return QParams(float(scale), int(zero_point))


def _is_finite(ends: Tensor) -> bool:
    return bool(_codes_of(ends.detach())[0].isfinite())


def _show(ends: Tensor) -> str:
    lo, hi = ends.tolist() if not ends.is_meta else (math.nan, math.nan)
    return f"{lo:.4g}, {hi:.4g}"
