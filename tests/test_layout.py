"""The files themselves: none grows too long, and what may import what."""

import ast
from collections.abc import Iterator
from pathlib import Path

from helpers import ROOT

LONGEST = 420  # lines


def sources(*folders: str, kinds: tuple[str, ...] = (".py", ".cpp", ".h", ".inc")) -> list[Path]:
    """Gives the files of these folders, their subfolders' too, relative to the root."""
    paths = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in kinds)
    return sorted(path.relative_to(ROOT) for path in paths)


def imported(path: Path) -> Iterator[str]:
    """Gives the full names that a Python file imports, wherever in it: `from a import b` gives a.b."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_no_file_is_too_long():
    files = sources("csrc", "torchq", "tests", "benchmarks")
    lengths = {str(path): len((ROOT / path).read_text().splitlines()) for path in files}
    assert {path: lines for path, lines in lengths.items() if lines > LONGEST} == {}


def test_no_test_file_imports_another():
    """What they share stands in helpers, which import no test either."""
    guilty = {
        str(path): name
        for path in sources("tests", kinds=(".py",))
        for name in imported(path)
        if any(part.startswith("test_") for part in name.split("."))
    }
    assert guilty == {}
