"""The cores alone: they compile without torch and Python, they allocate nothing, and pass their own tests.

The tests of the core are a C++ program, tests/core. Here it is built as shipped and under sanitizers, and run.
"""

import os
import re
from pathlib import Path

import pytest

from helpers.core import (
    ATTENTION,
    CORE,
    PLAIN,
    SANITIZERS,
    WARNINGS,
    built,
    compiler,
    core_as_shipped,
    core_sources,
    jobs,
    program_sources,
    run,
)

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
    sorted(path for core in (CORE, ATTENTION) for path in core.rglob("*") if path.is_file()),
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


def required_kernels() -> list[str]:
    """The kernels in TORCHQ_REQUIRED_KERNELS, separated by commas. CI sets it to the kernels it must test."""
    names = os.environ.get("TORCHQ_REQUIRED_KERNELS", "")
    return ["--require", names] if names else []


def sanitized() -> list[Path]:
    return built("sanitized", jobs(core_sources(), *PLAIN, "-O1", "-g1", *SANITIZERS))


@pytest.mark.parametrize(
    ("objects", "flags", "arguments"),
    [
        pytest.param(core_as_shipped, [], [], id="as shipped", marks=pytest.mark.slow(seconds=20)),
        pytest.param(sanitized, SANITIZERS, ["--quick"], id="sanitizers", marks=pytest.mark.slow(seconds=40)),
    ],
)
def test_core_passes_its_tests(tmp_path, objects, flags, arguments):
    tests = built("tests", jobs(program_sources(), *PLAIN, "-O2", *WARNINGS))
    program = tmp_path / "core_test"
    run([*compiler(), *flags, *objects(), *tests, "-o", program, "-pthread"])

    output = run([program, "--seed", "1", *arguments, *required_kernels()])

    print(output)
    assert re.fullmatch(r"[1-9]\d* passed, 0 failed", output.splitlines()[-1])
    *runnable, active = run([program, "--list"]).splitlines()
    assert active == f"active: {runnable[0]}"
    assert runnable[-1] == "reference"
    for kernel in runnable:
        assert re.search(rf"^{kernel}: [1-9]\d* checks passed$", output, re.MULTILINE), f"{kernel} was not tested"
    with pytest.raises(pytest.fail.Exception, match="no kernel of this name"):
        run([program, "--list", "--require", "avx1024"])
