"""How values are shown: tables, bytes, times, and values that JSON has no form for."""

import math
from collections.abc import Sequence
from typing import Any


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table: aligned columns, and a rule below the head.

    >>> print(*table(["layer", "x"], [["fc", "1"]]), sep="|")
    layer  x|--------|fc     1
    """
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def size(count: int) -> str:
    """A number of bytes in KiB or MiB.

    >>> size(2560), size(3 * 2**20)
    ('2.5 KiB', '3.00 MiB')
    """
    return f"{count / 2**20:.2f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"


def duration(seconds: float) -> str:
    """A time in ms or us.

    >>> duration(0.0123), duration(4.2e-6)
    ('12.3 ms', '4.2 us')
    """
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def to_json(value: Any) -> Any:
    """The value in JSON's types: tuples become lists, and inf and nan, which JSON lacks, become strings.

    >>> to_json({"a": (1, float("inf"))})
    {'a': [1, 'inf']}
    """
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_json(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
