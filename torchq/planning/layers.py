"""Which matrices of a model can become int8, and why the others can't."""

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from torchq import ops
from torchq.config import QConfig
from torchq.errors import BadTypeError, BadValueError
from torchq.modules.base import FLOATS, Int8Module, model_bytes, why_opaque
from torchq.modules.computed_weights import is_weight_hook
from torchq.modules.registry import Layer, find_layers, type_names, type_of
from torchq.planning.plan import LayerPlan, Plan, TablePlan
from torchq.planning.tables import find_tables, first_tables


class Selection(NamedTuple):
    """What of a model can become int8: its layers by name, the reasons of those that can't, and its embeddings."""

    layers: dict[str, Layer]
    barred: dict[str, str]
    tables: dict[str, TablePlan]


def select_layers(model: nn.Module, calib_loader: Iterable[Any] | None, config: QConfig) -> Selection:
    """The layers of the model, the reasons of those that must stay in float, and what its embeddings become.

    Raises:
        TypeError: model or config is of another type.
        ValueError: nothing to convert, already converted, not initialized, sharded, or not on the CPU.
    """
    if not isinstance(model, nn.Module):
        raise BadTypeError(f"model must be an nn.Module, got {type(model).__name__}.")
    if not isinstance(config, QConfig):
        raise BadTypeError(f"config must be a torchq.QConfig, got {type(config).__name__}.")
    lazy = [name for name, module in model.named_modules() if _is_lazy(module)]
    if lazy and calib_loader is not None:
        raise BadValueError(
            f"module {lazy[0]!r} is not initialized yet, and calibration would do it behind your back. Run one batch "
            "through the model first."
        )
    converted = [(name, module) for name, module in model.named_modules() if isinstance(module, Int8Module)]
    if converted:
        name, module = converted[0]
        raise BadValueError(
            f"the model is already converted ({name!r} is a {type(module).__name__}). Start from the float model."
        )
    sharded = [name for name, parameter in model.named_parameters() if hasattr(parameter, "full_tensor")]
    if sharded:
        raise BadValueError(
            f"parameter {sharded[0]!r} is sharded over processes (a DTensor, as fully_shard makes them). Load the "
            "whole state_dict into a model that is not sharded, and pass that one: docs/distributed.md shows how."
        )
    layers = find_layers(model)
    embeddings = find_tables(model, layers)
    if not layers and (not embeddings or config.embeddings is False):
        kinds = ", ".join(sorted({type(module).__name__ for module in model.modules()}))
        hint = " torch.jit compiled it; convert it before that." if isinstance(model, torch.jit.ScriptModule) else ""
        raise BadValueError(f"the model has no {type_names()} to convert. Its modules are: {kinds}.{hint}")
    hits = excluded([*layers, *embeddings], config.exclude)
    barred = {name: f"excluded by {pattern!r}" for name, pattern in hits.items()}
    for name, layer in layers.items():
        if name in barred:
            continue
        _check_layer(layer)
        reason = why_float(model, layer)
        if reason is not None:
            barred[name] = reason
    tables = first_tables(model, layers, barred, config)
    tied = _tied(model, tables)
    barred |= {name: tied[layer.path] for name, layer in layers.items() if layer.path in tied and name not in barred}
    return Selection(layers, {name: reason for name, reason in barred.items() if name in layers}, tables)


def first_plan(model: nn.Module, selection: Selection) -> Plan:
    """The plan that planning starts from: layers that are barred stay in float, all others are dynamic."""
    free = LayerPlan("int8 dynamic", "no calibration data")
    barred = selection.barred
    plans = {name: LayerPlan("float", barred[name]) if name in barred else free for name in selection.layers}
    return Plan(plans, model_bytes=model_bytes(model), tables=selection.tables)


def warn_of_float(plan: Plan, layers: Mapping[str, Layer]) -> None:
    """One warning, for the caller of `convert`, if nothing becomes int8, or if layers are float64.

    None where an accuracy budget returned all layers to float: that has said so with its numbers.
    """
    names = [name for name, layer in plan.layers.items() if not layer.is_int8]
    reasons = Counter(plan.layers[name].reason for name in names)
    double = [name for name in names if name in layers and layers[name].dtype == torch.float64]
    advice = " Make the model float32 first: model.float()." if double else ""
    if names and len(names) == len(plan.layers) and not plan.int8_tables():
        if plan.frontier is not None and plan.frontier.sensitivity_db:
            return
        said = "; ".join(f"{reason} ({count})" for reason, count in reasons.most_common(3))
        message = f"nothing became int8. Of {len(names)} layers, all stay in float: {said}.{advice}"
    elif double:
        message = f"{len(double)} of {len(plan.layers)} layers are float64 and stay so, {double[0]!r} first.{advice}"
    else:
        return
    warnings.warn(f"torchq.convert: {message}", stacklevel=4)  # the caller of convert()


def why_float(model: nn.Module, layer: Layer) -> str | None:
    """Why a layer can't become int8, whatever the data; None if it can."""
    module = layer.module
    if _is_lazy(module):
        return f"{type(module).__name__} is not initialized yet: run one batch through the model first"
    reason = layer.kind.why_float(module, model.get_submodule(layer.path.rpartition(".")[0]))
    if has_hooks(module):
        return "it has forward hooks, which a swap would drop"
    if reason is not None:
        return reason
    if not layer.is_ready:
        return "its trained range is not finite: no training batch reached it, or training diverged"
    if (reason := why_opaque(module)) is not None:
        return reason
    if layer.dtype not in FLOATS:
        return f"its weight is {layer.dtype}; float32, bfloat16 and float16 can be quantized"
    if layer.in_features > ops.MAX_DEPTH:
        return f"in_features = {layer.in_features}: int32 sums are exact up to {ops.MAX_DEPTH}"
    weight = layer.weight.detach()
    if weight.numel() and not all(math.isfinite(extreme) for extreme in torch.aminmax(weight)):
        return "its weight has NaN or infinity"
    return None if layer.trained else too_small(layer)


def too_small(layer: Layer) -> str | None:
    """Why a layer would gain nothing: its columns are padded to whole panels, and take as many bytes as in float.

    Bytes decide, and not the number of outputs alone: wherever int8 takes fewer, it was faster too (Zen 4, one thread,
    1 to 15 outputs of 32 to 2048 inputs, 1 and 32 rows).
    """
    if layer.patches is not None and layer.patches.geometry.groups > 1:
        return None  # a few weights for a whole image: their bytes are not what counts
    before = sum(tensor.nbytes for tensor in layer.matrix if tensor is not None)
    after = layer.packed_bytes()
    if after < before:
        return None
    n = layer.out_features
    few = f"{n} output{'s' * (n != 1)}, fewer than a panel of {ops.PANEL_COLUMNS}: " if n < ops.PANEL_COLUMNS else ""
    return f"{few}int8 would save nothing, {after} bytes where float has {before}"


def has_hooks(module: nn.Module) -> bool:
    """Whether this module has forward hooks, other than one that computes its weight."""
    return bool(module._forward_hooks) or not all(map(is_weight_hook, module._forward_pre_hooks.values()))


def excluded(layers: Sequence[str], patterns: tuple[str, ...]) -> dict[str, str]:
    """The layers and embeddings that `QConfig.exclude` matches, each with the first pattern that matches it.

    Raises:
        ValueError: a pattern matches none.
    """
    excluded_by: dict[str, str] = {}
    for pattern in patterns:
        hits = [name for name in layers if any(fnmatchcase(part, pattern) for part in _prefixes(name))]
        if not hits:
            known = ", ".join(repr(name) for name in layers[:8])
            raise BadValueError(
                f"exclude pattern {pattern!r} matches no {type_names()} of the model. Its layers are "
                f"{known}{', ...' if len(layers) > 8 else ''}."
            )
        excluded_by.update({name: pattern for name in hits if name not in excluded_by})
    return excluded_by


def unprepared(model: nn.Module, layers: Mapping[str, Layer]) -> dict[str, str]:
    """The layers `prepare_qat` left in float. Its reasons are known only if `model` is the very model it returned."""
    plan = getattr(model, "torchq_plan", None)
    known = plan.layers if isinstance(plan, Plan) else {}
    reasons = {name: layer.reason for name, layer in known.items() if layer.kind == "float"}
    names = [name for name, layer in layers.items() if layer.trained is None]
    return {name: reasons.get(name, "prepare_qat left it in float") for name in names}


def _tied(model: nn.Module, tables: Mapping[str, TablePlan]) -> dict[str, str]:
    """By the path of a module of a registered type that shares a parameter with one of another type: the reason.

    Such as a head whose weight is the table of an embedding that stays in float: int8 would be a second copy.
    """
    others: dict[int, tuple[str, nn.Module]] = {}
    for path, module in model.named_modules():
        if type_of(module) is None and not (path in tables and tables[path].kind == "int8"):
            others.update({id(p): (path, module) for p in module._parameters.values() if p is not None})
    found = {}
    for path, module in model.named_modules():
        shared = [others[id(p)] for p in module._parameters.values() if id(p) in others]
        if type_of(module) is not None and shared:
            other, owner = shared[0]
            kind = type(owner).__name__
            found[path] = f"its weight is that of {other!r} ({kind}) too; int8 would be a second copy of it"
    return found


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _is_lazy(module: nn.Module) -> bool:
    return isinstance(module, LazyModuleMixin) and module.has_uninitialized_params()


def _check_layer(layer: Layer) -> None:
    if layer.weight.device.type != "cpu":
        raise BadValueError(
            f"layer {layer.name!r} is on device {layer.weight.device}, expected cpu. Move the model there with "
            "model.cpu(), or, if its weights are not loaded yet (meta), load them first."
        )
