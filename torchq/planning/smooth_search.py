"""Smoothing search: `dataflow` has proven which inputs may be smoothed; this decides which are, and with which alpha.

Each candidate is measured like any other scheme: the scaled layers are planned again on their scaled samples.
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
    """Tries every alpha on each group of layers that share an input. Where one is better, it replaces their plans."""
    for source, readers in evidence.readers.items():
        if _may_be_smoothed(source, readers, plan, evidence):
            plan = _smooth_one(source, readers, plan, evidence)
    return plan


def _may_be_smoothed(source: str, readers: tuple[str, ...], plan: Plan, evidence: Evidence) -> bool:
    layers = evidence.layers
    if source in layers and evidence.config.weight == "per_tensor":
        return False  # the one scale of its weight would no longer fit all rows, and its codes would change
    if any(layers[name].trained for name in (source, *readers) if name in layers):
        return False  # it was trained on its present inputs and weights
    return all(plan.layers[name].sqnr_db for name in readers)  # empty if nothing was measured


def _smooth_one(source: str, readers: tuple[str, ...], plan: Plan, evidence: Evidence) -> Plan:
    config = evidence.config
    group = _Group([evidence.layers[name] for name in readers], evidence)
    before = {
        layer.name: plan_layer(layer, record.held_out(), config, few=record.is_too_few)
        if record.is_few
        else plan.layers[layer.name]
        for layer, record in group.members
    }
    after = {alpha: group.planned(group.scales(alpha, held_out=True)) for alpha in ALPHAS}
    alpha = _best_alpha(before, after, config.margin_db)
    if alpha is None:
        return plan
    scales = group.scales(alpha)
    smoothing = Smoothing(tuple(scales.tolist()), readers, alpha, _mean_db(before), _mean_db(after[alpha]))
    layers = dict(plan.layers)
    for name, chosen in after[alpha].items():
        ranges = None  # for a static layer: from all data, where the trial may have used half of the sample
        if chosen.observer is not None:
            ranges = group.trial(evidence.records[name], scales, held_out=False).ranges[chosen.observer]
        layers[name] = dataclasses.replace(chosen, smoothed=source, input_qparams=ranges)
    return dataclasses.replace(plan, layers=layers, smoothings={**plan.smoothings, source: smoothing})


class _Group:
    """The readers of one input, for trials with that input divided by different scales."""

    def __init__(self, layers: list[Layer], evidence: Evidence) -> None:
        self.members = [(layer, evidence.records[layer.name]) for layer in layers]
        self._config = evidence.config
        self._latest: tuple[Tensor, dict[int, Trial]] | None = None

    def scales(self, alpha: float, *, held_out: bool = False) -> Tensor:
        """The scales (K,), from the peaks of all data, or of the rows that are not held out."""
        trials = [record.held_out() if held_out else record.whole for _, record in self.members]
        peak = torch.stack([trial.peak for trial in trials]).amax(dim=0)
        return smoothing_scales(peak, [layer.weight for layer, _ in self.members], alpha)

    def planned(self, scales: Tensor) -> dict[str, LayerPlan]:
        """The plans of the layers for inputs divided by `scales`, measured on held-out rows if rows are few."""
        return {
            layer.name: plan_layer(
                layer, self.trial(record, scales, held_out=True), self._config, into=scales, few=record.is_too_few
            )
            for layer, record in self.members
        }

    def trial(self, record: Record, scales: Tensor, *, held_out: bool) -> Trial:
        """The record's trial for inputs divided by `scales`, computed once for all layers that share the record."""
        if self._latest is None or self._latest[0] is not scales:
            self._latest = scales, {}
        known = self._latest[1]
        if id(record) not in known:
            known[id(record)] = record.held_out(into=scales) if held_out else record.trial(into=scales)
        return known[id(record)]


def _best_alpha(
    before: dict[str, LayerPlan], after: Mapping[float, dict[str, LayerPlan]], margin_db: float
) -> float | None:
    """The best alpha, or None to leave the layers as they are.

    The options with the most int8 layers remain. Of these, those remain whose mean SQNR is within `margin_db` of the
    highest. The best of them has the most static layers, and then the highest SQNR. Not smoothing wins nevertheless if
    it is among them, and the best adds no static layer and gains at most MIN_GAIN_DB. (It is not among them if the gain
    exceeds `margin_db`, so with a smaller `margin_db` than MIN_GAIN_DB that much gain is enough.)
    """
    options: list[tuple[float | None, dict[str, LayerPlan]]] = [(None, before), *after.items()]
    most = max(_count(plans, "int8") for _, plans in options)
    if most == 0:
        return None  # all stay float
    most_int8 = {
        alpha: (_count(plans, "int8 static"), _mean_db(plans))
        for alpha, plans in options
        if _count(plans, "int8") == most and not math.isnan(_mean_db(plans))
    }
    top = max((db for _, db in most_int8.values()), default=0.0)
    near = {alpha: score for alpha, score in most_int8.items() if score[1] >= top - margin_db}
    best = max(near, key=lambda alpha: near[alpha], default=None)
    if None in near and near[None][0] == near[best][0] and near[None][1] >= near[best][1] - MIN_GAIN_DB:
        return None
    return best


def _count(plans: Mapping[str, LayerPlan], kind: str) -> int:
    return sum(plan.kind.startswith(kind) for plan in plans.values())


def _mean_db(plans: Mapping[str, LayerPlan]) -> float:
    """The mean output SQNR of the layers: as planned, or the best candidate's for a layer that stays float."""
    chosen = [plan.measured_db if plan.kind != "float" else max(plan.sqnr_db.values()) for plan in plans.values()]
    return sum(db for db in chosen if db is not None) / len(chosen)
