"""Smoothing search: which of the inputs that `dataflow` has proven may be smoothed are, and by which alpha.

Each candidate is measured as any other scheme: by planning the scaled layers anew on their scaled samples.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from torchq.calibration.calibrate import Calibration
from torchq.calibration.record import Record
from torchq.config import QConfig
from torchq.modules.qat_linear import QATLinear
from torchq.numerics.qparams import QParams
from torchq.planning.choose import plan_layer, static_qparams, static_ranges
from torchq.planning.plan import LayerPlan, Plan, Smoothing
from torchq.planning.smoothing import ALPHAS, MIN_GAIN_DB, smoothing_scales


def smooth(model: nn.Module, plan: Plan, calibration: Calibration, config: QConfig) -> Plan:
    """Tries every alpha on each group of layers that share an input, and replaces their plans where one pays."""
    plans, smoothings = dict(plan.layers), {}
    for source, readers in calibration.readers.items():
        if isinstance(model.get_submodule(source), nn.Linear) and config.weight == "per_tensor":
            continue  # dividing its outputs would change its own weight codes
        if any(isinstance(model.get_submodule(name), QATLinear) for name in (source, *readers)):
            continue  # trained on what it has
        if not all(plans[name].sqnr_db for name in readers):
            continue  # nothing was measured
        linears = {name: cast(nn.Linear, model.get_submodule(name)) for name in readers}
        records = {name: calibration.records[name] for name in readers}
        judged = {name: record.judged() for name, record in records.items()}
        before = {
            name: plans[name] if judged[name] is records[name] else plan_layer(linear, judged[name], config)
            for name, linear in linears.items()
        }
        after = {alpha: _plan_smoothed(linears, judged, _scales(linears, judged, alpha), config) for alpha in ALPHAS}
        alpha = _cheapest(before, after, config.margin_db)
        if alpha is None:
            continue
        old, new, scales = _mean_db(before), _mean_db(after[alpha]), _scales(linears, records, alpha)
        smoothings[source] = Smoothing(tuple(scales.tolist()), readers, alpha, old, new)
        for name, chosen in after[alpha].items():
            reason = f"{chosen.reason}; smoothed in {source!r}, alpha {alpha:g}: {old:.1f} -> {new:.1f} dB"
            ranges = None  # of all data, not only of the half that was judged
            if chosen.observer is not None:
                ranges = static_qparams(records[name].smoothed(scales).observers[chosen.observer])
            plans[name] = dataclasses.replace(chosen, reason=reason, smoothed=source, input_qparams=ranges)
    return dataclasses.replace(plan, layers=plans, smoothings=smoothings)


def _scales(linears: Mapping[str, nn.Linear], records: Mapping[str, Record], alpha: float) -> Tensor:
    """The scales (K,) for readers of one input."""
    peak = torch.stack([record.peak for record in records.values()]).amax(dim=0)
    return smoothing_scales(peak, [linear.weight for linear in linears.values()], alpha)


def _plan_smoothed(
    linears: Mapping[str, nn.Linear], records: Mapping[str, Record], scales: Tensor, config: QConfig
) -> dict[str, LayerPlan]:
    """The plans of these layers with their inputs divided by `scales`; layers that saw the same share the ranges."""
    plans: dict[str, LayerPlan] = {}
    known: list[tuple[Record, Record, dict[str, QParams]]] = []
    for name, record in records.items():
        found = next((entry for entry in known if _saw_the_same(entry[0], record)), None)
        if found is None:
            smoothed = record.smoothed(scales)
            found = (record, smoothed, static_ranges(smoothed))
            known.append(found)
        plans[name] = plan_layer(linears[name], found[1], config, found[2], into=scales)
    return plans


def _saw_the_same(one: Record, other: Record) -> bool:
    """Whether `Record.smoothed` gives the same for both, as for q, k and v of an attention."""
    if one.extremes is None or other.extremes is None or not torch.equal(one.extremes, other.extremes):
        return False
    return torch.equal(one.observed, other.observed) and torch.equal(one.sample.rows, other.sample.rows)


def _cheapest(
    before: dict[str, LayerPlan], after: Mapping[float, dict[str, LayerPlan]], margin_db: float
) -> float | None:
    """The alpha that pays: most int8 layers, then most static ones within `margin_db` of the best, then most SQNR.

    None, which leaves all as it was, where the best of them gains no static layer and less than MIN_GAIN_DB.
    """
    options: list[tuple[float | None, dict[str, LayerPlan]]] = [(None, before), *after.items()]
    most = max(_count(plans, "int8") for _, plans in options)
    if most == 0:
        return None  # all stay float
    able = {
        alpha: (_count(plans, "int8 static"), _mean_db(plans))
        for alpha, plans in options
        if _count(plans, "int8") == most and not math.isnan(_mean_db(plans))
    }
    top = max((db for _, db in able.values()), default=0.0)
    near = {alpha: ranked for alpha, ranked in able.items() if ranked[1] >= top - margin_db}
    best = max(near, key=lambda alpha: near[alpha], default=None)
    if None in near and near[None][0] == near[best][0] and near[None][1] >= near[best][1] - MIN_GAIN_DB:
        return None
    return best


def _count(plans: Mapping[str, LayerPlan], kind: str) -> int:
    return sum(plan.kind.startswith(kind) for plan in plans.values())


def _mean_db(plans: Mapping[str, LayerPlan]) -> float:
    """Over the layers: SQNR as planned, or the best there was where a layer stays float."""
    chosen = [plan.measured_db if plan.kind != "float" else max(plan.sqnr_db.values()) for plan in plans.values()]
    return sum(db for db in chosen if db is not None) / len(chosen)
