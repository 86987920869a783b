"""How every benchmark here times: contestants interleaved in one process, the best of several rounds.

Other work on a machine only ever makes a run slower, so the best round is the estimate, and interleaving lets clock
changes fall on every contestant alike. Ratios within one run are what to quote.
"""

import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

import torchq


def interleaved(
    contestants: Mapping[str, Callable[[], object]], *, rounds: int = 15, seconds: float = 0.02
) -> dict[str, float]:
    """Seconds a call takes, for each contestant: the best of `rounds` rounds of about `seconds` each.

    >>> sorted(interleaved({"a": lambda: None, "b": lambda: None}, rounds=2, seconds=0.001))
    ['a', 'b']
    """
    repeats = {name: _repeats(call, seconds) for name, call in contestants.items()}
    best = dict.fromkeys(contestants, float("inf"))
    for _ in range(rounds):
        for name, call in contestants.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            best[name] = min(best[name], (time.perf_counter() - start) / repeats[name])
    return best


def _repeats(call: Callable[[], object], seconds: float) -> int:
    for _ in range(3):  # first calls allocate and start threads
        call()
    start = time.perf_counter()
    call()
    return max(1, int(seconds / max(time.perf_counter() - start, 1e-7)))


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
