"""Applying a plan: checks, int8 modules in the place of the float ones, all or nothing."""

import copy
import dataclasses
from collections.abc import Mapping
from typing import cast, get_args

import torch
from torch import nn

from torchq.modules.folded import Folded
from torchq.modules.linear import QuantizedLinear, activation_of
from torchq.modules.qat_linear import QATLinear
from torchq.ops import Activation
from torchq.planning.fusion import IDLE
from torchq.planning.layers import find_layers
from torchq.planning.plan import Kind, LayerPlan, Plan, Smoothing
from torchq.planning.rounding import Rounded, take_rounded, warn_of_missing
from torchq.planning.smoothing import can_scale, scaled_linear, scaled_parameters, scales_around

FLT_MIN, FLT_MAX = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def apply_plan(
    model: nn.Module, plan: Plan, *, inplace: bool = False, rounded: Mapping[str, Rounded] | None = None
) -> nn.Module:
    """Swaps the layers of `model` as `plan` says, which `convert` made or a user edited.

    `rounded` holds the weights of the layers with `rounding="gptq"`, which a plan is too small for:
    `rounding.rounded_weights(qmodel)` of a model that `convert` returned. A layer without them is rounded to nearest,
    with a warning; `load_state_dict` of the converted model's state makes it whole too.

    Raises:
        ValueError: the plan names a layer the model lacks, hands codes to a layer that does not take them, or smooths
            what it can't, or by halves; `rounded` has the weights of another layer, or of one smoothed otherwise.
    """
    rounded = rounded or {}
    warn_of_missing(plan, rounded)
    _check_plan(model, plan, find_layers(model))
    names = [name for name in plan.layers if _is_int8(plan, name)]
    try:
        if inplace:
            _smooth(model, plan)
            _swap(model, dataclasses.replace(plan, smoothings={}), names, rounded)
        else:
            rescaled = _rescaled(model, plan)
            swaps = {id(model.get_submodule(name)): quantize_layer(model, plan, name, rounded) for name in names}
            model = _copy(model, swaps)
            _replace(model, rescaled)
            for name in names:
                _fold(model, plan.layers[name])
        for module in model.modules():
            if isinstance(module, QATLinear):  # one the plan leaves in float
                module.release()
    finally:
        leave_fast_path(model)
    model.torchq_plan = plan  # type: ignore[assignment]
    return model


def _swap(model: nn.Module, plan: Plan, names: list[str], rounded: Mapping[str, Rounded]) -> None:
    """In place, one layer after the other, so that each float weight can be freed before the next int8 one is made.

    The last comes first: a layer takes floats as well as codes, so the model is right after each step, and stays so if
    memory runs out before the next.
    """
    places = _places(model)
    for name in reversed(names):
        quantized = quantize_layer(model, plan, name, rounded)
        for children, key in places[id(model.get_submodule(name))]:
            children[key] = quantized
        _fold(model, plan.layers[name])


def _places(model: nn.Module) -> dict[int, list[tuple[dict[str, nn.Module | None], str]]]:
    """Where each module hangs, by its id: the dict of children and the key there."""
    places: dict[int, list[tuple[dict[str, nn.Module | None], str]]] = {}
    for parent in model.modules():
        for key, child in parent._modules.items():
            places.setdefault(id(child), []).append((parent._modules, key))
    return places


def _fold(model: nn.Module, layer: LayerPlan) -> None:
    """Puts Folded in the place of the modules whose work this layer does."""
    for name in _folded(layer):
        parent, _, key = name.rpartition(".")
        model.get_submodule(parent)._modules[key] = Folded()


def _copy(model: nn.Module, swaps: dict[int, QuantizedLinear]) -> nn.Module:
    """Deepcopy takes what its memo holds for a copy already made: the swap, without copying the float weights."""
    try:
        return copy.deepcopy(model, dict(swaps))
    except Exception as error:
        raise TypeError(
            f"torchq.convert: this {type(model).__name__} cannot be copied ({type(error).__name__}: {error}). Pass "
            "inplace=True, and no evaluate, to convert it as it is."
        ) from error


def _rescaled(model: nn.Module, plan: Plan) -> dict[str, dict[str, nn.Parameter]]:
    """New parameters for what stays float and has a smoothing folded in: norms, and layers edited to float."""
    touched = {name: None for source, s in plan.smoothings.items() for name in (source, *s.layers)}
    return {
        name: scaled_parameters(model, plan.smoothings, name)
        for name in touched
        if name not in plan.layers or not _is_int8(plan, name)
    }


def _replace(model: nn.Module, parameters: Mapping[str, Mapping[str, nn.Parameter]]) -> None:
    for name, values in parameters.items():
        model.get_submodule(name)._parameters.update(values)


def _smooth(model: nn.Module, plan: Plan) -> None:
    """Folds the smoothings into the float model itself, one after the other: its function is the same after each."""
    for source, smoothing in plan.smoothings.items():
        alone = {source: smoothing}
        _replace(model, {name: scaled_parameters(model, alone, name) for name in (source, *smoothing.layers)})


def quantize_layer(
    model: nn.Module, plan: Plan, name: str, rounded: Mapping[str, Rounded] | None = None
) -> QuantizedLinear:
    """The QuantizedLinear that `plan` makes of this layer of `model`; `rounded` as in `apply_plan`."""
    layer, linear = plan.layers[name], cast(nn.Linear, model.get_submodule(name))
    into, out = scales_around(plan.smoothings, name)
    quantized = QuantizedLinear.from_float(
        linear if into is None and out is None else scaled_linear(linear, into=into, out=out),
        per_channel=layer.per_channel,
        input_qparams=layer.input_qparams if layer.kind == "int8 static" else None,
        output_qparams=plan.layers[layer.feeds].input_qparams if layer.feeds else None,
        activation=activation_of(model.get_submodule(layer.activation) if layer.activation else None),
        takes_codes=any(other.feeds == name for other in plan.layers.values()),
    )
    if layer.rounding == "gptq":
        take_rounded(name, quantized, (rounded or {}).get(name))
    return quantized.train(linear.training)


def _folded(layer: LayerPlan) -> tuple[str, ...]:
    return layer.skipped if layer.activation is None else (layer.activation, *layer.skipped)


def _is_int8(plan: Plan, name: str) -> bool:
    return plan.layers[name].kind != "float"


def _check_plan(model: nn.Module, plan: Plan, layers: dict[str, nn.Linear]) -> None:
    """Raises ValueError for what an edit can get wrong."""
    modules = dict(model.named_modules())

    def require(ok: bool, name: str, problem: str) -> None:
        if not ok:
            raise ValueError(f"torchq.apply_plan: layer {name!r} {problem}.")

    def is_static(name: str) -> bool:
        layer = plan.layers.get(name)
        return layer is not None and layer.kind == "int8 static" and layer.input_qparams is not None

    for name, layer in plan.layers.items():
        if name not in layers:
            raise ValueError(f"torchq.apply_plan: the plan names layer {name!r}, which is no nn.Linear of the model.")
        require(layer.kind in get_args(Kind), name, f"is to be {layer.kind!r}, expected one of {get_args(Kind)}")
        if layer.kind == "int8 static":
            require(layer.input_qparams is not None, name, "is static, but its input_qparams are None")
        if layer.feeds is not None:
            both = is_static(name) and is_static(layer.feeds)
            require(both, name, f"feeds {layer.feeds!r}, so both must be static, with input_qparams")
        if layer.input_qparams is not None:
            scale, zero_point = layer.input_qparams
            require(FLT_MIN <= scale <= FLT_MAX, name, f"has scale {scale}, expected a positive normal float32")
            require(0 <= zero_point <= 255, name, f"has zero_point {zero_point}, expected one in [0, 255]")
        for folded in _folded(layer):
            module = modules.get(folded)
            idle = folded != layer.activation and type(module) in (nn.ReLU, *IDLE)
            foldable = idle or activation_of(module) != Activation.NONE
            require(foldable, name, f"has {folded!r} folded in, which is no activation or idle module of the model")
        smoothing = plan.smoothings.get(layer.smoothed or "")
        require(
            layer.smoothed is None or (smoothing is not None and name in smoothing.layers),
            name,
            f"expects its input smoothed in {layer.smoothed!r}, but plan.smoothings has none for it there. To undo a "
            "smoothing, make its layers dynamic too, with smoothed=None",
        )
    for source, smoothing in plan.smoothings.items():
        _check_smoothing(modules, plan, source, smoothing)


def _check_smoothing(modules: dict[str, nn.Module], plan: Plan, source: str, smoothing: Smoothing) -> None:
    def require(ok: bool, problem: str) -> None:
        if not ok:
            raise ValueError(f"torchq.apply_plan: the smoothing of {source!r} {problem}.")

    module = modules.get(source)
    require(can_scale(module), "is for no LayerNorm, RMSNorm or Linear with a weight of the model")
    count = len(cast(torch.Tensor, cast(nn.Module, module).weight))
    require(len(smoothing.scales) == count, f"has {len(smoothing.scales)} scales, expected {count}")
    positive = all(FLT_MIN <= scale <= FLT_MAX for scale in smoothing.scales)
    require(positive, "has a scale that is not a positive normal float32")
    for name in smoothing.layers:
        takes = name in plan.layers and cast(nn.Linear, modules[name]).in_features == count
        require(takes, f"names {name!r}, which is no layer of the plan with {count} inputs")
        require(plan.layers[name].smoothed == source, f"names {name!r}, whose `smoothed` is not {source!r}")


def leave_fast_path(model: nn.Module) -> None:
    """Keeps torch's fused encoder kernels, which read weights without calling the layers, off what torchq changed."""
    for module in model.modules():
        changed = any(isinstance(child, (QuantizedLinear, QATLinear)) for child in module.modules())
        if isinstance(module, nn.TransformerEncoderLayer) and changed:
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder) and changed:
            module.use_nested_tensor = False
