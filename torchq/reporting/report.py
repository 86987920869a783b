"""report(): what a converted model is made of, layer by layer, as text and as plain data."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from torchq import kernels, text
from torchq.errors import door
from torchq.modules.base import Int8Module, float_size
from torchq.planning.frontier import Frontier
from torchq.planning.plan import Plan, attached_plan
from torchq.reporting.drift import Drift
from torchq.reporting.profile import LayerTime
from torchq.reporting.render import render


@dataclass(frozen=True)
class LayerReport:
    """One layer of the original model; None stands for what was not measured.

    Args:
        name: of the layer.
        kind: "int8 dynamic", "int8 static" or "float".
        kernel: that computes it.
        bytes_before: of weight and bias in float.
        bytes_after: the same now, resident, with scales and padding.
        sqnr_db: of the layer's output, on its calibration sample.
        reason: what decided on what it became.
        weight_db: SQNR of the int8 weight.
        input_db: SQNR of the quantized input, on the sample.
        clipped: the share of the sample's values outside a static layer's range.
        float_seconds: of the float layer at its calibration shape, from `profile_layers`.
        int8_seconds: the same of this layer.
        drift: the share of values clipped at inference, from `watch_drift`.
        advice: what to do about that, if anything.
        static_db: of the output under the best static range, with weights rounded to nearest.
        dynamic_db: of the output under ranges per row, with weights rounded to nearest.
        smoothing_db: what smoothing gained, in the mean of all layers that read the same input.
        gptq_db: what GPTQ gained on held-out rows, or would have gained (`rounding`).
        rounding: "nearest" or "gptq".
        no_gptq: why GPTQ was not tried.
    """

    name: str
    kind: str
    kernel: str | None
    bytes_before: int
    bytes_after: int
    sqnr_db: float | None
    reason: str
    weight_db: float | None = None
    input_db: float | None = None
    clipped: float | None = None
    float_seconds: float | None = None
    int8_seconds: float | None = None
    drift: float | None = None
    advice: str | None = None
    static_db: float | None = None
    dynamic_db: float | None = None
    smoothing_db: float | None = None
    gptq_db: float | None = None
    rounding: str = "nearest"
    no_gptq: str | None = None


@dataclass(frozen=True)
class Report:
    """Prints as a table; `to_dict()` gives the same as plain data, `plot` draws the frontier of an accuracy budget."""

    layers: tuple[LayerReport, ...]
    frontier: Frontier | None = None

    @property
    def bytes_before(self) -> int:
        """Bytes of all layers in float."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Bytes of the same layers now, resident."""
        return sum(layer.bytes_after for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON knows it."""
        layers = [text.to_json(asdict(layer)) for layer in self.layers]
        frontier = self.frontier and self.frontier.to_dict()
        sizes = {"bytes_before": self.bytes_before, "bytes_after": self.bytes_after}
        return {"layers": layers, **sizes, "frontier": frontier}

    def plot(self, path: str | Path) -> None:
        """Draws the frontier: the metric against latency and bytes (see `Frontier.plot`).

        Raises:
            ValueError: the model was converted without `evaluate`, so there is none.
            ImportError: matplotlib is not installed.
        """
        if self.frontier is None:
            raise ValueError(
                "torchq.reporting.report.Report.plot: this model has no frontier. Convert it with an accuracy budget: "
                "torchq.convert(model, loader, evaluate=..., max_drop=...)."
            )
        self.frontier.plot(path)

    def __str__(self) -> str:
        return "\n".join(render(self))


@door("torchq.report")
def report(qmodel: nn.Module, *, profile: Mapping[str, LayerTime] | None = None, drift: Drift | None = None) -> Report:
    """What became of every layer of a converted model: scheme, kernel, bytes, SQNR, clipped share, times, reason.

    SQNR and clipped share are those of the layer's own calibration sample, None where there was no calibration. After a
    conversion with `evaluate`, the frontier of the accuracy budget is there too. Printed, it fits a terminal of 120
    columns; with times or drift, these take the place of the columns on how the layer was chosen.

    Args:
        qmodel: from `torchq.convert`.
        profile: from `torchq.profile_layers(qmodel)`: adds each layer's time in float and in int8.
        drift: from `torchq.watch_drift(qmodel)`: adds the share of values clipped at inference, and says which layers
            to calibrate again.

    Raises:
        ValueError: `qmodel` did not come from `torchq.convert`.

    >>> from torchq import convert
    >>> report(convert(nn.Linear(64, 64))).layers[0].kind
    'int8 dynamic'
    """
    plan = attached_plan(qmodel)
    layers = [_layer_report(qmodel, plan, name, profile or {}, drift) for name in plan.layers]
    return Report(tuple(layers), plan.frontier)


def _layer_report(
    qmodel: nn.Module, plan: Plan, name: str, profile: Mapping[str, LayerTime], drift: Drift | None
) -> LayerReport:
    layer, module, time = plan.layers[name], _module_of(qmodel, name), profile.get(name)
    before, after = _sizes(module)
    stats, seen = layer.stats, None if drift is None else drift.layers.get(name)
    smoothing = plan.smoothings.get(layer.smoothed or "")
    static = [db for scheme, db in layer.sqnr_db.items() if scheme not in ("dynamic", "gptq")]
    return LayerReport(
        name,
        layer.kind,
        kernels.active() if isinstance(module, Int8Module) else None,
        before,
        after,
        layer.measured_db,
        layer.reason,
        weight_db=None if stats is None else stats.weight_db,
        input_db=None if stats is None else stats.input_db,
        clipped=None if stats is None else stats.clipped,
        float_seconds=None if time is None else time.float_seconds,
        int8_seconds=None if time is None else time.int8_seconds,
        drift=None if seen is None else seen.share,
        advice=None if drift is None else drift.advice(name),
        static_db=max(static, default=None),
        dynamic_db=layer.sqnr_db.get("dynamic"),
        smoothing_db=None if smoothing is None else smoothing.after_db - smoothing.before_db,
        gptq_db=None if layer.gptq_db is None else layer.gptq_db[1] - layer.gptq_db[0],
        rounding=layer.rounding,
        no_gptq=layer.no_gptq,
    )


def _module_of(qmodel: nn.Module, name: str) -> nn.Module:
    """The layer's module: of its own in the int8 model, or, where all of its module stayed float, that one."""
    while True:
        try:
            return qmodel.get_submodule(name)
        except AttributeError:
            name = name.rpartition(".")[0]


def _sizes(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, Int8Module):
        return module.float_bytes, module.int8_bytes
    size = float_size(module)
    return size, size
