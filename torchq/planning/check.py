"""Checks a plan, which a user may have edited, before anything in the model is changed."""

from collections.abc import Mapping
from typing import get_args

from torch import nn

from torchq.errors import BadValueError
from torchq.modules.activations import activation_named
from torchq.modules.attention_offer import attention_modules
from torchq.modules.folding import IDLE
from torchq.modules.layer_norm import LayerNorm
from torchq.modules.linear import LinearType
from torchq.modules.norms import is_foldable
from torchq.modules.registry import Layer, type_names
from torchq.numerics.qparams import FLT_MAX, FLT_MIN
from torchq.ops import ATTENTION_SCHEMES, MAX_DEPTH, Activation
from torchq.planning.plan import Kind, LayerPlan, Plan
from torchq.planning.tables import find_tables


def check_plan(model: nn.Module, plan: Plan, layers: Mapping[str, Layer]) -> None:
    """Raises ValueError where `plan` can't be applied to this model, which has these layers."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, planned in plan.layers.items():
        if name not in layers:
            raise BadValueError(f"the plan names layer {name!r}, which is no {type_names()} of the model.")
        _check_scheme(plan, name, planned)
        depth = layers[name].in_features if planned.is_int8 else 0
        exact = depth <= MAX_DEPTH
        _require(exact, name, f"has in_features = {depth}; int32 sums are exact up to {MAX_DEPTH}")
        _check_fine(name, planned, layers[name])
        _check_channel_scale(plan, name, planned, layers[name])
        unknown = [each for each in planned.hands if each not in layers]
        _require(not unknown, name, f"hands its output to {unknown}, which the model does not have")
        _check_folded(model, modules, layers[name], planned)
    _check_tables(find_tables(model, layers), plan)
    if plan.attentions:
        own = {layer.path for layer in layers.values() if layer.kind.attends}
        _check_attentions(own | set(attention_modules(model)), plan)


def _require(ok: bool, name: str, problem: str) -> None:
    if not ok:
        raise BadValueError(f"layer {name!r} {problem}.")


def _check_scheme(plan: Plan, name: str, planned: LayerPlan) -> None:
    _require(planned.kind in get_args(Kind), name, f"is to be {planned.kind!r}, expected one of {get_args(Kind)}")
    _require(
        isinstance(planned.per_channel, bool), name, f"has per_channel {planned.per_channel!r}, expected True or False"
    )
    if planned.kind == "int8 static":
        _require(planned.input_qparams is not None, name, "is static, but its input_qparams are None")
    if planned.feeds is not None:
        both = _is_static(plan, name) and _is_static(plan, planned.feeds)
        _require(both, name, f"feeds {planned.feeds!r}, so both must be static, with input_qparams")
    if planned.sum_qparams is not None:
        _require(_is_static(plan, name), name, "has sum_qparams, so it must be static, with input_qparams")
        _require(planned.adds, name, "has sum_qparams, but adds nothing")
    for qparams in filter(None, (planned.input_qparams, planned.sum_qparams)):
        scale, zero_point = qparams
        _require(FLT_MIN <= scale <= FLT_MAX, name, f"has scale {scale}, expected a positive normal float32")
        _require(0 <= zero_point <= 255, name, f"has zero_point {zero_point}, expected one in [0, 255]")


def _is_static(plan: Plan, name: str) -> bool:
    planned = plan.layers.get(name)
    return planned is not None and planned.kind == "int8 static" and planned.input_qparams is not None


def _check_folded(model: nn.Module, modules: Mapping[str, nn.Module], layer: Layer, planned: LayerPlan) -> None:
    name = layer.name
    if planned.norm is not None:
        norm, rank = modules.get(planned.norm), layer.kind.weight(layer.module, layer.part).dim()
        _require(
            is_foldable(norm, rank), name, f"includes {planned.norm!r}, which is no batch norm with fixed statistics"
        )
    summed = planned.sum_norm is None or LayerNorm.can_be(modules.get(planned.sum_norm))
    _require(summed, name, f"has the sum_norm {planned.sum_norm!r}, which is no nn.LayerNorm of one dimension")
    for folded in planned.folded:
        module = modules.get(folded)
        idle = folded != planned.activation and type(module) in (nn.ReLU, *IDLE)
        foldable = idle or activation_named(model, folded) != Activation.NONE
        _require(foldable, name, f"has {folded!r} folded in, which is no activation or idle module of the model")


def _check_attentions(known_names: set[str], plan: Plan) -> None:
    for name, row in plan.attentions.items():
        known = (*ATTENTION_SCHEMES, "sdpa")
        if row.scheme not in known:
            raise BadValueError(f"attention {name!r} is to be {row.scheme!r}, expected one of {known}.")
        if name not in known_names:
            raise BadValueError(
                f"the plan names attention {name!r}, which is no module of the model whose attention torchq computes: "
                "an nn.MultiheadAttention, one that calls torch's scaled_dot_product_attention in its own code, or one "
                "that asks transformers for its attention 'sdpa'. Was the model made with another attn_implementation?"
            )


def _check_tables(modules: Mapping[str, nn.Module], plan: Plan) -> None:
    residuals: dict[str, bool] = {}  # of each int8 copy
    for name, row in plan.tables.items():
        if name not in modules:
            raise BadValueError(f"the plan names table {name!r}, which is no embedding of the model.")
        if row.kind not in ("int8", "float"):
            raise BadValueError(f"table {name!r} is to be {row.kind!r}, expected 'int8' or 'float'.")
        if row.kind == "int8" and row.owner is not None and row.owner not in {**plan.layers, **plan.tables}:
            raise BadValueError(f"table {name!r} is tied to {row.owner!r}, which the plan does not have.")
        for field in ("residual", "scaled"):
            if not isinstance(getattr(row, field), bool):
                raise BadValueError(f"table {name!r} has {field} {getattr(row, field)!r}, expected True or False.")
        if row.kind == "int8" and residuals.setdefault(row.owner or name, row.residual) != row.residual:
            raise BadValueError(f"table {name!r} shares one int8 copy with others, so all have residuals or none.")


def _check_fine(name: str, planned: LayerPlan, layer: Layer) -> None:
    _require(isinstance(planned.fine, bool), name, f"has fine {planned.fine!r}, expected True or False")
    if planned.fine:
        linear = isinstance(layer.kind, LinearType) and planned.kind == "int8 dynamic"
        _require(linear, name, f"is fine, so it must be a dynamic nn.Linear; it is {planned.kind}, {layer.kind.name}")
        _require(planned.sum_norm is None, name, "is fine, so it can't compute a sum and its norm")


def _check_channel_scale(plan: Plan, name: str, planned: LayerPlan, layer: Layer) -> None:
    if planned.feeds is not None:
        scaled = plan.layers[planned.feeds].channel_scale is not None
        _require(not scaled, name, f"feeds {planned.feeds!r}, which has a channel_scale and so takes no codes")
    if planned.channel_scale is None:
        return
    count, expected = len(planned.channel_scale), layer.channels
    _require(
        layer.takes_scale, name, "has a channel_scale, which a convolution with groups of several channels can't have"
    )
    _require(count == expected, name, f"has a channel_scale of {count} numbers, expected {expected}")
    positive = all(FLT_MIN <= scale <= FLT_MAX for scale in planned.channel_scale)
    _require(positive, name, "has a channel_scale with a number that is not a positive normal float32")
