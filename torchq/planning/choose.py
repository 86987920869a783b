"""The scheme of each layer, by measuring every candidate on the layer's own calibration rows."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from torchq import ops
from torchq.calibration.calibrate import Calibration
from torchq.calibration.record import Record
from torchq.config import QConfig
from torchq.modules.linear import QuantizedLinear
from torchq.modules.qat_linear import QATLinear
from torchq.numerics.metrics import decibels, energies
from torchq.numerics.qparams import QParams
from torchq.observers import Observer
from torchq.planning.plan import LayerPlan, Plan
from torchq.planning.smoothing import scaled_parts


def make_plan(
    layers: Mapping[str, nn.Linear],
    barred: Mapping[str, str],
    calibration: Calibration | None,
    config: QConfig,
) -> Plan:
    """Decides every layer alone: those in `barred` stay float for the reason given, the others as measured.

    Raises:
        ValueError: `activation="static"` and a layer the calibration data never reached.
    """
    if config.activation == "static" and calibration is not None:
        untrained = {name for name, layer in layers.items() if not isinstance(layer, QATLinear)}
        missed = [name for name, record in calibration.records.items() if name in untrained and not record.has_data]
        if missed:
            raise ValueError(
                f"torchq.convert: activation='static', but calib_loader never reached {', '.join(map(repr, missed))}. "
                "Pass data that runs these layers, exclude them, or use activation='auto'."
            )
    plans: dict[str, LayerPlan] = {}
    for name, layer in layers.items():
        if name in barred:
            plans[name] = LayerPlan("float", barred[name])
        elif isinstance(layer, QATLinear):
            plans[name] = plan_trained(layer, None if calibration is None else calibration.records[name])
        elif calibration is None:
            plans[name] = LayerPlan("int8 dynamic", "no calibration data", config.weight == "per_channel")
        else:
            plans[name] = plan_layer(layer, calibration.records[name], config)
    return Plan(plans)


def plan_layer(
    layer: nn.Linear,
    record: Record,
    config: QConfig,
    ranges: Mapping[str, QParams] | None = None,
    *,
    into: Tensor | None = None,
) -> LayerPlan:
    """The scheme and range with the least error on the layer's sample, or float where none is good enough.

    `ranges` are those of `static_ranges(record)`, for a caller that has them. `into` (K,) is what the record's inputs
    were divided by, for the layer to take up.
    """
    per_channel = config.weight == "per_channel"
    if record.calls == 0 and config.activation == "auto":
        return LayerPlan("float", "calib_loader never reached it; its weight may be read without calling it")
    if not record.has_data:
        return LayerPlan("int8 dynamic", "no calibration data reached it", per_channel)

    ranges = static_ranges(record) if ranges is None else ranges
    measured = measure(layer, record.sample.rows, ranges, per_channel=per_channel, into=into)
    observer = max(ranges, key=lambda name: measured[name])
    static, dynamic = measured[observer], measured["dynamic"]
    numbers = f"static {static:.1f} dB ({observer}), dynamic {dynamic:.1f} dB"
    enough = {"static": static >= config.min_sqnr_db, "dynamic": dynamic >= config.min_sqnr_db}  # nan is not
    if config.activation == "auto":
        use_static = enough["static"] and static >= dynamic - config.margin_db
        reason = f"{numbers}: {'static costs no accuracy' if use_static else 'static would cost accuracy'}"
    else:
        use_static = config.activation == "static"
        reason = f"asked for; {numbers}"
    if not enough["static" if use_static else "dynamic"]:
        return LayerPlan("float", f"{numbers}: below min_sqnr_db = {config.min_sqnr_db:g}", sqnr_db=measured)
    if not use_static:
        return LayerPlan("int8 dynamic", reason, per_channel, sqnr_db=measured)
    return LayerPlan("int8 static", reason, per_channel, ranges[observer], observer, measured)


def plan_trained(layer: QATLinear, record: Record | None) -> LayerPlan:
    """The scheme and range this layer was trained with, whatever their error on the data: training made up for it."""
    trained, reason = layer.input_range.qparams(), f"trained, {layer.input_range.origin}"
    measured = {}
    if record is not None and record.has_data:
        ranges = {} if trained is None else {"trained": trained}
        measured = measure(layer, record.sample.rows, ranges, per_channel=layer.per_channel)
    if trained is None:
        return LayerPlan("int8 dynamic", reason, layer.per_channel, sqnr_db=measured)
    return LayerPlan("int8 static", reason, layer.per_channel, trained, "trained", measured)


def static_ranges(record: Record) -> dict[str, QParams]:
    """What each observer of the record would quantize the input with; needs data."""
    return {name: static_qparams(observer) for name, observer in record.observers.items()}


def static_qparams(observer: Observer) -> QParams:
    """The range of a static layer's input, from what an observer saw of it."""
    scale, zero_point = observer.qparams(dtype=torch.uint8, symmetric=False)
    return QParams(float(scale), int(zero_point))


@torch.no_grad()
def measure(
    layer: nn.Linear,
    rows: Tensor,
    ranges: Mapping[str, QParams],
    *,
    per_channel: bool = True,
    into: Tensor | None = None,
) -> dict[str, float]:
    """Output SQNR in dB of each scheme, against the float layer on the same rows (R, K), by the real integer ops.

    All of inputs divided by `into` (K,), if given: the rows are, and the layer takes it up.

    >>> _ = torch.manual_seed(0)
    >>> layer, rows = nn.Linear(64, 64), torch.randn(32, 64)
    >>> sorted(measure(layer, rows, {"minmax": QParams(0.03, 128)}))
    ['dynamic', 'minmax']
    """
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in ("dynamic", *ranges)}
    for _, part in scaled_parts(layer, per_channel=per_channel, into=into):
        bias = None if part.bias is None else part.bias.float()
        exact = nn.functional.linear(rows, part.weight.float(), bias)
        packed = QuantizedLinear.from_float(part, per_channel=per_channel).packed
        sums["dynamic"] += energies(exact, ops.linear_dynamic(rows, packed))
        for name, (scale, zero_point) in ranges.items():
            sums[name] += energies(exact, ops.linear_static(rows, packed, scale, zero_point, torch.float32))
    return {name: decibels(both) for name, both in sums.items()}
