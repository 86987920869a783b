"""Without its compiled part torchq says why, and what to do."""

import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES

import pytest

from helpers import ROOT
from torchq.compiled import why_missing

OWN = f"_C{EXTENSION_SUFFIXES[0]}"
CIRCULAR = ImportError("cannot import name '_C' from partially initialized module 'torchq'", name="torchq")


@pytest.mark.parametrize(
    ("files", "error", "words"),
    [
        ([], CIRCULAR, ["compiled part is missing", "Install a wheel", "C++17 compiler", "apt-get install g++"]),
        (["_C.cpython-27-x86_64-linux-gnu.so"], CIRCULAR, ["another Python", "_C.cpython-27-x86_64", f"loads {OWN}"]),
        ([OWN], ImportError("libc.so.6: version `GLIBC_2.39' not found"), ["GLIBC_2.39", "built on a newer Linux"]),
        ([OWN], ImportError("undefined symbol: aoti_torch_x"), ["undefined symbol: aoti_torch_x", "torch >= 2.10"]),
        ([OWN], ModuleNotFoundError("No module named 'torch'", name="torch"), ["pip install torch"]),
    ],
    ids=["no file", "another Python", "another Linux", "another torch", "no torch"],
)
def test_the_reason_is_named(tmp_path, files, error, words):
    for name in files:
        (tmp_path / name).touch()
    message = why_missing(error, tmp_path)
    for word in words:
        assert word in message
    assert message.endswith(".")


# An editable install finds the compiled part of its own checkout for any torchq.
UNBUILT = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
from torchq.modules.linear import LinearType
"""


@pytest.mark.subprocess
@pytest.mark.slow(seconds=3)
def test_sources_that_nobody_built(tmp_path):
    """Also for what is imported from the middle of the package."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "torchq", tmp_path / "torchq", ignore=ignored)
    run = subprocess.run(
        [sys.executable, "-c", UNBUILT],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith(
        f"ImportError: torchq's compiled part is missing: {tmp_path / 'torchq'} holds the sources only"
    )
