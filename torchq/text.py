"""How numbers are shown: one table, one way to write bytes and times, and what JSON knows."""

import math
from collections.abc import Sequence
from typing import Any


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with the cells of a column under one another, and a rule below the head.

    >>> print(*table(["layer", "x"], [["fc", "1"]]), sep="|")
    layer  x|--------|fc     1
    """
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def size(count: int) -> str:
    """Bytes, as people read them.

    >>> size(2560), size(3 * 2**20)
    ('2.5 KiB', '3.00 MiB')
    """
    return f"{count / 2**20:.2f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"


def duration(seconds: float) -> str:
    """Seconds, as people read them.

    >>> duration(0.0123), duration(4.2e-6)
    ('12.3 ms', '4.2 us')
    """
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def to_json(value: Any) -> Any:
    """Tuples as lists, and what JSON has no number for, inf and nan, as strings.

    >>> to_json({"a": (1, float("inf"))})
    {'a': [1, 'inf']}
    """
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_json(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
