"""describe(): the stats of each int8 layer in its final form: smoothed, trained and rounded."""

import dataclasses
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from torchq import ops
from torchq.calibration.calibrate import Evidence
from torchq.modules.base import Matrix
from torchq.numerics.metrics import count_clipped, decibels, energies, sqnr_db
from torchq.numerics.qparams import QParams, dequantize, fake_quantize, quantize_weight
from torchq.planning.plan import LayerPlan, LayerStats, Plan
from torchq.planning.smoothing import scaled_parts, scales_around


def describe(plan: Plan, evidence: Evidence) -> Plan:
    """The plan with the stats of every int8 layer that data reached.

    The reference for a smoothed layer is the float layer with scaled weights, on scaled rows: what is really quantized.
    """
    layers = dict(plan.layers)
    for name, layer in plan.layers.items():
        record = evidence.records.get(name)
        if not layer.is_int8 or record is None or not record.has_data:
            continue
        into, out = scales_around(plan.smoothings, name)
        rows = record.sample.rows if into is None else record.sample.rows / into
        parts = scaled_parts(evidence.layers[name].matrix, per_channel=layer.per_channel, into=into, out=out)
        both = torch.zeros(2, dtype=torch.float64, device="cpu")
        error = decibels(sum((energies(*pair) for pair in _weights(parts, layer)), both))
        stats = layer_stats(error, rows, layer.input_qparams, max(1, round(record.sample.rows_seen / record.calls)))
        layers[name] = dataclasses.replace(layer, stats=stats)
    return dataclasses.replace(plan, layers=layers)


def _weights(parts: Iterable[tuple[slice, Matrix]], layer: LayerPlan) -> Iterator[tuple[Tensor, Tensor]]:
    """The weight of each part, in float and dequantized from int8."""
    for channels, part in parts:
        if layer.weights is None:
            codes, scale = quantize_weight(part.weight, per_channel=layer.per_channel)
        else:
            codes, scale = layer.weights.weight[channels], layer.weights.scale[channels]
        yield part.weight.detach(), dequantize(codes, scale, axis=0)


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
        restored, below, above = (codes.int() - zero_point).float() * scale, 0, 0
    else:
        restored = fake_quantize(sample, *qparams, dtype=torch.uint8)
        below, above = count_clipped(sample, qparams)
    values = max(1, sample.numel())
    return LayerStats(weight_db, sqnr_db(sample, restored), below / values, above / values, rows)
