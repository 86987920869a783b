"""The files: their lengths, which may import which, and the tree in CONTRIBUTING.md."""

import ast
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from helpers import ROOT

LONGEST = 420  # lines of a file
LONGEST_FUNCTION = 60  # lines of a C++ function

# Lowest first. A module imports from its own package and from lower rows, never from others in its row or higher.
LAYERS = [
    {"_C", "imports"},
    {"errors", "text", "timing", "scopes", "watching", "compiled"},
    {"numerics"},
    {"ops", "kernels"},
    {"observers"},
    {"modules", "config"},
    {"calibration"},
    {"planning"},
    {"conversion", "qat", "reporting", "compiling", "files"},
    {"hf"},
    {"__init__"},
    {"command_line"},
    {"__main__"},
]


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
    files = sources("csrc", "torchq", "tests", "benchmarks", "examples", "tools")
    lengths = {str(path): len((ROOT / path).read_text().splitlines()) for path in files}
    assert {path: lines for path, lines in lengths.items() if lines > LONGEST} == {}


def test_no_test_file_imports_another():
    """What they share is in helpers, which import no test either."""
    guilty = {
        str(path): name
        for path in sources("tests", kinds=(".py",))
        for name in imported(path)
        if any(part.startswith("test_") for part in name.split("."))
    }
    assert guilty == {}


# ---- torchq/: imports point downwards ----


def part_of(name: str) -> str | None:
    """Gives the package or module of torchq that a full name belongs to; __init__, if it is one of the public names."""
    first, _, rest = name.partition(".")
    if first != "torchq":
        return None
    part = rest.split(".")[0]
    return part if any(part in layer for layer in LAYERS) else "__init__"


def layer_of(part: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if part in layer)


def test_every_module_has_a_layer():
    parts = {path.parts[1].removesuffix(".py") for path in sources("torchq", kinds=(".py",))}
    assert parts == set().union(*LAYERS) - {"_C"}


def test_imports_point_downwards():
    guilty = []
    for path in sources("torchq", kinds=(".py",)):
        own = path.parts[1].removesuffix(".py")
        for name in imported(path):
            part = part_of(name)
            if part and part != own and layer_of(part) >= layer_of(own):
                guilty.append(f"{path} imports {name}")
    assert guilty == []


# ---- csrc/: no function is too long ----


def without_comments_and_strings(source: str) -> str:
    """Blanks comments, literals and preprocessor lines out; every line keeps its number."""
    dull = r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])+\'|^[ \t]*#(?:\\\n|[^\n])*'
    return re.sub(dull, lambda found: "\n" * found[0].count("\n"), source, flags=re.DOTALL | re.MULTILINE)


CONTAINER = re.compile(r"\s*(template\s*<[^{]*>\s*)?(inline\s+)?(namespace|struct|class|union|enum|extern)\b")


def functions(source: str) -> Iterator[tuple[str, int]]:
    """Gives the head of each function, and its lines from head to closing brace.

    A brace opens a function if what stands before it has a parenthesis, and neither it nor a brace around it is a
    namespace's, a type's or a list of values. Bodies are not looked into: lambdas count as part of theirs.
    """
    text = without_comments_and_strings(source)
    depth, head, inside = 0, 0, None  # `head`: where what stands before the next brace begins
    for at, sign in enumerate(text):
        if inside is not None:
            depth += {"{": 1, "}": -1}.get(sign, 0)
            if depth == 0:
                start = head + len(text[head:at]) - len(text[head:at].lstrip())
                yield " ".join(text[start:inside].split()), text.count("\n", start, at) + 1
                inside, head = None, at + 1
        elif sign == "{" and "(" in text[head:at] and not CONTAINER.match(text, head, at):
            depth, inside = 1, at
        elif sign in "{};":
            head = at + 1


def test_no_cpp_function_is_too_long():
    long = []
    for path in sources("csrc", kinds=(".cpp", ".h", ".inc")):
        found = list(functions((ROOT / path).read_text()))
        made_of_pieces = path.suffix == ".cpp" and path.stem.startswith("kernel_")
        assert found or path.suffix != ".cpp" or made_of_pieces, f"{path}: no function was found in it"
        long += [f"{path}: {lines} lines: {head}" for head, lines in found if lines > LONGEST_FUNCTION]
    assert long == []


def test_the_counter_of_lines_can_count():
    source = """#include "a.h"
namespace n {
struct S { int x[2] = {1, 2}; int f() const { return 1; } };
constexpr int table[] = {1, 2};
// void g() {
template <int k>
void g(int a,
       const char* b = "{") {
  if (a) {
    auto h = [&] { return 1; };
  }
}
}
"""
    assert list(functions(source)) == [("int f() const", 1), ("template <int k> void g(int a, const char* b = )", 7)]


# ---- The tree in CONTRIBUTING.md ----

A_FILE = re.compile(r"(?<![\w./*])[\w*./-]*\w\.(?:py|pyi|cpp|c|h|inc)\b(?!\()")
A_NAME = r"(?:[\w.*/-]+[./][\w.*/-]*|Makefile)"
CONTINUED = 12  # a line indented so far goes on with the description above it


def tree() -> Iterator[tuple[str, str]]:
    """Gives each name in the left column, with its folders, and what the description beside it says.

    Two spaces an indent; what follows the last name, best after two spaces or more, is the description of all of them.
    """
    (block,) = re.findall(r"```\n(\S.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    lines: list[str] = []
    for line in block.splitlines():
        if len(line) - len(line.lstrip()) >= CONTINUED:
            lines[-1] += " " + line.strip()
        else:
            lines.append(line)
    folders: list[str] = []
    for line in lines:
        found = re.fullmatch(rf"\s*({A_NAME}(?:,? {A_NAME})*)(?:\s+(\S.*))?", line)
        assert found, f"CONTRIBUTING.md: neither a name and its description, nor more of one: {line!r}"
        names, description = found[1], found[2] or ""
        del folders[(len(line) - len(line.lstrip())) // 2 :]
        for name in re.split(r",? ", names):
            yield "".join(folders) + name, description
        if names.endswith("/"):
            folders.append(names)


def named() -> set[str]:
    """Gives the names in the left column and the files in the descriptions, all as paths from the root.

    A file in a description lies in the folder described, in the one of the file described, or in one above.
    """
    found = set()
    for name, description in tree():
        found.add(name)
        around = Path(name) if name.endswith("/") else Path(name).parent
        for file in A_FILE.findall(description):
            paths = [str(folder / file) for folder in (around, *around.parents)]
            found.add(next((path for path in paths if (ROOT / path).exists()), paths[0]))
    return found


def test_the_tree_names_nothing_that_is_not_there():
    assert sorted(name for name in named() if not list(ROOT.glob(name))) == []


@pytest.mark.parametrize("root", ["csrc", "torchq"])
def test_the_tree_names_every_folder_and_file(root):
    """By its name or a pattern with `*`; an __init__.py of a package by its folder."""
    files = [str(path) for path in sources(root) if path.name != "__init__.py" or path.parent.name == root]
    folders = {f"{Path(file).parent}/" for file in files}
    names = named()
    assert [file for file in [*sorted(folders), *files] if not any(fnmatchcase(file, name) for name in names)] == []


def test_every_promise_names_tests_that_exist():
    rows = [row for row in (ROOT / "docs/reliability.md").read_text().splitlines() if re.match(r"\| [^-]", row)]
    promises = [row for row in rows if row != "| promise | tests |"]
    assert len(promises) > 20
    for promise in promises:
        named = re.findall(r"`((?:\w+/)?test_\w+\.py)(?:::(test_\w+))?`", promise.split("|")[2])
        assert named, promise
        for file, test in named:
            assert not test or f"def {test}(" in (ROOT / "tests" / file).read_text(), (file, test)
            assert (ROOT / "tests" / file).exists(), file
