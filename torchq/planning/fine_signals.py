"""A first linear layer has two codes for each value of its input where that makes the output much more exact.

All that a model computes depends on the pixels, measurements or observations that its first layer reads. These are few
values, 64 where the layers behind have 1024, say. Rounding each of them to one code of 8 bits can then make most of the
output's error. First convolutions return to float for it (`stems.py`); a linear layer has `FineLinear` between the
two, which multiplies twice. Its weights are rounded by GPTQ, so they make little error themselves.

A layer that reads what tables of embeddings gave is none of these: its error is one of many alike.
"""

import dataclasses
from typing import Any, TypeVar

from torch import nn

from torchq.calibration.calibrate import Evidence
from torchq.modules.linear import LinearType
from torchq.planning.apply import applied
from torchq.planning.fine_heads import WHY, as_fine
from torchq.planning.making import Sharing
from torchq.planning.plan import Plan
from torchq.planning.selfcheck import SelfCheck
from torchq.planning.stems import int8_layers, share

M = TypeVar("M", bound=nn.Module)

LARGEST_SHARE = 0.1
"""How much of the weights of all layers in int8 it may hold."""

GAIN_DB, GAIN_DB_A_SHARE = 1.0, 50.0
"""What it must gain of the output's SQNR: a fifth of the error, and half a dB for each percent of the products."""

ONE_CODE = "first layer with one code a value"


def fine_signals(model: M, plan: Plan, converted: M, evidence: Evidence, check: SelfCheck) -> tuple[Plan, M]:
    """The plan with two codes for what its first layer reads, where one costs much; and the model by it."""
    name, checked = _first(plan, evidence, check), plan.checked
    if name is None or checked is None:
        return plan, converted
    part = share([name], int8_layers(plan, evidence))
    if part > LARGEST_SHARE:
        return plan, converted
    db = checked.model_db
    least_db = db + max(GAIN_DB, GAIN_DB_A_SHARE * part)
    other = _with_two_codes(plan, name, evidence)
    made = applied(model, other, make=Sharing(plan, converted))
    fine_db = check.compare(made, least_db=least_db)
    if fine_db is None or not fine_db > least_db:
        return plan, converted
    reason = f"{WHY}: one costs {fine_db - db:.1f} dB of the model's output, {db:.1f} instead of {fine_db:.1f}"
    other = _replaced(other, name, reason=reason)
    figures = {**checked.output_db, ONE_CODE: db, checked.chosen: fine_db}
    return check.noted(made, other, figures, checked.chosen), made


def _first(plan: Plan, evidence: Evidence, check: SelfCheck) -> str | None:
    """The linear layer that the model calls before all others, tables and convolutions too, if it may have two codes.

    Not what the config wants static, and not trained ones: training compensated the codes that they have.
    """
    planned, layer = plan.layers.get(check.first or ""), evidence.layers.get(check.first or "")
    if planned is None or layer is None or not planned.is_int8 or evidence.config.activation == "static":
        return None
    may = isinstance(layer.kind, LinearType) and layer.trained is None and planned.sum_norm is None
    return layer.name if may and not planned.fine else None


def _with_two_codes(plan: Plan, name: str, evidence: Evidence) -> Plan:
    fine = as_fine(evidence.layers[name], plan.layers[name], evidence)
    plan = dataclasses.replace(plan, layers=plan.layers | {name: fine})
    return (
        plan if fine.feeds is None else _replaced(plan, name, feeds=None, skipped=())
    )  # codes, which it does not give


def _replaced(plan: Plan, name: str, **fields: Any) -> Plan:
    return dataclasses.replace(plan, layers=plan.layers | {name: dataclasses.replace(plan.layers[name], **fields)})
