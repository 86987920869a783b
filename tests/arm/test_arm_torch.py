"""The package itself, built for aarch64 by its own setup.py, under an emulated arm64 Python with torch 2.10.0."""

import subprocess
import sys

import pytest

import emulation
from emulation import PACKAGE, ROOT


@pytest.fixture(scope="module", autouse=True)
def package(tmp_path_factory):
    emulation.make_all()


@pytest.fixture(autouse=True)
def _beside_the_package(monkeypatch):
    """Changes the folder: in the checkout, Python would import its torchq folder."""
    monkeypatch.chdir(PACKAGE)


@pytest.mark.slow(seconds=110)
def test_the_project_passes_its_tests():
    """On the CPU with all kernels, of which the best is active. (cortex-a53 can't run torch's libraries.)"""
    assert emulation.project_passes("max") == "neon_i8mm asimd asimddp i8mm"


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
    output = emulation.python(exchange, "check", here, "save", there, cpu="max")
    for kernel in ("neon_i8mm", "neon_dotprod", "neon", "reference"):
        assert f"static: {kernel} gives the saved bits" in output
        assert f"dynamic: {kernel} gives the saved bits" in output
    assert "dynamic: reference gives the saved bits" in on_this_machine("check", there)
