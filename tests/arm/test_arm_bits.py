"""What an architecture can change, on the CPU of each kernel: the bits of every op, and which kernel runs.

tests/golden.json was recorded on x86-64, where the suite holds the same ops against the oracle. In the full run every
test runs instead, on neoverse-n1; on max test_arm_torch.py does that.
"""

import pytest

import emulation
from emulation import MODE, PACKAGE


@pytest.mark.slow(seconds=45)
@pytest.mark.parametrize("cpu", ["neoverse-n1", "max"] if MODE == "quick" else ["neoverse-n1"])
def test_no_bit_differs_and_kernels_are_found_and_forced(monkeypatch, cpu):
    emulation.make_all()
    monkeypatch.chdir(PACKAGE)  # in the clone, its own torchq folder would be imported
    emulation.project_passes(cpu, *(["test_golden.py", "test_kernels.py"] if MODE == "quick" else []))
