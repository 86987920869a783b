"""convert(): calibrate -> plan -> budget -> swap. All or nothing: the model passed in is never left half changed."""

import copy
import dataclasses
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, cast, get_args

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from torchq import ops
from torchq.budget import Evaluate, FirstBatch, fit, make_budget, return_to_float
from torchq.calibrate import Forward, calibrate, call_with_batch, warn_of_few_rows
from torchq.config import QConfig
from torchq.describe import describe
from torchq.modules.folded import Folded
from torchq.modules.linear import QuantizedLinear, activation_of
from torchq.modules.qat_linear import QATLinear
from torchq.ops import Activation
from torchq.plan import IDLE, Kind, LayerPlan, Plan, excluded, find_layers, fuse, make_plan, why_float
from torchq.rounding import Rounded, round_weights, take_rounded, warn_of_missing
from torchq.smooth_search import smooth
from torchq.smoothing import Smoothing, can_scale, scaled_linear, scaled_parameters, scales_around

FLT_MIN, FLT_MAX = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def convert(
    model: nn.Module,
    calib_loader: Iterable[Any] | None = None,
    *,
    config: QConfig | None = None,
    forward: Forward | None = None,
    inplace: bool = False,
    progress: bool | None = None,
    evaluate: Evaluate | None = None,
    max_drop: float | None = None,
) -> nn.Module:
    """Returns the model with its nn.Linear layers in int8: the same forward, weights 4 times smaller.

    Args:
        model: a trained model on the CPU, in float32, bfloat16 or float16. It is left as it was, unless `inplace`.
        calib_loader: an iterable of typical batches: tensors, (input, label) pairs, or dicts, which may differ in shape
            (`calibrate` says what each kind of data gives). Fewer than 16 rows (samples, or tokens) for a layer are a
            UserWarning. Without a loader, every layer is dynamic. A model from `prepare_qat` keeps the schemes and
            ranges it was trained with, either way; data lets its layers be fused and their error be measured.
        config: a QConfig; the default measures and chooses per layer.
        forward: `forward(model, batch)`: how to run one batch, where the model's own signature does not tell.
        inplace: swap the layers of `model` itself and return it, which needs no memory beyond its own, a layer's, and
            what calibration keeps (docs/performance.md; least with rounding="nearest"). Everything is checked before
            the first swap.
        progress: a progress bar over the batches; None shows it on a terminal only.
        evaluate: `evaluate(model) -> float`, your own metric, higher is better. Layers that cost it too much stay in
            float. It is called on the float model and on copies, 2 + ceil(log2(int8 layers)) times at most
            (torchq/budget.py); its errors pass through.
        max_drop: the most the metric may fall below the float model's, in its own unit; 0.01 if not given. Where no
            int8 layer fits into it, that is a warning with the numbers, and all layers stay in float.

    Returns:
        The converted model. `torchq_plan`, an attribute of it, says of every Linear what it became and why.

    Raises:
        TypeError: `model` is not a module, or can't be copied, or a batch is of a type it can't be called with.
        ValueError: no Linear in the model; already converted; weights not on the CPU; K > 65793; an exclude pattern
            that matches nothing; "static" without data, or with a layer that the data never reach; a loader without
            batches; NaN or infinity in a layer's input; `evaluate` without data, or that returns NaN.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    >>> qmodel = convert(model, [torch.randn(32, 64) for _ in range(4)])
    >>> qmodel(torch.randn(2, 64)).shape
    torch.Size([2, 10])
    """
    config = QConfig() if config is None else config
    budget = make_budget(evaluate, max_drop, calib_loader)
    layers, barred = select_layers("torchq.convert", model, calib_loader, config)
    prepared = any(isinstance(layer, QATLinear) for layer in layers.values())
    if inplace and isinstance(model, nn.Linear):
        raise ValueError("torchq.convert: inplace=True can't replace the model itself, an nn.Linear. Leave it out.")
    if config.activation == "static" and calib_loader is None and not prepared:
        raise ValueError("torchq.convert: activation='static' needs a calib_loader to find the ranges with.")
    if prepared:
        barred = _unprepared(model, layers) | barred
    wanted = {name: layer for name, layer in layers.items() if name not in barred}
    calibration, first = None, FirstBatch(forward or call_with_batch)
    if calib_loader is not None:
        calibration = calibrate(model, calib_loader, wanted, config, forward=first, progress=progress)
    plan = make_plan(layers, barred, calibration, config)
    if calibration is not None:
        trained = {name for name, layer in wanted.items() if isinstance(layer, QATLinear)}  # they keep their ranges
        warn_of_few_rows({name: record for name, record in calibration.records.items() if name not in trained})
    rounded: dict[str, Rounded] = {}
    if calibration is not None:
        plan = fuse(model, smooth(model, plan, calibration, config), calibration)
        if config.rounding != "nearest":
            plan, rounded = round_weights(model, plan, calibration, config, progress=progress)
        plan = describe(model, plan, calibration, rounded)
    if budget is not None:
        exact = apply_plan(model, return_to_float(plan, dict.fromkeys(plan.layers, ""))) if prepared else model
        plan = fit(exact, plan, budget, apply=partial(apply_plan, rounded=rounded), run=first.run)
        del exact
    del layers, wanted, calibration  # they hold the float layers, which inplace frees one by one
    return apply_plan(model, plan, inplace=inplace, rounded=rounded)


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
