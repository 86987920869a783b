"""Fusion: layers compute the activation that follows them, and pass u8 codes to the next layer."""

import dataclasses
from collections import Counter

from torch import nn

from torchq.calibration.calibrate import Evidence
from torchq.modules.activations import activation_of
from torchq.ops import Activation
from torchq.planning.layers import has_hooks
from torchq.planning.plan import LayerPlan, Plan

IDLE = (nn.Dropout, nn.Identity)  # they return their input in eval mode


def fuse(plan: Plan, evidence: Evidence) -> Plan:
    """Folds an activation that follows an int8 layer into that layer, and lets static neighbours pass u8 codes.

    That is safe only if nothing else reads the values in between. It holds inside an nn.Sequential with the original
    forward, if its children appear nowhere else in the model, and if calibration counted as many calls of each child as
    of the Sequential, so that no child was called in any other way.
    """
    plans = dict(plan.layers)
    places = Counter(id(child) for module in evidence.model.modules() for child in module._modules.values())
    for name, sequential in evidence.model.named_modules():
        calls = evidence.calls[name]
        if type(sequential).forward is not nn.Sequential.forward or "forward" in vars(sequential) or calls == 0:
            continue
        run: list[tuple[str, nn.Module | None]] = []
        for key, child in sequential._modules.items():
            path = f"{name}.{key}" if name else key
            only_here = child is not None and places[id(child)] == 1 and evidence.calls[path] == calls
            run.append((path, child if only_here else None))
        _fuse_run(run, plans)
    return dataclasses.replace(plan, layers=plans)


def _fuse_run(run: list[tuple[str, nn.Module | None]], plans: dict[str, LayerPlan]) -> None:
    """Fuses within `run`: the children of one Sequential in order, None for those that may also be used elsewhere."""

    def is_int8(name: str, module: nn.Module | None) -> bool:
        return module is not None and name in plans and plans[name].is_int8

    for i, (name, layer) in enumerate(run):
        if not is_int8(name, layer):
            continue
        activation, skipped, feeds = None, [], None
        kind = Activation.NONE
        for follower, module in run[i + 1 :]:
            if is_int8(follower, module):
                both_static = plans[name].kind == plans[follower].kind == "int8 static"
                feeds = follower if both_static else None
                break
            if module is None or has_hooks(module):
                break
            if kind == Activation.NONE and activation_of(module) != Activation.NONE:
                activation, kind = follower, activation_of(module)
            elif type(module) in IDLE or kind == activation_of(module) == Activation.RELU:  # relu(relu(x)) = relu(x)
                skipped.append(follower)
            else:
                break
        skipped = skipped if feeds else []
        plans[name] = dataclasses.replace(plans[name], activation=activation, skipped=tuple(skipped), feeds=feeds)
