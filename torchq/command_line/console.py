"""How commands speak: tables and colours on a terminal, plain text into pipes, and errors in one line."""

import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from torchq import text


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leaves it to `guarded`; rich's own exits with 1, which says that a check failed."""
        raise BrokenPipeError


out = _Console(highlight=False, soft_wrap=True)
"""What a command found."""

err = _Console(stderr=True, highlight=False, soft_wrap=True)
"""What it does meanwhile, warnings and errors: never a part of what it found."""

FAILED, WRONG_INPUT, INTERNAL, INTERRUPTED = 1, 2, 3, 130
"""Exit codes: a check failed; wrong usage or input; an error of torchq's own; Ctrl-C."""

_EXPECTED = (OSError, ValueError, TypeError, ImportError)


class UserError(Exception):
    """What the user must change, in words that say how."""


def note(message: str) -> None:
    """A line on what is being done."""
    err.print(f"[dim]{escape(message)}[/dim]")


@contextmanager
def working(message: str) -> Iterator[None]:
    """Says what is being done, with a sign of life on a terminal while it lasts."""
    if not err.is_terminal:
        note(message)
        yield
        return
    with err.status(escape(message)):
        yield


def verdict(line: str, style: str) -> None:
    """A line of the result, in a colour."""
    out.print(Text(line, style=style))


def print_json(data: Any) -> None:
    """Data for other programs."""
    out.print(json.dumps(text.to_json(data), indent=2), markup=False)


def print_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], styles: Sequence[str] = ()) -> None:
    """A table; in a pipe without frame and colours, a row a line.

    Args:
        title: above it.
        head: the titles of the columns.
        rows: the cells.
        styles: the colour of each row, "" for none.
    """
    if not out.is_terminal:
        print("\n".join([title, *text.table(head, rows)]))
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold underline")
    for name, column in zip(head, zip(*rows, strict=True), strict=True):
        numbers = all(cell[0].isdecimal() or cell == "-" for cell in column)
        table.add_column(escape(name), justify="right" if numbers else "left", no_wrap=numbers, overflow="fold")
    for i, row in enumerate(rows):
        table.add_row(*map(escape, row), style=styles[i] if styles else "")
    out.print(Text(title, style="bold"))
    out.print(table, soft_wrap=False)
    out.print()


@contextmanager
def short_warnings() -> Iterator[None]:
    """Inside, a warning is one line, said once."""
    said = set()

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if issubclass(category, (DeprecationWarning, PendingDeprecationWarning, FutureWarning)) or str(message) in said:
            return
        said.add(str(message))
        err.print(f"[yellow]warning:[/yellow] {escape(str(message))}")

    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = show
        yield


def guarded(command: Callable[[], int], *, show_traceback: bool) -> int:
    """Runs a command, and gives its exit code. Errors are a line for the user; their traceback only on request."""
    try:
        with short_warnings():
            code = command()
        sys.stdout.flush()
    except BrokenPipeError:  # `torchq report m | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        err.print("interrupted")
        return INTERRUPTED
    except Exception as error:
        if show_traceback:
            traceback.print_exc()
        expected = isinstance(error, (UserError, *_EXPECTED))
        name = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        err.print(f"[red]error:[/red] {escape(name + str(error))}")
        if not expected:
            err.print("This is no error of yours: `torchq --traceback ...` shows its place. Please report it.")
        return WRONG_INPUT if expected else INTERNAL
    return code
