"""report(): what a converted model is made of, layer by layer, as text and as plain data."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from torchq import kernels, text
from torchq.modules.linear import QuantizedLinear
from torchq.planning.frontier import Frontier
from torchq.planning.plan import plan_of
from torchq.reporting.drift import Drift
from torchq.reporting.profile import LayerTime


@dataclass(frozen=True)
class LayerReport:
    """One nn.Linear of the original model; None stands for what was not measured.

    Args:
        name: of the module.
        kind: "int8 dynamic", "int8 static" or "float".
        kernel: that computes it.
        bytes_before: of weight, scales and bias in float.
        bytes_after: the same now, resident.
        sqnr_db: of the layer's output, on its calibration sample.
        reason: why it became what it is.
        weight_db: SQNR of the int8 weight.
        input_db: SQNR of the quantized input, on the sample.
        clipped: the share of the sample's values outside a static layer's range.
        float_seconds: of the float layer at its calibration shape, from `profile_layers`.
        int8_seconds: the same of this layer.
        drift: the share of values clipped at inference, from `watch_drift`.
        advice: what to do about that, if anything.
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


@dataclass(frozen=True)
class Report:
    """Prints as a table; `to_dict()` gives the same as plain data, `plot` draws the frontier of an accuracy budget."""

    layers: tuple[LayerReport, ...]
    frontier: Frontier | None = None

    @property
    def bytes_before(self) -> int:
        """Bytes of all Linear layers in float."""
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
                "torchq.Report.plot: this model has no frontier. Convert it with an accuracy budget: "
                "torchq.convert(model, loader, evaluate=..., max_drop=...)."
            )
        self.frontier.plot(path)

    def __str__(self) -> str:
        columns = [_column(title, self.layers) for title in _CELLS]
        shown = [column for column in columns if column[0] not in _OPTIONAL or set(column[1:]) != {"-"}]
        head, *rows = zip(*shown, strict=True)
        ratio = self.bytes_before / max(1, self.bytes_after)
        before, after = text.size(self.bytes_before), text.size(self.bytes_after)
        lines = [*text.table(head, rows), f"Linear layers: {before} -> {after} ({ratio:.2f}x smaller)"]
        lines += [layer.advice for layer in self.layers if layer.advice is not None]
        return "\n".join(lines if self.frontier is None else [*lines, "", str(self.frontier)])


def report(qmodel: nn.Module, *, profile: Mapping[str, LayerTime] | None = None, drift: Drift | None = None) -> Report:
    """What became of every nn.Linear of a converted model: scheme, kernel, bytes, SQNR, clipped share, times, reason.

    SQNR and clipped share are those of the layer's own calibration sample, None where there was no calibration. After a
    conversion with `evaluate`, the frontier of the accuracy budget is there too.

    Args:
        qmodel: from `torchq.convert`.
        profile: from `torchq.profile_layers(qmodel)`: adds each layer's time in float and in int8.
        drift: from `torchq.watch_drift(qmodel)`: adds the share of values clipped at inference, and says which layers
            to calibrate again.

    Raises:
        ValueError: `qmodel` did not come from `torchq.convert`.

    >>> from torchq.conversion import convert
    >>> report(convert(nn.Linear(64, 64))).layers[0].kind
    'int8 dynamic'
    """
    plan = plan_of(qmodel, "report")
    layers = []
    for name, layer in plan.layers.items():
        module, stats = qmodel.get_submodule(name), layer.stats
        before, after = _layer_bytes(module)
        time = None if profile is None else profile.get(name)
        seen = None if drift is None else drift.layers.get(name)
        layers.append(
            LayerReport(
                name,
                layer.kind,
                kernels.active() if isinstance(module, QuantizedLinear) else None,
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
            )
        )
    return Report(tuple(layers), plan.frontier)


def _layer_bytes(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, QuantizedLinear):
        values = module.out_features * (module.in_features + module.has_bias)
        return values * module.dtype.itemsize, module.packed.numel()
    size = sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
    return size, size


# Column titles, each with the field it shows and how.
_CELLS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "layer": ("name", lambda name: name or "(root)"),
    "scheme": ("kind", str),
    "kernel": ("kernel", str),
    "before": ("bytes_before", text.size),
    "after": ("bytes_after", text.size),
    "weight": ("weight_db", lambda db: f"{db:.1f} dB"),
    "input": ("input_db", lambda db: f"{db:.1f} dB"),
    "SQNR": ("sqnr_db", lambda db: f"{db:.1f} dB"),
    "clipped": ("clipped", lambda share: f"{share:.2%}"),
    "now": ("drift", lambda share: f"{share:.2%}"),
    "float": ("float_seconds", text.duration),
    "int8": ("int8_seconds", text.duration),
    "reason": ("reason", str),
}
_OPTIONAL = ("weight", "input", "clipped", "now", "float", "int8")  # left out where no layer has a value


def _column(title: str, layers: tuple[LayerReport, ...]) -> list[str]:
    field, show = _CELLS[title]
    values = [getattr(layer, field) for layer in layers]
    return [title, *("-" if value is None else show(value) for value in values)]
