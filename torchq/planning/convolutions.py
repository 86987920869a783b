"""Which convolutions are static is judged by the model's output, since it decides most of their time.

Static saves a linear layer 1 to 3 %, and a convolution the more: no pass over the image for its range, and the one
before it gives u8 codes, a quarter of the bytes, which nothing quantizes again. So the rule for single layers
(choose.py) is not the last word here. Convolutions that it made dynamic become static, as many as cost the model's
output no more than STATIC_DB, all together, and leave it no more than MARGIN_DB below what one has without data. Where
convolutions are only a part of the model, they save only a part of its time, and may cost as much less. A depthwise one
multiplies floats without quantizing them, so static saves it nothing unless another one gives it codes.
"""

import dataclasses
from itertools import accumulate
from typing import NamedTuple, TypeVar

from torch import nn

from torchq.calibration.calibrate import Evidence
from torchq.planning.candidates import Candidate, first_that_keeps
from torchq.planning.fusion import fuse
from torchq.planning.plan import LayerPlan, Plan
from torchq.planning.rounding import corrected
from torchq.planning.selfcheck import WITHOUT_DATA, SelfCheck

M = TypeVar("M", bound=nn.Module)

STATIC_DB = 1.0
"""What static convolutions may cost the output of a model of nothing else, all together: 12 % more error.

Of other models it is this times the share of convolutions in the values that int8 layers read. It is no more than
`selfcheck.CLOSE_DB`: the output without data is known as far below the plan's.
"""

SHARES = (1.0, 0.75, 0.5)
"""How much of what the dynamic convolutions read is to become static, tried in this order: less saves too little."""

STATIC = "static convolutions"


def static_convolutions(model: M, plan: Plan, converted: M, evidence: Evidence, check: SelfCheck) -> tuple[Plan, M]:
    """The plan with as many static convolutions as it may have, with its figures, and the model converted by it."""
    checked = plan.checked
    if checked is None or checked.chosen == WITHOUT_DATA or evidence.config.activation != "auto":
        return plan, converted
    without_data = checked.output_db.get(WITHOUT_DATA, checked.model_db)
    allowed = STATIC_DB * _share(plan, evidence)
    least = max(checked.model_db - allowed, without_data - check.margin_db)
    candidates = (
        Candidate(fuse(dataclasses.replace(plan, layers={**plan.layers, **static}), evidence), list(static))
        for static in _prefixes(_options(plan, evidence))
    )
    return first_that_keeps(least, candidates, STATIC, model, evidence, check) or (plan, converted)


def _share(plan: Plan, evidence: Evidence) -> float:
    """How much of what int8 layers read in a call convolutions do."""
    read = {name: evidence.records[name].values_per_call for name in plan.int8_layers() if name in evidence.layers}
    total = sum(read.values())
    return sum(read[name] for name in read if evidence.layers[name].kind.absorbs) / total if total else 0.0


class _Option(NamedTuple):
    """A dynamic convolution as a static one.

    Args:
        name: of the layer.
        plan: what it would be.
        values: how many values it reads in a call.
        error: how much more error energy its output has, relative to the output's.
    """

    name: str
    plan: LayerPlan
    values: float
    error: float


def _prefixes(options: list[_Option]) -> list[dict[str, LayerPlan]]:
    """The first of these that read each of SHARES of what all do, without repetitions."""
    total, found = sum(option.values for option in options), {}
    for share in SHARES if options else ():
        read = list(accumulate(option.values for option in options))
        count = 1 + next(i for i, values in enumerate(read) if values >= share * total)
        found[count] = {option.name: option.plan for option in options[:count]}
    return list(found.values())


def _options(plan: Plan, evidence: Evidence) -> list[_Option]:
    """What could be static, those first that add least error for each value they read."""
    options, fed = [], {chain[-1] for chain in evidence.chains.values() if chain}
    for name, planned in plan.layers.items():
        layer = evidence.layers.get(name)
        if planned.kind != "int8 dynamic" or layer is None or not layer.kind.absorbs or layer.trained is not None:
            continue
        if layer.is_depthwise and name not in fed:
            continue
        static = _as_static(name, planned, evidence)
        if static is not None:
            error = _error(static.measured_db) - _error(planned.measured_db)
            options.append(_Option(name, static, evidence.records[name].values_per_call, error))
    return sorted(options, key=lambda option: option.error / option.values)


def _as_static(name: str, planned: LayerPlan, evidence: Evidence) -> LayerPlan | None:
    """The same layer with the best static range; None if it has none that is good enough."""
    record = evidence.records[name]
    observers = [each for each in planned.sqnr_db if each not in ("dynamic", "gptq")]
    if not observers or record.is_too_few:
        return None
    if planned.channel_scale is not None and not evidence.chains.get(name):
        return None  # as smoothing.py says; it would give no codes either
    observer = max(observers, key=lambda each: planned.sqnr_db[each])
    if not planned.sqnr_db[observer] >= evidence.config.min_sqnr_db:
        return None
    static = dataclasses.replace(
        planned,
        kind="int8 static",
        reason="static convolutions cost the model's output little",
        input_qparams=record.trial(planned.scale_vector).ranges[observer],
        observer=observer,
    )
    return corrected(evidence.layers[name], static, record)


def _error(db: float | None) -> float:
    return 0.0 if db is None else 10 ** (-db / 10)
