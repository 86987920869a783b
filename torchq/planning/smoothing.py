"""SmoothQuant moves activation outliers into the weights; the function stays the same (arXiv 2211.10438).

A few channels of a transformer's activations are 50 times as large as the others. With one scale for all channels, the
others are left with a few codes. So channel k is multiplied by c_k, and column k of the weight divided by it:

    y = (x · c) · (w / c)ᵀ        c_k = max|w_k|^(1 - alpha) / max|x_k|^alpha

The product is the same, but the range is now shared between the activations and the weights, which have a scale per
output channel. The layer itself multiplies, where it quantizes its rows (`ops.pack`, channel_scale). So nothing else in
the model changes, and every layer may have its own c. Each alpha is measured like any other scheme: on the layer's own
rows, with the real integer ops. In a depthwise convolution each channel has a row of the weight, and so a weight scale,
of its own: there alpha = 1 costs the weight nothing, and gives every channel all codes. Only if all are to be static: a
dynamic one multiplies floats.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from torchq.calibration.calibrate import Evidence
from torchq.calibration.record import Record
from torchq.config import QConfig
from torchq.modules.registry import Layer
from torchq.numerics.qparams import QParams
from torchq.planning.choose import plan_layer, too_few, yardstick_of
from torchq.planning.plan import LayerPlan, Plan
from torchq.planning.tables import heads_of_coarse_tables, measured_tables

ALPHAS = (0.35, 0.5, 0.65, 0.8, 0.95)
"""The migration strengths tried: the larger, the more of the range moves into the weights."""

_ALWAYS = 3  # of ALPHAS, so many are tried on every layer

MIN_GAIN_DB = 0.5
"""Up to this gain in output SQNR, a layer is not smoothed."""

FED_GAIN_DB = 3.0
"""The same for a convolution that another one could hand u8 codes to: one that scales its input takes floats only."""

NO_STATIC = "smoothed: the largest value of every channel is at the end of the range"
"""Why a smoothed layer is not static unasked. A new row may exceed the range in any channel, and one large row of many
is enough to cost the model's output 4 dB, while a range for each row costs 1 to 3 % of the layer's time. A convolution
that scales its input takes no codes, but static ones may give them: convolutions.py decides by the model's output.
"""

NO_CODES = "a depthwise convolution multiplies floats, or codes of others, which can't be scaled"
"""Why one has no scales unless all layers are to be static: they are for the codes that it makes of floats itself."""

_ROUNDED = 0.25
"""What GPTQ is expected to leave of the error of rounding weights to nearest: so alpha may move more of the range into
them. (In the models of benchmarks/accuracy.py it leaves 0.1 to 0.6 of a layer's.)
"""

CLEAR_DB = 1.0
"""Where no static range is within so much of being chosen, by all rows, none is made for parts of them."""

_LIMIT = 2.0**12  # the largest scale: beyond it, either the activations or the weights of the channel are only noise


def _alphas(layer: Layer) -> tuple[float, ...]:
    return (1.0,) if layer.is_depthwise else ALPHAS


def smooth(plan: Plan, evidence: Evidence) -> Plan:
    """Tries every alpha on each layer that has been measured. Where one is better, it replaces the layer's plan."""
    if evidence.config.smoothing == "none":
        return plan
    tied = heads_of_coarse_tables(plan)
    layers, fed = dict(plan.layers), {chain[-1] for chain in evidence.chains.values() if chain}
    for name, planned in plan.layers.items():
        layer = evidence.layers.get(name)
        if not planned.sqnr_db or layer is None or layer.trained is not None or name in tied:
            continue
        if layer.is_depthwise and evidence.config.activation != "static":
            layers[name] = dataclasses.replace(planned, no_smoothing=NO_CODES)
        elif not layer.takes_scale:
            why_not = "a convolution with groups of several channels takes no channel_scale"
            layers[name] = dataclasses.replace(planned, no_smoothing=why_not)
        elif not _would_not_shrink(layer):
            least = FED_GAIN_DB if name in fed else MIN_GAIN_DB
            layers[name] = _smoothed(layer, evidence.records[name], planned, evidence.config, least)
    scaled = {name for name, layer in layers.items() if layer.channel_scale is not None}
    return measured_tables(dataclasses.replace(plan, layers=layers), evidence.model, scaled)


def _would_not_shrink(layer: Layer) -> bool:
    """Whether the layer takes less memory than in float, and would not with a scale: it has few outputs."""
    before = sum(tensor.nbytes for tensor in layer.matrix if tensor is not None)
    return layer.packed_bytes() < before <= layer.packed_bytes(channel_scale=True)


def channel_scale(x_peak: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """`c_k = max|w_k|^(1 - alpha) / max|x_k|^alpha`, divided by their geometric mean.

    Dividing by the mean changes no int8 code, since all ranges change by the same factor. It keeps x · c and w / c near
    their old size.

    Args:
        x_peak: max|x_k| over the calibration data, float32 (K,).
        weight: (N, K).
        alpha: in [0, 1].

    Returns:
        float32 (K,). Channels that are zero in x or in the weight get the scale 1.

    >>> channel_scale(torch.tensor([16.0, 1.0]), torch.ones(3, 2), alpha=0.5)
    tensor([0.5000, 2.0000])
    """
    return _scale(x_peak, _peak(weight), alpha)


def _peak(weight: Tensor) -> Tensor:
    """max|w_k| of each column."""
    return torch.maximum(weight.detach().amax(dim=0), -weight.detach().amin(dim=0)).float()  # abs() would copy it


def _scale(x_peak: Tensor, w_peak: Tensor, alpha: float) -> Tensor:
    used = (x_peak > 0) & (w_peak > 0)
    logs = torch.where(used, (1 - alpha) * w_peak.double().log2() - alpha * x_peak.double().log2(), 0.0)
    logs = torch.where(used, logs - logs.sum() / max(1, int(used.sum())), 0.0)
    return logs.clamp(-math.log2(_LIMIT), math.log2(_LIMIT)).exp2().float()


class _Try(NamedTuple):
    """A plan of a layer, and the SQNR that is expected of it when its weights are rounded as they will be."""

    plan: LayerPlan
    db: float


def _smoothed(layer: Layer, record: Record, planned: LayerPlan, config: QConfig, least: float) -> LayerPlan:
    """The plan of this layer with the best alpha, or as it is.

    All alphas are compared with a range per row, and the best is taken if it gains more than `least`. Static ranges are
    made only where a smoothed layer may become static, since to make them and to measure them takes most of the time:
    of convolutions, for the best alpha; of all layers if they are to be static, for all. Where rows are few, each part
    of them judges what the other gives; the worse of the two with a scale must be better than the better one without.
    """
    trials, w_peak, alphas = record.trials(), _peak(layer.channel_rows), _alphas(layer)
    yardsticks = [yardstick_of(layer, trial, config) for trial in trials]
    hopeless = _no_static_is_close(planned, config)
    scales: dict[float | None, Tensor] = {alpha: _scale(trials[0].peak, w_peak, alpha) for alpha in alphas}

    @cache
    def leaving(alpha: float | None) -> float:
        """What GPTQ is expected to take of the noise."""
        if layer.kind.absorbs or not record.may_round:  # convolutions are faster without a scale
            return 0.0
        return (1 - _ROUNDED) * yardsticks[0].rounding_noise(scales.get(alpha))

    @cache
    def dynamic(alpha: float | None) -> float:
        if layer.is_depthwise:
            return tries(alpha)[0].db  # of its static ranges
        return _less(yardsticks[0].measure({}, scales.get(alpha))["dynamic"], leaving(alpha))

    def tries(alpha: float | None) -> list[_Try]:
        scale = scales.get(alpha)
        no_static = too_few(record) or (None if scale is None else NO_STATIC)
        ranges: list[Mapping[str, QParams]] = [{}] * len(yardsticks)
        needed = not hopeless if scale is None else config.activation == "static"
        if needed or layer.kind.absorbs:  # convolutions may become static later
            ranges = [trial.ranges for trial in record.trials(scale)]
        pairs = zip(yardsticks, ranges, strict=True)
        plans = [plan_layer(*pair, config, channel_scale=scale, no_static=no_static) for pair in pairs]
        return [_Try(plan, _less(_db(plan), leaving(alpha))) for plan in plans]

    best = _best_alpha(alphas, dynamic, least)
    if best is None:
        return planned
    before = tries(None) if record.is_few else [_Try(planned, _less(_db(planned), leaving(None)))]
    options = {alpha: tries(alpha) for alpha in (alphas if config.activation == "static" else (best,))}
    alpha = max(options, key=lambda alpha: options[alpha][0].db)
    after = options[alpha]
    if not all(_is_better(new, old, config.margin_db, least) for new in after for old in before):
        return planned
    chosen, scale, ranges = after[0].plan, _scale(record.whole.peak, w_peak, alpha), None
    if chosen.observer is not None:  # a range from all data, where the trial may have used a part of the sample
        ranges = record.trial(scale).range_of(chosen.observer)
    return dataclasses.replace(
        chosen,
        input_qparams=ranges,
        channel_scale=tuple(scale.tolist()),
        alpha=alpha,
        smoothing_db=(before[0].db, after[0].db),
    )


def _best_alpha(alphas: tuple[float, ...], db: Callable[[float | None], float], least: float) -> float | None:
    """The alpha that is best with a range per row; None if it gains too little to be worth a closer look.

    The larger ones are tried only while they gain: they are for inputs with large outliers.
    """
    best = max(alphas[:_ALWAYS], key=db)
    for alpha in alphas[_ALWAYS:]:
        if not db(alpha) > db(best):
            break
        best = alpha
    return best if db(best) > db(None) + least else None


def _is_better(after: _Try, before: _Try, margin_db: float, least: float) -> bool:
    """Whether to smooth: it gains more than `least`, or makes the layer static or int8 at no cost."""
    if not (after.plan.is_int8 and before.plan.is_int8):
        return after.plan.is_int8
    if after.plan.kind == "int8 static" != before.plan.kind:
        return after.db >= before.db - margin_db
    return after.db > before.db + least


def _no_static_is_close(planned: LayerPlan, config: QConfig) -> bool:
    """Whether this layer, unsmoothed, is clearly dynamic: by the rows that gave the ranges, which flatters static."""
    static = [db for name, db in planned.sqnr_db.items() if name != "dynamic"]
    least = planned.sqnr_db.get("dynamic", math.inf) - config.margin_db - CLEAR_DB
    return config.activation == "auto" and max(static, default=math.inf) < least


def _db(plan: LayerPlan) -> float:
    """The layer's output SQNR: as planned, or the best candidate's for a layer that stays float."""
    chosen = plan.measured_db if plan.is_int8 else max(plan.sqnr_db.values())
    return math.nan if chosen is None else chosen


def _less(db: float, noise: float) -> float:
    """The SQNR without this part of the noise (as a share of the signal), of which no more than 90 % can go."""
    if not math.isfinite(db):
        return db
    whole = 10 ** (-db / 10)
    return -10 * math.log10(max(whole - noise, 0.1 * whole))
