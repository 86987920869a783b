"""What decides where the first router of experts sends a row stays in float, where that is few of the weights.

A router that picks 2 of 8 experts turns a small error into a large one, where two experts are nearly as good as each
other: a row of other experts is another row. In front of the first router stands little more than one attention. It
writes most of what this router reads, so there its error is the largest, and what the router chooses changes all that
follows. Later routers read sums of many layers, each with an error of its own, which no small share of them would mend.

Whether a row will be sent elsewhere can't be judged by a few batches, in which one or two rows make all the
difference. So what stays in float is a matter of the weights, with and without data.
"""

from torchq.calibration.calibrate import Evidence
from torchq.modules.registry import Layer
from torchq.planning import stems
from torchq.planning.budget import return_to_float
from torchq.planning.mixtures import choosing
from torchq.planning.plan import Plan


def keep_choices(plan: Plan, evidence: Evidence) -> Plan:
    """A stage: routers stay in float, and layers in front of the first one, each where they are few of the weights.

    The layers that a module holds itself which chooses are its router. "In front" is the order in which the model lists
    its modules. Where that is not the order of calls, other layers stay in float, as small a share.
    """
    layers = stems.int8_layers(plan, evidence)
    if evidence.config.activation != "auto" or any(layer.trained for layer in layers.values()):
        return plan
    places = {name: place for place, (name, _) in enumerate(evidence.model.named_modules())}
    choosers = choosing(evidence.model)
    holders = set(choosers)
    routers = [name for name, layer in layers.items() if _parent(layer) in holders and not layer.kind.routed]
    for names in (routers, _before_the_first(choosers, places, layers)):
        held = stems.share(names, layers)
        if held <= stems.SMALL_SHARE:
            why = f"routers choose by what it gives: {held:.2%} of the weights"
            plan = return_to_float(plan, dict.fromkeys(names, why))
    return plan


def _before_the_first(choosers: list[str], places: dict[str, int], layers: dict[str, Layer]) -> list[str]:
    """The layers in front of the first module that chooses and has any in front of it; the model itself has none."""
    for chooser in choosers:
        if names := [name for name, layer in layers.items() if places[layer.path] < places[chooser]]:
            return names
    return []


def _parent(layer: Layer) -> str:
    return layer.path.rpartition(".")[0]
