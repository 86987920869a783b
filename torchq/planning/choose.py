"""Chooses the scheme of each layer by measuring every candidate on the layer's own calibration rows."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Set

import torch
from torch import Tensor, nn

from torchq import ops
from torchq.calibration.calibrate import Evidence
from torchq.calibration.record import MIN_STATIC_ROWS, Record, Trial
from torchq.config import QConfig
from torchq.errors import BadValueError
from torchq.modules.base import Matrix, Trained
from torchq.modules.patches import Patches
from torchq.modules.registry import Layer
from torchq.numerics.metrics import decibels, energies
from torchq.numerics.qparams import QParams, dequantize
from torchq.ops.fine import linear_fine
from torchq.ops.weights import quantize_weight
from torchq.planning.mixtures import unreached_experts
from torchq.planning.plan import LayerPlan, Plan

_ENOUGH_CHANNELS = 256  # of a layer's outputs, to tell one scheme from another
_PART_VALUES = 2**21  # of a weight, measured at a time

SMALL_INPUT = 0.05
"""Without data, the first input products of a recurrent module stay in float up to this share of its weights.

With data, the model's output tells whether it must (selfcheck.py).
"""

FLOATS = "a depthwise convolution that gets no codes multiplies floats"
"""Why one is not static unasked: its range would save nothing, except between static convolutions (convolutions.py)."""

ONLY_READ = "code reads its weight and does not call it: each read would dequantize int8"
"""Why a layer stays in float whose module is a place for its weight only."""

READ_TOO = "; code reads its weight as well, which dequantizes it each time"

TOO_FEW = f"fewer than {MIN_STATIC_ROWS} calibration rows: too few"


class Yardstick:
    """What a float matrix gives for some rows: what every scheme of the layer is compared with.

    Of many output channels with a scale each, about 256 are measured, which is enough to tell one scheme from another.

    Args:
        matrix: the float matrix.
        rows: float32 (R, K); of a convolution, as `patches` gives them.
        per_channel: whether each output channel has a weight scale of its own.
        patches: how rows are made of the input of a convolution.
    """

    @torch.no_grad()
    def __init__(
        self, matrix: Matrix, rows: Tensor, *, per_channel: bool = True, patches: Patches | None = None
    ) -> None:
        self._rows, self._per_channel, self._patches = rows, per_channel, patches
        self._latest: tuple[Tensor | None, list[tuple[Tensor, Tensor]]] | None = None
        if patches is None:
            self._parts = list(_parts(matrix, rows, per_channel))
        else:
            some = enough_channels(len(matrix.weight), per_channel and patches.geometry.groups == 1)
            weight, bias = matrix.weight[some].float(), None if matrix.bias is None else matrix.bias[some].float()
            self._parts = [(Matrix(weight, bias), patches.multiplied(patches.values(rows), weight, bias))]

    @torch.no_grad()
    def measure(
        self, ranges: Mapping[str, QParams], channel_scale: Tensor | None = None, *, fine: bool = False
    ) -> dict[str, float]:
        """As the function of this name. `fine`: what is dynamic has two codes for each value; not of convolutions."""
        sums = {name: torch.zeros(2, dtype=torch.float64, device="cpu") for name in ("dynamic", *ranges)}
        multiply = linear_fine if fine else ops.linear_dynamic
        for (part, exact), rounded in zip(self._parts, self._rounded(channel_scale), strict=True):
            for name, y in self._outputs(part.bias, rounded, ranges, channel_scale, multiply):
                sums[name] += energies(exact, y)
        return {name: decibels(both) for name, both in sums.items()}

    @torch.no_grad()
    def rounding_noise(self, channel_scale: Tensor | None = None) -> float:
        """The energy of the error that rounding the weights to nearest makes, over the signal's. Not of convolutions.

        Rounding errors are independent of each other: their energy is that of each weight's error times its inputs'.
        """
        inputs = (self._rows if channel_scale is None else self._rows * channel_scale).square().sum(0)
        noise, signal = 0.0, 0.0
        for (part, exact), (codes, scales) in zip(self._parts, self._rounded(channel_scale), strict=True):
            weight = part.weight.float() if channel_scale is None else part.weight.float() / channel_scale
            noise += float(codes.float().mul_(scales.unsqueeze(1)).sub_(weight).square_().sum(0) @ inputs)
            signal += float(exact.square().sum())
        return noise / signal if signal else 0.0

    def _rounded(self, channel_scale: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        """The int8 codes and scales of each part. Those of the latest scale are kept: its noise is asked for next."""
        if self._latest is None or self._latest[0] is not channel_scale:
            by = channel_scale if self._patches is None else self._patches.weight_scale(channel_scale)
            weights = [part.weight for part, _ in self._parts]
            rounded = [quantize_weight(each, per_channel=self._per_channel, channel_scale=by) for each in weights]
            self._latest = channel_scale, rounded
        return self._latest[1]

    def _outputs(
        self,
        bias: Tensor | None,
        rounded: tuple[Tensor, Tensor],
        ranges: Mapping[str, QParams],
        channel_scale: Tensor | None,
        dynamic: Callable[[Tensor, Tensor], Tensor],
    ) -> Iterator[tuple[str, Tensor]]:
        """What this part of the matrix gives in int8: by a range per row, and by each static range."""
        rows, patches, (codes, scales) = self._rows, self._patches, rounded
        if patches is None:
            packed = ops.pack(codes, scales, None if bias is None else bias.float(), channel_scale)
            yield "dynamic", dynamic(rows, packed)
            for name, (step, zero_point) in ranges.items():
                yield name, ops.linear_static(rows, packed, step, zero_point, torch.float32)
            return
        weight = dequantize(codes, scales, axis=0)
        for name in ("dynamic", *ranges):
            values = patches.quantized(rows, channel_scale, ranges.get(name))
            yield name, patches.multiplied(values, weight, bias)


def enough_channels(count: int, per_channel: bool) -> slice:
    """Which of so many output channels are measured: all where they share a scale, which depends on all of them."""
    return slice(None, None, max(1, count // _ENOUGH_CHANNELS) if per_channel else 1)


def choose(plan: Plan, evidence: Evidence) -> Plan:
    """Decides each layer independently. Layers already planned as float stay so; the others get the best scheme.

    Raises:
        ValueError: `activation="static"`, but the calibration data never reached a layer.
    """
    experts = unreached_experts(evidence)
    if evidence.config.activation == "static":
        _require_data(plan, evidence, experts)
    layers = {
        name: _choose_layer(evidence.layers[name], evidence, experts) if layer.is_int8 else layer
        for name, layer in plan.layers.items()
    }
    return dataclasses.replace(plan, layers=layers)


def _require_data(plan: Plan, evidence: Evidence, experts: Set[str]) -> None:
    needed = [name for name in evidence.records if evidence.layers[name].trained is None and name not in experts]
    needed = [name for name in needed if plan.layers[name].is_int8 and not is_only_read(name, evidence)]
    missed = [name for name in needed if not evidence.records[name].has_data]
    if missed:
        raise BadValueError(
            f"activation='static', but calib_loader never reached {', '.join(map(repr, missed))}. "
            "Pass data that runs these layers, exclude them, or use activation='auto'."
        )


def is_only_read(name: str, evidence: Evidence) -> bool:
    """Whether code reads the weight of a layer and never calls it, as far as the evidence says."""
    return name in evidence.weights_read and (name not in evidence.records or evidence.records[name].calls == 0)


def note_code(plan: Plan, evidence: Evidence) -> Plan:
    """A stage: says what costs time in code: reads of weights of int8 layers, and attention that is written out."""
    layers = {
        name: dataclasses.replace(layer, reason=layer.reason + READ_TOO)
        if layer.is_int8 and name in evidence.weights_read
        else layer
        for name, layer in plan.layers.items()
    }
    return dataclasses.replace(plan, layers=layers, written_attentions=evidence.written_attentions)


def _choose_layer(layer: Layer, evidence: Evidence, experts: Set[str]) -> LayerPlan:
    """The plan of one layer. Of `experts` only their calls reach the weights."""
    config, record, trained = evidence.config, evidence.records.get(layer.name), layer.trained
    if is_only_read(layer.name, evidence):
        return LayerPlan("float", ONLY_READ)
    if trained is not None:
        return _plan_trained(layer, trained, record.whole if record is not None and record.has_data else None)
    per_channel = config.weight == "per_channel"
    if record is None:
        share = _first_input(layer) if config.activation == "auto" and layer.kind.is_first_input(layer.part) else 1
        if share <= SMALL_INPUT:
            return LayerPlan("float", f"no data to judge it by: {share:.1%} of weights whose errors the steps amplify")
        return LayerPlan("int8 dynamic", "no calibration data", per_channel)
    if record.calls == 0 and config.activation == "auto" and layer.name not in experts:
        return LayerPlan("float", "calib_loader never reached it; its weight may be read without calling it")
    if not record.has_data:
        return LayerPlan("int8 dynamic", "no calibration data reached it", per_channel)
    return plan_by(layer, record.whole, config, no_static=FLOATS if layer.is_depthwise else too_few(record))


def too_few(record: Record) -> str | None:
    """Why no static range is chosen unasked for a layer with this record; None if there are enough rows."""
    return f"{TOO_FEW} for a static range" if record.is_too_few else None


def _first_input(layer: Layer) -> float:
    """The share of the first input's products in the weights of this layer's module."""
    sizes = {part: matrix.weight.numel() for part, matrix in layer.kind.matrices(layer.module).items()}
    return sum(size for part, size in sizes.items() if layer.kind.is_first_input(part)) / sum(sizes.values())


def yardstick_of(layer: Layer, trial: Trial, config: QConfig) -> Yardstick:
    """What this layer gives for the rows of `trial`."""
    return Yardstick(layer.matrix, trial.rows, per_channel=config.weight == "per_channel", patches=layer.patches)


def plan_by(layer: Layer, trial: Trial, config: QConfig, *, no_static: str | None = None) -> LayerPlan:
    """The plan of this layer by `trial`, as `plan_layer` makes it."""
    return plan_layer(yardstick_of(layer, trial, config), trial.ranges, config, no_static=no_static)


def plan_layer(
    yardstick: Yardstick,
    ranges: Mapping[str, QParams],
    config: QConfig,
    *,
    channel_scale: Tensor | None = None,
    no_static: str | None = None,
) -> LayerPlan:
    """The scheme and range with the least error on the rows of the yardstick, or float if none is good enough.

    The layer has this `channel_scale` (K,), for which the ranges were made; without ranges it is dynamic. `no_static`
    says why the layer is not static unless that is asked for.
    """
    per_channel, measured = config.weight == "per_channel", yardstick.measure(ranges, channel_scale)
    observer = max(ranges, key=lambda name: measured[name], default=None)
    static, dynamic = measured.get(observer or "", math.nan), measured["dynamic"]
    if config.activation == "auto":
        close = static >= config.min_sqnr_db and static >= dynamic - config.margin_db  # False for nan
        use_static, reason = close, "static costs no accuracy" if close else "static would cost accuracy"
        if no_static is not None and (close or observer is None):
            use_static, reason = False, no_static
    else:
        use_static, reason = config.activation == "static", "asked for"
    if not (static if use_static else dynamic) >= config.min_sqnr_db:
        best = "" if observer is None else f"static {static:.1f} dB ({observer}), "
        best += f"dynamic {dynamic:.1f} dB"
        return LayerPlan("float", f"{best}: below min_sqnr_db = {config.min_sqnr_db:g}", sqnr_db=measured)
    if use_static and observer is not None:
        return LayerPlan("int8 static", reason, per_channel, ranges[observer], observer, measured)
    return LayerPlan("int8 dynamic", reason, per_channel, sqnr_db=measured)


def _plan_trained(layer: Layer, trained: Trained, trial: Trial | None) -> LayerPlan:
    """The scheme and range this layer was trained with, whatever their error on the data: training compensated it."""
    qparams, reason = trained.input_qparams, f"trained, {trained.origin}"
    measured = {}
    if trial is not None:
        ranges = {} if qparams is None else {"trained": qparams}
        measured = measure(
            layer.matrix,
            trial.rows,
            ranges,
            per_channel=trained.per_channel,
            channel_scale=trained.channel_scale,
            patches=layer.patches,
        )
    scale = None if trained.channel_scale is None else tuple(trained.channel_scale.tolist())
    if qparams is None:
        return LayerPlan("int8 dynamic", reason, trained.per_channel, sqnr_db=measured, channel_scale=scale)
    return LayerPlan("int8 static", reason, trained.per_channel, qparams, "trained", measured, channel_scale=scale)


def measure(
    matrix: Matrix,
    rows: Tensor,
    ranges: Mapping[str, QParams],
    *,
    per_channel: bool = True,
    channel_scale: Tensor | None = None,
    patches: Patches | None = None,
) -> dict[str, float]:
    """Output SQNR in dB of each scheme, computed with the real integer ops, against the float matrix on `rows` (R, K).

    The layer has this `channel_scale` (K,), for which the ranges were made. Of a convolution, rows are as `patches`
    gives them, the scale is one for each channel, and the products are those of the simulated path. Of many output
    channels, some are measured (`Yardstick`).

    >>> _ = torch.manual_seed(0)
    >>> matrix, rows = Matrix(torch.randn(64, 64), None), torch.randn(32, 64)
    >>> sorted(measure(matrix, rows, {"minmax": QParams(0.03, 128)}))
    ['dynamic', 'minmax']
    """
    return Yardstick(matrix, rows, per_channel=per_channel, patches=patches).measure(ranges, channel_scale)


def _parts(matrix: Matrix, rows: Tensor, per_channel: bool) -> Iterator[tuple[Matrix, Tensor]]:
    """Some output channels at a time, and what they give for `rows`: a float32 copy of a whole large layer is large."""
    weight, bias = matrix.weight, matrix.bias
    some = enough_channels(len(weight), per_channel)
    count = max(1, _PART_VALUES // max(1, weight.shape[1])) if per_channel else len(weight)
    biases = [None] * len(weight) if bias is None else bias[some].split(count)
    for part, its_bias in zip(weight[some].split(max(1, count)), biases, strict=bias is not None):
        exact = nn.functional.linear(rows, part.float(), None if its_bias is None else its_bias.float())
        yield Matrix(part, its_bias), exact
