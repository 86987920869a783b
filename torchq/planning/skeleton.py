"""The skeleton: an int8 model without values, made of a float model and a plan. A checkpoint fills it.

The float model may be on the meta device, for only its modules, shapes and dtypes count. So whoever loads a converted
model, from a file or by transformers, needs neither float weights nor calibration data.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from torchq import ops
from torchq.errors import BadValueError
from torchq.modules.packed_weights import PackedWeights
from torchq.planning.apply import applied
from torchq.planning.attach import attach_plan
from torchq.planning.making import Empty
from torchq.planning.plan import Plan

M = TypeVar("M", bound=nn.Module)


def skeleton(model: M, plan: Plan, *, inplace: bool = False) -> M:
    """The int8 model that `plan` makes of the float `model`, with all tensors of the int8 modules on the meta device.

    A copy has its other parameters and buffers there too; in place, they stay as they are.
    """
    return applied(model, plan, inplace=inplace, make=Empty())


def to_stored(plan: Plan) -> dict[str, Any]:
    """`Plan.to_dict`, but of channel scales only the count: their numbers are tensors of the model."""
    data = plan.to_dict()
    for layer in data["layers"].values():
        layer["channel_scale"] = layer["channel_scale"] and len(layer["channel_scale"])
    return data


def from_stored(data: Mapping[str, Any]) -> Plan:
    """The plan of a skeleton, whose channel scales are all 1.

    Raises:
        ValueError: `data` is not what `to_stored` gives.
    """
    try:
        layers = {name: {**layer, "channel_scale": _ones(layer)} for name, layer in data["layers"].items()}
        return Plan.from_dict({**data, "layers": layers})
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as wrong:
        raise BadValueError(
            f"its plan is not one of this version of torchq: {type(wrong).__name__}: {wrong}"
        ) from wrong


def _ones(layer: Mapping[str, Any]) -> list[float] | None:
    count = layer["channel_scale"]
    if count is None:
        return None
    if not isinstance(count, int) or not 0 < count <= ops.MAX_DEPTH:
        raise ValueError(f"channel_scale is {count!r}, expected the number of a layer's inputs")
    return [1.0] * count


def complete_plan(model: nn.Module) -> None:
    """Puts the channel scales of a filled skeleton into its plan."""
    plan: Any = model.torchq_plan
    layers = dict(plan.layers)
    for name, planned in plan.layers.items():
        layer = model.get_submodule(name) if planned.is_int8 and planned.channel_scale is not None else None
        if isinstance(layer, PackedWeights) and layer.channel_scale is not None:
            layers[name] = dataclasses.replace(planned, channel_scale=tuple(layer.channel_scale.tolist()))
    attach_plan(model, dataclasses.replace(plan, layers=layers))
