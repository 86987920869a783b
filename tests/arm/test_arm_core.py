"""The core's own tests under qemu, on a CPU without SDOT, one with SDOT, and one with USMMLA; and CPU detection."""

import re
from pathlib import Path

import pytest

import emulation
from emulation import CPUS, CXX, MODE
from helpers.core import PLAIN, WARNINGS, compile_all, jobs, program_sources


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    """The test program of the core, cross-compiled as shipped, with warnings as errors."""
    folder = tmp_path_factory.mktemp("core")
    core = emulation.core_objects().values()
    tests = compile_all(jobs(program_sources(), *PLAIN, "-O2", *WARNINGS), folder, [CXX])
    out = folder / "core_test"
    emulation.run([CXX, "-static", *core, *tests, "-o", out, "-pthread"])
    return out


@pytest.mark.parametrize("cpu", CPUS)
def test_dispatch_picks_the_best_kernel(program, cpu):
    """It also lists the kernels that the CPU can run, best first."""
    order = list(CPUS.values())[::-1]
    expected = [*order[order.index(CPUS[cpu]) :], "reference"]
    assert emulation.emulated(program, "--list", cpu=cpu).split("\n") == [*expected, f"active: {expected[0]}", ""]


@pytest.mark.slow(seconds=60)
@pytest.mark.parametrize("cpu", [cpu for cpu in CPUS if MODE != "quick" or cpu != "neoverse-n1"])
def test_core_passes_its_tests(program, cpu):
    """Every kernel of this CPU equals the reference, bit for bit: tails, corners, special values, guard pages, parts.

    A quick run leaves out neoverse-n1, since max has its kernels too; the tests with torch run them on neoverse-n1.
    """
    quick = ["--quick"] if MODE == "quick" else []
    output = emulation.emulated(program, "--seed", "1", "--require", CPUS[cpu], *quick, cpu=cpu)
    print(output)
    assert re.fullmatch(r"[1-9]\d* passed, 0 failed", output.splitlines()[-1])
    assert re.search(rf"^{CPUS[cpu]}: [1-9]\d* checks passed$", output, re.MULTILINE)


def test_a_kernel_the_cpu_lacks_is_a_failure(program):
    with pytest.raises(RuntimeError, match="this CPU cannot run it"):
        emulation.emulated(program, "--list", "--require", "neon_i8mm", cpu="neoverse-n1")


SYSTEMS = {
    "Linux": [],
    "macOS": ["-U__linux__", "-D__APPLE__"],
    "Windows": ["-U__linux__", "-D_WIN32", "-DPF_ARM_V82_I8MM_INSTRUCTIONS_AVAILABLE=66"],
    "Windows, older SDK": ["-U__linux__", "-D_WIN32"],
}
# The system; its answers about SDOT and USMMLA (and A: Apple silicon); and the kernels in order of preference.
ANSWERS = [
    ("Linux", "00", "neon reference"),
    ("Linux", "10", "neon_dotprod neon reference"),
    ("Linux", "11", "neon_i8mm neon_dotprod neon reference"),
    ("Linux", "11A", "neon_dotprod neon_i8mm neon reference"),
    ("macOS", "00", "neon reference"),
    ("macOS", "10", "neon_dotprod neon reference"),
    ("macOS", "11", "neon_dotprod neon_i8mm neon reference"),
    ("Windows", "00", "neon reference"),
    ("Windows", "10", "neon_dotprod neon reference"),
    ("Windows", "11", "neon_i8mm neon_dotprod neon reference"),
    ("Windows, older SDK", "11", "neon_dotprod neon reference"),
]


@pytest.mark.parametrize(("system", "answers", "kernels"), ANSWERS)
def test_detection(tmp_path, system, answers, kernels):
    """Compiles cpu.cpp and dispatch.cpp as for each system, with stand-ins for its functions; checks the kernels."""
    here, out = Path(__file__).parent / "stand_ins", tmp_path / "dispatch_test"
    flags = [*PLAIN, *WARNINGS, "-O1", *SYSTEMS[system], "-I", here]
    emulation.run([CXX, *flags, "-c", here / "dispatch_test.cpp", "-o", f"{out}.o"])
    emulation.run([CXX, "-static", f"{out}.o", "-o", out])
    assert emulation.emulated(out, answers, cpu="max").split() == kernels.split()
