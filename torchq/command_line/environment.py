"""What `torchq env` tells: the machine, its kernels and why each can run or not, threads, versions."""

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import torchq
from torchq import _C, kernels
from torchq.command_line.console import out, print_table

PACKAGES = ("transformers", "sentence-transformers", "safetensors", "peft", "numpy")
VARIABLES = (kernels.ENVIRONMENT_VARIABLE, "OMP_NUM_THREADS", "MKL_NUM_THREADS", "TORCH_DEVICE_BACKEND_AUTOLOAD")


def facts() -> dict[str, Any]:
    """All of it, as plain data."""
    return {
        "torchq": torchq.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": " ".join(filter(None, (platform.system(), platform.release(), *platform.libc_ver()))),
        "machine": platform.machine(),
        "cpu": cpu_name(),
        "features": _C.cpu_features(),
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "kernels": [kernel_facts(name) for name in _C.known_names()],
        "active": kernels.active(),
        "attention": kernels.active_attention(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
    }


def kernel_facts(name: str) -> dict[str, Any]:
    """One kernel: whether it can run here, whether it does, and why not."""
    why_not = kernels.why_not(name)
    tile = kernels.tile(name) if name in kernels.names() else None
    return {
        "name": name,
        "runnable": why_not is None,
        "active": name == kernels.active(),
        "why_not": why_not,
        "tile": tile,
    }


def cpu_name() -> str:
    """As the system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def usable_cores() -> float:
    """How many this process may use: by its affinity, and by the quota of its container."""
    cores: float = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return cores if quota == "max" else min(cores, int(quota) / int(period))
    except (OSError, ValueError):
        return cores


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def show(found: dict[str, Any]) -> None:
    """Prints what `facts` found."""
    variables = ", ".join(f"{name}={value}" for name, value in found["variables"].items())
    lines = {
        "torchq": f"{found['torchq']} on torch {found['torch']}, Python {found['python']}",
        "system": f"{found['system']}, {found['machine']}",
        "CPU": f"{found['cpu']}; of what kernels need it has {', '.join(found['features']) or 'nothing'}",
        "threads": f"{found['threads']} of torch, {found['usable_cores']:g} of {found['cores']} cores usable",
        "set": variables or "none of " + ", ".join(VARIABLES),
        "packages": ", ".join(f"{name} {version}" for name, version in found["packages"].items()),
    }
    width = max(map(len, lines))
    for name, line in lines.items():
        out.print(f"[bold]{name:<{width}}[/bold]  ", end="")
        out.print(line, markup=False)
    out.print()
    rows, styles = [], []
    for kernel in found["kernels"]:
        state = "active" if kernel["active"] else "can run" if kernel["runnable"] else kernel["why_not"]
        rows.append((kernel["name"], " x ".join(map(str, kernel["tile"] or ("-",))), state))
        styles.append("green" if kernel["active"] else "" if kernel["runnable"] else "dim")
    print_table("kernels, best first", ("kernel", "tile", "state"), rows, styles)
    out.print(f"attention is computed by {found['attention']}", markup=False)
    if found["threads"] > found["usable_cores"]:
        out.print("[yellow]torch has more threads than it may use cores:[/yellow] set OMP_NUM_THREADS")
