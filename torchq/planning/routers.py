"""What decides where the first router of experts sends a row stays in float, where that is few of the weights.

A router that picks 2 of 8 experts turns a small error into a large one, where two experts are nearly as good as each
other: a row of other experts is another row. In front of the first router stands little more than one attention. It
writes most of what this router reads, so there its error is the largest, and what the router chooses changes all that
follows. Later routers read sums of many layers, each with an error of its own, which no small share of them would mend.

Whether a row will be sent elsewhere can't be judged by a few batches, in which one or two rows make all the
difference. So what stays in float is a matter of the weights, with and without data.
"""

import inspect
from collections.abc import Iterator
from types import FunctionType
from typing import Any

from torch import nn

from torchq.calibration.calibrate import Evidence
from torchq.modules.plain_code import forward_of
from torchq.modules.registry import Layer, type_of
from torchq.planning import stems
from torchq.planning.budget import return_to_float
from torchq.planning.plan import Plan


def keep_choices(plan: Plan, evidence: Evidence) -> Plan:
    """A stage: routers stay in float, and layers in front of the first one, each where they are few of the weights.

    Modules that choose are known by `topk` in their code, or are stacked experts. The layers that one with topk holds
    itself are its router. "In front" is the order in which the model lists its modules. Where that is not the order of
    calls, other layers stay in float, as small a share.
    """
    layers = stems.int8_layers(plan, evidence)
    if evidence.config.activation != "auto" or any(layer.trained for layer in layers.values()):
        return plan
    places = {name: place for place, (name, _) in enumerate(evidence.model.named_modules())}
    choosing = {name for name, module in evidence.model.named_modules() if _is_routed(module) or _picks(type(module))}
    routers = [name for name, layer in layers.items() if _parent(layer) in choosing and not layer.kind.routed]
    for names in (routers, _before_the_first(choosing, places, layers)):
        held = stems.share(names, layers)
        if held <= stems.SMALL_SHARE:
            why = f"routers choose by what it gives: {held:.2%} of the weights"
            plan = return_to_float(plan, dict.fromkeys(names, why))
    return plan


def _before_the_first(choosing: set[str], places: dict[str, int], layers: dict[str, Layer]) -> list[str]:
    """The layers in front of the first module that chooses and has any in front of it; the model itself has none."""
    for chooser in sorted(choosing, key=places.__getitem__):
        if names := [name for name, layer in layers.items() if places[layer.path] < places[chooser]]:
            return names
    return []


def _parent(layer: Layer) -> str:
    return layer.path.rpartition(".")[0]


def _is_routed(module: nn.Module) -> bool:
    kind = type_of(module)
    return kind is not None and kind.routed


def _picks(kind: type[nn.Module]) -> bool:
    """Whether the forward of this class, or a method that it names, uses topk. Their code is read, not run."""
    return any("topk" in code.co_names for code in _code(kind))


def _code(kind: type[nn.Module]) -> Iterator[Any]:
    """The code of a class's forward, and of the methods that it names, but for nn.Module's."""
    waiting, seen = [forward_of(kind)], set()
    while waiting:
        method = _function(waiting.pop())
        if method is not None and method not in seen:
            seen.add(method)
            yield method.__code__
            own = (name for name in method.__code__.co_names if not hasattr(nn.Module, name))
            waiting += [inspect.getattr_static(kind, name, None) for name in own]


def _function(value: Any) -> FunctionType | None:
    """The function that an attribute of a class is, behind decorators. Of anything else nothing is asked."""
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    function = inspect.unwrap(value) if isinstance(value, FunctionType) else None
    return function if isinstance(function, FunctionType) else None
