"""describe(): the stats of each int8 layer in its final form: smoothed, trained and rounded."""

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from torchq import ops
from torchq.calibration.calibrate import Evidence
from torchq.modules.registry import Layer
from torchq.numerics.fine import rounded_twice
from torchq.numerics.metrics import count_clipped, decibels, energies, sqnr_db
from torchq.numerics.qparams import QParams, dequantize, fake_quantize
from torchq.ops.weights import quantize_weight, weight_blocks
from torchq.planning.plan import InputHistogram, LayerPlan, LayerStats, Plan

HISTOGRAM_BINS = 40
"""What fits a phone's screen, and costs a plan a few hundred bytes a layer."""


def describe(plan: Plan, evidence: Evidence) -> Plan:
    """The plan with the stats of every int8 layer that data reached.

    With a channel_scale c they are those of the weight divided by c, and of rows times c: of what is really quantized.
    """
    layers = dict(plan.layers)
    for name, layer in plan.layers.items():
        record = evidence.records.get(name)
        if not layer.is_int8 or record is None or not record.has_data:
            continue
        scale, both = layer.scale_vector, torch.zeros(2, dtype=torch.float64, device="cpu")
        rows = record.scaled(record.sample.rows, scale)
        patches = record.patches
        pairs = _weights(
            evidence.layers[name].weight.detach(), layer, scale if patches is None else patches.weight_scale(scale)
        )
        error = decibels(sum((energies(*pair) for pair in pairs), both))
        count = max(1, round(record.sample.rows_seen / record.calls))
        dynamic = None if patches is None else patches.sample_qparams(record.sample.rows, scale)
        stats = layer_stats(error, rows, layer.input_qparams, count, dynamic)
        if patches is not None and patches.takes_floats and layer.input_qparams is None:
            stats = dataclasses.replace(stats, input_db=sqnr_db(rows, rows))
        if layer.fine:
            stats = dataclasses.replace(stats, input_db=sqnr_db(rows, rounded_twice(rows)))
        if evidence.layers[name].kind.absorbs:
            stats = dataclasses.replace(stats, input_shape=record.shape or _pointwise(evidence.layers[name], count))
        layers[name] = dataclasses.replace(layer, stats=stats)
    return dataclasses.replace(plan, layers=layers)


def _pointwise(layer: Layer, rows: int) -> tuple[int, ...]:
    """An input of so many places, (1, C, rows, 1, ...)."""
    rank = layer.kind.weight(layer.module, layer.part).dim()
    return (1, layer.channels, rows, 1, 1)[:rank]


def _weights(weight: Tensor, layer: LayerPlan, channel_scale: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """What is quantized of the weight, in float and dequantized from int8, some rows at a time."""
    if layer.weights is None:
        codes, scale = quantize_weight(weight, per_channel=layer.per_channel, channel_scale=channel_scale)
    else:
        codes, scale = layer.weights.weight, layer.weights.scale
    for rows, values in weight_blocks(weight, channel_scale):
        yield values, dequantize(codes[rows], scale[rows], axis=0)


@torch.no_grad()
def layer_stats(
    weight_db: float,
    sample: Tensor,
    qparams: QParams | None,
    rows: int,
    row_qparams: tuple[Tensor, Tensor] | None = None,
) -> LayerStats:
    """The stats of a layer, from sample rows (R, K) of its input in float32 and its static range, or None.

    `row_qparams`: scale and zero point of each row (R,), if they are others than those that cover the row.

    >>> _ = torch.manual_seed(0)
    >>> stats = layer_stats(44.0, torch.randn(32, 64), None, rows=8)
    >>> stats.input_db > 40, stats.clipped, stats.rows
    (True, 0.0, 8)
    """
    if qparams is None and row_qparams is not None:
        restored, below, above = fake_quantize(sample, *row_qparams, axis=0, dtype=torch.uint8), 0, 0
    elif qparams is None:
        codes, scale, zero_point = ops.quantize_per_token(sample)
        restored, below, above = (codes.int() - zero_point).float() * scale, 0, 0
    else:
        restored = fake_quantize(sample, *qparams, dtype=torch.uint8)
        below, above = count_clipped(sample, qparams)
    values = max(1, sample.numel())
    histogram = input_histogram(sample)
    return LayerStats(weight_db, sqnr_db(sample, restored), below / values, above / values, rows, histogram)


def input_histogram(sample: Tensor) -> InputHistogram | None:
    """The values of a sample in `HISTOGRAM_BINS` bins; None of an empty one.

    >>> histogram = input_histogram(torch.tensor([[-1.0, 0.0, 0.01, 3.0]]))
    >>> histogram.lo, histogram.hi, sum(histogram.counts), histogram.counts[0], histogram.counts[-1]
    (-1.0, 3.0, 4, 1, 1)
    """
    if sample.numel() == 0:
        return None
    lo, hi = float(sample.min()), float(sample.max())
    start, width = (lo, hi - lo) if hi > lo else (lo - 1, 2.0)
    places = (sample.double() - start).mul_(HISTOGRAM_BINS / width).int().clamp_(max=HISTOGRAM_BINS - 1)
    counts = places.flatten().bincount(minlength=HISTOGRAM_BINS)  # an eighth of the time of histc
    return InputHistogram(lo, hi, tuple(map(int, counts.tolist())))
