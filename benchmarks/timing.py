"""How every benchmark here times, which is how torchq does (torchq/timing.py), and on what machine."""

import platform
import time
from pathlib import Path

import torch

import torchq
from torchq.timing import interleaved as interleaved


def settle(limit: float = 1.0) -> None:
    """Sleeps until no thread of this process is busy: those of ONNX Runtime spin for 50 ms after a run.

    A contestant with two threads on two cores, timed before that, shares one with them. The kernel counts the time of
    running threads by the tick, up to 10 ms apart, so shorter naps would see nothing.
    """
    end, nap = time.perf_counter() + limit, 0.02
    while time.perf_counter() < end:
        before = time.process_time()
        time.sleep(nap)
        if time.process_time() - before < nap / 4:
            return


def machine() -> str:
    """One line: CPU, threads, kernel, versions."""
    return (
        f"{_cpu_name()}, {torch.get_num_threads()} threads, kernel {torchq.kernels.active()}, "
        f"torchq {torchq.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    )


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    cleaned = {key.strip(): value.strip() for key, value in fields.items()}
    if "model name" not in cleaned:
        return platform.processor() or platform.machine()
    return f"{cleaned['model name']} (family {cleaned.get('cpu family')}, model {cleaned.get('model')})"
