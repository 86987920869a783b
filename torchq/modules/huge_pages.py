"""Packed weights of a model that is loaded: side by side, in huge pages.

A forward reads every weight once, and with pages of 4 KiB it waits for the TLB at each. What `convert()` packs lies
side by side, and the system gathers it into huge pages afterwards (`PackedWeights.settle`). What is packed from a
checkpoint lies between the checkpoint's tensors, and when those are freed they leave holes, which no huge page covers.
So it gets memory of its own.
"""

import mmap
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

_HUGE_PAGE = 2 << 20
_CHUNK = 32 << 20
"""Bytes that are mapped at once. Weights of several layers share them, and each keeps all of them in memory."""

_WORTH = 128 << 10
"""Bytes of a weight from which sharing huge pages pays, as in csrc/run.cpp."""

_LINE = 64


class _Chunk(threading.local):
    """Where the next weight of this thread goes. Only tensors keep the memory: when they are gone, it is."""

    memory: Callable[[], mmap.mmap | None] = staticmethod(lambda: None)  # a weak reference, once there is memory
    begin = end = 0


_chunk = _Chunk()


def in_huge_pages(packed: Tensor) -> Tensor:
    """A copy of a packed weight, uint8 of any shape, behind the last one of this thread.

    That is in huge pages, if the system has them. Where they don't pay, or there is no room for them under a limit of
    the process, it is `packed` itself.
    """
    size = packed.nbytes
    if type(packed) is not Tensor or packed.device.type != "cpu" or size < _WORTH or not hasattr(mmap, "MADV_HUGEPAGE"):
        return packed
    try:
        memory, begin = _place(size)
    except OSError:
        return packed
    flat = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=begin)
    return flat.view(packed.shape).copy_(packed)


def _place(size: int) -> tuple[mmap.mmap, int]:
    """Memory with room for so many bytes, and where in it."""
    if size > _CHUNK:
        return _mapped(size)
    memory = _chunk.memory()
    if memory is None or _chunk.begin + size > _chunk.end:
        memory, begin = _mapped(_CHUNK)
        _chunk.memory, _chunk.begin, _chunk.end = weakref.ref(memory), begin, begin + _CHUNK
    begin = _chunk.begin
    _chunk.begin = begin + -(-size // _LINE) * _LINE
    return memory, begin


def _mapped(size: int) -> tuple[mmap.mmap, int]:
    """Memory that begins at a huge page, and where in the mapping that is. What nobody writes to costs nothing."""
    # Private, which is not Python's default: the pages of shared memory are the system's to choose, by another rule.
    memory = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a system without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory, -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % _HUGE_PAGE
