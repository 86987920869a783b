"""Fusion: which layers may compute the activation that follows them, and pass u8 codes to the next layer."""

import dataclasses
from collections.abc import Iterator

from torch import nn

from torchq.calibration.calibrate import Evidence
from torchq.calibration.readers import ADDITION, PADDING
from torchq.modules.activations import activation_named
from torchq.modules.folding import IDLE, followers
from torchq.modules.gated import gated_of
from torchq.modules.layer_norm import LayerNorm
from torchq.modules.straight import line_of
from torchq.ops import Activation
from torchq.planning.layers import has_hooks
from torchq.planning.plan import LayerPlan, Plan


def fuse(plan: Plan, evidence: Evidence) -> Plan:
    """Notes what each int8 layer may be fused with: an activation that reads its output, and in an nn.Sequential codes.

    In an nn.Sequential, and in modules of the user that are such a row by their code (`line_of`), the structure is all
    that is needed: they fuse only inside a call of their own, where nothing else can read what lies in between. So do
    modules whose code has a sum and a LayerNorm behind the layer. Elsewhere a layer waits for the activation that
    calibration saw (`Pending`), or that is known to follow, in torch's transformer layers. All modules stay callable by
    themselves.
    """
    if not evidence.config.fuse:
        return plan
    plans = {
        name: dataclasses.replace(planned, norm=evidence.norms.get(name)) if planned.is_int8 else planned
        for name, planned in plan.layers.items()
    }
    for name, chain in evidence.chains.items():
        if name in plans and plans[name].is_int8:
            plans[name] = _of_chain(name, list(chain), plans, evidence)
    names = {id(layer.module): name for name, layer in evidence.layers.items() if not layer.part}
    for keys, row in _rows(evidence.model):
        _fuse_children(keys, row, names, plans, evidence)
    for name, activation in (evidence.activations | _feed_forwards(evidence.model) | _gates(evidence.model)).items():
        if name in plans and plans[name].is_int8 and not (plans[name].activation or plans[name].feeds):
            plans[name] = dataclasses.replace(plans[name], activation=activation)
    for name, readers in evidence.handovers.items():
        if all(plans[each].is_int8 for each in (name, *readers)) and not plans[name].feeds:
            plans[name] = dataclasses.replace(plans[name], hands=readers)
    for name in evidence.turned:
        if plans[name].is_int8 and not plans[name].feeds:
            plans[name] = dataclasses.replace(plans[name], turned=True)
    for name, norm in (_sum_norms(evidence) | _encoder_norms(evidence.model)).items():
        if name in plans and plans[name].is_int8 and not plans[name].feeds:
            plans[name] = dataclasses.replace(plans[name], sum_norm=norm)
    return dataclasses.replace(plan, layers=plans)


def _rows(model: nn.Module) -> Iterator[tuple[list[str], list[nn.Module | None]]]:
    """Children that are called one after the other and nothing else, by their full names, of each such module."""
    for path, module in model.named_modules():
        if "forward" in vars(module):
            continue
        line = line_of(type(module))
        names = tuple(module._modules) if type(module) is nn.Sequential else () if line is None else line.calls
        if type(module) is nn.Sequential or (line is not None and line.last is None):
            yield [f"{path}.{name}" if path else name for name in names], [module._modules.get(name) for name in names]


def _sum_norms(evidence: Evidence) -> dict[str, str]:
    """By the layer in a module that is nothing but `norm(idle(layer(x)) + residual)`: its norm."""
    found = {}
    for path, module in evidence.model.named_modules():
        line = line_of(type(module))
        if line is None or line.last is None or not LayerNorm.can_be(module._modules.get(line.last)):
            continue
        name, norm = (f"{path}.{name}" if path else name for name in (line.calls[0], line.last))
        layer = evidence.layers.get(name)
        idle = all(type(module._modules.get(name)) in IDLE for name in line.calls[1:])
        if idle and layer is not None and not (layer.kind.absorbs or layer.part):
            found[name] = norm
    return found


def _encoder_norms(model: nn.Module) -> dict[str, str]:
    """The same in torch's encoder layers that have their norms behind the sums."""
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        if type(module) is nn.TransformerEncoderLayer and not module.norm_first:
            pairs = {"self_attn.out_proj": "norm1", "linear2": "norm2"}
            named = {layer: norm for layer, norm in pairs.items() if LayerNorm.can_be(module._modules.get(norm))}
            found |= {f"{path}.{a}" if path else a: f"{path}.{b}" if path else b for a, b in named.items()}
    return found


def _feed_forwards(model: nn.Module) -> dict[str, str]:
    """By the first layer of a feed forward of torch's transformers: the activation behind it, module or function."""
    kinds = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
    paths = [f"{path}." if path else "" for path, module in model.named_modules() if isinstance(module, kinds)]
    pairs = {f"{path}linear1": f"{path}activation" for path in paths}
    return {layer: name for layer, name in pairs.items() if activation_named(model, name) != Activation.NONE}


def _gates(model: nn.Module) -> dict[str, str]:
    """By the gate of a gated feed forward: the activation behind it."""
    codes = [(path, gated_of(type(module))) for path, module in model.named_modules() if "forward" not in vars(module)]
    named = [(f"{path}." if path else "", code) for path, code in codes if code is not None]
    pairs = {prefix + code.gate: prefix + code.act for prefix, code in named}
    return {layer: name for layer, name in pairs.items() if activation_named(model, name) != Activation.NONE}


def _of_chain(name: str, chain: list[str], plans: dict[str, LayerPlan], evidence: Evidence) -> LayerPlan:
    """The plan of a convolution with what follows it as its only reader: a norm, a sum, an activation, another one."""
    planned = plans[name]
    if chain and chain[0] == planned.norm:
        del chain[0]
    adds = chain[:1] == [ADDITION]
    del chain[: int(adds)]
    activation = None
    if chain and activation_named(evidence.model, chain[0]) != Activation.NONE:
        activation = chain.pop(0)
    del chain[: int(chain[:1] == [PADDING])]
    feeds = chain[0] if chain and not adds and _takes_codes(chain[0], plans, evidence) else None
    feeds = feeds if planned.kind == "int8 static" else None
    return dataclasses.replace(planned, adds=adds, activation=activation, feeds=feeds)


def _takes_codes(name: str, plans: dict[str, LayerPlan], evidence: Evidence) -> bool:
    """Whether this layer may be handed codes by a convolution."""
    if name not in plans or plans[name].kind != "int8 static" or plans[name].channel_scale is not None:
        return False
    layer = evidence.layers[name]
    return layer.kind.absorbs and layer.kind.takes_codes(layer.module)


def _fuse_children(
    keys: list[str], row: list[nn.Module | None], names: dict[int, str], plans: dict[str, LayerPlan], evidence: Evidence
) -> None:
    def is_int8(module: nn.Module) -> bool:
        name = names.get(id(module))
        return name is not None and plans[name].is_int8

    children = [None if child is None or has_hooks(child) else child for child in row]
    for i, layer in enumerate(children):
        if layer is None or not is_int8(layer) or names[id(layer)] in evidence.chains:
            continue
        name, behind = names[id(layer)], children[i + 1 :]
        absorbs = evidence.layers[name].kind.absorbs
        if plans[name].norm is not None:
            behind = [
                (None if b and b._modules else nn.Identity()) if keys[i + 1 + j] == plans[name].norm else b
                for j, b in enumerate(behind)
            ]
        planned, found = plans[name], followers(behind, is_int8)
        if planned.activation or planned.feeds:  # the layer has another place, which was first
            continue
        activation: str | None = None
        skipped: tuple[str, ...] = ()
        feeds: str | None = None
        if found.activation is not None:
            activation = keys[i + 1 + found.activation]
        if found.reader is not None:
            reader = names[id(behind[found.reader])]
            static = planned.kind == plans[reader].kind == "int8 static" and plans[reader].channel_scale is None
            alike = absorbs == evidence.layers[reader].kind.absorbs
            if static and alike and (not absorbs or _takes_codes(reader, plans, evidence)):
                feeds = reader
                between = keys[i + 1 : i + 1 + found.reader]
                skipped = tuple(key for key in between if key not in (activation, planned.norm))
        plans[name] = dataclasses.replace(planned, activation=activation, skipped=skipped, feeds=feeds)
