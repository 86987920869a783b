"""A loose guard: int8 is never slower than torch's own float32 from 16 rows on.

It is 4 to 8 times faster where these run (docs/performance.md), so that nothing but a lost kernel, a spilled
accumulator or a copy on the way makes this fail. The figures are the benchmarks' affair.
"""

import pytest
import torch
from torch import nn

from benchmarks.timing import interleaved
from torchq import QuantizedLinear, kernels

ATTEMPTS = 3  # other processes may hold the core for a whole round


@pytest.mark.skipif(kernels.active() == "reference", reason="the reference kernel defines the answers, not the speed")
@pytest.mark.parametrize("shape", [(16, 768, 768), (64, 1024, 1024), (128, 3072, 768)], ids=str)
def test_int8_is_not_slower_than_float32(shape):
    m, n, k = shape
    torch.manual_seed(0)
    linear, x = nn.Linear(k, n), torch.randn(m, k)
    layer = QuantizedLinear.from_float(linear)
    ratios = []
    with torch.inference_mode():
        for _ in range(ATTEMPTS):
            times = interleaved({"float": lambda: linear(x), "int8": lambda: layer(x)}, rounds=5, seconds=0.005)
            ratios.append(times["float"] / times["int8"])
            if ratios[-1] >= 1:
                return
    pytest.fail(f"int8 at {ratios} of float32's speed, in {ATTEMPTS} attempts at {shape}")
