"""The memory of activations: pages are taken from the system once, and not in every call."""

import os
import platform
import subprocess
import sys

import pytest

# Tensors of 3 MB, one behind the other, as a network's activations are, after one call of an int8 layer.
PROGRAM = """
import resource, torch, torchq
torch.set_num_threads(1)
torchq.QuantizedLinear.from_float(torch.nn.Linear(64, 64))(torch.ones(4, 64))

def faults(count):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        x = y = None
        for _ in range(4):
            x, y = y, torch.empty(3 << 18).fill_(1.0)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / count

faults(3)
print(faults(10))
"""
PAGES = (3 << 20) // 4096


def faults_of_a_call(**settings):
    names = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
    plain = {name: value for name, value in os.environ.items() if not name.startswith(names)}
    command = [sys.executable, "-c", PROGRAM]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=plain | settings)
    return float(run.stdout)


@pytest.mark.subprocess
@pytest.mark.slow(seconds=8)
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives memory back so eagerly")
def test_activations_are_not_new_pages_in_every_call():
    """The system would get each back, once two are free: so it does where the user has set its bounds, which stay."""
    assert faults_of_a_call() < PAGES / 10
    assert faults_of_a_call(MALLOC_TRIM_THRESHOLD_="1000000", MALLOC_MMAP_THRESHOLD_="1000000") > PAGES
