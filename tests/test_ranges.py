"""Fake quantization for training: inference's values bit for bit, and the gradients against the formulas."""

import math

import pytest
import torch

from helpers.compare import assert_identical
from helpers.numbers import normal, random_float
from torchq import fake_quantize, ops
from torchq.modules.ranges import LearnedRange, ObservedRange, PerToken, fake_quantize_weight
from torchq.numerics.qparams import dequantize, qparams_from_range


def formulas(x, lo, hi, gradient):
    """∂L/∂x, ∂L/∂lo and ∂L/∂hi: LSQ+'s ∂x̂/∂s and ∂x̂/∂z, value by value in float64, then the chain rule."""
    scale, zero_point = (
        float(v) for v in qparams_from_range(*torch.tensor([lo, hi]), dtype=torch.uint8, symmetric=False)
    )
    to_x, to_lo, to_hi = [], 0.0, 0.0
    for value, g in zip(x.flatten().tolist(), gradient.flatten().tolist(), strict=True):
        steps = value / scale
        code = round(steps) + zero_point
        if 0 <= code <= 255:
            by_x, by_scale, by_zero = 1.0, round(steps) - steps, 0.0
        else:
            by_x, by_scale, by_zero = 0.0, (255 if code > 255 else 0) - zero_point, -scale
        # s = (hi - lo) / 255 and z = -lo / s. z is rounded, and its gradient passes straight through the rounding.
        zero_by_lo, zero_by_hi = -1 / scale + zero_point / (255 * scale), -zero_point / (255 * scale)
        to_x.append(g * by_x)
        to_lo += g * (-by_scale / 255 + by_zero * zero_by_lo)
        to_hi += g * (by_scale / 255 + by_zero * zero_by_hi)
    return torch.tensor(to_x).reshape(x.shape), to_lo, to_hi


@pytest.mark.parametrize(("lo", "hi"), [(-1.0, 3.0), (-0.7, 0.2), (-200.0, 90.0), (-1e-3, 3e-3)])
def test_static_values_and_gradients(generator, lo, hi):
    """Values lie beyond both ends, inside, and up to half a step outside the ends, where codes need no clamp."""
    step = (hi - lo) / 255
    edges = torch.tensor([lo - 0.4 * step, lo - 2 * step, hi + 0.4 * step, hi + 2 * step, 0.0, -0.0])
    x = torch.cat([edges, lo - hi + 3 * (hi - lo) * torch.rand(300, generator=generator)]).requires_grad_()
    gradient = torch.randn(x.shape, generator=generator)
    learned = LearnedRange(lo, hi)
    assert learned.range().tolist() == torch.tensor([lo, hi]).tolist()  # exact, since the unit is a power of two
    y = learned(x)
    y.backward(gradient)
    scale, zero_point = learned.qparams()
    assert_identical(y.detach(), fake_quantize(x.detach(), scale, zero_point, dtype=torch.uint8))
    to_x, to_lo, to_hi = formulas(x.detach(), lo, hi, gradient)
    assert torch.equal(x.grad, to_x)
    # float32 sums of 306 terms of size up to 4. The terms of values inside are at most 0.5 / 255, far less.
    expected = float(learned.unit) * torch.tensor([to_lo, to_hi])
    torch.testing.assert_close(learned.ends.grad, expected, rtol=1e-4, atol=float(learned.unit) * 306 * 4 * 2**-22)
    assert to_lo != 0
    assert to_hi != 0


def test_gradients_written_out():
    """At s = 1, z = 0: 2.25 rounds down by a quarter step, 300 is above, -5 below; 255.25 still has the code 255."""
    learned = LearnedRange(0.0, 255.0)
    x = torch.tensor([2.25, 300.0, 255.25, -5.0], requires_grad=True)
    y = learned(x)
    assert y.tolist() == [2.0, 255.0, 255.0, 0.0]
    y.backward(torch.tensor([255.0, 7.0, 510.0, 3.0]))
    assert x.grad.tolist() == [255.0, 0.0, 510.0, 0.0]
    # hi: -0.25 - 0.25 * 2 inside, 7 above; lo: 0.25 + 0.5 inside, 3 below. The unit is 128.
    assert learned.ends.grad.tolist() == [3.75 * 128, 6.25 * 128]


def test_an_end_at_zero_is_not_pushed_across():
    """Past 0 it would have no effect, since 0 is always in the range. A gradient that moves it away from 0 passes."""
    for wrong, right, end, lo, hi, x in ((-1.0, 1.0, 0, 0.0, 4.0, -1.0), (1.0, -1.0, 1, -4.0, 0.0, 1.0)):
        for gradient, expected in ((wrong, 0.0), (right, right)):
            learned = LearnedRange(lo, hi)
            learned(torch.tensor([x])).backward(torch.tensor([gradient]))
            assert learned.ends.grad[end] == expected * learned.unit


def test_a_learned_range_shrinks_to_what_is_there():
    """Gradient descent on the error, from a range six times too wide for 4000 values of N(0, 1)."""
    x = normal(4000)
    learned = LearnedRange(-20.0, 20.0)
    optimizer = torch.optim.Adam(learned.parameters(), lr=0.01)
    errors = []
    for _ in range(400):
        optimizer.zero_grad()
        error = (learned(x) - x).square().mean()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    lo, hi = learned.range().tolist()
    # The values reach ±3.5. The error goes with the square of the step: (3.5 / 20)² = 0.03 of the error at the start.
    assert -4.5 < lo < -3
    assert 3 < hi < 4.5
    assert errors[-1] < 0.06 * errors[0]


@pytest.mark.parametrize("make", [lambda: LearnedRange(-1.0, 1.0), lambda: ObservedRange(-1.0, 1.0).eval()])
def test_nan_and_infinity_static(make):
    """As at inference, NaN gets the lowest code and infinities saturate. None of them gets a gradient."""
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.5], requires_grad=True)
    y = make()(x)
    y.backward(torch.ones(4))
    pair = make().qparams()
    assert_identical(y.detach(), fake_quantize(x.detach(), *pair, dtype=torch.uint8))
    assert x.grad.tolist() == [0.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize("magnitude", [0.0, 1e-40, 1e-36, 1e-30, 3e38])
def test_ranges_of_any_size(magnitude):
    """The smallest ranges give scale 1, as in qparams, and nothing overflows."""
    learned = LearnedRange(-magnitude, magnitude)
    scale, zero_point = qparams_from_range(
        torch.tensor(-magnitude), torch.tensor(magnitude), dtype=torch.uint8, symmetric=False
    )
    assert learned.qparams() == (scale, zero_point)
    assert learned.is_ready()
    learned(torch.zeros(3)).sum().backward()
    assert learned.ends.grad.isfinite().all()


def test_an_observed_range_is_the_moving_average():
    observed = ObservedRange(momentum=0.75)
    assert not observed.is_ready()
    for batch, expected in ([-1.0, 1.0], [-1.0, 1.0]), ([-5.0, 9.0], [-2.0, 3.0]), ([0.5, 0.5], [-1.375, 2.375]):
        y = observed(torch.tensor(batch))
        assert observed.range().tolist() == expected
        assert_identical(y, fake_quantize(torch.tensor(batch), *observed.qparams(), dtype=torch.uint8))
    assert observed.is_ready()


def test_what_leaves_an_observed_range_alone():
    """Eval mode, freeze(), empty batches, and batches that are not finite."""
    observed = ObservedRange(-1.0, 1.0)
    x = torch.full((4,), 8.0)
    observed.eval()(x)
    observed.train()(x[:0])
    for bad in (math.nan, math.inf, -math.inf):
        observed(torch.tensor([8.0, bad]))
    observed.freeze()
    observed(x)
    assert observed.range().tolist() == [-1.0, 1.0]


def test_before_the_first_batch_eval_mode_uses_the_batch_at_hand(generator):
    x = random_float(5, 8, generator=generator)
    fresh = ObservedRange()
    y = fresh.eval()(x)
    assert not fresh.is_ready()
    assert_identical(y, fresh.train()(x))
    assert fresh.is_ready()


def test_observed_gradients_are_clipped_and_reach_x_only():
    observed = ObservedRange(-1.0, 1.0).eval()
    x = torch.tensor([0.5, 2.0, -3.0], requires_grad=True)
    observed(x).backward(torch.full((3,), 4.0))
    assert x.grad.tolist() == [4.0, 0.0, 0.0]
    assert not list(observed.parameters())


def test_a_range_used_twice_before_backward():
    """In a shared layer, the second batch moves the buffer. The first gradient must still use the first range."""
    observed = ObservedRange(momentum=0.5)
    x = torch.tensor([1.0, 3.0], requires_grad=True)
    total = observed(x).sum() + observed(x.detach() / 100).sum()
    total.backward()
    assert x.grad.tolist() == [1.0, 1.0]
    with torch.no_grad():
        observed(x / 100)
    assert observed(x).sum().item() < 4


def test_momentum_is_checked():
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\), got 1"):
        ObservedRange(momentum=1)


def test_per_token_values_are_those_of_the_op(generator):
    x = random_float(40, 50, generator=generator).requires_grad_()
    codes, scale, zero_point = ops.quantize_per_token(x.detach())
    y = PerToken()(x)
    expected = torch.stack(
        [dequantize(*row) for row in zip(codes, scale.squeeze(1), zero_point.squeeze(1), strict=True)]
    )
    assert_identical(y.detach(), expected)
    gradient = torch.randn(y.shape, generator=generator)
    y.backward(gradient)
    assert_identical(x.grad, gradient)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_weight_gradient_is_straight_through(generator, dtype, per_channel):
    weight = torch.randn(7, 9, generator=generator).to(dtype).requires_grad_()
    gradient = torch.randn(7, 9, generator=generator)
    fake_quantize_weight(weight, per_channel=per_channel).backward(gradient)
    assert_identical(weight.grad, gradient.to(dtype))
