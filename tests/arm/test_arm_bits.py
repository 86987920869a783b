"""Results that depend on the architecture, on the CPU of each kernel: the bits of every op, and which kernel runs.

tests/golden.json was recorded on x86-64, where the suite compares the same ops with the oracle. Here it is neoverse-n1;
test_arm_torch.py does the same on max. The full run runs every test, on both.
"""

import pytest

import emulation
from emulation import PACKAGE


@pytest.mark.slow(seconds=45)
def test_no_bit_differs_and_kernels_are_found_and_forced(monkeypatch):
    """And the best kernel is active: CPU features have their names from /proc/cpuinfo."""
    emulation.make_all()
    monkeypatch.chdir(PACKAGE)  # in the checkout, Python would import its torchq folder
    assert emulation.project_passes("neoverse-n1") == "neon_dotprod asimd asimddp"
