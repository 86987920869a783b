"""What a conversion decided, for the `torchq` logger: a summary at INFO, and each layer with its reason at DEBUG."""

import logging
from collections import Counter

from torchq.planning.plan import Plan

_log = logging.getLogger("torchq.convert")


def log_plan(plan: Plan, model: str) -> None:
    """Logs a plan that has been applied to a model of this type."""
    if not _log.isEnabledFor(logging.INFO):
        return
    _log.info("%s: %s", model, summary(plan))
    for name, layer in plan.layers.items():
        rounded = ", rounded by GPTQ" if layer.rounding == "gptq" else ""
        smoothed = "" if layer.channel_scale is None else ", smoothed"
        db = "" if layer.measured_db is None else f", {layer.measured_db:.1f} dB"
        _log.debug("layer %s: %s%s%s%s: %s", name or "(root)", layer.kind, smoothed, rounded, db, layer.reason)
    for name, attention in plan.attentions.items():
        _log.debug("attention %s: %s: %s", name or "(root)", attention.scheme, attention.reason)
    for name, table in plan.tables.items():
        _log.debug("table %s: %s: %s", name or "(root)", table.kind, table.reason)


def summary(plan: Plan) -> str:
    """A plan in one line.

    >>> from torchq.planning.plan import LayerPlan
    >>> summary(Plan({"a": LayerPlan("int8 dynamic", ""), "b": LayerPlan("float", "")}))
    '1 of 2 layers in int8 (1 int8 dynamic, 1 float)'
    """
    kinds = Counter(layer.kind for layer in plan.layers.values())
    shown = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    parts = [f"{len(plan.int8_layers())} of {len(plan.layers)} layers in int8 ({shown})"]
    if plan.tables:
        parts.append(f"{len(plan.int8_tables())} of {len(plan.tables)} tables in int8")
    if plan.attentions:
        schemes = Counter(attention.scheme for attention in plan.attentions.values())
        parts.append("attention in " + ", ".join(f"{scheme} ({count})" for scheme, count in schemes.most_common()))
    if plan.checked is not None:
        parts.append(f"output SQNR {plan.checked.model_db:.1f} dB")
    return "; ".join(parts)
