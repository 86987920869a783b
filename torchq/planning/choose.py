"""Chooses the scheme of each layer by measuring every candidate on the layer's own calibration rows."""

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from torchq import ops
from torchq.calibration.calibrate import Evidence
from torchq.calibration.record import MIN_STATIC_ROWS, Trial
from torchq.config import QConfig
from torchq.errors import BadValueError
from torchq.modules.base import Matrix, Trained
from torchq.modules.quantized_linear import QuantizedLinear
from torchq.modules.registry import Layer
from torchq.numerics.metrics import decibels, energies
from torchq.numerics.qparams import QParams
from torchq.planning.plan import LayerPlan, Plan
from torchq.planning.smoothing import scaled_parts

TOO_FEW = f"fewer than {MIN_STATIC_ROWS} calibration rows: too few"


def choose(plan: Plan, evidence: Evidence) -> Plan:
    """Decides each layer independently. Layers already planned as float stay so; the others get the best scheme.

    Raises:
        ValueError: `activation="static"`, but the calibration data never reached a layer.
    """
    if evidence.config.activation == "static":
        _require_data(plan, evidence)
    layers = {
        name: _choose_layer(evidence.layers[name], evidence) if layer.is_int8 else layer
        for name, layer in plan.layers.items()
    }
    return dataclasses.replace(plan, layers=layers)


def _require_data(plan: Plan, evidence: Evidence) -> None:
    missed = [
        name
        for name, record in evidence.records.items()
        if plan.layers[name].is_int8 and not record.has_data and evidence.layers[name].trained is None
    ]
    if missed:
        raise BadValueError(
            f"activation='static', but calib_loader never reached {', '.join(map(repr, missed))}. "
            "Pass data that runs these layers, exclude them, or use activation='auto'."
        )


def _choose_layer(layer: Layer, evidence: Evidence) -> LayerPlan:
    config, record, trained = evidence.config, evidence.records.get(layer.name), layer.trained
    if trained is not None:
        return _plan_trained(layer, trained, record.whole if record is not None and record.has_data else None)
    per_channel = config.weight == "per_channel"
    if record is None:
        return LayerPlan("int8 dynamic", "no calibration data", per_channel)
    if record.calls == 0 and config.activation == "auto":
        return LayerPlan("float", "calib_loader never reached it; its weight may be read without calling it")
    if not record.has_data:
        return LayerPlan("int8 dynamic", "no calibration data reached it", per_channel)
    return plan_layer(layer, record.whole, config, few=record.is_too_few)


def plan_layer(
    layer: Layer, trial: Trial, config: QConfig, *, into: Tensor | None = None, few: bool = False
) -> LayerPlan:
    """The scheme and range with the least error on the rows of `trial`, or float if none is good enough.

    `into` (K,): the trial's inputs were divided by it, so the weight is multiplied by it. Rows that are `few` give no
    static range unless asked for.
    """
    per_channel = config.weight == "per_channel"
    measured = measure(layer.matrix, trial.rows, trial.ranges, per_channel=per_channel, into=into)
    observer = max(trial.ranges, key=lambda name: measured[name])
    static, dynamic = measured[observer], measured["dynamic"]
    if config.activation == "auto":
        close = static >= config.min_sqnr_db and static >= dynamic - config.margin_db  # False for nan
        use_static, reason = close, "static costs no accuracy" if close else "static would cost accuracy"
        if close and few:
            use_static, reason = False, f"{TOO_FEW} for a static range"
    else:
        use_static, reason = config.activation == "static", "asked for"
    if not (static if use_static else dynamic) >= config.min_sqnr_db:
        best = f"static {static:.1f} dB ({observer}), dynamic {dynamic:.1f} dB"
        return LayerPlan("float", f"{best}: below min_sqnr_db = {config.min_sqnr_db:g}", sqnr_db=measured)
    if use_static:
        return LayerPlan("int8 static", reason, per_channel, trial.ranges[observer], observer, measured)
    return LayerPlan("int8 dynamic", reason, per_channel, sqnr_db=measured)


def _plan_trained(layer: Layer, trained: Trained, trial: Trial | None) -> LayerPlan:
    """The scheme and range this layer was trained with, whatever their error on the data: training compensated it."""
    qparams, reason = trained.input_qparams, f"trained, {trained.origin}"
    measured = {}
    if trial is not None:
        ranges = {} if qparams is None else {"trained": qparams}
        measured = measure(layer.matrix, trial.rows, ranges, per_channel=trained.per_channel)
    if qparams is None:
        return LayerPlan("int8 dynamic", reason, trained.per_channel, sqnr_db=measured)
    return LayerPlan("int8 static", reason, trained.per_channel, qparams, "trained", measured)


@torch.no_grad()
def measure(
    matrix: Matrix,
    rows: Tensor,
    ranges: Mapping[str, QParams],
    *,
    per_channel: bool = True,
    into: Tensor | None = None,
) -> dict[str, float]:
    """Output SQNR in dB of each scheme, computed with the real integer ops, against the float matrix on `rows` (R, K).

    `into` (K,): the rows were divided by it, so the weight is multiplied by it.

    >>> _ = torch.manual_seed(0)
    >>> matrix, rows = Matrix(torch.randn(64, 64), None), torch.randn(32, 64)
    >>> sorted(measure(matrix, rows, {"minmax": QParams(0.03, 128)}))
    ['dynamic', 'minmax']
    """
    sums = {name: torch.zeros(2, dtype=torch.float64, device="cpu") for name in ("dynamic", *ranges)}
    for _, part in scaled_parts(matrix, per_channel=per_channel, into=into):
        bias = None if part.bias is None else part.bias.float()
        exact = nn.functional.linear(rows, part.weight.float(), bias)
        packed = QuantizedLinear.from_float(part, per_channel=per_channel).packed
        sums["dynamic"] += energies(exact, ops.linear_dynamic(rows, packed))
        for name, (scale, zero_point) in ranges.items():
            sums[name] += energies(exact, ops.linear_static(rows, packed, scale, zero_point, torch.float32))
    return {name: decibels(both) for name, both in sums.items()}
