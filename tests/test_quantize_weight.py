"""quantize_weight, which makes the codes of all weights: the bits of choose_qparams and quantize, and its errors."""

import math

import pytest
import torch

from helpers.compare import assert_identical
from helpers.numbers import FLT_MIN, normal
from torchq import choose_qparams, quantize
from torchq.ops.weights import quantize_rows, quantize_weight


def by_definition(weight, per_channel, channel_scale=None):
    """Codes and scales by the functions for tensors of any kind, which know nothing of weights."""
    values = weight.float() if channel_scale is None else weight.float() / channel_scale
    scale, _ = choose_qparams(values, axis=0 if per_channel else None)
    scale = scale.expand(len(values))
    return quantize(values, scale, axis=0), scale


def both_agree(weight, per_channel=True, channel_scale=None):
    found = quantize_weight(weight, per_channel=per_channel, channel_scale=channel_scale)
    for given, expected in zip(found, by_definition(weight, per_channel, channel_scale), strict=True):
        assert_identical(given, expected.contiguous())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (1, 1), (7, 31), (5, 1023), (3, 2050), (300, 1000)])
def test_codes_and_scales_are_those_of_the_definition(shape, per_channel, dtype):
    """The last shape is quantized in several blocks of rows, where it is not float32."""
    weight = normal(*shape).to(dtype)
    both_agree(weight, per_channel)
    both_agree(weight, per_channel, normal(shape[1]).abs() + 0.1)
    both_agree(weight, per_channel, normal(shape[0], 1).abs() + 0.1)


def test_every_tie_is_rounded_to_even():
    ties = torch.arange(-127, 127) + 0.5
    codes, scale = quantize_weight(torch.cat([ties, torch.tensor([127.0])])[None], per_channel=True)
    assert scale.tolist() == [1.0]
    assert codes[0, :-1].tolist() == [2 * math.floor((each + 0.5) / 2) for each in ties.tolist()]


@pytest.mark.parametrize("largest", [0.0, 1e-45, 126 * FLT_MIN, 127 * FLT_MIN, 128 * FLT_MIN, 3.4e38])
def test_the_smallest_and_the_largest_scales(largest):
    """Below 127 FLT_MIN the scale is 1, and all codes are 0."""
    weight = torch.tensor([[largest, -largest / 3, 0.0, -0.0], [1.0, 2.0, -3.0, 4.0]])
    both_agree(weight)
    both_agree(weight, per_channel=False)


def test_the_largest_magnitude_has_code_127_whatever_it_is():
    """`w · (1 / (w / 127))` may be above 127 by a rounding error or two."""
    weight = normal(4096, 1)
    codes, _ = quantize_weight(weight, per_channel=True)
    assert torch.equal(codes, 127 * weight.sign().to(torch.int8))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_is_refused(bad, per_channel, dtype):
    weight = normal(600, 700).to(dtype)
    weight[599, 3] = bad
    with pytest.raises(ValueError, match="got 1 NaN or Inf"):
        quantize_weight(weight, per_channel=per_channel)
    with pytest.raises(ValueError, match="got 1 NaN or Inf"):
        quantize_weight(weight, per_channel=per_channel, channel_scale=torch.ones(700))
    with pytest.raises(ValueError, match="got 1 NaN or Inf"):
        quantize_weight(torch.full((1, 1), 3e38), per_channel=per_channel, channel_scale=torch.full((1,), 0.1))
    _, scale = quantize_rows(weight.float(), None, per_channel=True)
    assert scale.isfinite().tolist() == [True] * 599 + [False]


@pytest.mark.parametrize("channel_scale", [None, torch.ones(4)])
def test_integers_are_refused(channel_scale):
    with pytest.raises(TypeError, match=r"weight must be floating point, got torch.int8. Pass weight.float\(\)."):
        quantize_weight(torch.ones(4, 4, dtype=torch.int8), per_channel=True, channel_scale=channel_scale)


def test_strides_make_no_difference():
    weight, scale = normal(90, 80), (normal(160).abs() + 0.1)[::2]
    for view in (weight[::7], weight[:, 3:50], weight.T, weight[:, ::2], weight[:1].expand(5, 80)):
        both_agree(view)
        both_agree(view, channel_scale=(normal(2 * view.shape[1]).abs() + 0.1)[::2])
    both_agree(weight, channel_scale=scale)


def test_threads_make_no_difference(request):
    before = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(before))
    weight = normal(500, 400)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        both_agree(weight)
        both_agree(weight, per_channel=False, channel_scale=normal(400).abs() + 0.1)


def test_a_parameter_gets_no_gradient():
    codes, scale = quantize_weight(torch.nn.Parameter(normal(4, 5)), per_channel=True)
    assert not codes.requires_grad
    assert not scale.requires_grad


@pytest.mark.parametrize("channel_scale", [None, torch.ones(7)])
@pytest.mark.parametrize("per_channel", [True, False])
def test_it_is_an_op_of_torch(channel_scale, per_channel):
    arguments = (normal(30, 7), channel_scale, per_channel)
    assert set(torch.library.opcheck(torch.ops.torchq.quantize_weight, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("weight", "channel_scale"),
    [
        (torch.ones(4), None),
        (torch.ones(2, 3, 4), None),
        (torch.ones(2, 3).double(), None),
        (torch.ones(2, 3, dtype=torch.int8), None),
        (torch.ones(2, 3), torch.ones(2)),
        (torch.ones(2, 3), torch.ones(3).double()),
        (torch.ones(2, 3), torch.ones(1, 3)),
    ],
)
def test_other_arguments_are_refused(weight, channel_scale):
    with pytest.raises(RuntimeError, match="quantize_weight"):
        quantize_rows(weight, channel_scale, per_channel=True)
