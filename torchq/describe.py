"""describe(): the stats of each int8 layer as it finally is: smoothed, trained, and rounded."""

import dataclasses
from collections.abc import Mapping
from typing import cast

from torch import nn

from torchq.calibrate import Calibration
from torchq.modules.linear import QuantizedLinear
from torchq.plan import Plan
from torchq.rounding import Rounded
from torchq.smoothing import scaled_linear, scales_around
from torchq.stats import layer_stats


def describe(model: nn.Module, plan: Plan, calibration: Calibration, rounded: Mapping[str, Rounded]) -> Plan:
    """The plan with the stats of every int8 layer that data reached; `rounded` as in `apply_plan`.

    A smoothed layer is compared with the scaled layer on scaled rows: these are the weight and the input it gets.
    """
    plans = dict(plan.layers)
    for name, layer in plan.layers.items():
        if layer.kind == "float" or not calibration.records[name].has_data:
            continue
        sample, calls = calibration.records[name].sample, calibration.records[name].calls
        into, out = scales_around(plan.smoothings, name)
        linear, rows = cast(nn.Linear, model.get_submodule(name)), sample.rows
        if into is not None or out is not None:
            linear = scaled_linear(linear, into=into, out=out)
        if into is not None:
            rows = rows / into
        quantized = QuantizedLinear.from_float(linear, per_channel=layer.per_channel, input_qparams=layer.input_qparams)
        if name in rounded:
            quantized.replace_weight(rounded[name].weight, rounded[name].scale, rounded[name].bias)
        stats = layer_stats(linear, quantized, rows, max(1, round(sample.seen / calls)))
        plans[name] = dataclasses.replace(layer, stats=stats)
    return dataclasses.replace(plan, layers=plans)
