"""count_bins, what histograms count with: the values of its definition, and what it refuses."""

import math

import pytest
import torch

from helpers.compare import assert_identical
from helpers.numbers import FLT_MIN, normal
from torchq.ops.histogram import count_bins


def by_definition(x, per_value, bins):
    """The counts and zeros, one value at a time."""
    counts = torch.zeros(x.shape[1], bins, dtype=torch.int64)
    for channel, factor in enumerate(per_value.tolist()):
        for value in x[:, channel].tolist():
            k = 0 if abs(value) <= FLT_MIN else math.trunc(value * factor) - (value < 0)
            counts[channel, min(max(bins // 2 + k, 0), bins - 1)] += 1
    return counts, (x.abs() <= FLT_MIN).sum(0)


@pytest.mark.parametrize("bins", [2, 6, 2048])
@pytest.mark.parametrize(("rows", "channels"), [(0, 1), (1, 1), (7, 3), (1023, 1), (1025, 2), (2050, 1)])
def test_values_are_those_of_the_definition(rows, channels, bins):
    """Some are beyond the bins, and every seventh row is zero. Powers of two scale exactly."""
    x = normal(rows, channels)
    x[::7] = 0.0
    per_value = 2.0 ** torch.arange(channels).float() * (bins / 4)
    counts, zeros = count_bins(x, per_value, bins)
    expected = by_definition(x, per_value, bins)
    assert_identical(counts, expected[0])
    assert_identical(zeros, expected[1])
    assert counts.sum(1).tolist() == [rows] * channels


def test_edges_zeros_and_what_is_not_finite():
    x = torch.tensor([[-1.0], [-0.99], [-0.0], [0.0], [0.99], [1.0], [-FLT_MIN], [FLT_MIN]])
    assert [each.tolist() for each in count_bins(x, torch.ones(1), 4)] == [[[1, 1, 5, 1]], [4]]
    least = torch.tensor([[FLT_MIN], [2 * FLT_MIN], [-2 * FLT_MIN]])  # FLT_MIN is zero in the narrowest bins, too
    assert [each.tolist() for each in count_bins(least, torch.tensor([2.0**126]), 8)] == [
        [[0, 1, 0, 0, 1, 0, 1, 0]],
        [1],
    ]
    x = torch.tensor([[math.inf], [-math.inf], [math.nan], [3e38]])
    assert [each.tolist() for each in count_bins(x, torch.ones(1), 4)] == [[[1, 0, 1, 2]], [1]]


def test_strides_make_no_difference():
    x, per_value = normal(40, 1500).T, torch.arange(1.0, 81.0)[::2]
    for found, expected in zip(
        count_bins(x, per_value, 16), count_bins(x.contiguous(), per_value.contiguous(), 16), strict=True
    ):
        assert_identical(found, expected)


def test_it_is_an_op_of_torch():
    arguments = (normal(30, 2), torch.ones(2), 8)
    assert set(torch.library.opcheck(torch.ops.torchq.count_bins, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("x", "per_value", "bins"),
    [
        (torch.ones(4), torch.ones(1), 4),
        (torch.ones(4, 1, dtype=torch.float64), torch.ones(1), 4),
        (torch.ones(4, 1), torch.ones(2), 4),
        (torch.ones(4, 1), torch.ones(1, dtype=torch.float64), 4),
        (torch.ones(4, 1), torch.ones(1), 0),
        (torch.ones(4, 1), torch.ones(1), 3),
    ],
)
def test_what_it_refuses(x, per_value, bins):
    with pytest.raises(RuntimeError, match="count_bins"):
        count_bins(x, per_value, bins)
