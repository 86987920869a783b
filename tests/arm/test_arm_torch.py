"""The package itself, built for aarch64 by its own setup.py, under an emulated arm64 Python with torch 2.10.0."""

import re
import subprocess
import sys

import pytest

import emulation
from emulation import CPUS, MODE, PACKAGE, ROOT

TESTS = ROOT / "tests"
# What runs, and on which CPU; every test of a kernel goes through all kernels of its CPU. A quick run takes what an
# architecture can change: the bits of every op, as recorded on x86-64, on the CPU of each kernel; that kernels are
# found, forced and refused; and on the CPU that has them all, every op against the oracle. The longest come first.
RUNS = {
    "full": [("max", ""), ("neoverse-n1", "")],
    "quick": [
        ("max", "test_ops.py"),
        ("max", "test_golden.py test_kernels.py"),
        ("neoverse-n1", "test_golden.py test_kernels.py"),
    ],
}
# Why a test may be skipped there; any other reason is a failure.
SKIPS = ["emulated by qemu-user", "the checks read x86-64 instructions", "this CPU cannot run neon_i8mm"]
SKIPS += ["this CPU runs every kernel"]


@pytest.fixture(scope="module", autouse=True)
def package(tmp_path_factory):
    emulation.make_all()


@pytest.fixture(autouse=True)
def _beside_the_package(monkeypatch):
    """In the clone, its own torchq folder would be imported."""
    monkeypatch.chdir(PACKAGE)


@pytest.mark.slow(seconds=100)
@pytest.mark.parametrize(("cpu", "files"), RUNS.get(MODE, []))
def test_the_project_passes_its_tests(cpu, files):
    """The files named, or all that are not about Arm, on the kernels of this CPU, its best one required."""
    paths = [TESTS / name for name in files.split()] or [TESTS, f"--ignore={TESTS / 'arm'}"]
    kernels = list(CPUS.values())
    required = ",".join(["reference", *kernels[: kernels.index(CPUS[cpu]) + 1]])
    options = ["-q", "-rs", "-p", "no:cacheprovider"]
    output = emulation.python("-m", "pytest", *options, *paths, cpu=cpu, TORCHQ_REQUIRED_KERNELS=required)
    print(output)
    assert re.search(r"[1-9]\d* passed", output.splitlines()[-1])
    skips = [line for line in output.splitlines() if line.startswith("SKIPPED")]
    assert [line for line in skips if not any(reason in line for reason in SKIPS)] == []


@pytest.mark.parametrize("cpu", ["neoverse-n1", "max"])
def test_the_best_kernel_is_active(cpu):
    """And CPU features are named as /proc/cpuinfo does. (torch's own libraries need more than cortex-a53 has.)"""
    code = "import torchq; from torchq import _C; print(torchq.kernels.active(), *_C.cpu_features())"
    features = {"neoverse-n1": "asimd asimddp", "max": "asimd asimddp i8mm"}[cpu]
    assert emulation.python("-c", code, cpu=cpu).split("\n")[-2] == f"{CPUS[cpu]} {features}"


def test_a_model_moves_between_architectures(tmp_path):
    """Saved on x86-64 it gives the same bits under aarch64, with every kernel; and the reverse."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir(), there.mkdir()
    exchange = TESTS / "arm" / "exchange.py"

    def on_this_machine(*arguments):
        done = subprocess.run(
            [sys.executable, exchange, *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    on_this_machine("save", here)
    output = emulation.python(exchange, "check", here, cpu="max")
    for kernel in ("neon_i8mm", "neon_dotprod", "neon", "reference"):
        assert f"static: {kernel} gives the saved bits" in output
        assert f"dynamic: {kernel} gives the saved bits" in output
    emulation.python(exchange, "save", there, cpu="max")
    assert "dynamic: reference gives the saved bits" in on_this_machine("check", there)
