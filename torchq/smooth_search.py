"""Smoothing search: which of the inputs that `dataflow` has proven may be smoothed are, and by which alpha.

Each candidate is measured as any other scheme: by planning the scaled layers anew on their scaled samples.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from torchq.calibrate import Calibration, Record
from torchq.config import QConfig
from torchq.modules.linear import QParams
from torchq.modules.qat_linear import QATLinear
from torchq.plan import LayerPlan, Plan, plan_layer, static_ranges
from torchq.smoothing import ALPHAS, MIN_GAIN_DB, Smoothing, scaled_linear, smoothing_scales


def smooth(model: nn.Module, plan: Plan, calibration: Calibration, config: QConfig) -> Plan:
    """Tries every alpha on each group of layers that share an input, and replaces their plans where one pays."""
    plans, smoothings = dict(plan.layers), {}
    for source, readers in calibration.readers.items():
        if isinstance(model.get_submodule(source), nn.Linear) and config.weight == "per_tensor":
            continue  # dividing its outputs would change its own weight codes
        if any(isinstance(model.get_submodule(name), QATLinear) for name in (source, *readers)):
            continue  # trained on what it has
        group = {name: (cast(nn.Linear, model.get_submodule(name)), calibration.records[name]) for name in readers}
        before = {name: plans[name] for name in readers}
        if not all(layer.sqnr_db for layer in before.values()):
            continue  # nothing was measured
        peak = torch.stack([record.peak for _, record in group.values()]).amax(dim=0)
        weights = [layer.weight for layer, _ in group.values()]
        scales = {alpha: smoothing_scales(peak, weights, alpha) for alpha in ALPHAS}
        after = {alpha: _plan_smoothed(group, s, config) for alpha, s in scales.items()}
        alpha = _cheapest(before, after, config.margin_db)
        if alpha is None:
            continue
        old, new = _mean_db(before), _mean_db(after[alpha])
        smoothings[source] = Smoothing(tuple(scales[alpha].tolist()), readers, alpha, old, new)
        for name, chosen in after[alpha].items():
            reason = f"{chosen.reason}; smoothed in {source!r}, alpha {alpha:g}: {old:.1f} -> {new:.1f} dB"
            plans[name] = dataclasses.replace(chosen, reason=reason, smoothed=source)
    return dataclasses.replace(plan, layers=plans, smoothings=smoothings)


def _plan_smoothed(
    group: Mapping[str, tuple[nn.Linear, Record]], scales: Tensor, config: QConfig
) -> dict[str, LayerPlan]:
    """The plans of these layers with their inputs divided by `scales`; layers that saw the same share the ranges."""
    plans: dict[str, LayerPlan] = {}
    known: list[tuple[Record, Record, dict[str, QParams]]] = []
    for name, (layer, record) in group.items():
        found = next((entry for entry in known if _saw_the_same(entry[0], record)), None)
        if found is None:
            smoothed = record.smoothed(layer, config, scales)
            found = (record, smoothed, static_ranges(smoothed))
            known.append(found)
        plans[name] = plan_layer(scaled_linear(layer, into=scales), found[1], config, found[2])
    return plans


def _saw_the_same(one: Record, other: Record) -> bool:
    """Whether `Record.smoothed` gives the same for both, as for q, k and v of an attention."""
    if one.extremes is None or other.extremes is None:
        return False
    return torch.equal(one.sample.rows, other.sample.rows) and torch.equal(one.extremes, other.extremes)


def _cheapest(
    before: dict[str, LayerPlan], after: Mapping[float, dict[str, LayerPlan]], margin_db: float
) -> float | None:
    """The alpha that pays: most int8 layers, then most static ones within `margin_db` of the best, then most SQNR.

    None, which leaves all as it was, where the best of them gains no static layer and less than MIN_GAIN_DB.
    """
    options: list[tuple[float | None, dict[str, LayerPlan]]] = [(None, before), *after.items()]
    most = max(_count(plans, "int8") for _, plans in options)
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
