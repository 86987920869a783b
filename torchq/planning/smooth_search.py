"""Smoothing search: which of the inputs that `dataflow` has proven may be smoothed are, and by which alpha.

Each candidate is measured as any other scheme: by planning the scaled layers anew on their scaled samples.
"""

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from torchq.calibration.calibrate import Evidence
from torchq.calibration.record import Record, Trial
from torchq.modules.registry import Layer
from torchq.planning.choose import plan_layer
from torchq.planning.plan import LayerPlan, Plan, Smoothing
from torchq.planning.smoothing import ALPHAS, MIN_GAIN_DB, smoothing_scales


def smooth(plan: Plan, evidence: Evidence) -> Plan:
    """Tries every alpha on each group of layers that share an input, and replaces their plans where one pays."""
    for source, readers in evidence.readers.items():
        if _may_be_smoothed(source, readers, plan, evidence):
            plan = _smooth_one(source, readers, plan, evidence)
    return plan


def _may_be_smoothed(source: str, readers: tuple[str, ...], plan: Plan, evidence: Evidence) -> bool:
    layers = evidence.layers
    if source in layers and evidence.config.weight == "per_tensor":
        return False  # dividing its outputs would change its own weight codes
    if any(layers[name].trained for name in (source, *readers) if name in layers):
        return False  # trained on what it has
    return all(plan.layers[name].sqnr_db for name in readers)  # else nothing was measured


def _smooth_one(source: str, readers: tuple[str, ...], plan: Plan, evidence: Evidence) -> Plan:
    config = evidence.config
    group = _Group([evidence.layers[name] for name in readers], evidence)
    before = {
        layer.name: plan_layer(layer, record.held_out(), config) if record.is_few else plan.layers[layer.name]
        for layer, record in group.members
    }
    after = {alpha: group.planned(group.scales(alpha, held_out=True)) for alpha in ALPHAS}
    alpha = _cheapest(before, after, config.margin_db)
    if alpha is None:
        return plan
    scales = group.scales(alpha)
    smoothing = Smoothing(tuple(scales.tolist()), readers, alpha, _mean_db(before), _mean_db(after[alpha]))
    layers = dict(plan.layers)
    for name, chosen in after[alpha].items():
        ranges = None  # of all data, not only of the half that was judged
        if chosen.observer is not None:
            ranges = group.trial(evidence.records[name], scales, held_out=False).ranges[chosen.observer]
        layers[name] = dataclasses.replace(chosen, smoothed=source, input_qparams=ranges)
    return dataclasses.replace(plan, layers=layers, smoothings={**plan.smoothings, source: smoothing})


class _Group:
    """The readers of one input, tried with that input divided by some scales."""

    def __init__(self, layers: list[Layer], evidence: Evidence) -> None:
        self.members = [(layer, evidence.records[layer.name]) for layer in layers]
        self._config = evidence.config
        self._latest: tuple[Tensor, dict[int, Trial]] | None = None

    def scales(self, alpha: float, *, held_out: bool = False) -> Tensor:
        """The scales (K,), from the peaks of all data or of those rows that are not held out."""
        trials = [record.held_out() if held_out else record.whole for _, record in self.members]
        peak = torch.stack([trial.peak for trial in trials]).amax(dim=0)
        return smoothing_scales(peak, [layer.weight for layer, _ in self.members], alpha)

    def planned(self, scales: Tensor) -> dict[str, LayerPlan]:
        """The plans of the layers for inputs divided by `scales`, judged on held-out rows where rows are few."""
        return {
            layer.name: plan_layer(layer, self.trial(record, scales, held_out=True), self._config, into=scales)
            for layer, record in self.members
        }

    def trial(self, record: Record, scales: Tensor, *, held_out: bool) -> Trial:
        """The record's trial for inputs divided by `scales`: one for all layers that share the record."""
        if self._latest is None or self._latest[0] is not scales:
            self._latest = scales, {}
        known = self._latest[1]
        if id(record) not in known:
            known[id(record)] = record.held_out(into=scales) if held_out else record.trial(into=scales)
        return known[id(record)]


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
