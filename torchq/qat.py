"""prepare_qat(): quantization-aware training. prepare_qat -> train as usual -> convert."""

import copy
import dataclasses
import math
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from torch import Tensor, nn

from torchq.calibration.batches import Forward
from torchq.calibration.calibrate import Evidence, calibrate
from torchq.calibration.peers import Peers
from torchq.calibration.record import Record
from torchq.config import QConfig
from torchq.errors import BadTypeError, BadValueError, door
from torchq.modules.computed_weights import without_history
from torchq.modules.embedding import is_prepared
from torchq.modules.qat_embedding import QATTable
from torchq.modules.qat_linear import QATProduct
from torchq.modules.ranges import InputRange, LearnedRange, ObservedRange, PerToken
from torchq.modules.registry import Layer, type_names
from torchq.planning.apply import leave_fast_path
from torchq.planning.choose import measure, plan_by
from torchq.planning.layers import Selection, select_layers, too_small
from torchq.planning.mixtures import unreached_experts
from torchq.planning.plan import Kind, LayerPlan, Plan, TablePlan
from torchq.planning.smoothing import smooth
from torchq.planning.tables import keep_together
from torchq.scopes import outside_autocast, outside_inference_mode

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

M = TypeVar("M", bound=nn.Module)
Ranges = Literal["auto", "learned", "observed"]


@door("torchq.prepare_qat")
def prepare_qat(
    model: M,
    calib_loader: Iterable[Any] | None = None,
    *,
    config: QConfig | None = None,
    ranges: Ranges = "auto",
    forward: Forward | None = None,
    inplace: bool = False,
    progress: bool | None = None,
    group: "ProcessGroup | None" = None,
) -> M:
    """Returns the model with its layers ready to train on int8 values; `convert` then makes them int8.

    It takes what `convert` would take, and turns each module into its training form with the same parameters, an
    nn.Linear into a `QATLinear`. There is an example in docs/qat.md, with a table of what trains how, and the gradients
    are in torchq/modules/ranges.py. `torchq_plan`, an attribute of the model, says what each layer will become.

    Args:
        model: a model on the CPU. Once prepared, it may be trained on any device. Left as it was, unless `inplace`.
        calib_loader: typical batches, as for `convert`. They give the initial static ranges. A layer they never reach
            stays float if its range is to be learned.
        config: a QConfig. Only `weight`, `activation`, `smoothing`, `embeddings`, `exclude` and the options of the
            observers are used. "auto" means "static" here: training compensates what a fixed range loses, and static is
            faster at inference. A smoothed layer multiplies the channels of its input by fixed factors, and divides its
            weight by them, before it quantizes both.
        ranges: of static inputs. "learned": parameters, trained with the weights. "observed": buffers, a moving
            average over the training batches. "auto": learned with a calib_loader, observed without.
        forward: `forward(model, batch)`: how to run one batch of calib_loader.
        inplace: prepare `model` itself and return it. If anything fails, it is unchanged.
        progress: a progress bar over calib_loader; None shows it on a terminal only.
        group: processes of torch.distributed that prepare the same model together, each with its own part of
            `calib_loader`. All of them get the same initial ranges and smoothing (docs/distributed.md).

    Raises:
        TypeError: `model` is not a module or can't be copied, or a batch is of a type it can't be called with.
        ValueError: no Linear in the model, or none that can be quantized (a warning, where all are only too small);
            already prepared or converted; weights not on the CPU; "learned" without a calib_loader; or what `convert`
            raises for the loader and the config.
        RuntimeError: another process of `group` failed, died, or did not answer in time.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    >>> qat_model = prepare_qat(model, [torch.randn(16, 64)])
    >>> qat_model(torch.randn(4, 64)).sum().backward()
    >>> sorted(name for name, p in qat_model.named_parameters() if p.grad is not None)[:3]
    ['0.bias', '0.input_range.ends', '0.weight']
    """
    config = QConfig() if config is None else config
    with Peers(group, model) as peers, outside_inference_mode(), outside_autocast():
        selection = _check(model, calib_loader, config, ranges)
        layers, barred, tables = selection
        free = {name: layer for name, layer in layers.items() if name not in barred}
        evidence, calibrated = Evidence(model, free, config), False
        if calib_loader is not None and config.activation != "dynamic":
            static = dataclasses.replace(config, rounding="nearest", activation="static", min_sqnr_db=-math.inf)
            owners = {name: row.owner for name, row in tables.items()}
            evidence = calibrate(
                model, calib_loader, free, static, forward=forward, tables=owners, progress=progress, shard=peers.shard
            )
            calibrated = True
        merged = peers.merged(evidence, data=calibrated)
        if merged is None:
            scales, starts, plan = peers.received()
        else:
            scales, starts = _beginnings(merged, ranges, tables)
            plan = keep_together(_plan(selection, starts, scales, config), merged)
            peers.send((scales, starts, plan))
    if not plan.int8_layers() and not plan.int8_tables():
        _explain(plan, layers)
    with outside_inference_mode():
        if not inplace:
            model = _copy(model)
        for name in plan.int8_layers():
            layer = layers[name]
            layer.kind.prepare(
                model.get_submodule(layer.path),
                layer.part,
                starts[name],
                per_channel=config.weight == "per_channel",
                channel_scale=scales.get(name),
            )
        for name in plan.int8_tables():
            by_row = config.weight == "per_channel" or plan.tables[name].owner not in plan.layers
            QATTable.adopt(model.get_submodule(name), by_row=by_row, finely=plan.tables[name].residual)
        leave_fast_path(model)
    model.torchq_plan = plan
    return model


def freeze_ranges(model: nn.Module) -> None:
    """Fixes the input ranges of all prepared layers: learned ones are no longer trained, observed ones stop moving.

    Useful for the last epochs: the weights then settle on a fixed grid. `model.eval()` fixes observed ranges too, but
    also changes everything else that depends on the mode, such as dropout.

    Raises:
        ValueError: no layer of `model` is prepared.

    >>> import torch
    >>> model = prepare_qat(nn.Sequential(nn.Linear(64, 32)), [torch.randn(16, 64)])
    >>> freeze_ranges(model)
    >>> [name for name, p in model.named_parameters() if not p.requires_grad]
    ['0.input_range.ends']
    """
    prepared = [module for module in model.modules() if isinstance(module, QATProduct)]
    if not prepared:
        raise ValueError("torchq.freeze_ranges: no layer of the model is a QATLinear. Call torchq.prepare_qat() first.")
    for product in prepared:
        product.input_range.freeze()


def _check(model: nn.Module, calib_loader: Iterable[Any] | None, config: QConfig, ranges: str) -> Selection:
    """Checks all arguments before any work. Returns what can be prepared, and why the rest must stay float."""
    if ranges not in get_args(Ranges):
        raise BadValueError(f"ranges must be one of {get_args(Ranges)}, got {ranges!r}.")
    layers, barred, tables = select_layers(model, calib_loader, config)
    prepared = {layer.name: layer.module for layer in layers.values() if layer.trained}
    prepared |= {name: table for name in tables if is_prepared(table := model.get_submodule(name))}
    if prepared:
        name, module = next(iter(prepared.items()))
        raise BadValueError(
            f"the model is already prepared ({name!r} is a {type(module).__name__}). Train it, then call "
            "torchq.convert()."
        )
    if config.activation == "dynamic" and ranges != "auto":
        raise BadValueError(f"ranges={ranges!r}, but activation='dynamic' has none. Leave one out.")
    if ranges == "learned" and calib_loader is None:
        raise BadValueError(
            "ranges='learned' needs a calib_loader, one batch or more, to start from. Pass one, or use "
            "ranges='observed'."
        )
    for name, layer in layers.items():
        reason = layer.kind.why_untrainable(layer.module)
        if reason is not None:
            barred.setdefault(name, reason)
    return Selection(layers, barred, tables)


def _explain(plan: Plan, layers: Mapping[str, Layer]) -> None:
    """Warns that nothing was prepared, where all layers are only too small; else it is an error.

    Raises:
        ValueError: there is another reason.
    """
    reasons = {name: row.reason for name, row in plan.layers.items()}
    name, reason = next(iter((reasons or {name: row.reason for name, row in plan.tables.items()}).items()))
    if not reasons or any(reason != too_small(layers[name]) for name, reason in reasons.items()):
        raise BadValueError(f"no {type_names()} of the model can be quantized; {name!r}: {reason}.")
    warnings.warn(f"torchq.prepare_qat: nothing was prepared; {name!r}: {reason}.", stacklevel=4)


def _beginnings(
    evidence: Evidence, ranges: Ranges, tables: dict[str, TablePlan]
) -> tuple[dict[str, Tensor], dict[str, InputRange]]:
    """What multiplies the channels of the input, by layer, and the input ranges to begin with."""
    if evidence.config.activation == "dynamic":
        return {}, {name: PerToken() for name in evidence.layers}
    if not evidence.batches:
        return {}, {name: _without_data(layer) for name, layer in evidence.layers.items()}
    scales = _channel_scales(evidence, tables)
    return scales, _starts(evidence, scales, ranges)


def _channel_scales(evidence: Evidence, tables: dict[str, TablePlan]) -> dict[str, Tensor]:
    """What multiplies the channels of the input, for the layers that smoothing helps.

    Heads that share a table have none: the training form of the table rounds its rows as they are.
    """
    tied = {row.owner for row in tables.values() if row.kind == "int8"}
    reached = [name for name, record in evidence.records.items() if record.has_data and name not in tied]
    plan = Plan(
        {name: plan_by(evidence.layers[name], evidence.records[name].whole, evidence.config) for name in reached}
    )
    layers = smooth(plan, evidence).layers
    return {name: scale for name, layer in layers.items() if (scale := layer.scale_vector) is not None}


def _plan(
    selection: Selection, starts: Mapping[str, InputRange], scales: Mapping[str, Tensor], config: QConfig
) -> Plan:
    """What each layer and table will become."""
    plans = {}
    for name in selection.layers:
        if name in starts:
            kind: Kind = "int8 dynamic" if isinstance(starts[name], PerToken) else "int8 static"
            reason = f"to be trained, {starts[name].origin}{'; input smoothed' if name in scales else ''}"
            plans[name] = LayerPlan(kind, reason, config.weight == "per_channel")
        else:
            plans[name] = LayerPlan("float", selection.barred.get(name, "calib_loader never reached it"))
    return Plan(plans, tables=selection.tables)


def _starts(evidence: Evidence, scales: Mapping[str, Tensor], ranges: Ranges) -> dict[str, InputRange]:
    """The initial range of each layer. One without data is left out if its range is to be learned, but for experts."""
    starts: dict[str, InputRange] = {}
    experts = unreached_experts(evidence)
    for name, layer in evidence.layers.items():
        record = evidence.records[name]
        if not record.has_data:
            if name in experts:
                starts[name] = PerToken()
            elif ranges == "observed":
                starts[name] = ObservedRange()
            continue
        lo, hi = _best_range(layer, record, scales.get(name), evidence.config)
        starts[name] = ObservedRange(lo, hi) if ranges == "observed" else LearnedRange(lo, hi)
    return starts


def _without_data(layer: Layer) -> InputRange:
    """The range of a layer that no batch has reached: of an expert, which training may not reach either, per token."""
    return PerToken() if layer.kind.routed else ObservedRange()


def _best_range(layer: Layer, record: Record, scale: Tensor | None, config: QConfig) -> tuple[float, float]:
    """The range of the observer with the highest output SQNR for this layer, as in `choose`."""
    trial, per_channel = record.trial(scale), config.weight == "per_channel"
    measured = measure(
        layer.matrix, trial.rows, trial.ranges, per_channel=per_channel, channel_scale=scale, patches=layer.patches
    )
    lo, hi = trial.observers[max(trial.ranges, key=lambda name: measured[name])].range()
    return float(lo), float(hi)


def _copy(model: M) -> M:
    try:
        return copy.deepcopy(model, dict[int, Any](without_history(model)))
    except Exception as error:
        raise BadTypeError(
            f"this {type(model).__name__} cannot be copied ({type(error).__name__}: {error}). Pass inplace=True to "
            "prepare it as it is."
        ) from error
