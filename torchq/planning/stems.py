"""A first convolution stays in float where it holds few of the weights and makes much of the output's error.

What reads pixels or samples gives all that the model works on, and in a model of residual blocks its error runs beside
them to the output. Deep models have more of their own: ViT-B/16 loses 0.6 dB by it, and ResNet-50 0.02. Where blocks
are few, or add little (BEiT multiplies them by 0.1), it is most of the output's error. So the output tells. It has a
scale for each patch already, and rounding its weights makes as much of its error as rounding its input: only float
is much more exact.

Without data there is no output to tell, and with inplace=True no way back. Then it stays in float where other layers
hold most of the weights: it may cost a transformer 16 dB, and in float takes up to 2 % more of its time. In networks of
convolutions it is one of many, costs 0.5 dB at most, and hands its codes on.
"""

from collections.abc import Iterable, Mapping
from typing import TypeVar, cast

from torch import nn

from torchq.calibration.calibrate import Evidence
from torchq.modules.registry import Layer
from torchq.planning.apply import applied
from torchq.planning.budget import return_to_float
from torchq.planning.making import Sharing
from torchq.planning.plan import Plan
from torchq.planning.selfcheck import SelfCheck

M = TypeVar("M", bound=nn.Module)

SIGNAL_CHANNELS = 4
"""A convolution with no more input channels reads pixels or samples, which no other layer has made."""

SMALL_SHARE = 0.01
"""How much of the weights of all layers in int8 it may hold, since in float it takes up to three times as long.

So much may stay in float in front of routers too (`routers.py`)."""

COST_DB = 1.0
"""How much of the output's SQNR it must cost in int8: a fifth of the error."""

MOST_CONVOLUTIONS = 0.5
"""With more of the weights in convolutions, their first one is in int8 without data."""

IN_INT8 = "first convolution in int8"


def float_stems(model: M, plan: Plan, converted: M, evidence: Evidence, check: SelfCheck) -> tuple[Plan, M]:
    """The plan with its first convolution in float where int8 costs much, with its figures, and the model by it."""
    names, checked = _stems(plan, evidence), plan.checked
    if not names or checked is None or evidence.config.activation != "auto":
        return plan, converted
    db = checked.model_db
    made = applied(model, return_to_float(plan, dict.fromkeys(names, "")), make=Sharing(plan, converted))
    exact_db = check.compare(made, least_db=db + COST_DB)
    if exact_db is None or not exact_db > db + COST_DB:
        return plan, converted
    reason = f"int8 costs {exact_db - db:.1f} dB of the model's output, {db:.1f} instead of {exact_db:.1f}"
    plan = return_to_float(plan, dict.fromkeys(names, reason))
    return check.noted(made, plan, {**checked.output_db, IN_INT8: db, checked.chosen: exact_db}, checked.chosen), made


def keep_unjudged(plan: Plan, evidence: Evidence, *, inplace: bool = False) -> Plan:
    """A stage: first convolutions that no output judges stay in float, where other layers hold most of the weights.

    That is without data, and `inplace`.
    """
    if (evidence.batches and not inplace) or evidence.config.activation != "auto":
        return plan
    layers = int8_layers(plan, evidence)
    convolutions = [name for name, layer in layers.items() if layer.kind.absorbs]
    if share(convolutions, layers) > MOST_CONVOLUTIONS:
        return plan
    names = _stems(plan, evidence)
    unjudged = "inplace=True can't undo what costs much" if evidence.batches else "no data to judge it by"
    why = f"{unjudged}: {share(names, layers):.1%} of the weights make all that the others work on"
    return return_to_float(plan, dict.fromkeys(names, why))


def _stems(plan: Plan, evidence: Evidence) -> list[str]:
    """The convolutions in int8 that read a signal; none if they hold more than a small share of all weights."""
    layers = int8_layers(plan, evidence)
    stems = [name for name, layer in layers.items() if _reads_signal(layer)]
    return stems if share(stems, layers) <= SMALL_SHARE else []


def int8_layers(plan: Plan, evidence: Evidence) -> dict[str, Layer]:
    """The layers that the plan has in int8."""
    return {name: evidence.layers[name] for name in plan.int8_layers() if name in evidence.layers}


def share(names: Iterable[str], layers: Mapping[str, Layer]) -> float:
    """How much of the weights of `layers` these of them hold."""
    sizes = {name: layer.out_features * layer.in_features for name, layer in layers.items()}
    return sum(sizes[name] for name in names) / max(sum(sizes.values()), 1)


def _reads_signal(layer: Layer) -> bool:
    return layer.kind.absorbs and layer.trained is None and cast(nn.Conv2d, layer.module).in_channels <= SIGNAL_CHANNELS
