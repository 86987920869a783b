"""What quantization did to one layer, in plain numbers: taken in `convert`, where the float weights still are."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchq import ops
from torchq.modules.linear import QParams
from torchq.qparams import fake_quantize, sqnr_db


@dataclass(frozen=True)
class LayerStats:
    """One int8 layer on its calibration sample.

    Args:
        weight_db: SQNR of the int8 weight against the float one, in dB.
        input_db: SQNR of the sample's u8 codes against the sample, in dB.
        clipped_below: the share of the sample's values that lie below the static range (see `count_clipped`); 0 for
            a dynamic layer.
        clipped_above: the same above it.
        rows: how many rows (tokens) a call of the layer had in calibration, in the mean.
    """

    weight_db: float
    input_db: float
    clipped_below: float
    clipped_above: float
    rows: int

    @property
    def clipped(self) -> float:
        """The share of values outside the range, on either side."""
        return self.clipped_below + self.clipped_above

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "LayerStats":
        """The inverse of `dataclasses.asdict`, and of the strings that JSON has for inf and nan."""
        return cls(rows=int(data["rows"]), **{key: float(data[key]) for key in data if key != "rows"})


@torch.no_grad()
def layer_stats(weight_db: float, sample: Tensor, qparams: QParams | None, rows: int) -> LayerStats:
    """The stats of a layer, from sample rows (R, K) of its input in float32 and its static range, or None.

    >>> _ = torch.manual_seed(0)
    >>> stats = layer_stats(44.0, torch.randn(32, 64), None, rows=8)
    >>> stats.input_db > 40, stats.clipped, stats.rows
    (True, 0.0, 8)
    """
    if qparams is None:
        codes, scale, zero_point = ops.quantize_per_token(sample)
        seen, below, above = (codes.int() - zero_point).float() * scale, 0, 0
    else:
        seen = fake_quantize(sample, *qparams, dtype=torch.uint8)
        below, above = count_clipped(sample, qparams)
    values = max(1, sample.numel())
    return LayerStats(weight_db, sqnr_db(sample, seen), below / values, above / values, rows)


def count_clipped(x: Tensor, qparams: QParams) -> tuple[int, int]:
    """How many values lie below and above the range of u8 codes, `[-z·s, (255 - z)·s]`, by more than one step s.

    Within a step the error is one of rounding: the rounded zero point alone moves the range by half of one, so that
    the largest value that calibration saw may lie just outside. NaN is in neither count.

    >>> count_clipped(torch.tensor([-0.2, 0.0, 25.5, 25.55, 26.0]), QParams(scale=0.1, zero_point=0))
    (1, 1)
    """
    scale, zero_point = qparams
    below, above = x < -(zero_point + 1) * scale, x > (256 - zero_point) * scale
    return int(below.sum()), int(above.sum())
