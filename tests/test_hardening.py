"""How the library is linked: one exported symbol, read-only tables of addresses, a guarded stack."""

import re
import shutil
import subprocess
import sys

import pytest

from torchq import _C

pytestmark = [
    pytest.mark.subprocess,
    pytest.mark.skipif(sys.platform != "linux" or not shutil.which("readelf"), reason="reads ELF with binutils"),
]


def readelf(*options):
    return subprocess.run(["readelf", *options, "-W", _C.__file__], capture_output=True, text=True, check=True).stdout


def symbols():
    """Name and section of each dynamic symbol."""
    rows = [line.split() for line in readelf("--dyn-syms").splitlines()]
    return [(row[7].split("@")[0], row[6]) for row in rows if len(row) >= 8 and row[0].endswith(":")]


def test_one_symbol_is_exported():
    assert [name for name, section in symbols() if section not in ("UND", "Ndx")] == ["PyInit__C"]


def test_addresses_are_read_only_once_loaded():
    assert "GNU_RELRO" in readelf("-l")
    assert "NOW" in readelf("-d")


def test_it_loads_on_every_linux_with_glibc_2_28():
    """Also where it was built on a newer one: so a wheel is manylinux_2_28, as torch's own are."""
    versions = set(re.findall(r"Name: GLIBC_([\d.]+)", readelf("-V")))
    assert versions
    assert [version for version in versions if tuple(map(int, version.split("."))) > (2, 28)] == []


def test_a_smashed_stack_is_noticed():
    assert "__stack_chk_fail" in {name for name, _ in symbols()}
