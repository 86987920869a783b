"""Of several plans, the first whose model keeps enough of the output's SQNR."""

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple, TypeVar

from torch import nn

from torchq.calibration.calibrate import Evidence
from torchq.planning.apply import applied
from torchq.planning.describe import describe
from torchq.planning.plan import Plan
from torchq.planning.selfcheck import SelfCheck

M = TypeVar("M", bound=nn.Module)


class Candidate(NamedTuple):
    """A plan to try.

    Args:
        plan: the whole plan.
        changed: the layers that it plans otherwise than the plan it was made of.
    """

    plan: Plan
    changed: list[str]


def first_that_keeps(
    least_db: float, candidates: Iterable[Candidate], step: str, model: M, evidence: Evidence, check: SelfCheck
) -> tuple[Plan, M] | None:
    """The first candidate whose output has `least_db`, with its figures, and the model by it; None if none has.

    Args:
        least_db: what the output's SQNR must be.
        candidates: the plans, in the order in which they are wanted.
        step: what they are called among the plan's figures.
        model: the float model.
        evidence: of the calibration.
        check: compares a converted model's output with the float model's.
    """
    for plan, changed in candidates:
        made = applied(model, plan)
        db = check.compare(made, least_db=least_db)
        if db is not None and db >= least_db:
            described = describe(Plan({name: plan.layers[name] for name in changed}), evidence).layers
            plan = dataclasses.replace(plan, layers={**plan.layers, **described})
            before = plan.checked.output_db if plan.checked else {}
            return check.noted(made, plan, {**before, step: db}, step), made
    return None
