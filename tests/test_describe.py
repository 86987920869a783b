"""What the plan says of a layer's input."""

import pytest
import torch

from helpers.numbers import normal
from torchq.planning.describe import HISTOGRAM_BINS, input_histogram


@pytest.mark.parametrize("x", [normal(50, 40), normal(3, 7).abs(), torch.full([4, 5], 2.5), torch.zeros(1, 1)])
def test_the_histogram_counts_each_value_in_its_bin(x):
    histogram = input_histogram(x)
    assert (histogram.lo, histogram.hi) == (float(x.min()), float(x.max()))
    start, width = (histogram.lo, histogram.hi - histogram.lo) if histogram.hi > histogram.lo else (histogram.lo - 1, 2)
    expected = [0] * HISTOGRAM_BINS
    for value in x.flatten().tolist():
        expected[min(int((value - start) * (HISTOGRAM_BINS / width)), HISTOGRAM_BINS - 1)] += 1
    assert list(histogram.counts) == expected


def test_the_widest_range_does_not_overflow():
    """Its width is no float32."""
    histogram = input_histogram(torch.tensor([[-3e38, 0.0, 3e38]]))
    assert sum(histogram.counts) == 3
    assert [histogram.counts[place] for place in (0, HISTOGRAM_BINS // 2, -1)] == [1, 1, 1]
