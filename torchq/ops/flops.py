"""What torch's FlopCounterMode counts for the ops: 2 for each multiply-add of the float layer, as torch does.

Without a formula an op counts as 0, without a word. Sums, curves, look-ups and quantization count 0, as torch's own do.
Importing torch.utils.flop_counter may import triton, so `import torchq` does not: the formulas wait for who does.
"""

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from torchq import _C as _C  # which defines the ops
from torchq.imports import when_imported
from torchq.numerics.recurrent import Cell


def product_flops(x: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any) -> int:
    """Of a product of rows (..., K) that gives (..., N).

    >>> product_flops((2, 3), out_shape=(2, 5))
    60
    """
    return 2 * math.prod(out_shape) * x[-1]


def convolution_flops(
    x: Sequence[int], packed: Any, geometry: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any
) -> int:
    """Of a convolution: each of its outputs is a sum over a patch."""
    inputs, groups = geometry[1], geometry[3]
    return 2 * math.prod(out_shape) * (inputs // groups) * math.prod(geometry[4::5])


def attention_flops(q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: Any, **__: Any) -> int:
    """Of both products of attention, with all keys, whatever a mask hides."""
    return 2 * math.prod(q[:3]) * k[2] * (q[3] + v[3])


def recurrent_flops(
    cell: int, gates: Sequence[Sequence[int]], packed_hh: Any, packed_hr: Any, h0: Sequence[int], *_: Any, **__: Any
) -> int:
    """Of the products with h at every step, and of projections; those with the input are products of their own."""
    of_width = 1 + (1 / Cell(cell).gates if packed_hr else 0)
    return sum(2 * rows * round(width * of_width) * h0[2] for rows, width in gates)


FORMULAS = {
    **dict.fromkeys(("gemm", "linear_dynamic", "linear_static", "linear_fine"), product_flops),
    "convolution": convolution_flops,
    "attention": attention_flops,
    "recurrent": recurrent_flops,
}


def _register(counter: ModuleType) -> None:
    for name, formula in FORMULAS.items():
        counter.register_flop_formula(getattr(torch.ops.torchq, name))(formula)


when_imported("torch.utils.flop_counter", _register)
