"""`torchq report` and `torchq verify`: what a converted directory is, and whether its kernels are right here."""

from pathlib import Path
from typing import Any

import torchq
from torchq import text
from torchq.command_line.console import note, out, print_json, print_table, verdict, working
from torchq.command_line.models import Opened, open_int8, random_batch, read_texts, tokenized
from torchq.reporting.verified import Verification, shortened

WIDE = 110
"""Columns of a terminal from which on it shows the times of every kernel, and not only of the active one."""


def report(directory: Path, *, page: Path | None, times: bool, as_json: bool) -> None:
    """Prints the report of the model, or writes it as a page."""
    opened = open_int8(directory)
    profile = None
    if times:
        with working("timing each layer"):
            profile = torchq.profile_layers(opened.model)
    found = torchq.report(opened.model, profile=profile)
    if page is not None:
        found.save(page)
        note(f"wrote {page}, {text.size(page.stat().st_size)}")
    if as_json:
        print_json(found.to_dict())
    elif page is None:
        out.print(str(found), markup=False)


def verify(directory: Path, texts: Path | None, *, batch: int, tokens: int, as_json: bool) -> bool:
    """Verifies the model on texts, or on random tokens, and prints the result. Returns whether all is right."""
    opened = open_int8(directory)
    example = example_of(opened, texts, batch, tokens)
    with working("computing each layer by every kernel"):
        result = torchq.verify(opened.model, example)
    if as_json:
        print_json(result.to_dict())
    else:
        show(result)
    return result.ok


def example_of(opened: Opened, texts: Path | None, batch: int, tokens: int) -> dict[str, Any]:
    """One batch: of the first texts of a file, or random."""
    if texts is None:
        return random_batch(opened, batch, tokens)
    return next(iter(tokenized(opened, read_texts(texts, batch), batch, tokens)))


def show(result: Verification) -> None:
    """Prints a table of times, with calls of one kind and shape in one row, and what was wrong."""
    groups: dict[Any, list[Any]] = {}
    for call in result.calls:
        groups.setdefault((call.kind, call.shape), []).append(call)
    narrow = out.is_terminal and out.width < WIDE
    columns = [*((result.active, "reference") if narrow else result.kernels), "float"]
    columns = list(dict.fromkeys(columns))
    rows, styles = [], []
    for (kind, shape), calls in groups.items():
        cells = [text.duration(calls[0].seconds[each]) if each in calls[0].seconds else "-" for each in columns]
        name, size = shortened(calls[0].layer, 26), "x".join(map(str, shape))
        rows.append((name, str(len(calls)), kind.removeprefix("int8 "), size, *cells))
        styles.append("red" if any(call.differences for call in calls) else "")
    print_table("time of a call, by kernel", ("first layer", "count", "kind", "shape", *columns), rows, styles)
    for line in result.words():
        verdict(line, {"WRONG": "red", "ok": "green"}.get(line.partition(":")[0], "yellow"))
