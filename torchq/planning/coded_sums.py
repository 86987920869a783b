"""Which sums between convolutions are handed over as u8 codes is judged by the model's output.

As floats a sum on a large map is more than L2 holds: it is written to L3, and read from there by the next block's
convolutions, which quantize it, and by its sum. As codes it is a quarter of that, and quantized once. All its readers
then have one range, and none may scale its channels. What that costs, no single layer can tell.
"""

import dataclasses
from typing import NamedTuple, TypeVar

from torch import nn

from torchq.calibration.calibrate import Evidence
from torchq.numerics.qparams import QParams
from torchq.planning.candidates import Candidate, first_that_keeps
from torchq.planning.plan import LayerPlan, Plan
from torchq.planning.rounding import rounded_again
from torchq.planning.selfcheck import ENOUGH_DB, SelfCheck

M = TypeVar("M", bound=nn.Module)

SUMS_DB = 2.0
"""What sums in codes may cost the model's output, all together; and it keeps ENOUGH_DB."""

LARGE = 1 << 18
"""The values of a sum, 1 MB of floats, from which on it is worth codes: L2 holds less beside the weights."""

SUMS = "sums in codes"


class _Sum(NamedTuple):
    """A sum that could be codes.

    Args:
        name: of the layer that adds.
        values: how many values it has in a call.
        readers: the layers that read it, as they would then be planned.
    """

    name: str
    values: float
    readers: dict[str, LayerPlan]

    @property
    def qparams(self) -> QParams | None:
        """Of its codes."""
        return next(iter(self.readers.values())).input_qparams


def coded_sums(model: M, plan: Plan, converted: M, evidence: Evidence, check: SelfCheck) -> tuple[Plan, M]:
    """The plan with the large sums in codes, or the larger half, if the output keeps enough; and the model by it."""
    checked = plan.checked
    if checked is None or evidence.config.rounding == "gptq":
        return plan, converted
    least, sums = max(checked.model_db - SUMS_DB, ENOUGH_DB), _sums(plan, evidence)
    counts = dict.fromkeys((len(sums), (len(sums) + 1) // 2)) if sums else ()
    candidates = (_with(plan, sums[:count]) for count in counts)
    return first_that_keeps(least, candidates, SUMS, model, evidence, check) or (plan, converted)


def _sums(plan: Plan, evidence: Evidence) -> list[_Sum]:
    """What could be codes, the largest first."""
    sums = []
    for name, readers in evidence.sums.items():
        planned = plan.layers[name]
        chained = planned.adds and planned.hands and planned.activation
        if planned.kind != "int8 static" or not chained:
            continue
        largest = max(readers, key=lambda each: evidence.records[each].values_per_call)
        record, ranges = evidence.records[largest], evidence.records[largest].trial(None).ranges
        if record.values_per_call < LARGE or not ranges:
            continue
        observer = plan.layers[largest].observer
        observer = observer if observer in ranges else next(iter(ranges))
        plans = {each: _as_reader(each, plan, evidence, observer, ranges[observer]) for each in readers}
        read = {each: found for each, found in plans.items() if found is not None}
        if len(read) == len(plans):
            sums.append(_Sum(name, record.values_per_call, read))
    return sorted(sums, key=lambda each: -each.values)


def _as_reader(name: str, plan: Plan, evidence: Evidence, observer: str, qparams: QParams) -> LayerPlan | None:
    """The layer with this range, which all readers share, and without a channel_scale; None if it takes no codes."""
    planned, layer = plan.layers[name], evidence.layers[name]
    if planned.kind != "int8 static" or layer.trained is not None or not layer.kind.takes_codes(layer.module):
        return None
    static = dataclasses.replace(
        planned,
        reason="static, and reads a sum in codes",
        input_qparams=qparams,
        observer=observer,
        channel_scale=None,
        alpha=None,
        smoothing_db=None,
    )
    return rounded_again(name, static, evidence)


def _with(plan: Plan, sums: list[_Sum]) -> Candidate:
    """The plan with these sums in codes."""
    layers = dict(plan.layers)
    for each in sums:
        layers |= each.readers
    for each in sums:
        layers[each.name] = dataclasses.replace(layers[each.name], sum_qparams=each.qparams)
    return Candidate(dataclasses.replace(plan, layers=layers), [name for each in sums for name in each.readers])
