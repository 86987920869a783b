"""How the C++ core is compiled and its programs are run."""

import ast
import hashlib
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from filelock import FileLock  # torch needs it too

from helpers import ROOT
from torchq import _C

CORE = ROOT / "csrc" / "gemm"
ATTENTION = ROOT / "csrc" / "attention"
CONV = ROOT / "csrc" / "conv"
PROGRAM = ROOT / "tests" / "core"
BUILD = ROOT / "build" / "core"

PLAIN = ["-std=c++17", "-ffp-contract=off"]
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
# g++ 12 finds uninitialized variables in its own avx512fintrin.h; it calls them _mm512_undefined_ps().
AVX512_FALSE_ALARMS = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# What a CPU has that runs the kernels with this in their names. AMX's tiles may be in memory (tests/core).
FEATURES = {"avx_vnni": "avx_vnni", "avx512": "avx512_vnni", "amx": "avx512_vnni", "dotprod": "asimddp", "i8mm": "i8mm"}


def compiler() -> list[str]:
    """The command of $CXX, or g++. Fails with instructions if there is no compiler."""
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


def run(command: Sequence[str | Path]) -> str:
    """Runs a command and returns what it printed; a failure shows command and output."""
    # Without CPATH and the like, the compiler finds only what the command line names.
    env = {k: v for k, v in os.environ.items() if k not in {"CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH"}}
    done = subprocess.run(
        [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
    )
    if done.returncode != 0:
        pytest.fail(f"{shlex.join(map(str, command))}\nexited with {done.returncode}:\n{done.stdout}", pytrace=False)
    return done.stdout


def jobs(sources: list[Path], *flags: str) -> dict[Path, list[str]]:
    """The argument of `compile_all` and `built`: each source with its flags."""
    return {source: list(flags) for source in sources}


def object_name(source: Path) -> str:
    """Both cores have a dispatch.cpp."""
    return f"{source.parent.name}_{source.stem}.o"


def compile_all(work: dict[Path, list[str]], folder: Path, command: list[str] | None = None) -> list[Path]:
    """Compiles every source with its flags into `folder`, as many at a time as there are processors."""
    command = command or compiler()
    # The largest first, so that the last one to start is not the one that takes longest.
    sources = sorted(work, key=lambda source: (not source.name.startswith("kernel_a"), source.name))
    objects = [folder / object_name(source) for source in sources]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        running = [
            pool.submit(run, [*command, *work[source], "-c", source, "-o", out])
            for source, out in zip(sources, objects, strict=True)
        ]
    for job in running:
        job.result()
    return objects


def files_under(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())


def made(folder: Path, key: str, contents: Sequence[Path], make: Callable[[], object]) -> None:
    """Calls `make`, which fills the folder, unless it did so before with the same key and contents of these files.

    So test files that use the same build share it, also between workers of pytest.
    """
    digest = hashlib.sha256(key.encode())
    for path in contents:
        digest.update(path.read_bytes())
    folder.mkdir(parents=True, exist_ok=True)
    stamp = folder / "complete"
    with FileLock(f"{folder}.lock"):
        if not stamp.exists() or stamp.read_text() != digest.hexdigest():
            stamp.unlink(missing_ok=True)
            make()
            stamp.write_text(digest.hexdigest())


def built(name: str, work: dict[Path, list[str]]) -> list[Path]:
    """Compiles into build/core/<name>, if it isn't there already."""
    command, folder = compiler(), BUILD / name
    key = run([*command, "--version"])
    key += "".join(f"{source.name} {shlex.join([*command, *flags])}\n" for source, flags in sorted(work.items()))
    made(folder, key, files_under(CORE, ATTENTION, CONV, PROGRAM), lambda: compile_all(work, folder, command))
    return [folder / object_name(source) for source in work]


def core_sources() -> list[Path]:
    return sorted(path for folder in (CORE, ATTENTION, CONV) for path in folder.rglob("*.cpp"))


def idle_kernels() -> list[Path]:
    """The kernels that this CPU can't run."""
    lacking = [part for part, feature in FEATURES.items() if feature not in _C.cpu_features()]
    return [source for source in core_sources() if any(part in source.stem for part in lacking)]


def instrumented(*flags: str) -> dict[Path, list[str]]:
    """The core with these flags, but for kernels that are only linked: with them, each would take half a minute."""
    return jobs(core_sources(), *flags) | jobs(idle_kernels(), *PLAIN, "-O0")


def program_sources() -> list[Path]:
    return sorted(PROGRAM.glob("*.cpp"))


def core_as_shipped() -> list[Path]:
    """The core's object files, with setup.py's flags, without an include directory, and with warnings as errors."""
    avx512 = [path for path in core_sources() if "avx512" in path.name or "amx" in path.name]
    flags = [*shipped_flags(), *WARNINGS]
    return built("shipped", jobs(core_sources(), *flags) | jobs(avx512, *flags, *AVX512_FALSE_ALARMS))


def required_kernels() -> list[str]:
    """The kernels in TORCHQ_REQUIRED_KERNELS, separated by commas. CI sets it to the kernels it must test."""
    names = os.environ.get("TORCHQ_REQUIRED_KERNELS", "")
    return ["--require", names] if names else []


def check_core(objects: list[Path], flags: list[str], arguments: list[str], folder: Path) -> None:
    """Links the core, compiled with these flags, with its tests in tests/core, and runs them with these arguments."""
    tests = built("tests", jobs(program_sources(), *PLAIN, "-O1", *WARNINGS))
    program = folder / "core_test"
    run([*compiler(), *flags, *objects, *tests, "-o", program, "-pthread"])

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
