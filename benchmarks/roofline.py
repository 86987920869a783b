"""Measures the machine's limits: int8 operations per second on registers, bytes per second from cache and memory."""

import contextlib
import ctypes
import mmap
import os
import subprocess
from pathlib import Path

import torch

HERE = Path(__file__).parent


class Roofline:
    """Builds benchmarks/peak.cpp once (it needs a C++ compiler) and calls it. Both limits are for one thread.

    `peak(kernel)` is in operations per second. `bandwidth(size)` is in bytes per second, for a buffer of `size` bytes
    that is read again and again.
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
        """Operations per second of the kernel's multiply instruction on registers; best of 5."""
        return max(float(self._library.peak_of(kernel.encode())) for _ in range(5))

    def bandwidth(self, size: int, rounds: int = 3) -> float:
        """Bytes per second of reading `size` bytes again and again; best of `rounds`."""
        data = _pages(max(256, size // 256 * 256))
        return max(float(self._library.read_bandwidth(data.data_ptr(), data.numel())) for _ in range(rounds))


def _pages(size: int) -> torch.Tensor:
    """Memory of this size, written once, in huge pages if the system has them, like torchq's weights.

    It is private: memory that processes may share, as mmap's is unless told otherwise, gets small pages on most
    systems. They are read at 21 GB/s where huge ones are at 37 (Zen 4).
    """
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
    memory = mmap.mmap(-1, size, **private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # the Linux kernel may lack huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8).fill_(1)
