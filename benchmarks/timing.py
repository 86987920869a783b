"""What all benchmarks share: torchq's own way of timing (torchq/timing.py), and a description of the machine."""

import argparse
import platform
import time
from pathlib import Path

import torch

import torchq
from torchq.timing import interleaved as interleaved


def settle(limit: float = 1.0) -> None:
    """Sleeps until no thread of this process is busy: the threads of ONNX Runtime spin for 50 ms after a run.

    Until then, the next contestant would have to share a core with them. Linux updates the CPU time of running threads
    only at its ticks, up to 10 ms apart, so a shorter sleep would see no change.
    """
    end, nap = time.perf_counter() + limit, 0.02
    while time.perf_counter() < end:
        before = time.process_time()
        time.sleep(nap)
        if time.process_time() - before < nap / 4:
            return


def add_clock(parser: argparse.ArgumentParser) -> None:
    """Adds --cpu-time, which chooses the `clock` of the parsed arguments."""
    parser.add_argument(
        "--cpu-time",
        dest="clock",
        action="store_const",
        const=time.process_time,
        default=time.perf_counter,
        help="for one thread on a busy machine: the CPU time of the process, not wall time",
    )


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
