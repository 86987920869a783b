"""Which layers of a model can become int8, and why the others can't."""

import math
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from torchq import ops
from torchq.config import QConfig
from torchq.modules.linear import QuantizedLinear
from torchq.modules.qat_linear import QATLinear
from torchq.planning.plan import Plan


def find_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Every nn.Linear of the model, subclasses too, by its first name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def why_float(model: nn.Module, name: str, layer: nn.Linear) -> str | None:
    """Why a layer can't become a QuantizedLinear whatever the data, or None if it can."""
    kind = type(layer).__name__
    if type(layer).forward not in (nn.Linear.forward, QATLinear.forward) or "forward" in vars(layer):
        return f"{kind} has a forward of its own"
    if isinstance(layer.weight, nn.parameter.UninitializedParameter):
        return f"{kind} is not initialized yet: run one batch through the model first"
    if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention):
        return "nn.MultiheadAttention reads this layer's weight without calling it"
    if has_hooks(layer):
        return "it has forward hooks, which a swap would drop"
    if layer.weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its weight is {layer.weight.dtype}; float32, bfloat16 and float16 can be quantized"
    if layer.weight.numel() and not all(math.isfinite(extreme) for extreme in torch.aminmax(layer.weight.detach())):
        return "its weight has NaN or infinity"
    if isinstance(layer, QATLinear) and not layer.input_range.is_ready():
        return "its trained range is not finite: no training batch reached it, or training diverged"
    return None


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody listens to this module's forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def excluded(function: str, layers: Mapping[str, nn.Linear], patterns: tuple[str, ...]) -> dict[str, str]:
    """The layers that `QConfig.exclude` names, each with the pattern that does.

    Raises:
        ValueError: a pattern matches no layer.
    """
    found: dict[str, str] = {}
    for pattern in patterns:
        hits = [name for name in layers if any(fnmatchcase(part, pattern) for part in _prefixes(name))]
        if not hits:
            known = ", ".join(repr(name) for name in list(layers)[:8])
            raise ValueError(
                f"{function}: exclude pattern {pattern!r} matches no nn.Linear of the model. Its layers are "
                f"{known}{', ...' if len(layers) > 8 else ''}."
            )
        found.update({name: pattern for name in hits if name not in found})
    return found


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def select_layers(
    function: str, model: nn.Module, calib_loader: Iterable[Any] | None, config: QConfig
) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    """The model's Linear layers, and those that must stay float with reasons; errors are those of `function`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be an nn.Module, got {type(model).__name__}.")
    if not isinstance(config, QConfig):
        raise TypeError(f"{function}: config must be a torchq.QConfig, got {type(config).__name__}.")
    lazy = [name for name, module in model.named_modules() if _is_lazy(module)]
    if lazy and calib_loader is not None:
        raise ValueError(
            f"{function}: module {lazy[0]!r} is not initialized yet, and calibration would do it behind your back. "
            "Run one batch through the model first."
        )
    done = [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]
    if done:
        raise ValueError(
            f"{function}: the model is already converted ({done[0]!r} is a QuantizedLinear). "
            "Start from the float model."
        )
    layers = find_layers(model)
    if not layers:
        kinds = ", ".join(sorted({type(module).__name__ for module in model.modules()}))
        raise ValueError(
            f"{function}: the model has no nn.Linear to convert. Its modules are: {kinds}. "
            "Convolutions, recurrent layers and embeddings are not supported."
        )
    barred = {name: f"excluded by {pattern!r}" for name, pattern in excluded(function, layers, config.exclude).items()}
    for name, layer in layers.items():
        if name in barred:
            continue
        _check_layer(function, name, layer)
        reason = why_float(model, name, layer)
        if reason is not None:
            barred[name] = reason
    return layers, barred


def _unprepared(model: nn.Module, layers: dict[str, nn.Linear]) -> dict[str, str]:
    """The layers prepare_qat left in float, with its reasons where the model passed in is the one it returned."""
    plan = getattr(model, "torchq_plan", None)
    known = plan.layers if isinstance(plan, Plan) else {}
    reasons = {name: layer.reason for name, layer in known.items() if layer.kind == "float"}
    names = [name for name, layer in layers.items() if not isinstance(layer, QATLinear)]
    return {name: reasons.get(name, "prepare_qat left it in float") for name in names}


def _is_lazy(module: nn.Module) -> bool:
    return isinstance(module, LazyModuleMixin) and module.has_uninitialized_params()


def _check_layer(function: str, name: str, layer: nn.Linear) -> None:
    if layer.weight.device.type != "cpu":
        raise ValueError(
            f"{function}: layer {name!r} is on device {layer.weight.device}, expected cpu. Move the model there "
            "with model.cpu(), or, if its weights are not loaded yet (meta), load them first."
        )
    if layer.in_features > ops.MAX_DEPTH:
        raise ValueError(
            f"{function}: layer {name!r} has in_features = {layer.in_features}; int32 sums are exact up to "
            f"{ops.MAX_DEPTH}. Leave it in float with QConfig(exclude=({name!r},))."
        )
