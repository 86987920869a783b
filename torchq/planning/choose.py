"""Chooses the scheme of each layer by measuring every candidate on the layer's own calibration rows."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from torchq import ops
from torchq.calibration.calibrate import Evidence
from torchq.calibration.record import MIN_STATIC_ROWS, Trial
from torchq.config import QConfig
from torchq.errors import BadValueError
from torchq.modules.base import Matrix, Trained
from torchq.modules.patches import Patches
from torchq.modules.quantized_linear import QuantizedLinear
from torchq.modules.registry import Layer
from torchq.numerics.metrics import decibels, energies
from torchq.numerics.qparams import QParams, dequantize, quantize_weight, weight_rows
from torchq.planning.plan import LayerPlan, Plan

_ENOUGH_CHANNELS = 512  # of a layer's outputs, to tell one scale of its inputs from another

SMALL_INPUT = 0.05
"""Without data, the first input products of a recurrent module stay in float up to this share of its weights.

With data, the model's output tells whether it must (selfcheck.py).
"""

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
        if plan.layers[name].is_int8 and not record.has_data and _needs_data(evidence.layers[name])
    ]
    if missed:
        raise BadValueError(
            f"activation='static', but calib_loader never reached {', '.join(map(repr, missed))}. "
            "Pass data that runs these layers, exclude them, or use activation='auto'."
        )


def _needs_data(layer: Layer) -> bool:
    return layer.trained is None and not layer.kind.dynamic_unreached


def _choose_layer(layer: Layer, evidence: Evidence) -> LayerPlan:
    config, record, trained = evidence.config, evidence.records.get(layer.name), layer.trained
    if trained is not None:
        return _plan_trained(layer, trained, record.whole if record is not None and record.has_data else None)
    per_channel = config.weight == "per_channel"
    if record is None:
        share = _first_input(layer) if config.activation == "auto" and layer.kind.is_first_input(layer.part) else 1
        if share <= SMALL_INPUT:
            return LayerPlan("float", f"no data to judge it by: {share:.1%} of weights whose errors the steps amplify")
        return LayerPlan("int8 dynamic", "no calibration data", per_channel)
    if record.calls == 0 and config.activation == "auto" and not layer.kind.dynamic_unreached:
        return LayerPlan("float", "calib_loader never reached it; its weight may be read without calling it")
    if not record.has_data:
        return LayerPlan("int8 dynamic", "no calibration data reached it", per_channel)
    return plan_layer(layer, record.whole, config, few=record.is_too_few)


def _first_input(layer: Layer) -> float:
    """The share of the first input's products in the weights of this layer's module."""
    sizes = {part: matrix.weight.numel() for part, matrix in layer.kind.matrices(layer.module).items()}
    return sum(size for part, size in sizes.items() if layer.kind.is_first_input(part)) / sum(sizes.values())


def plan_layer(
    layer: Layer, trial: Trial, config: QConfig, *, channel_scale: Tensor | None = None, few: bool = False
) -> LayerPlan:
    """The scheme and range with the least error on the rows of `trial`, or float if none is good enough.

    The layer has this `channel_scale` (K,), for which the trial's ranges were made. Rows that are `few` give no static
    range unless asked for.
    """
    per_channel = config.weight == "per_channel"
    measured = measure(
        layer.matrix,
        trial.rows,
        trial.ranges,
        per_channel=per_channel,
        channel_scale=channel_scale,
        patches=layer.patches,
    )
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
        measured = measure(
            layer.matrix,
            trial.rows,
            ranges,
            per_channel=trained.per_channel,
            channel_scale=trained.channel_scale,
            patches=layer.patches,
        )
    scale = None if trained.channel_scale is None else tuple(trained.channel_scale.tolist())
    if qparams is None:
        return LayerPlan("int8 dynamic", reason, trained.per_channel, sqnr_db=measured, channel_scale=scale)
    return LayerPlan("int8 static", reason, trained.per_channel, qparams, "trained", measured, channel_scale=scale)


@torch.no_grad()
def measure(
    matrix: Matrix,
    rows: Tensor,
    ranges: Mapping[str, QParams],
    *,
    per_channel: bool = True,
    channel_scale: Tensor | None = None,
    patches: Patches | None = None,
) -> dict[str, float]:
    """Output SQNR in dB of each scheme, computed with the real integer ops, against the float matrix on `rows` (R, K).

    The layer has this `channel_scale` (K,), for which the ranges were made. Of a convolution, rows are as `patches`
    gives them, the scale is one for each channel, and the products are those of the simulated path.

    >>> _ = torch.manual_seed(0)
    >>> matrix, rows = Matrix(torch.randn(64, 64), None), torch.randn(32, 64)
    >>> sorted(measure(matrix, rows, {"minmax": QParams(0.03, 128)}))
    ['dynamic', 'minmax']
    """
    sums = {name: torch.zeros(2, dtype=torch.float64, device="cpu") for name in ("dynamic", *ranges)}
    if patches is not None:
        exact, weight, bias = _patches_parts(matrix, rows, per_channel, channel_scale, patches)
        for name in sums:
            values = patches.quantized(rows, channel_scale, ranges.get(name))
            sums[name] += energies(exact, patches.multiplied(values, weight, bias))
        return {name: decibels(both) for name, both in sums.items()}
    for part, exact in _parts(matrix, rows, per_channel):
        packed = QuantizedLinear.from_float(part, per_channel=per_channel, channel_scale=channel_scale).packed
        sums["dynamic"] += energies(exact, ops.linear_dynamic(rows, packed))
        for name, (scale, zero_point) in ranges.items():
            sums[name] += energies(exact, ops.linear_static(rows, packed, scale, zero_point, torch.float32))
    return {name: decibels(both) for name, both in sums.items()}


@torch.no_grad()
def measure_scales(
    matrix: Matrix,
    rows: Tensor,
    scales: Sequence[Tensor | None],
    *,
    per_channel: bool = True,
    patches: Patches | None = None,
) -> list[float]:
    """Output SQNR in dB under the dynamic scheme with each of these channel scales (K,), as `measure`.

    Of many output channels with a scale each, about 512 are measured.

    >>> _ = torch.manual_seed(0)
    >>> matrix, rows = Matrix(torch.randn(64, 64), None), torch.randn(32, 64)
    >>> measure_scales(matrix, rows, [None]) == [measure(matrix, rows, {})["dynamic"]]
    True
    """
    if patches is not None:
        return [
            measure(matrix, rows, {}, per_channel=per_channel, channel_scale=scale, patches=patches)["dynamic"]
            for scale in scales
        ]
    if per_channel:
        some = slice(None, None, max(1, len(matrix.weight) // _ENOUGH_CHANNELS))
        matrix = Matrix(matrix.weight[some], None if matrix.bias is None else matrix.bias[some])
    sums = torch.zeros(len(scales), 2, dtype=torch.float64, device="cpu")
    for part, exact in _parts(matrix, rows, per_channel):
        for both, scale in zip(sums, scales, strict=True):
            packed = QuantizedLinear.from_float(part, per_channel=per_channel, channel_scale=scale).packed
            both += energies(exact, ops.linear_dynamic(rows, packed))
    return [decibels(both) for both in sums]


def _patches_parts(
    matrix: Matrix, rows: Tensor, per_channel: bool, channel_scale: Tensor | None, patches: Patches
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What a convolution gives for rows of patches, and its int8 weight and bias as floats."""
    weight, bias = matrix.weight.float(), None if matrix.bias is None else matrix.bias.float()
    exact = patches.multiplied(patches.values(rows), weight, bias)
    codes, scale = quantize_weight(weight, per_channel=per_channel, channel_scale=patches.tiled_scale(channel_scale))
    return exact, dequantize(codes, scale.contiguous(), axis=0), bias


def _parts(matrix: Matrix, rows: Tensor, per_channel: bool) -> Iterator[tuple[Matrix, Tensor]]:
    """Some output channels at a time, and what they give for `rows`: a float32 copy of a whole large layer is large."""
    for some in weight_rows(matrix.weight, per_channel=per_channel):
        part = Matrix(matrix.weight[some], None if matrix.bias is None else matrix.bias[some])
        bias = None if part.bias is None else part.bias.float()
        yield part, nn.functional.linear(rows, part.weight.float(), bias)
