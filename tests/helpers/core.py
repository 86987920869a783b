"""How the C++ core is compiled and its programs are run."""

import ast
import os
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from helpers import ROOT

CORE = ROOT / "csrc" / "gemm"
PROGRAM = ROOT / "tests" / "core"

PLAIN = ["-std=c++17", "-ffp-contract=off"]
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
# g++ 12 finds uninitialized variables in its own avx512fintrin.h; it calls them _mm512_undefined_ps().
AVX512_FALSE_ALARMS = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def compiler() -> list[str]:
    """Gives $CXX, or g++; fails with what to do if there is none."""
    command = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    if shutil.which(command[0]) is None:
        pytest.fail(f"the core's tests need a C++17 compiler: {command[0]!r} was not found. Install g++ or set CXX.")
    return command


def shipped_flags() -> list[str]:
    """Reads CXX_FLAGS from setup.py, without running it."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "CXX_FLAGS":
            flags: list[str] = ast.literal_eval(node.value)
            return flags
    raise AssertionError("setup.py has no CXX_FLAGS = [...]")


def run(command: list[str | Path]) -> str:
    """Runs a command and returns what it printed; a failure shows command and output."""
    # Without CPATH and its like nothing is found but what the command line names.
    env = {k: v for k, v in os.environ.items() if k not in {"CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH"}}
    done = subprocess.run(
        [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
    )
    if done.returncode != 0:
        pytest.fail(f"{shlex.join(map(str, command))}\nexited with {done.returncode}:\n{done.stdout}", pytrace=False)
    return done.stdout


def compile_all(sources: list[Path], flags: list[str], folder: Path) -> list[Path]:
    """Compiles every source into folder, as many at a time as there are processors."""
    command = compiler()
    # The largest first: the last one to start should not be the longest.
    sources = sorted(sources, key=lambda source: (not source.name.startswith("kernel_a"), source.name))
    objects = [folder / f"{source.stem}.o" for source in sources]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [
            pool.submit(run, [*command, *flags, "-c", source, "-o", out])
            for source, out in zip(sources, objects, strict=True)
        ]
    for job in jobs:
        job.result()
    return objects


def core_sources() -> list[Path]:
    return sorted(CORE.glob("*.cpp"))
