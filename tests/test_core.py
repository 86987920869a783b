"""The cores alone: they compile without torch and Python, they allocate nothing, and pass their own tests.

The tests of the core are a C++ program, tests/core. Here it is built as shipped, and run.
"""

import re

import pytest

from helpers.core import ATTENTION, CONV, CORE, check_core, core_as_shipped, run

pytestmark = pytest.mark.subprocess

# What the core must not use. <atomic> is allowed: the threads of the caller share the forced kernel through an atomic.
FORBIDDEN_HEADERS = {
    *("vector", "string", "map", "memory", "functional", "iostream"),  # they allocate
    *("thread", "mutex", "future", "condition_variable", "pthread.h", "omp.h"),
    *("Python.h", "cstdlib", "stdlib.h"),
}
FORBIDDEN_FOLDERS = ("torch", "ATen", "c10", "pybind11")
FORBIDDEN_WORDS = re.compile(r"\b(malloc|calloc|realloc|aligned_alloc|posix_memalign|free|new|pthread_\w+|omp)\b")
FORBIDDEN_SYMBOLS = re.compile(r"\b(malloc|calloc|realloc|aligned_alloc|posix_memalign|operator new|pthread_create)\b")


def forbidden(source: str) -> list[str]:
    """Lists the forbidden headers and words that a C++ source uses. Comments may contain them."""
    code = re.sub(r"//[^\n]*|/\*.*?\*/", "", source, flags=re.DOTALL)
    headers = re.findall(r'#\s*include\s*[<"]([^>"]+)[>"]', code)
    bad = [h for h in headers if h in FORBIDDEN_HEADERS or h.split("/")[0] in FORBIDDEN_FOLDERS]
    return bad + FORBIDDEN_WORDS.findall(code)


@pytest.mark.parametrize(
    "path",
    sorted(path for core in (CORE, ATTENTION, CONV) for path in core.rglob("*") if path.is_file()),
    ids=lambda path: f"{path.parent.name}-{path.name}",
)
def test_core_knows_no_torch_no_allocation_no_threads(path):
    assert forbidden(path.read_text()) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("#include <torch/csrc/stable/tensor.h>\n", ["torch/csrc/stable/tensor.h"]),
        ("#  include <Python.h>\n", ["Python.h"]),
        ("#include <vector>\n#include <cstdint>\n#include <mutex>\n", ["vector", "mutex"]),
        ('#include "pybind11/pybind11.h"\n', ["pybind11/pybind11.h"]),
        ("auto* x = new float[8];\n", ["new"]),
        ("void* x = std::malloc(8);  // malloc\n", ["malloc"]),
        ("#pragma omp parallel for\n", ["omp"]),
        ("// new, malloc\n/* #include <vector>\n */ #include <atomic>\nint newest, freed;\n", []),
    ],
)
def test_the_check_above_can_fail(source, found):
    assert forbidden(source) == found


def test_only_run_cpp_has_threads():
    threads = re.compile(r"\b(parallel_for|get_num_threads|thread_local|std::thread|omp)\b")
    sources = {path.name: path.read_text() for path in CORE.parent.glob("*.*")}
    assert {name for name, text in sources.items() if threads.search(text)} == {"run.cpp"}


@pytest.mark.slow(seconds=11)
def test_core_compiles_alone_and_calls_no_allocator():
    """The core compiles without any include directory, and with warnings as errors."""
    symbols = run(["nm", "-C", "--undefined-only", *core_as_shipped()])
    assert "torchq::packed_header" in symbols or "torchq::kernel_reference" in symbols, "nm listed nothing of the core"
    assert FORBIDDEN_SYMBOLS.findall(symbols) == []


@pytest.mark.slow(seconds=20)
def test_core_passes_its_tests(tmp_path):
    """Under sanitizers it does so in tests/sanitize."""
    check_core(core_as_shipped(), [], [], tmp_path)
