"""Mixtures of experts in a model: the modules that choose, and the experts that nobody chose."""

import inspect
from collections.abc import Iterator
from types import FunctionType
from typing import Any

from torch import nn

from torchq.calibration.calibrate import Evidence
from torchq.modules.plain_code import forward_of
from torchq.modules.registry import type_of

_CHOICES = ({"topk"}, {"argmax", "one_hot"})
"""What the code of a module that chooses names: argmax alone also finds the last token, or the next one."""


def choosing(model: nn.Module) -> list[str]:
    """The modules that choose, in model order: those whose code says so, and stacked experts, whatever chooses them."""
    picking = {kind for kind in {type(module) for module in model.modules()} if _picks(kind)}
    return [name for name, module in model.named_modules() if type(module) in picking or _is_routed(module)]


def unreached_experts(evidence: Evidence) -> set[str]:
    """The layers of experts without calibration data, known to run by calls: those of other experts, or of none, do.

    These are stacked experts, and those in a list of modules beside what chooses, where the same layer of another one
    ran. Of other layers without data nothing is known: code that never calls a layer may still read its weight.
    """
    missed = [evidence.layers[name] for name, record in evidence.records.items() if not record.has_data]
    found = {layer.name for layer in missed if layer.kind.routed}
    for path, experts in _lists(evidence.model) if missed else ():
        for name in (layer.name for layer in missed if layer.name.startswith(f"{path}.")):
            own, _, inner = name.removeprefix(f"{path}.").partition(".")
            kind = type(experts.get_submodule(own))
            twins = (other for other, expert in experts.named_children() if other != own and type(expert) is kind)
            if any(_ran(".".join(filter(None, (path, twin, inner))), evidence) for twin in twins):
                found.add(name)
    return found


def _lists(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The lists and dicts of modules that a module holds which chooses, or which holds one that does."""
    names = choosing(model)
    owners = dict.fromkeys(owner for name in names for owner in (name, name.rpartition(".")[0]))
    children = [(owner, *child) for owner in owners for child in model.get_submodule(owner).named_children()]
    return [
        (".".join(filter(None, (owner, name))), module)
        for owner, name, module in children
        if isinstance(module, (nn.ModuleList, nn.ModuleDict))
    ]


def _ran(name: str, evidence: Evidence) -> bool:
    return name in evidence.records and evidence.records[name].calls > 0


def _is_routed(module: nn.Module) -> bool:
    kind = type_of(module)
    return kind is not None and kind.routed


def _picks(kind: type[nn.Module]) -> bool:
    """Whether the forward of this class, or a method that it names, chooses. Their code is read, not run."""
    return any(choice <= set(code.co_names) for code in _code(kind) for choice in _CHOICES)


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
