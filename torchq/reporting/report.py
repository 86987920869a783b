"""report(): what a converted model is made of, layer by layer, as text and as plain data."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from torchq import kernels, text
from torchq.errors import door
from torchq.modules.base import Int8Module, float_size
from torchq.modules.registry import type_of
from torchq.numerics.qparams import QParams
from torchq.planning.frontier import Frontier
from torchq.planning.plan import AttentionPlan, InputHistogram, Plan, attached_plan
from torchq.planning.tables import settled
from torchq.reporting.drift import Drift
from torchq.reporting.page import page
from torchq.reporting.profile import LayerTime
from torchq.reporting.render import render
from torchq.reporting.whole import WholeModel, whole_model


@dataclass(frozen=True)
class LayerReport:
    """One layer of the original model. A value that was not measured is None.

    Args:
        name: the layer's name.
        kind: "int8 dynamic", "int8 static" or "float".
        kernel: the kernel that computes an int8 layer.
        bytes_before: the size of weight and bias in float.
        bytes_after: their size in memory now, with scales and padding.
        sqnr_db: SQNR of the layer's output, on its calibration sample.
        reason: why the layer became what it is.
        weight_db: SQNR of the int8 weight.
        input_db: SQNR of the quantized input, on the sample.
        clipped: the share of the sample's values outside a static layer's range.
        float_seconds: time of the float layer at its calibration shape, from `profile_layers`.
        int8_seconds: time of the int8 layer at the same shape.
        drift: the share of values clipped at inference, from `watch_drift`.
        advice: to calibrate the layer again, if it has drifted.
        static_db: SQNR of the output with the best static range, with weights rounded to nearest. None for a layer
            that is smoothed and need not be static.
        dynamic_db: SQNR of the output with ranges per row, with weights rounded to nearest.
        smoothing_db: the gain in SQNR by smoothing.
        alpha: how far smoothing moves the range of the input's channels into the weight, in [0, 1].
        no_smoothing: why smoothing was not tried.
        gptq_db: the gain in SQNR by GPTQ on held-out rows, also if GPTQ was not taken (see `rounding`).
        rounding: "nearest" or "gptq".
        no_gptq: why GPTQ was not tried.
        group: the name of the row that shows this layer together with others, such as one for all experts.
        rows: the mean number of rows (tokens) per call in calibration.
        histogram: the values of the calibration sample of its input.
        input_range: the lowest and the highest value that a static layer's codes stand for.
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
    alpha: float | None = None
    no_smoothing: str | None = None
    gptq_db: float | None = None
    rounding: str = "nearest"
    no_gptq: str | None = None
    group: str | None = None
    rows: int | None = None
    histogram: InputHistogram | None = None
    input_range: tuple[float, float] | None = None


@dataclass(frozen=True)
class TableReport:
    """The table of one embedding of the original model.

    Args:
        kind: "int8" or "float".
        bytes_before: its size in float; 0 for a table that its owner counts.
        bytes_after: its size now.
        sqnr_db: SQNR of the int8 table against the float one, in dB.
        reason: why it became what it is.
        owner: the layer or embedding whose weight it is too.
    """

    kind: str
    bytes_before: int
    bytes_after: int
    sqnr_db: float | None
    reason: str
    owner: str | None = None


@dataclass(frozen=True)
class Report:
    """Prints as a table, and is saved as a page. `to_dict()` returns it as plain data, `plot` draws the frontier.

    `model_type` is the name of the model's class. `written_attentions` are the modules whose code computes attention
    operation by operation, which torchq does not.
    """

    layers: tuple[LayerReport, ...]
    frontier: Frontier | None = None
    model: WholeModel | None = None
    attentions: Mapping[str, AttentionPlan] = field(default_factory=dict)
    tables: Mapping[str, TableReport] = field(default_factory=dict)
    model_type: str = "model"
    written_attentions: tuple[str, ...] = ()

    @property
    def bytes_before(self) -> int:
        """Bytes of all layers in float."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Bytes of the same layers in memory now."""
        return sum(layer.bytes_after for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        layers = [text.to_json(asdict(layer)) for layer in self.layers]
        frontier = self.frontier and self.frontier.to_dict()
        sizes = {"bytes_before": self.bytes_before, "bytes_after": self.bytes_after}
        return {
            "layers": layers,
            **sizes,
            "frontier": frontier,
            "model_type": self.model_type,
            "model": self.model and self.model.to_dict(),
            "attentions": {name: text.to_json(asdict(row)) for name, row in self.attentions.items()},
            "tables": {name: text.to_json(asdict(row)) for name, row in self.tables.items()},
            "written_attentions": list(self.written_attentions),
        }

    def save(self, path: str | Path) -> None:
        """Writes the report as one HTML page, which needs no other file and no network.

        It has what the printed report has, as a tree of modules to open, with the input's histogram of each layer that
        was calibrated; and the accuracy budget's frontier.

        >>> from torchq import convert
        >>> report(convert(nn.Linear(64, 64))).save("report.html")  # doctest: +SKIP
        """
        Path(path).write_text(page(self), encoding="utf-8")

    def plot(self, path: str | Path) -> None:
        """Draws the frontier: the metric against latency and bytes (see `Frontier.plot`).

        Raises:
            ValueError: the model was converted without `evaluate`, so there is no frontier.
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
    """What every layer of a converted model became: scheme, kernel, bytes, SQNR, clipped share, times, reason.

    The report opens with the whole model: bytes, the share of weights in int8, and what stayed in float, also of module
    types that torchq does not know, and the SQNR of the model's output where `convert` measured it. SQNR and clipped
    share of a layer are measured on its own calibration sample; they are None without calibration. After a conversion
    with `evaluate`, the report includes the frontier of the accuracy budget. Printed, it is at most 120 columns wide.
    If times or drift are given, their columns replace those on how the scheme was chosen.

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
    tables = {name: _table_report(qmodel, plan, name) for name in plan.tables}
    name = type(qmodel).__name__.removeprefix("Int8")  # an nn.Sequential has become an Int8Sequential
    written = tuple(each for each in plan.written_attentions if each not in plan.attentions)
    return Report(tuple(layers), plan.frontier, whole_model(qmodel, plan), plan.attentions, tables, name, written)


def _table_report(qmodel: nn.Module, plan: Plan, name: str) -> TableReport:
    row = settled(plan).tables[name]
    before, after = _sizes(qmodel.get_submodule(name))
    return TableReport(row.kind, before, after, row.sqnr_db, row.reason, row.owner)


def _layer_report(
    qmodel: nn.Module, plan: Plan, name: str, profile: Mapping[str, LayerTime], drift: Drift | None
) -> LayerReport:
    layer, module, time = plan.layers[name], _module_of(qmodel, name), profile.get(name)
    owner, part = _owner_of(qmodel, name)
    before, after = (_matrix_bytes(owner, part),) * 2 if part and module is owner else _sizes(module)
    stats, layer_drift = layer.stats, None if drift is None else drift.layers.get(name)
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
        drift=None if layer_drift is None else layer_drift.share,
        advice=None if drift is None else drift.advice(name),
        static_db=max(static, default=None),
        dynamic_db=layer.sqnr_db.get("dynamic"),
        smoothing_db=None if layer.smoothing_db is None else layer.smoothing_db[1] - layer.smoothing_db[0],
        alpha=layer.alpha,
        no_smoothing=layer.no_smoothing,
        gptq_db=None if layer.gptq_db is None else layer.gptq_db[1] - layer.gptq_db[0],
        rounding=layer.rounding,
        no_gptq=layer.no_gptq,
        group=_group(owner, part, name),
        rows=None if stats is None else stats.rows,
        histogram=None if stats is None else stats.histogram,
        input_range=None if layer.input_qparams is None or not layer.is_int8 else _range(layer.input_qparams),
    )


def _range(qparams: QParams) -> tuple[float, float]:
    scale, zero_point = qparams
    return -zero_point * scale, (255 - zero_point) * scale


def _module_of(qmodel: nn.Module, name: str) -> nn.Module:
    """The layer's own module in the converted model. If the module that holds its matrix stayed float, that module."""
    while True:
        try:
            return qmodel.get_submodule(name)
        except AttributeError:
            name = name.rpartition(".")[0]


def _owner_of(qmodel: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module of several parts that this layer is one of, and its name there; or the layer's own, and ""."""
    module, path = qmodel, name.split(".") if name else []
    for depth, child in enumerate(path):
        if type_of(module) is not None or isinstance(module, Int8Module):
            return module, ".".join(path[depth:])
        module = getattr(module, child)
    return module, ""


def _group(owner: nn.Module, part: str, name: str) -> str | None:
    kind = type_of(owner)
    group = owner.group(part) if isinstance(owner, Int8Module) else None if kind is None else kind.group(part)
    return None if group is None else name.removesuffix(part) + group


def _matrix_bytes(owner: nn.Module, part: str) -> int:
    """The bytes of one matrix of a module that stayed in float."""
    kind = type_of(owner)
    if kind is None:
        return float_size(owner)
    return sum(tensor.nbytes for tensor in kind.matrix(owner, part) if tensor is not None)


def _sizes(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, Int8Module):
        return module.float_bytes, module.int8_bytes
    size = float_size(module)
    return size, size
