"""Plan: per layer, what it becomes and why. Plain data: printable, JSON, and editable before it is applied.

`make_plan` decides from the records of a calibration (or, without one, from the weights alone), by measuring each
candidate scheme on the layer's own input sample with the real integer ops. `fuse` then joins neighbours. Between the
two, `smooth_search` may replace what `make_plan` chose.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchq import ops
from torchq.calibrate import Calibration, Record
from torchq.config import QConfig
from torchq.frontier import Frontier
from torchq.modules.linear import QParams, QuantizedLinear, activation_of
from torchq.modules.qat_linear import QATLinear
from torchq.observers import Observer
from torchq.ops import Activation
from torchq.qparams import decibels, energies
from torchq.smoothing import Smoothing, scaled_parts
from torchq.stats import LayerStats
from torchq.text import to_json

Kind = Literal["int8 dynamic", "int8 static", "float"]


@dataclass(frozen=True)
class LayerPlan:
    """What one layer becomes.

    Args:
        kind: "int8 dynamic", "int8 static" or "float".
        reason: why, in words and numbers.
        per_channel: one weight scale per output channel, or one per tensor.
        input_qparams: scale and zero point of a static layer's input.
        observer: the observer the static range came from.
        sqnr_db: output SQNR of each candidate, measured on the layer's input sample, in dB; "gptq" is the scheme chosen
            with its weights so rounded, on the half of the sample that did not take part.
        activation: the name of the module (nn.ReLU, nn.GELU or nn.SiLU) computed in this layer's epilogue.
        skipped: modules between this layer and `feeds` that do nothing in eval mode.
        feeds: the layer that takes this one's output as u8 codes, in its `input_qparams`.
        smoothed: the module whose smoothing (`Plan.smoothings`) divides this layer's input; `input_qparams` and
            `sqnr_db` are those of the divided input.
        rounding: how the weights are rounded: "nearest", or "gptq" with calibration data, which a plan does not hold.
        stats: what quantization did to the weight and the input, measured on the layer's input sample.
    """

    kind: Kind
    reason: str
    per_channel: bool = True
    input_qparams: QParams | None = None
    observer: str | None = None
    sqnr_db: dict[str, float] = field(default_factory=dict)
    activation: str | None = None
    skipped: tuple[str, ...] = ()
    feeds: str | None = None
    smoothed: str | None = None
    rounding: Literal["nearest", "gptq"] = "nearest"
    stats: LayerStats | None = None

    @property
    def measured_db(self) -> float | None:
        """The output SQNR of the scheme chosen, or None where nothing was measured, or nothing quantized."""
        if self.kind == "float":
            return None
        if self.rounding == "gptq":
            return self.sqnr_db.get("gptq")
        return self.sqnr_db.get(self.observer if self.kind == "int8 static" and self.observer else "dynamic")


@dataclass(frozen=True)
class Plan:
    """The layer plans by module name, in model order, and the smoothings by the name of the module rescaled.

    To undo a smoothing, take it out of `smoothings`, and make its layers dynamic with `smoothed=None`. `frontier` is
    what the search for an accuracy budget measured.

    >>> plan = Plan({"fc": LayerPlan("int8 dynamic", "no calibration data")})
    >>> print(plan)
    fc: int8 dynamic (no calibration data)
    >>> Plan.from_dict(plan.to_dict()) == plan
    True
    """

    layers: dict[str, LayerPlan]
    smoothings: dict[str, Smoothing] = field(default_factory=dict)
    frontier: Frontier | None = None

    def __str__(self) -> str:
        return "\n".join(f"{name or '(root)'}: {layer.kind} ({layer.reason})" for name, layer in self.layers.items())

    def to_dict(self) -> dict[str, Any]:
        """As JSON knows it: dicts, lists, strings and numbers."""
        layers = {name: to_json(dataclasses.asdict(layer)) for name, layer in self.layers.items()}
        smoothings = {name: to_json(dataclasses.asdict(smoothing)) for name, smoothing in self.smoothings.items()}
        return {"layers": layers, "smoothings": smoothings, "frontier": self.frontier and self.frontier.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Plan":
        """The inverse of `to_dict`."""
        layers = {}
        for name, values in data["layers"].items():
            pair, stats = values["input_qparams"], values["stats"] and LayerStats.from_dict(values["stats"])
            sqnr = {scheme: float(value) for scheme, value in values["sqnr_db"].items()}
            given = {"input_qparams": pair and QParams(*pair), "skipped": tuple(values["skipped"]), "sqnr_db": sqnr}
            layers[name] = LayerPlan(**{**values, **given, "stats": stats})
        smoothings = {name: _smoothing(values) for name, values in data["smoothings"].items()}
        return cls(layers, smoothings, data["frontier"] and Frontier.from_dict(data["frontier"]))


def _smoothing(values: Mapping[str, Any]) -> Smoothing:
    numbers = {key: float(values[key]) for key in ("alpha", "before_db", "after_db")}
    return Smoothing(scales=tuple(values["scales"]), layers=tuple(values["layers"]), **numbers)


def plan_of(qmodel: nn.Module, function: str) -> Plan:
    """The plan of a converted model, for torchq's `function` of this name.

    Raises:
        ValueError: `qmodel` did not come from `torchq.convert`.
    """
    plan = getattr(qmodel, "torchq_plan", None)
    if not isinstance(plan, Plan):
        raise ValueError(
            f"torchq.{function}: this {type(qmodel).__name__} has no torchq_plan. Pass the model that torchq.convert "
            "returned."
        )
    return plan


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


def make_plan(
    layers: Mapping[str, nn.Linear],
    barred: Mapping[str, str],
    calibration: Calibration | None,
    config: QConfig,
) -> Plan:
    """Decides every layer alone: those in `barred` stay float for the reason given, the others as measured.

    Raises:
        ValueError: `activation="static"` and a layer the calibration data never reached.
    """
    if config.activation == "static" and calibration is not None:
        untrained = {name for name, layer in layers.items() if not isinstance(layer, QATLinear)}
        missed = [name for name, record in calibration.records.items() if name in untrained and not record.has_data]
        if missed:
            raise ValueError(
                f"torchq.convert: activation='static', but calib_loader never reached {', '.join(map(repr, missed))}. "
                "Pass data that runs these layers, exclude them, or use activation='auto'."
            )
    plans: dict[str, LayerPlan] = {}
    for name, layer in layers.items():
        if name in barred:
            plans[name] = LayerPlan("float", barred[name])
        elif isinstance(layer, QATLinear):
            plans[name] = plan_trained(layer, None if calibration is None else calibration.records[name])
        elif calibration is None:
            plans[name] = LayerPlan("int8 dynamic", "no calibration data", config.weight == "per_channel")
        else:
            plans[name] = plan_layer(layer, calibration.records[name], config)
    return Plan(plans)


def plan_layer(
    layer: nn.Linear,
    record: Record,
    config: QConfig,
    ranges: Mapping[str, QParams] | None = None,
    *,
    into: Tensor | None = None,
) -> LayerPlan:
    """The scheme and range with the least error on the layer's sample, or float where none is good enough.

    `ranges` are those of `static_ranges(record)`, for a caller that has them. `into` (K,) is what the record's inputs
    were divided by, for the layer to take up.
    """
    per_channel = config.weight == "per_channel"
    if record.calls == 0 and config.activation == "auto":
        return LayerPlan("float", "calib_loader never reached it; its weight may be read without calling it")
    if not record.has_data:
        return LayerPlan("int8 dynamic", "no calibration data reached it", per_channel)

    ranges = static_ranges(record) if ranges is None else ranges
    measured = measure(layer, record.sample.rows, ranges, per_channel=per_channel, into=into)
    observer = max(ranges, key=lambda name: measured[name])
    static, dynamic = measured[observer], measured["dynamic"]
    numbers = f"static {static:.1f} dB ({observer}), dynamic {dynamic:.1f} dB"
    enough = {"static": static >= config.min_sqnr_db, "dynamic": dynamic >= config.min_sqnr_db}  # nan is not
    if config.activation == "auto":
        use_static = enough["static"] and static >= dynamic - config.margin_db
        reason = f"{numbers}: {'static costs no accuracy' if use_static else 'static would cost accuracy'}"
    else:
        use_static = config.activation == "static"
        reason = f"asked for; {numbers}"
    if not enough["static" if use_static else "dynamic"]:
        return LayerPlan("float", f"{numbers}: below min_sqnr_db = {config.min_sqnr_db:g}", sqnr_db=measured)
    if not use_static:
        return LayerPlan("int8 dynamic", reason, per_channel, sqnr_db=measured)
    return LayerPlan("int8 static", reason, per_channel, ranges[observer], observer, measured)


def plan_trained(layer: QATLinear, record: Record | None) -> LayerPlan:
    """The scheme and range this layer was trained with, whatever their error on the data: training made up for it."""
    trained, reason = layer.input_range.qparams(), f"trained, {layer.input_range.origin}"
    measured = {}
    if record is not None and record.has_data:
        ranges = {} if trained is None else {"trained": trained}
        measured = measure(layer, record.sample.rows, ranges, per_channel=layer.per_channel)
    if trained is None:
        return LayerPlan("int8 dynamic", reason, layer.per_channel, sqnr_db=measured)
    return LayerPlan("int8 static", reason, layer.per_channel, trained, "trained", measured)


def static_ranges(record: Record) -> dict[str, QParams]:
    """What each observer of the record would quantize the input with; needs data."""
    return {name: static_qparams(observer) for name, observer in record.observers.items()}


def static_qparams(observer: Observer) -> QParams:
    """The range of a static layer's input, from what an observer saw of it."""
    scale, zero_point = observer.qparams(dtype=torch.uint8, symmetric=False)
    return QParams(float(scale), int(zero_point))


@torch.no_grad()
def measure(
    layer: nn.Linear,
    rows: Tensor,
    ranges: Mapping[str, QParams],
    *,
    per_channel: bool = True,
    into: Tensor | None = None,
) -> dict[str, float]:
    """Output SQNR in dB of each scheme, against the float layer on the same rows (R, K), by the real integer ops.

    All of inputs divided by `into` (K,), if given: the rows are, and the layer takes it up.

    >>> _ = torch.manual_seed(0)
    >>> layer, rows = nn.Linear(64, 64), torch.randn(32, 64)
    >>> sorted(measure(layer, rows, {"minmax": QParams(0.03, 128)}))
    ['dynamic', 'minmax']
    """
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in ("dynamic", *ranges)}
    for _, part in scaled_parts(layer, per_channel=per_channel, into=into):
        bias = None if part.bias is None else part.bias.float()
        exact = nn.functional.linear(rows, part.weight.float(), bias)
        packed = QuantizedLinear.from_float(part, per_channel=per_channel).packed
        sums["dynamic"] += energies(exact, ops.linear_dynamic(rows, packed))
        for name, (scale, zero_point) in ranges.items():
            sums[name] += energies(exact, ops.linear_static(rows, packed, scale, zero_point, torch.float32))
    return {name: decibels(both) for name, both in sums.items()}


# ---- Fusion: runs of Linear, activation, Linear in an nn.Sequential ----------------------------------------------

IDLE = (nn.Dropout, nn.Identity)  # nothing happens in them in eval mode


def fuse(model: nn.Module, plan: Plan, calibration: Calibration) -> Plan:
    """Folds each activation that follows an int8 layer into it, and lets static neighbours hand over u8 codes.

    That is safe only if nobody else reads what lies between. An nn.Sequential's own forward guarantees it, if its
    children have no other place in the model, and if the calls counted in calibration show that they ran as its
    children and in no other way.
    """
    plans = dict(plan.layers)
    places = Counter(id(child) for module in model.modules() for child in module._modules.values())
    for name, sequential in model.named_modules():
        calls = calibration.calls[name]
        if type(sequential).forward is not nn.Sequential.forward or "forward" in vars(sequential) or calls == 0:
            continue
        run: list[tuple[str, nn.Module | None]] = []
        for key, child in sequential._modules.items():
            path = f"{name}.{key}" if name else key
            alone = child is not None and places[id(child)] == 1 and calibration.calls[path] == calls
            run.append((path, child if alone else None))
        _fuse_run(run, plans)
    return dataclasses.replace(plan, layers=plans)


def _fuse_run(run: list[tuple[str, nn.Module | None]], plans: dict[str, LayerPlan]) -> None:
    """One Sequential's children in order, None where others may see into one."""

    def is_int8(name: str, module: nn.Module | None) -> bool:
        return module is not None and name in plans and plans[name].kind != "float"

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
