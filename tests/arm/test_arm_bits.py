"""Results that depend on the architecture, on the CPU of each kernel: the bits of every op, and which kernel runs.

tests/golden.json was recorded on x86-64, where the suite compares the same ops with the oracle. The full run runs every
test on neoverse-n1 instead; test_arm_torch.py does so on max.
"""

import pytest

import emulation
from emulation import MODE, PACKAGE


@pytest.mark.slow(seconds=45)
@pytest.mark.parametrize("cpu", ["neoverse-n1", "max"] if MODE == "quick" else ["neoverse-n1"])
def test_no_bit_differs_and_kernels_are_found_and_forced(monkeypatch, cpu):
    emulation.make_all()
    monkeypatch.chdir(PACKAGE)  # in the checkout, Python would import its torchq folder
    emulation.project_passes(cpu, *(["test_golden.py", "test_kernels.py"] if MODE == "quick" else []))
