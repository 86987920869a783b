"""The machine's limits, measured: int8 operations a second on registers, and bytes a second from cache and memory."""

import contextlib
import ctypes
import mmap
import os
import subprocess
from pathlib import Path

import torch

HERE = Path(__file__).parent


class Roofline:
    """Builds benchmarks/peak.cpp once (it needs a C++ compiler) and calls it.

    `peak(kernel)` is in operations a second, one thread; `bandwidth(bytes)` in bytes a second, one thread, for a buffer
    of that size read over and over.
    """

    def __init__(self) -> None:
        library = HERE.parent / "build" / "libpeak.so"
        library.parent.mkdir(exist_ok=True)
        if not library.exists() or library.stat().st_mtime < (HERE / "peak.cpp").stat().st_mtime:
            compiler = os.environ.get("CXX", "g++")
            subprocess.run(
                [compiler, "-std=c++17", "-O2", "-shared", "-fPIC", "-o", str(library), str(HERE / "peak.cpp")],
                check=True,
            )
        self._library = ctypes.CDLL(str(library))
        self._library.peak_of.restype = self._library.read_bandwidth.restype = ctypes.c_double
        self._library.read_bandwidth.argtypes = [ctypes.c_void_p, ctypes.c_int64]

    def peak(self, kernel: str) -> float:
        """Operations a second of the kernel's multiply instruction on registers; best of 5."""
        return max(float(self._library.peak_of(kernel.encode())) for _ in range(5))

    def bandwidth(self, size: int, rounds: int = 3) -> float:
        """Bytes a second of reading `size` bytes again and again; best of `rounds`."""
        data = _pages(max(256, size // 256 * 256))
        return max(float(self._library.read_bandwidth(data.data_ptr(), data.numel())) for _ in range(rounds))


def _pages(size: int) -> torch.Tensor:
    """Written memory of this size, in huge pages where the system has them, as torchq's weights are."""
    memory = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8).fill_(1)
