"""An arm64 Debian with Python and torch under build/arm, and programs run in it by qemu-user: no Arm hardware, no root.

qemu-user emulates one process. Its system calls go to this machine's kernel, it looks for files under the root first
(-L), and a program that it starts runs on this machine. So the emulated Python can run setup.py with a cross compiler
at full speed. But `subprocess.run([sys.executable, ...])` does not work: such tests have the mark `subprocess`.
"""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock  # torch needs it too

from helpers import ROOT
from helpers.core import WARNINGS, compile_all, core_sources, files_under, jobs, made, object_name, shipped_flags

TESTS, BUILD = ROOT / "tests", ROOT / "build" / "arm"
DEBIAN, SITE, PACKAGE = BUILD / "debian", BUILD / "site", BUILD / "package"
MODE = os.environ.get("TORCHQ_ARM", "")
CXX = "aarch64-linux-gnu-g++"
CPUS = {"cortex-a53": "neon", "neoverse-n1": "neon_dotprod", "max": "neon_i8mm"}
"""qemu's CPU models, and the kernel that dispatch must choose on each: without SDOT, with SDOT, and with USMMLA too."""

# The last release whose aarch64 wheel on PyPI is a CPU build. It needs LSE atomics, which cortex-a53 lacks. So only the
# core is tested on cortex-a53, and the tests with torch force the neon kernel on another CPU.
TORCH = "torch==2.10.0"
# The packages that the tests and torch need, at the versions in requirements.txt if it has them.
PINNED = ["numpy", "tqdm", "safetensors", "setuptools", "pybind11", "pytest", "hypothesis", "scikit-learn"]
OTHERS = ["filelock", "typing-extensions", "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "fsspec", "iniconfig"]
OTHERS += ["packaging", "pluggy", "pygments", "sortedcontainers", "scipy", "joblib", "threadpoolctl", "narwhals"]
OTHERS += ["cloudpickle"]

# What a quick run has of each CPU: the bits of every op, as on x86-64, and which kernel runs; on the one with all
# kernels the ops against the oracle, too.
QUICK = {
    "neoverse-n1": ["test_golden.py", "test_kernels.py"],
    "max": ["test_ops.py", "test_golden.py", "test_kernels.py"],
}

# The reasons for which a test may be skipped under emulation. Any other reason is a failure.
SKIPS = ["emulated by qemu-user", "the checks read x86-64 instructions", "this CPU cannot run neon_i8mm"]
SKIPS += ["this CPU runs every kernel", "is not installed"]  # transformers and the like

NEEDED = {
    CXX: "g++-aarch64-linux-gnu",
    "aarch64-linux-gnu-objdump": "binutils-aarch64-linux-gnu",
    "qemu-aarch64-static": "qemu-user-static",
    "qemu-aarch64": "qemu-user",
    "mmdebstrap": "mmdebstrap",
}


def run(command: Sequence[str | Path], **environment: str) -> str:
    """Runs a command and returns its output. A failure raises an error with command and output."""
    done = subprocess.run(
        [str(word) for word in command],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode != 0:
        line = shlex.join(str(word) for word in command)
        raise RuntimeError(f"{line}\nexited with {done.returncode}:\n{done.stdout[-30000:]}")
    return done.stdout


def check_tools() -> None:
    """Fails with the apt-get command if a program is missing."""
    absent = [package for program, package in NEEDED.items() if shutil.which(program) is None]
    if absent:
        raise RuntimeError(f"apt-get install -y --no-install-recommends {' '.join(absent)}")


# ---- The core alone -------------------------------------------------------------------------------------------------


def core_objects() -> dict[Path, Path]:
    """The core's object files by their sources, cross-compiled as shipped, with warnings as errors."""
    check_tools()
    folder, flags = BUILD / "core", [*shipped_flags(), *WARNINGS]
    work = jobs(core_sources(), *flags)
    key = f"{run([CXX, '--version'])} {flags}"
    made(folder, key, files_under(ROOT / "csrc"), lambda: compile_all(work, folder, [CXX]))
    return {source: folder / object_name(source) for source in work}


def emulated(program: Path, *arguments: str, cpu: str) -> str:
    """Runs a static Arm program."""
    return run(["qemu-aarch64-static", "-cpu", cpu, program, *arguments])


# ---- Python and torch -----------------------------------------------------------------------------------------------


def requirements() -> list[str]:
    """The requirements: torch, and the pinned versions for the emulated Python."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = [line.split(";")[0].strip() for line in lines if "==" in line and "< " not in line.partition(";")[2]]
    return [TORCH, *(pin for pin in pins if pin.split("==")[0] in PINNED), *OTHERS]


def make_debian() -> None:
    """Unpacks arm64 Python 3.11 from Debian's packages: 4 seconds, 130 MB, no maintainer scripts are run."""
    if (DEBIAN / "complete").exists():
        return
    shutil.rmtree(DEBIAN, ignore_errors=True)
    packages = "python3.11,libpython3.11-dev,libgomp1,libstdc++6"
    command = ["mmdebstrap", "-q", "--arch=arm64", "--variant=extract", f"--include={packages}", "bookworm", DEBIAN]
    run(command)  # makes the folder, but not its parents
    # torch reads /proc/cpuinfo to find its CPU. With -L, it finds this file instead of the host's.
    entry = "processor\t: {}\nFeatures\t: fp asimd atomics asimddp\nCPU implementer\t: 0x41\nCPU part\t: 0xd0c\n\n"
    (DEBIAN / "proc").mkdir(exist_ok=True)
    (DEBIAN / "proc" / "cpuinfo").write_text(entry.format(0) + entry.format(1))
    run([sys.executable, "-m", "compileall", "-q", DEBIAN / "usr/lib/python3.11"])
    (DEBIAN / "complete").touch()


def make_site() -> None:
    """Downloads the aarch64 wheels with this machine's pip: about 200 MB, half a minute."""
    wanted = requirements()
    stamp = SITE / hashlib.sha256(" ".join(wanted).encode()).hexdigest()[:16]
    if stamp.exists():
        return
    shutil.rmtree(SITE, ignore_errors=True)
    platforms = ["manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014"]
    flags = [f"--platform={p}_aarch64" for p in platforms] + [f"--abi={a}" for a in ("cp311", "abi3", "none")]
    flags += ["--python-version=3.11", "--implementation=cp", "--only-binary=:all:", "--no-deps", f"--target={SITE}"]
    run([sys.executable, "-m", "pip", "install", "-q", *flags, *wanted])
    stamp.touch()


def python(*arguments: str | Path, cpu: str, **environment: str) -> str:
    """Runs the emulated Python with torch and this project on its path."""
    interpreter = DEBIAN / "usr/bin/python3.11"
    return run(
        ["qemu-aarch64-static", "-L", DEBIAN, "-cpu", cpu, interpreter, *arguments],
        PYTHONPATH=f"{PACKAGE}:{SITE}:{ROOT}",  # the last for benchmarks, of which a test uses some
        PYTHONNOUSERSITE="1",
        PYTHONDONTWRITEBYTECODE="1",
        OMP_NUM_THREADS="1",
        TORCHQ_EMULATED="1",
        **environment,
    )


# Importing torch takes longer than most files of tests, so what all runs need of it is said and done in one process.
RUN = """
import sys, pytest, torchq
from torchq import _C
print(torchq.kernels.active(), *_C.cpu_features(), flush=True)
sys.exit(pytest.main(sys.argv[1:]))
"""


def project_passes(cpu: str) -> str:
    """Runs the tests of a quick run, or all but those in tests/arm. Gives the active kernel and the CPU's features.

    No test of a kernel that the CPU has may be skipped.
    """
    paths = [TESTS / name for name in QUICK[cpu]] if MODE == "quick" else [TESTS, f"--ignore={TESTS / 'arm'}"]
    kernels = list(CPUS.values())
    required = ",".join(["reference", *kernels[: kernels.index(CPUS[cpu]) + 1]])
    options = ["-q", "-rs", "-p", "no:cacheprovider"]
    output = python("-c", RUN, *options, *paths, cpu=cpu, TORCHQ_REQUIRED_KERNELS=required)
    print(output)
    assert re.search(r"[1-9]\d* passed", output.splitlines()[-1])
    skips = [line for line in output.splitlines() if line.startswith("SKIPPED")]
    assert [line for line in skips if not any(reason in line for reason in SKIPS)] == []
    return output.splitlines()[0]


def sources_of_package() -> str:
    """A hash of all files that the package is built from."""
    folders = ROOT / "csrc", ROOT / "torchq"
    inside = [path for folder in folders for path in folder.rglob("*") if path.suffix not in {".so", ".pyc"}]
    found = hashlib.sha256()
    for path in sorted(path for path in [*inside, ROOT / "setup.py", ROOT / "pyproject.toml"] if path.is_file()):
        found.update(f"{path.relative_to(ROOT)};".encode() + path.read_bytes())
    return found.hexdigest()


def make_package() -> None:
    """Builds the project by its own setup.py, in the emulated Python: half a minute, if a source has changed."""
    stamp, wanted = BUILD / "package.complete", sources_of_package()
    if stamp.exists() and stamp.read_text() == wanted:
        return
    stamp.unlink(missing_ok=True)
    shutil.rmtree(PACKAGE, ignore_errors=True)  # removes files that no longer exist in the project
    include = DEBIAN / "usr/include"
    shared = f"{CXX} -shared"
    os.chdir(ROOT)
    python(
        *("setup.py", "-q", "build", "--build-base", BUILD / "temporary", "--build-lib", PACKAGE),
        cpu="max",
        CC="aarch64-linux-gnu-gcc",
        CXX=CXX,
        # The first keeps the compiler from this machine's headers. Debian's pyconfig.h needs the second.
        CPPFLAGS=f"-I{include}/python3.11 -idirafter {include}",
        LDSHARED=shared,
        LDCXXSHARED=shared,
        PATH=f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}",  # ninja
    )
    stamp.write_text(wanted)


def make_all() -> None:
    """Makes everything that is missing. If several processes call it at a time, one of them does the work."""
    check_tools()
    BUILD.mkdir(parents=True, exist_ok=True)
    with FileLock(BUILD / "lock"):
        make_debian()
        make_site()
        make_package()


if __name__ == "__main__":
    make_all()
