"""The package itself, built for aarch64 by its own setup.py, under an emulated arm64 Python with torch 2.10.0."""

import subprocess
import sys

import pytest

import emulation
from emulation import CPUS, MODE, PACKAGE, ROOT


@pytest.fixture(scope="module", autouse=True)
def package(tmp_path_factory):
    emulation.make_all()


@pytest.fixture(autouse=True)
def _beside_the_package(monkeypatch):
    """Changes the folder: in the checkout, Python would import its torchq folder."""
    monkeypatch.chdir(PACKAGE)


@pytest.mark.slow(seconds=90)
def test_the_project_passes_its_tests():
    """On the CPU with all kernels. A quick run has the tests of the ops against the oracle, the full run has all."""
    emulation.project_passes("max", *(["test_ops.py"] if MODE == "quick" else []))


@pytest.mark.slow(seconds=11)
@pytest.mark.parametrize("cpu", ["neoverse-n1", "max"])
def test_the_best_kernel_is_active(cpu):
    """CPU features have their names from /proc/cpuinfo. (cortex-a53 is left out: torch's libraries can't run on it.)"""
    code = "import torchq; from torchq import _C; print(torchq.kernels.active(), *_C.cpu_features())"
    features = {"neoverse-n1": "asimd asimddp", "max": "asimd asimddp i8mm"}[cpu]
    assert emulation.python("-c", code, cpu=cpu).split("\n")[-2] == f"{CPUS[cpu]} {features}"


@pytest.mark.slow(seconds=36)
def test_a_model_moves_between_architectures(tmp_path):
    """A model saved on x86-64 gives the same bits on aarch64, with every kernel, and vice versa."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir(), there.mkdir()
    exchange = ROOT / "tests" / "arm" / "exchange.py"

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
