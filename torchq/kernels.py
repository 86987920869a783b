"""The kernels that multiply: which are compiled in, which this CPU can run, which is active, and how to force one.

One table lists the kernels, best first (csrc/gemm/dispatch.cpp). The first that this CPU can run is active. All kernels
give the same integers and the same floats, bit for bit, so the choice affects only speed. To force a kernel, set the
environment variable `TORCHQ_KERNEL=<name>` for a process, or call `use(name)` for a block of code in its thread.
"""

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torchq.compiled import _C
from torchq.scopes import Scoped

__all__ = [
    "ENVIRONMENT_VARIABLE",
    "active",
    "active_attention",
    "attention_schemes",
    "last_used",
    "names",
    "runnable",
    "tile",
    "use",
    "why_not",
]

ENVIRONMENT_VARIABLE = "TORCHQ_KERNEL"

_used: Scoped[str] = Scoped("torchq.kernels.use", _C.ask_for_kernel)
_C.set_kernel_of_context(_used.get)


def names() -> list[str]:
    """The kernels compiled into this build, best first.

    >>> names()[-1]
    'reference'
    """
    return [kernel.name for kernel in _C.table()]


def runnable() -> list[str]:
    """The kernels this CPU can run, best first; `reference` runs everywhere.

    >>> "reference" in runnable()
    True
    """
    return [kernel.name for kernel in _C.table() if kernel.runnable]


def why_not(name: str) -> str | None:
    """Why this kernel can't run here; None if it can.

    >>> why_not("reference") is None
    True

    Raises:
        ValueError: there is no such kernel.
    """
    if name not in names():
        if name not in _C.known_names():
            raise ValueError(f"kernels.why_not(): {name!r} is not a kernel. There are: {', '.join(_C.known_names())}.")
        return "not compiled into this build (other architecture, or a compiler too old for it)"
    kernel = next(kernel for kernel in _C.table() if kernel.name == name)
    lacking = ", ".join(sorted(set(kernel.needs) - set(_C.cpu_features())))
    return None if kernel.runnable else f"this CPU lacks {lacking}"


def active() -> str:
    """The kernel that the ops use now, called from this thread.

    >>> active() in runnable()
    True
    """
    return _C.active()


def active_attention() -> str:
    """The attention kernel that goes with the active one: the best that uses no wider vectors.

    >>> with use("reference"):
    ...     active_attention()
    'reference'
    """
    return _C.active_attention()


def attention_schemes(keys: int) -> tuple[str, ...]:
    """The schemes of `ops.attention` that pay by the active kernel for so many keys: the fastest first.

    Each costs accuracy, and takes less time than those that are more exact. AMX multiplies bfloat16 so fast that int8
    pays from 512 keys on only. "avx2" multiplies pairs of codes as int16, 1.5 times as fast as floats: there int8 pays
    from 64 keys on, and nothing else does (docs/performance-avx2.md). By the other kernels int8 always pays, and
    "int8_bfloat16" is faster than "bfloat16".

    >>> with use("reference"):
    ...     attention_schemes(keys=128)
    ('int8', 'int8_bfloat16')
    """
    if active() == _OF_PAIRS:
        return ("int8",) if keys >= _PAIRS_PAY_FROM else ()
    pays_from = _C.codes_pay_from()
    if not pays_from:
        return ("int8", "int8_bfloat16")
    return ("int8", "bfloat16") if keys >= pays_from else ("bfloat16",)


_OF_PAIRS, _PAIRS_PAY_FROM = "avx2", 64


def last_used() -> str | None:
    """The kernel that really ran in the latest op call of this process; None before the first call."""
    return _C.last_used()


def tile(name: str) -> tuple[int, int, int]:
    """The (rows, columns, k) of the largest block that one call of this kernel computes.

    >>> tile("reference")
    (1, 16, 4)
    """
    return next(kernel.tile for kernel in _C.table() if kernel.name == _checked(name, "kernels.tile()"))


@contextmanager
def use(name: str) -> Iterator[None]:
    """Forces a kernel inside a `with` block, for its own thread and asyncio task.

    Other threads go on with theirs, also those that were started inside. An op asks the thread that called it: torch's
    own threads, which compute a part of the product each, take that kernel too. A DataLoader's workers are processes;
    forked inside the block, they force this kernel as well. For a whole process set `TORCHQ_KERNEL`.

    Raises:
        ValueError: no kernel has this name, or it is not compiled into this build.
        RuntimeError: this CPU cannot run it.

    >>> with use("reference"):
    ...     active()
    'reference'
    """
    _check_runnable(name, "kernels.use()")
    with _used.of(name):
        yield


def _checked(name: str, source: str) -> str:
    if name in names():
        return name
    compiled = ", ".join(names())
    if _C.is_kernel_name(name):
        raise ValueError(f"{source}: kernel {name!r} is {why_not(name)}. Compiled in: {compiled}.")
    raise ValueError(f"{source}: {name!r} is not a kernel. Compiled in: {compiled}.")


def _check_runnable(name: str, source: str) -> None:
    lacking = why_not(_checked(name, source))
    if lacking is not None:
        raise RuntimeError(f"{source}: {lacking}, which kernel {name!r} needs. It can run: {', '.join(runnable())}.")


_slow = threading.Lock()
"""Taken for good by the warning that no kernel is fast here: it is given once in a process."""


def warn_if_slow() -> None:
    """Says, once, that this CPU runs only `reference`, unless somebody asked for that kernel."""
    if active() != "reference" or _C.forced() is not None or not _slow.acquire(blocking=False):
        return
    lacking = {name: why_not(name) for name in names() if name != "reference"}
    whys = "; ".join(f"{name}: {why}" for name, why in lacking.items()) or "this build has no other"
    warnings.warn(
        f"torchq: no fast kernel runs on this CPU ({whys}). Int8 layers give the same results by `reference`, but take "
        "longer than float ones. On such a machine use the float model, and int8 to save memory only.",
        stacklevel=2,
    )


def _force_from_environment() -> None:
    name = os.environ.get(ENVIRONMENT_VARIABLE)
    if name:
        _check_runnable(name, ENVIRONMENT_VARIABLE)
        _C.force(name)


_force_from_environment()
