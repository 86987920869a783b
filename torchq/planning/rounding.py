"""Rounding: GPTQ where it improves the output on held-out rows, and bias correction. The arithmetic is in gptq.py."""

import dataclasses
import warnings

import torch
from torch import Tensor, nn
from tqdm import tqdm

from torchq import ops
from torchq.calibration.calibrate import MIN_ROWS, Evidence
from torchq.calibration.record import GRAM_SHARE, INPUTS_PER_ROW, MAX_GRAM_DEPTH, Record
from torchq.errors import BadValueError, door
from torchq.modules.packed_weights import PackedWeights
from torchq.modules.registry import Layer
from torchq.numerics.metrics import sqnr_db
from torchq.numerics.qparams import FLT_MIN, dequantize, fake_quantize
from torchq.ops.weights import quantize_weight
from torchq.planning.choose import enough_channels
from torchq.planning.gptq import gptq, mean_error
from torchq.planning.plan import LayerPlan, Plan, Rounded, attached_plan
from torchq.planning.tables import heads_of_tables

MIN_GAIN_DB = 0.5
"""The minimum gain for which "auto" takes GPTQ, in output SQNR on held-out rows."""

MIN_LIKENESS_DB = 10.0
"""The minimum SQNR between a layer's float weights and the rounded ones in its plan.

In practice they agree to 30 dB or more. Below 10 dB the plan has another layer's weights.
"""

_MIN_REMAINING = 0.01
"""The minimum share of XᵀX that must remain once the held-out rows are subtracted.

With less, the difference is mostly float32 rounding errors.
"""

SMALL_GRAM = 512
"""XᵀX of up to so many inputs, 1 MiB, is kept for layers that may read a sum in codes (`coded_sums.py`)."""

_MIN_SQUARE = torch.finfo(torch.float32).tiny / torch.finfo(torch.float32).eps
"""The smallest mean square of an input that float32 holds with full precision."""


def round_weights(plan: Plan, evidence: Evidence, *, progress: bool | None = None) -> Plan:
    """Rounds the int8 layers of `plan` by GPTQ and corrects their bias: always ("gptq"), or where it helps ("auto").

    Layers from `prepare_qat` are left alone: they were trained on weights rounded to nearest. Every second batch is
    held out: it is no part of H and measures the result. For one batch only, or "gptq", half of a layer's sample is
    held out and subtracted from H. The other rows give the bias correction. The XᵀX of a record is freed once every
    layer that shares it is rounded.
    """
    if evidence.config.rounding == "nearest":
        return plan
    layers, tied = dict(plan.layers), heads_of_tables(plan)
    names = [
        name
        for name, layer in plan.layers.items()
        if layer.is_int8 and layer.sqnr_db and evidence.layers[name].trained is None
    ]
    again = {id(evidence.records[name]) for readers in evidence.sums.values() for name in readers}
    waiting = [evidence.records[name] for name in names]  # the records of the layers still to come, in the same order
    for name in tqdm(names, desc="torchq: rounding", disable=None if progress is None else not progress):
        record = waiting.pop(0)
        layers[name] = _rounded(name, layers[name], evidence, tied)
        small = record.gram is not None and len(record.gram) <= SMALL_GRAM and id(record) in again
        if not small and not any(other is record for other in waiting):
            record.gram = None  # of a square layer, 4 times the bytes of the int8 weights that are kept from here on
    return dataclasses.replace(plan, layers=layers)


def rounded_again(name: str, layer: LayerPlan, evidence: Evidence) -> LayerPlan:
    """The plan of a layer whose input has another range now, or no channel_scale: its weights are rounded anew."""
    sqnr_db = {scheme: db for scheme, db in layer.sqnr_db.items() if scheme != "gptq"}
    plain = dataclasses.replace(layer, rounding="nearest", weights=None, sqnr_db=sqnr_db, gptq_db=None)
    if evidence.config.rounding == "nearest":
        return plain
    again = _rounded(name, plain, evidence, set())
    if again.gptq_db is None or again.observer is None:
        return again
    return dataclasses.replace(again, sqnr_db={**again.sqnr_db, again.observer: again.gptq_db[0]})


def _rounded(name: str, layer: LayerPlan, evidence: Evidence, tied: set[str]) -> LayerPlan:
    """The plan of this layer, with GPTQ's weights if they are good enough."""
    record = evidence.records[name]
    why_not = "its rows are an embedding's too" if name in tied else _why_not(record)
    if why_not is not None:
        return dataclasses.replace(layer, no_gptq=why_not)
    rounded, before, after = _round_layer(evidence.layers[name], layer, record)
    layer = dataclasses.replace(layer, gptq_db=(before, after))
    if evidence.config.rounding == "auto" and not after >= before + MIN_GAIN_DB:
        return layer
    return dataclasses.replace(layer, rounding="gptq", sqnr_db={**layer.sqnr_db, "gptq": after}, weights=rounded)


@door("torchq.plan_of")
def plan_of(qmodel: nn.Module) -> Plan:
    """The complete plan of a converted model, with the weights that calibration rounded (`LayerPlan.weights`).

    `apply_plan(model, plan)` turns the float model into the same int8 model again; edit the plan first for a variant.
    `qmodel.torchq_plan` is the same plan without these weights, which would be a second copy in memory.

    Raises:
        ValueError: `qmodel` did not come from `torchq.convert`.

    >>> from torchq import apply_plan, convert
    >>> model, data = nn.Sequential(nn.Linear(64, 64)).eval(), torch.randn(256, 64)
    >>> qmodel = convert(model, [data])
    >>> again = apply_plan(model, plan_of(qmodel))
    >>> torch.equal(again(data), qmodel(data))
    True
    """
    plan = attached_plan(qmodel)
    layers = dict(plan.layers)
    for name, layer in plan.layers.items():
        quantized = qmodel.get_submodule(name) if layer.rounding == "gptq" else None
        if isinstance(quantized, PackedWeights):
            layers[name] = dataclasses.replace(layer, weights=_weights_of(quantized))
    return dataclasses.replace(plan, layers=layers)


def _weights_of(quantized: PackedWeights) -> Rounded:
    return Rounded(*quantized.rows())


def check_rounded(layer: Layer, plan: LayerPlan) -> None:
    """Raises ValueError where the weights of a plan belong to another layer, or to a different channel_scale."""
    if plan.weights is not None and not _alike(layer, plan, plan.weights):
        raise BadValueError(
            f"the weights of layer {layer.name!r} in the plan are not this layer's weights by its channel_scale. Take "
            "the plan whole from torchq.plan_of(qmodel), and set rounding='nearest' where you edit a channel_scale."
        )


def _alike(layer: Layer, plan: LayerPlan, rounded: Rounded) -> bool:
    """Whether these can be the layer's weight, rounded for the plan's channel_scale."""
    none = torch.empty(0, dtype=torch.float32, device="cpu")
    asked, given = (none if scale is None else scale for scale in (plan.scale_vector, rounded.channel_scale))
    weight = layer.weight.detach()
    if rounded.weight.shape != weight.shape or not torch.equal(asked, given):
        return False
    some = slice(None, None, max(1, len(weight) // 64))  # about 64 rows: a whole layer in float is large
    exact, by = weight[some].float(), plan.scale_vector
    by = by if layer.patches is None else layer.patches.weight_scale(by)
    if by is not None:
        exact = exact / (by if by.dim() == 1 else by[some])
    likeness_db = sqnr_db(exact, dequantize(rounded.weight[some], rounded.scale[some], axis=0))
    return likeness_db > MIN_LIKENESS_DB or not (exact.abs() > 127 * FLT_MIN).any()  # less has code 0, as zeros have


def warn_of_missing(plan: Plan) -> None:
    """Warns if the plan lacks the weights of layers that it rounds by GPTQ."""
    missing = [
        name
        for name, layer in plan.layers.items()
        if layer.is_int8 and layer.rounding == "gptq" and layer.weights is None
    ]
    if missing:
        warnings.warn(
            f"torchq.apply_plan: {len(missing)} layers ({', '.join(map(repr, missing[:3]))}"
            f"{', ...' if len(missing) > 3 else ''}) have weights rounded with calibration data, which this plan does "
            "not hold: they are rounded to nearest now. Pass torchq.plan_of(qmodel), or load the converted model's "
            "state_dict.",
            UserWarning,
            stacklevel=6,  # the caller of apply_plan()
        )


def _why_not(record: Record) -> str | None:
    """Why GPTQ is not tried: it would cost too much, or there is too little data for H. None if it is."""
    depth, judge = record.values(record.sample.rows).shape[1], _judge(record)
    rows = record.sample.rows_seen - (record.held_rows or int(judge.sum()))
    if record.patches is not None and record.patches.geometry.groups > 1:
        return "a convolution with groups, which gptq is not written for"
    if record.gram is None:
        rounding = record.config.rounding
        if depth > MAX_GRAM_DEPTH[rounding]:
            return f"{depth} inputs, rounding={rounding!r} takes gptq up to {MAX_GRAM_DEPTH[rounding]}"
        return f"XᵀX of the layers before it takes {GRAM_SHARE:g} times the memory of the weights"
    if record.config.rounding == "auto" and record.sample.rows_seen < MIN_ROWS:
        return f"{record.sample.rows_seen} calibration rows, rounding='auto' takes gptq from {MIN_ROWS} rows on"
    if not judge.any() or judge.all():
        return "its rows are all of batches that judge, or none is: gptq needs both"
    if INPUTS_PER_ROW * rows < depth:
        needed = -(-depth // INPUTS_PER_ROW)
        return f"{rows} calibration rows beside the held-out ones, gptq needs {needed} for {depth} inputs"
    total = float(record.gram.trace())
    remaining = total - float(_held_out_of_gram(record).square().sum())
    if not remaining > max(_MIN_REMAINING * total, depth * _MIN_SQUARE):  # `not >`, so that nan is refused too
        return f"the squares of its inputs sum to {total:.3g}, {remaining:.3g} of it outside of the held-out rows"
    return None


def _judge(record: Record) -> Tensor:
    """Which rows of the sample judge, bool (R,): those of batches held out, or of one batch every second."""
    if record.held_rows:
        return record.sample.held_out
    return torch.arange(len(record.sample.rows), dtype=torch.long, device="cpu") % 2 == 0


def _held_out_of_gram(record: Record) -> Tensor:
    """The held-out rows that are part of XᵀX, (R, K)."""
    rows = record.values(record.sample.rows)
    return rows[:0] if record.held_rows else rows[_judge(record) & (record.sample.positions < record.gram_rows)]


@torch.no_grad()
def _round_layer(layer: Layer, plan: LayerPlan, record: Record) -> tuple[Rounded, float, float]:
    """The matrix rounded by GPTQ, and the output SQNR on held-out rows: rounded to nearest, and by GPTQ."""
    matrix, patches, counted = layer.matrix, layer.patches, _held_out_of_gram(record)
    gram, channel_scale = record.products(), plan.scale_vector
    if len(counted):
        gram = gram.addmm(counted.T, counted, alpha=-1)
    judge, rows = _judge(record), record.sample.rows
    held_out, correction_rows = rows[judge], rows[~judge]
    weight = matrix.weight.float()
    tiled = channel_scale if patches is None else patches.tiled_scale(channel_scale)
    nearest, scale = quantize_weight(weight, per_channel=plan.per_channel, channel_scale=tiled)
    bias = torch.zeros(len(weight), dtype=torch.float32, device="cpu") if matrix.bias is None else matrix.bias.float()
    some = enough_channels(len(weight), plan.per_channel)

    def held_out_db(rounded: Rounded) -> float:
        part = Rounded(rounded.weight[some], rounded.scale[some], rounded.bias[some], channel_scale)
        return sqnr_db(exact, _output(held_out, plan, record, part))

    exact = nn.functional.linear(record.values(held_out), weight[some], bias[some])
    before = held_out_db(Rounded(nearest, scale, bias, channel_scale))
    rounded = Rounded(gptq(weight, scale, gram, tiled), scale, bias, channel_scale)
    rounded = rounded._replace(bias=bias + _mean_error(weight, correction_rows, plan, record, rounded))
    return rounded, before, held_out_db(rounded)


def _mean_error(weight: Tensor, x: Tensor, plan: LayerPlan, record: Record, rounded: Rounded) -> Tensor:
    """What the planned layer's output lacks, on average over rows of the record's sample, with these weights."""
    values = _quantized(x, plan, record, rounded.channel_scale)
    return mean_error(weight, rounded.weight, rounded.scale, record.values(x), values)


def _quantized(x: Tensor, plan: LayerPlan, record: Record, channel_scale: Tensor | None) -> Tensor:
    """What the planned layer's weight multiplies for rows of the record's sample, float32."""
    qparams = plan.input_qparams if plan.kind == "int8 static" else None
    if record.patches is not None:
        return record.patches.quantized(x, channel_scale, qparams)
    values = record.scaled(x, channel_scale)
    if qparams is not None:
        return fake_quantize(values, *qparams, dtype=torch.uint8)
    codes, scale, zero_point = ops.quantize_per_token(values)
    return (codes.int() - zero_point).float() * scale


def _output(x: Tensor, plan: LayerPlan, record: Record, rounded: Rounded) -> Tensor:
    """What the planned layer gives for rows of the record's sample with these weights, float32."""
    patches, static = record.patches, plan.kind == "int8 static"
    codes, scale, bias, channel_scale = rounded
    if patches is not None:
        return patches.multiplied(_quantized(x, plan, record, channel_scale), dequantize(codes, scale, axis=0), bias)
    packed = ops.pack(codes, scale, bias, channel_scale)
    if static and plan.input_qparams is not None:
        return ops.linear_static(x, packed, *plan.input_qparams, torch.float32)
    return ops.linear_dynamic(x, packed)


@torch.no_grad()
def corrected(layer: Layer, plan: LayerPlan, record: Record) -> LayerPlan:
    """The plan of a layer that has another scheme since its weights were rounded: the same codes, another bias."""
    if plan.weights is None:
        return plan
    judge, rows = _judge(record), record.sample.rows
    weight, bias = layer.matrix.weight.float(), layer.matrix.bias
    start = torch.zeros_like(plan.weights.bias) if bias is None else bias.float()
    weights = plan.weights._replace(bias=start + _mean_error(weight, rows[~judge], plan, record, plan.weights))
    some = enough_channels(len(weight), plan.per_channel)
    part = Rounded(weights.weight[some], weights.scale[some], weights.bias[some], weights.channel_scale)
    exact = nn.functional.linear(record.values(rows[judge]), weight[some], start[some])
    db = sqnr_db(exact, _output(rows[judge], plan, record, part))
    return dataclasses.replace(plan, weights=weights, sqnr_db={**plan.sqnr_db, "gptq": db})
