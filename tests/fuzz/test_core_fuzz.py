"""libFuzzer on the face of the core: builds core_fuzz.cpp, and runs it for TORCHQ_FUZZ_MINUTES.

libFuzzer is a library of clang's; the core is compiled by its own compiler (coverage.cpp). What it finds stays in
build/fuzz: the corpus of inputs that took new ways, and the input of a failure.
"""

import os
import platform
import re
import subprocess
from pathlib import Path

import pytest

from helpers import ROOT
from helpers.core import PLAIN, SANITIZERS, built, compiler, files_under, instrumented, made, run
from helpers.core import compile_all as compiled
from helpers.fuzzing import FIRST_SEED, MINUTES, ONLY_SEED

pytestmark = [pytest.mark.subprocess, pytest.mark.slow(seconds=90)]

HERE = Path(__file__).parent
FUZZ = ROOT / "build" / "fuzz"
COVERAGE = "-fsanitize-coverage=trace-pc,trace-cmp"
LONGEST_INPUT = 512  # bytes, which fill larger tensors by repetition


def libfuzzer() -> Path:
    name = f"libclang_rt.fuzzer-{platform.machine()}.a"
    found = sorted(Path("/usr/lib").glob(f"llvm-*/lib/clang/*/lib/linux/{name}"))
    if not found:
        pytest.fail(f"no {name} below /usr/lib. On Debian and Ubuntu: apt-get install libclang-rt-19-dev")
    return found[-1]


def program() -> Path:
    """Builds build/fuzz/core_fuzz, unless it is up to date."""
    flags = [*PLAIN, "-O1", "-g1", *SANITIZERS]
    core = built("fuzz", instrumented(*flags, COVERAGE))
    sources = {HERE / "core_fuzz.cpp": [*flags, COVERAGE], HERE / "coverage.cpp": ["-std=c++17", "-O2"]}
    out = FUZZ / "core_fuzz"

    def make():
        objects = [*core, *compiled(sources, FUZZ)]
        wrapped = "-Wl,--wrap=__sanitizer_cov_trace_pc"
        run([*compiler(), *SANITIZERS, wrapped, *objects, libfuzzer(), "-o", out, "-pthread"])

    made(FUZZ, str([*flags, COVERAGE]), [*files_under(ROOT / "csrc"), *sources], make)
    return out


def test_core():
    fuzzer, corpus = program().relative_to(ROOT), FUZZ / "corpus"
    corpus.mkdir(exist_ok=True)
    options = [f"-max_total_time={max(1, round(60 * MINUTES))}", f"-max_len={LONGEST_INPUT}", "-len_control=0"]
    options += ["-verbosity=0", "-print_final_stats=1", "-timeout=60", f"-artifact_prefix={FUZZ.relative_to(ROOT)}/"]
    first = ONLY_SEED or FIRST_SEED
    options += [f"-seed={first}"] if first else []
    env = {**os.environ, "UBSAN_OPTIONS": "abort_on_error=1:print_stacktrace=1"}  # aborted, it writes the input
    command = [fuzzer, *options, corpus]
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said = done.stdout.decode(errors="replace")
    print(said)
    failing = re.search(r"Test unit written to (\S+)", said)
    assert done.returncode == 0, f"again: {fuzzer} {failing[1] if failing else '(no input was written)'}"
    assert int(re.search(r"number_of_executed_units: (\d+)", said)[1]) > 100
