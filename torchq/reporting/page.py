"""A report as one HTML page that needs no other file and no network: what `Report.save` writes.

`report.html` is the template. Here is what it shows: the tree of modules, the headline, and the two kinds of pictures,
as numbers that SVG takes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import jinja2
import torch

from torchq import kernels, text
from torchq.planning.frontier import Frontier
from torchq.planning.plan import AttentionPlan, InputHistogram
from torchq.reporting.render import notes, one_row_each

if TYPE_CHECKING:
    from torchq.reporting.report import LayerReport, Report, TableReport

GOOD_DB, FAIR_DB = 30.0, 20.0
"""SQNR from which a layer's bar is green, and yellow: errors of 3 % and 10 %."""


@dataclass
class Node:
    """A module in the tree, or a chain of modules that have one child each.

    Args:
        label: its name within its parent.
        path: its full name.
        children: the modules in it.
        layer: the layer that it is, if it is one.
        table: its table, if it is an embedding.
        attention: how it attends, if it does.
    """

    label: str
    path: str
    children: dict[str, Node] = field(default_factory=dict)
    layer: LayerReport | None = None
    table: TableReport | None = None
    attention: AttentionPlan | None = None

    def parts(self) -> list[LayerReport | TableReport]:
        """All layers and tables in it."""
        own = [part for part in (self.layer, self.table) if part is not None]
        return own + [part for child in self.children.values() for part in child.parts()]

    @property
    def summary(self) -> str:
        """How many of these are in int8."""
        parts = self.parts()
        return f"{sum(part.kind != 'float' for part in parts)}/{len(parts)} int8" if parts else ""

    @property
    def is_leaf(self) -> bool:
        """Whether it is one layer or one table, and nothing else."""
        return not self.children and self.attention is None and (self.layer is None) != (self.table is None)


def tree(report: Report) -> Node:
    """The layers, attentions and tables of a report by the modules that hold them. Tables mostly come first."""
    root = Node("", "")
    for name, table in report.tables.items():
        _at(root, name).table = table
    for layer in one_row_each(report.layers):
        _at(root, layer.name).layer = layer
    for name, attention in report.attentions.items():
        _at(root, name).attention = attention
    return _without_chains(root)


def _at(node: Node, name: str) -> Node:
    for label in name.split(".") if name else []:
        path = f"{node.path}.{label}" if node.path else label
        node = node.children.setdefault(label, Node(label, path))
    return node


def _without_chains(node: Node) -> Node:
    """The tree in which a module that holds nothing but one module is part of that one's label."""
    children = [_without_chains(child) for child in node.children.values()]
    node.children = {child.label: child for child in children}
    if len(children) != 1 or not node.path or any((node.layer, node.table, node.attention)):
        return node
    (only,) = children
    only.label = f"{node.label}.{only.label}"
    return only


# ---- Numbers --------------------------------------------------------------------------------------------------------


def totals(parts: Sequence[LayerReport | TableReport]) -> dict[str, Any]:
    """Bytes and times of several layers together, their lowest SQNR, and the largest share clipped.

    A table's SQNR is that of the table, and no output's: it does not count.
    """
    layers = [part for part in parts if not hasattr(part, "owner")]
    timed = [layer for layer in layers if layer.float_seconds is not None and layer.int8_seconds is not None]
    return {
        "before": sum(part.bytes_before for part in parts),
        "after": sum(part.bytes_after for part in parts),
        "db": min((layer.sqnr_db for layer in layers if layer.sqnr_db is not None), default=None),
        "clipped": max((layer.clipped for layer in layers if layer.clipped is not None), default=None),
        "float": sum(layer.float_seconds or 0.0 for layer in timed) if timed else None,
        "int8": sum(layer.int8_seconds or 0.0 for layer in timed) if timed else None,
    }


def headline(report: Report) -> list[tuple[str, str, str]]:
    """The large numbers: each with what it is, and a line of detail."""
    found, model = [], report.model
    if model is not None:
        ratio = model.bytes_before / max(1, model.bytes_after)
        sizes = f"{text.size(model.bytes_before)} → {text.size(model.bytes_after)}"
        found.append((times(ratio), "smaller", sizes))
        if model.weights:
            found.append((f"{model.int8_weights / model.weights:.1%}", "of weights in int8", "of matrix products"))
        if model.output_db is not None and math.isfinite(model.output_db):
            error = 10 ** (-model.output_db / 20)
            found.append((f"{model.output_db:.1f} dB", "output SQNR", f"an error of {error:.2%} of the signal"))
    sums = totals(report.layers)
    if sums["int8"]:
        detail = f"{text.duration(sums['float'])} → {text.duration(sums['int8'])}"
        found.append((times(sums["float"] / sums["int8"]), "faster layers", detail))
    if report.frontier is not None:
        taken = report.frontier.steps[report.frontier.chosen]
        drop = report.frontier.drop(taken)
        lost = f"{abs(drop):.3g} {'above' if drop < 0 else 'below'} float"
        found.append((f"{taken.metric:.4g}", "your metric", f"{lost}; {taken.speedup:.2f}× faster"))
    return found


def times(ratio: float) -> str:
    """A ratio in three digits.

    >>> times(2.345), times(34.56), times(345.6)
    ('2.35×', '34.6×', '346×')
    """
    return f"{ratio:.{2 if ratio < 10 else 1 if ratio < 100 else 0}f}×"


def level(db: float | None) -> str:
    """The class of a bar that shows this SQNR."""
    return "" if db is None else "good" if db >= GOOD_DB else "fair" if db >= FAIR_DB else "poor"


def bar(db: float) -> int:
    """Its length in percent: from 0 dB to 60."""
    return round(100 * min(1.0, max(0.0, db / 60)))


# ---- Pictures -------------------------------------------------------------------------------------------------------


def bars(histogram: InputHistogram, span: tuple[float, float] | None) -> dict[str, Any]:
    """An input's histogram in a box of 400 x 80, counts on a scale of logarithms.

    `span` is the static range. It may be wider than the histogram, and narrower where values are clipped.
    """
    lo, hi = (histogram.lo, histogram.hi) if span is None else (min(histogram.lo, span[0]), max(histogram.hi, span[1]))
    width = hi - lo or 1.0
    step = (histogram.hi - histogram.lo) / len(histogram.counts)
    highest = math.log1p(max(histogram.counts))

    def x(value: float) -> float:
        return round(400 * (value - lo) / width, 2)

    boxes = [
        (
            x(histogram.lo + i * step),
            max(1.0, round(400 * step / width - 0.5, 2)),
            round(80 * math.log1p(n) / highest, 2),
        )
        for i, n in enumerate(histogram.counts)
        if n
    ]
    ends = None if span is None else (x(span[0]), x(span[1]))
    return {"boxes": boxes, "ends": ends, "lo": f"{lo:.3g}", "hi": f"{hi:.3g}", "span": span}


def curve(frontier: Frontier) -> dict[str, Any]:
    """The frontier in a box of 380 x 220: latency to the right, the metric upwards, and the budget's line."""
    left, right, top, bottom = 52.0, 366.0, 14.0, 180.0
    steps = [step for step in frontier.steps if math.isfinite(step.metric)]
    budget = frontier.steps[-1].metric - frontier.max_drop
    xs, ys = _span([step.seconds for step in steps]), _span([*(step.metric for step in steps), budget])

    def place(seconds: float, metric: float) -> tuple[float, float]:
        x = left + (seconds - xs[0]) / (xs[1] - xs[0]) * (right - left)
        y = bottom - (metric - ys[0]) / (ys[1] - ys[0]) * (bottom - top)
        return round(x, 1), round(y, 1)

    taken = frontier.steps[frontier.chosen]
    points = [(*place(step.seconds, step.metric), step.returned, step is taken) for step in steps]
    return {
        "points": points,
        "line": " ".join(f"{x},{y}" for x, y, *_ in points),
        "budget": place(xs[0], budget)[1],
        "x_ticks": [(place(at, ys[0])[0], text.duration(at)) for at in _ticks(xs)],
        "y_ticks": [(place(xs[0], at)[1], f"{at:.4g}") for at in _ticks(ys)],
        "layers": frontier.steps[-1].returned,
    }


def _span(values: list[float]) -> tuple[float, float]:
    """From the lowest to the highest, with a margin."""
    lo, hi = min(values), max(values)
    margin = 0.08 * (hi - lo) or 0.05 * abs(hi) or 1.0
    return lo - margin, hi + margin


def _ticks(span: tuple[float, float]) -> list[float]:
    lo, hi = span
    return [lo + (hi - lo) * part for part in (0.15, 0.5, 0.85)]


# ---- The page -------------------------------------------------------------------------------------------------------


def page(report: Report) -> str:
    """The page as text."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(size=text.size, duration=text.duration, times=times)
    environment.filters.update(db=lambda value: f"{value:.1f} dB", percent=lambda value: f"{value:.2%}")
    environment.globals.update(bar=bar, bars=bars, curve=curve, level=level, totals=totals)
    template = environment.from_string(files("torchq.reporting").joinpath("report.html").read_text(encoding="utf-8"))
    return template.render(
        report=report,
        root=tree(report),
        headline=headline(report),
        notes=notes(report),
        timed=any(layer.int8_seconds is not None for layer in report.layers),
        ran_on=f"kernel {kernels.active()}, torch {torch.__version__}",
    )
