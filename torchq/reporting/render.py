"""Prints a report: a table with one row per layer, at most 120 columns wide, and remarks below it."""

from __future__ import annotations

import dataclasses
import textwrap
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torchq import text

if TYPE_CHECKING:
    from torchq.reporting.report import LayerReport, Report
    from torchq.reporting.whole import LeftInFloat, WholeModel

WIDTH = 120

_USUAL = ("static costs no accuracy", "static would cost accuracy")
"""The reasons that need no remark, because the columns static and dynamic show them."""


def _db(value: float) -> str:
    return f"{value:.1f}"


def _gain(value: float) -> str:
    return f"{value:+.1f}"


# The columns: title, field of LayerReport, and how to format its value.
_LAYER: dict[str, tuple[str, Callable[[Any], str]]] = {
    "scheme": ("kind", lambda kind: str(kind).removeprefix("int8 ")),
    "before": ("bytes_before", text.size),
    "after": ("bytes_after", text.size),
    "weight": ("weight_db", _db),
    "input": ("input_db", _db),
    "output": ("sqnr_db", _db),
    "clipped": ("clipped", lambda share: f"{share:.2%}"),
}
_CHOICE: dict[str, tuple[str, Callable[[Any], str]]] = {
    "static": ("static_db", _db),
    "dynamic": ("dynamic_db", _db),
    "smooth": ("smoothing_db", _gain),
    "gptq": ("gptq_db", _gain),
}
_LATER: dict[str, tuple[str, Callable[[Any], str]]] = {
    "now": ("drift", lambda share: f"{share:.2%}"),
    "float": ("float_seconds", text.duration),
    "int8": ("int8_seconds", text.duration),
}
_ALWAYS = ("scheme", "before", "after", "output")  # the other columns are left out if no layer has a value

_JOINS: dict[str, Callable[[list[Any]], Any]] = {
    **dict.fromkeys(("bytes_before", "bytes_after", "float_seconds", "int8_seconds"), sum),
    **dict.fromkeys(("sqnr_db", "weight_db", "input_db", "static_db", "dynamic_db"), min),
    **dict.fromkeys(("clipped", "drift"), max),
}
"""How the fields of several layers give those of their common row."""

_MEANINGS = {
    "output": "weight, input, output: SQNR in dB.",
    "clipped": "clipped: values outside the static range in calibration.",
    "static": "static, dynamic: the output's SQNR under each scheme, weights rounded to nearest.",
    "smooth": "smooth: gain in dB by smoothing.",
    "gptq": "gptq: gain in dB by GPTQ on held-out rows; in brackets where it was too small to be taken.",
    "now": "now: values clipped at inference.",
    "float": "float, int8: time of the layer alone.",
}


def render(report: Report) -> list[str]:
    """The lines of `str(report)`."""
    layers = one_row_each(report.layers)
    later = [column for title in _LATER if (column := _column(title, _LATER, layers)) is not None]
    choice = [column for title in _CHOICE if (column := _column(title, _CHOICE, layers)) is not None]
    columns = [column for title in _LAYER if (column := _column(title, _LAYER, layers)) is not None]
    columns += later or choice
    room = WIDTH - sum(2 + max(map(len, column)) for column in columns)
    names = ["layer", *(_shortened(layer.name or "(root)", max(room, 8)) for layer in layers)]
    head, *rows = zip(names, *columns, strict=True)
    lines = [] if report.model is None else _whole(report.model)
    lines += [*text.table(head, rows), _total(report)]
    lines += _wrapped(" ".join(meaning for title, meaning in _MEANINGS.items() if title in head))
    lines += [line for note in _reasons(report) for line in _wrapped(note)]
    lines += [layer.advice for layer in report.layers if layer.advice is not None]
    return lines if report.frontier is None else [*lines, "", str(report.frontier)]


def notes(report: Report) -> list[str]:
    """What tables can't show: reasons, each with the layers it applies to, and advice."""
    advice = [] if report.model is None else [_advised(each) for each in report.model.left if each.advice]
    return [*advice, *_reasons(report), *(layer.advice for layer in report.layers if layer.advice is not None)]


def _reasons(report: Report) -> list[str]:
    return [*_remarks(report.layers), *_tables(report), *_attentions(report)]


def one_row_each(layers: tuple[LayerReport, ...]) -> tuple[LayerReport, ...]:
    """One row for each layer, and one for each group: bytes and times of all together, the lowest SQNR."""
    groups: dict[str, list[LayerReport]] = {}
    for layer in layers:
        groups.setdefault(layer.group or layer.name, []).append(layer)
    return tuple(each[0] if len(each) == 1 else _joined(name, each) for name, each in groups.items())


def _joined(name: str, layers: list[LayerReport]) -> LayerReport:
    """The row of a group. Of gains it has none: they belong to single layers."""
    kinds = Counter(layer.kind.removeprefix("int8 ") for layer in layers)
    scheme = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    joined: dict[str, Any] = {}
    for field, join in _JOINS.items():
        values = [value for layer in layers if (value := getattr(layer, field)) is not None]
        joined[field] = join(values) if values else None
    return dataclasses.replace(
        layers[0], name=name, kind=scheme, smoothing_db=None, alpha=None, gptq_db=None, rounding="nearest", **joined
    )


def _column(
    title: str, cells: dict[str, tuple[str, Callable[[Any], str]]], layers: tuple[LayerReport, ...]
) -> list[str] | None:
    field, show = cells[title]
    values = [getattr(layer, field) for layer in layers]
    if title not in _ALWAYS and all(value is None for value in values):
        return None
    shown = ["-" if value is None else show(value) for value in values]
    if title == "gptq":
        taken = [layer.rounding == "gptq" or layer.gptq_db is None for layer in layers]
        shown = [cell if ok else f"({cell})" for cell, ok in zip(shown, taken, strict=True)]
    return [title, *shown]


def _shortened(name: str, room: int) -> str:
    """A name cut to `room` characters. The end is kept, since it is what differs between layers."""
    return name if len(name) <= room else "..." + name[len(name) - room + 3 :]


def _whole(model: WholeModel) -> list[str]:
    """What the report opens with."""
    before, after = text.size(model.bytes_before), text.size(model.bytes_after)
    share = (
        f"{model.int8_weights / model.weights:.1%} of the weights of matrix products in int8" if model.weights else ""
    )
    db = "" if model.output_db is None else f"output SQNR {model.output_db:.1f} dB"
    facts = [f"{before} -> {after} ({model.bytes_before / max(1, model.bytes_after):.2f}x smaller)", share, db]
    lines = _wrapped(f"whole model: {', '.join(filter(None, facts))}")
    left = ", ".join(f"{text.size(each.bytes)} in {each.modules} {each.kind}" for each in model.left)
    lines += _wrapped(f"left in float: {left}") if left else []
    lines += [line for each in model.left if each.advice for line in _wrapped(_advised(each))]
    return [*lines, ""]


def _advised(left: LeftInFloat) -> str:
    return f"{left.kind} ({_listed(list(left.matrices), 0)}): {left.advice}"


def _total(report: Report) -> str:
    before, after = text.size(report.bytes_before), text.size(report.bytes_after)
    kernel = next((f", kernel {layer.kernel}" for layer in report.layers if layer.kernel is not None), "")
    return (
        f"these layers: {before} -> {after} ({report.bytes_before / max(1, report.bytes_after):.2f}x smaller){kernel}"
    )


def _remarks(layers: tuple[LayerReport, ...]) -> list[str]:
    """The remarks that columns can't show, each with the layers it applies to."""
    remarks: dict[str, list[str]] = {}
    for layer in layers:
        name = layer.name or "(root)"
        if layer.kind == "float":
            remarks.setdefault(f"left in float, {layer.reason}", []).append(name)
        elif layer.reason not in _USUAL:
            remarks.setdefault(layer.reason, []).append(name)
        if layer.no_smoothing is not None:
            remarks.setdefault(f"not smoothed: {layer.no_smoothing}", []).append(name)
        if layer.no_gptq is not None:
            remarks.setdefault(f"rounded to nearest, no gptq: {layer.no_gptq}", []).append(name)
    return [f"{remark}: {_listed(names, len(layers))}" for remark, names in remarks.items()]


def _tables(report: Report) -> list[str]:
    """A line for each embedding in int8, and one for each reason to stay in float."""
    lines: list[str] = []
    left: dict[str, list[str]] = {}
    for name, row in report.tables.items():
        if row.kind == "float":
            left.setdefault(row.reason, []).append(name)
            continue
        sizes = "" if row.owner else f", {text.size(row.bytes_before)} -> {text.size(row.bytes_after)}"
        db = "" if row.sqnr_db is None else f", {_db(row.sqnr_db)} dB"
        lines.append(f"table of {name or '(root)'} in int8{sizes}{db} ({row.reason})")
    count = len(report.tables)
    lines += [f"table in float, {reason}: {_listed(names, count, 'of them')}" for reason, names in left.items()]
    return lines


def _attentions(report: Report) -> list[str]:
    """A line for the attentions of each scheme and reason."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, row in report.attentions.items():
        groups.setdefault((row.scheme, row.reason), []).append(name)
    lines = []
    for (scheme, reason), names in groups.items():
        dbs = [report.attentions[name].sqnr_db[scheme] for name in names if scheme in report.attentions[name].sqnr_db]
        own = f" of {_db(min(dbs))} to {_db(max(dbs))} dB each" if dbs else ""
        known = [name or "(root)" for name in names]
        lines.append(f"attention in {scheme}{own} ({reason}): {_listed(known, len(report.attentions), 'of them')}")
    if report.written_attentions:
        written = _listed([name or "(root)" for name in report.written_attentions], 0)
        lines.append(f"attention written out, in float: {written}. {_WRITTEN}")
    return lines


_WRITTEN = (
    "torch.nn.functional.scaled_dot_product_attention in its place (in transformers attn_implementation='sdpa') would "
    "be computed by torchq, in int8 too where that costs little (docs/faq.md)."
)


def _listed(names: list[str], of: int, what: str = "layers") -> str:
    if len(names) == of > 1:
        return f"all {of} {what}"
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _wrapped(line: str) -> list[str]:
    return textwrap.wrap(line, WIDTH, subsequent_indent="  ", break_long_words=False)
