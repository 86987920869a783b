"""How precisely each attention of the model is computed: measured on the model's own output.

The fastest scheme is the least exact. How much that matters to the model, no attention knows by itself. So all start in
float32, which is exact to rounding. Those that lose least by themselves get the fastest scheme first, as many as the
model's output allows; of the rest, as many as it allows get the next faster one.

Which schemes are how fast depends on this CPU's kernel and on the number of keys (`kernels.attention_schemes`). What
was chosen is in the plan, which is obeyed on every CPU.
"""

import dataclasses

from torch import nn

from torchq.modules.attention import AttentionErrors, measuring
from torchq.modules.attention_offer import attention_modules, offer_attention
from torchq.planning.attach import attach_plan
from torchq.planning.plan import AttentionPlan, Plan, attention_schemes
from torchq.planning.selfcheck import MARGIN_DB, SelfCheck

ROUNDING_DB = 90.0
"""An output this close differs by float32's rounding only."""


def choose_attention(converted: nn.Module, plan: Plan, check: SelfCheck, choice: str) -> Plan:
    """The plan with a row for each attention; the converted model computes by it."""
    names = list(attention_modules(converted))
    if choice == "none" or not names:
        return plan
    if choice != "auto":
        rows = {name: AttentionPlan(choice, "as the config says") for name in names}
        return _applied(converted, plan, rows, check.compare(_offered(converted, rows)))
    errors = AttentionErrors()
    exact = {name: AttentionPlan("float32", "no data to measure a faster scheme with") for name in names}
    with measuring(errors):
        exact_db = check.compare(_offered(converted, exact))
    own_db = None if plan.checked is None else plan.checked.model_db
    if exact_db is None or own_db is None:
        return _applied(converted, plan, exact, exact_db)
    if exact_db < min(own_db - MARGIN_DB, ROUNDING_DB):
        rows = {name: AttentionPlan("sdpa", "torchq's attention gives this model other values") for name in names}
        return _applied(converted, plan, rows, check.compare(_offered(converted, rows)))
    rows = {name: _measured(converted.get_submodule(name), errors) for name in names}
    rows, db = _fastest(converted, rows, exact_db, check)
    return _applied(converted, plan, rows, db)


def _measured(module: nn.Module, errors: AttentionErrors) -> AttentionPlan:
    sqnr_db = errors.sqnr_db(module)
    if not errors.was_called(module):
        reason = "no batch had a call that torchq computes"
    else:
        reason = "a faster scheme would cost accuracy" if sqnr_db else "none is faster for so few keys"
    return AttentionPlan("float32", reason, sqnr_db)


def _fastest(
    converted: nn.Module, rows: dict[str, AttentionPlan], exact_db: float, check: SelfCheck
) -> tuple[dict[str, AttentionPlan], float]:
    """As many rows in faster schemes as keep the output within MARGIN_DB of all float32: all, a half, or a quarter.

    First each row's fastest scheme is tried, then each one's second.
    """
    best, least_db = exact_db, exact_db - MARGIN_DB
    for place in range(max(len(row.sqnr_db) for row in rows.values())):
        left = {
            name: list(row.sqnr_db)[place]
            for name, row in rows.items()
            if row.scheme == "float32" and place < len(row.sqnr_db)
        }
        names = sorted(left, key=lambda name: -rows[name].sqnr_db[left[name]])
        for count in dict.fromkeys(-(-len(names) // part) for part in (1, 2, 4)):
            reason = f"the model's output loses less than {MARGIN_DB} dB by it"
            faster = {name: dataclasses.replace(rows[name], scheme=left[name], reason=reason) for name in names[:count]}
            db = check.compare(_offered(converted, rows | faster), least_db=least_db) if faster else None
            if db is not None and db > least_db:
                rows, best = rows | faster, db
                break
    return rows, best


def _offered(converted: nn.Module, rows: dict[str, AttentionPlan]) -> nn.Module:
    offer_attention(converted, attention_schemes(rows))
    return converted


def _applied(converted: nn.Module, plan: Plan, rows: dict[str, AttentionPlan], db: float | None) -> Plan:
    """Applies the rows, and puts them and the output's SQNR into the plan, and into the one that the model carries."""
    _offered(converted, rows)
    checked = plan.checked
    if checked is not None and db is not None:
        checked = dataclasses.replace(checked, output_db={**checked.output_db, checked.chosen: db})
    plan = dataclasses.replace(plan, attentions=rows, checked=checked)
    attach_plan(converted, plan)
    return plan
