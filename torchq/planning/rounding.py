"""Rounding: weights by GPTQ where that gains on held-out rows, and bias correction. The arithmetic: gptq.py."""

import dataclasses
import warnings

import torch
from torch import Tensor, nn
from tqdm import tqdm

from torchq import ops
from torchq.calibration.calibrate import Evidence
from torchq.calibration.record import MAX_GRAM_DEPTH, Record
from torchq.errors import BadValueError, door
from torchq.modules.base import Matrix
from torchq.modules.quantized_linear import QuantizedLinear
from torchq.numerics.metrics import sqnr_db
from torchq.numerics.qparams import dequantize, quantize, weight_scale
from torchq.planning.gptq import Factors, gptq, mean_error
from torchq.planning.plan import LayerPlan, Plan, Rounded, attached_plan
from torchq.planning.smoothing import scaled, scales_around

MIN_GAIN_DB = 0.5
"""What "auto" wants rounding to gain, in output SQNR on rows it has not seen."""

INPUTS_PER_ROW = 4
"""A layer of K inputs is rounded on K/4 rows at least: the damping fills up H where they leave it singular."""

MIN_LIKENESS_DB = 10.0
"""The minimum SQNR between one weight rounded to nearest and by GPTQ: below it, they are of different layers.

In practice it is 30 dB and more."""

_ROWS = 1024  # of a weight rounded together, in float64

_MIN_REST = 0.01
"""How much of XᵀX must be left without the held-out rows: less, and the difference is float32's rounding errors."""

_MIN_SQUARE = torch.finfo(torch.float32).tiny / torch.finfo(torch.float32).eps
"""The least mean square of inputs, of which float32 keeps all digits."""


def round_weights(plan: Plan, evidence: Evidence, *, progress: bool | None = None) -> Plan:
    """Rounds the int8 layers of `plan` by GPTQ and corrects their bias: always, or ("auto") where they gain by it.

    Layers trained on weights rounded to nearest stay as trained. Half of a layer's sample is taken out of H and judges;
    the other half gives the bias correction. The records of the layers rounded give up their XᵀX.
    """
    if evidence.config.rounding == "nearest":
        return plan
    layers, factors = dict(plan.layers), Factors()
    names = [
        name
        for name, layer in plan.layers.items()
        if layer.is_int8 and layer.sqnr_db and evidence.layers[name].trained is None
    ]
    waiting = [evidence.records[name] for name in names]  # by place in names
    for name in tqdm(names, desc="torchq: rounding", disable=None if progress is None else not progress):
        record = waiting.pop(0)
        layers[name] = _rounded(name, plan, evidence, factors)
        if not any(other is record for other in waiting):
            record.gram = None  # four times the rounded weights of a square layer, which are kept from here on
    return dataclasses.replace(plan, layers=layers)


def _rounded(name: str, plan: Plan, evidence: Evidence, factors: Factors) -> LayerPlan:
    """The plan of this layer, with GPTQ's weights where they are taken."""
    layer, record = plan.layers[name], evidence.records[name]
    why_not = _why_not(record)
    if why_not is not None:
        return dataclasses.replace(layer, no_gptq=why_not)
    into, out = scales_around(plan.smoothings, name)
    matrix = evidence.layers[name].matrix
    if into is not None:
        matrix = scaled(matrix, into=into)
    done, before, after = _round_layer(matrix, layer, record, into, factors)
    layer = dataclasses.replace(layer, gptq_db=(before, after))
    if evidence.config.rounding == "auto" and not after >= before + MIN_GAIN_DB:
        return layer
    weights = done if out is None else Rounded(done.weight, done.scale / out, done.bias / out)
    return dataclasses.replace(layer, rounding="gptq", sqnr_db={**layer.sqnr_db, "gptq": after}, weights=weights)


@door("torchq.plan_of")
def plan_of(qmodel: nn.Module) -> Plan:
    """The plan of a converted model, complete: with the weights that calibration rounded (`LayerPlan.weights`).

    `apply_plan(model, plan)` then makes the same model of the float one, and of an edited plan its variant.
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
        if isinstance(quantized, QuantizedLinear):
            layers[name] = dataclasses.replace(layer, weights=_weights_of(quantized))
    return dataclasses.replace(plan, layers=layers)


def _weights_of(quantized: QuantizedLinear) -> Rounded:
    weight, scale, bias = ops.unpack(quantized.packed)
    return Rounded(weight, scale, torch.zeros(len(scale)) if bias is None else bias)


def take_rounded(name: str, quantized: QuantizedLinear, rounded: Rounded | None) -> None:
    """Replaces a layer's nearest-rounded weights by those of its plan.

    If the plan has none, the layer only gets a bias, as the rounded ones come with one: so a state_dict of the
    converted model fits.

    Raises:
        ValueError: they are another layer's, or were made for inputs or outputs smoothed otherwise.
    """
    nearest = _weights_of(quantized)
    rounded = nearest if rounded is None else rounded
    if rounded.weight.shape != nearest.weight.shape or not _alike(nearest, rounded):
        raise BadValueError(
            f"the weights of layer {name!r} in the plan are not this layer's weights as the plan smooths them. Take "
            "the plan whole from torchq.plan_of(qmodel), and set rounding='nearest' where you edit a smoothing."
        )
    quantized.replace_weight(*rounded)


def _alike(nearest: Rounded, rounded: Rounded) -> bool:
    some = slice(None, None, max(1, len(nearest.weight) // 64))  # rows: whole float layers would double the memory
    exact = dequantize(nearest.weight[some], nearest.scale[some], axis=0)
    found = sqnr_db(exact, dequantize(rounded.weight[some], rounded.scale[some], axis=0))
    return found > MIN_LIKENESS_DB or not exact.any()


def warn_of_missing(plan: Plan) -> None:
    """Warns of the layers of a plan whose rounded weights are not there."""
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
            stacklevel=5,  # the caller of apply_plan()
        )


def _why_not(record: Record) -> str | None:
    """Why GPTQ would cost too much, or H would mean nothing."""
    depth, rows = record.sample.rows.shape[1], record.sample.seen - len(record.sample.rows[::2])
    if record.gram is None:
        rounding = record.config.rounding
        return f"{depth} inputs, rounding={rounding!r} takes gptq up to {MAX_GRAM_DEPTH[rounding]}"
    if INPUTS_PER_ROW * rows < depth:
        needed = -(-depth // INPUTS_PER_ROW)
        return f"{rows} calibration rows beside the held-out ones, gptq needs {needed} for {depth} inputs"
    whole = float(record.gram.trace())
    rest = whole - float(_held_out_of_gram(record).square().sum())
    if not rest > max(_MIN_REST * whole, depth * _MIN_SQUARE):  # nan is not
        return f"the squares of its inputs sum to {whole:.3g}, {rest:.3g} of it outside of the held-out rows"
    return None


def _held_out_of_gram(record: Record) -> Tensor:
    """The held-out rows that XᵀX took in, (R, K)."""
    return record.sample.rows[::2][record.sample.positions[::2] < record.gram_rows]


@torch.no_grad()
def _round_layer(
    matrix: Matrix, plan: LayerPlan, record: Record, into: Tensor | None, factors: Factors
) -> tuple[Rounded, float, float]:
    """The matrix rounded, and its output SQNR on held-out rows before and after.

    `into` (K,) is what smoothing divides its inputs by; the matrix takes inputs so divided.
    """
    assert record.gram is not None  # _why_not
    rows, counted = record.sample.rows, _held_out_of_gram(record)
    gram = record.gram - counted.T @ counted
    if into is not None:
        rows, gram = rows / into, gram / torch.outer(into, into)
    held_out, seen = rows[::2], rows[1::2]
    weight = matrix.weight.float()
    scale = weight_scale(weight, per_channel=plan.per_channel).contiguous()
    bias = torch.zeros(len(weight)) if matrix.bias is None else matrix.bias.float()

    def run(x: Tensor, codes: Tensor, bias: Tensor) -> Tensor:
        packed = ops.pack(codes, scale, bias)
        if plan.kind == "int8 static" and plan.input_qparams is not None:
            return ops.linear_static(x, packed, *plan.input_qparams, torch.float32)
        return ops.linear_dynamic(x, packed)

    exact = nn.functional.linear(held_out, weight, bias)
    nearest = run(held_out, quantize(weight, scale, axis=0), bias)
    pieces = zip(weight.split(_ROWS), scale.split(_ROWS), strict=True)  # each row by itself: less memory
    codes = torch.cat([gptq(w, s, gram, factors=factors) for w, s in pieces])
    corrected = bias + mean_error(nn.functional.linear(seen, weight, bias), run(seen, codes, bias))
    after = run(held_out, codes, corrected)
    return Rounded(codes, scale, corrected), sqnr_db(exact, nearest), sqnr_db(exact, after)
