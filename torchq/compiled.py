"""torchq._C, the compiled part; or an error that says why it can't be loaded, and what to do."""

import re
import sys
from importlib import metadata
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

__all__ = ["_C"]


def why_missing(error: ImportError, folder: Path) -> str:
    """What to tell a user whose import of `torchq._C` out of `folder` raised `error`.

    >>> why_missing(ModuleNotFoundError("No module named 'torch'", name="torch"), Path())
    'torchq needs torch, which is not installed. Install it: pip install torch.'
    """
    if error.name == "torch":
        return "torchq needs torch, which is not installed. Install it: pip install torch."
    files = sorted(file.name for kind in ("*.so", "*.pyd", "*.dylib") for file in folder.glob(f"_C.{kind}"))
    ours = [name for name in files if name.removeprefix("_C") in EXTENSION_SUFFIXES]
    python = f"Python {sys.version_info[0]}.{sys.version_info[1]}"
    if not files:
        return (
            f"torchq's compiled part is missing: {folder} holds the sources only. Install a wheel (docs/install.md), "
            "or build it where the sources are: pip install --no-build-isolation . That takes a C++17 compiler (on "
            "Debian and Ubuntu: apt-get install g++), torch, pybind11 and ninja."
        )
    if not ours:
        return (
            f"torchq's compiled part was built for another Python: {folder} holds {', '.join(files)}, and this is "
            f"{python}, which loads _C{EXTENSION_SUFFIXES[0]}. Install torchq with this Python."
        )
    return f"torchq's compiled part, {ours[0]}, can't be loaded: {error}. {_advice(str(error))}"


def _advice(message: str) -> str:
    if re.search(r"GLIBC(XX)?_", message):
        return "It was built on a newer Linux. Install a wheel (docs/install.md), or build it on this machine."
    version = _version_of_torch()
    needed = "torch >= 2.10 (the stable ABI)"
    return f"It needs {needed}, and finds torch {version}. Update torch, or build torchq again beside this one."


def _version_of_torch() -> str:
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return "of an unknown version"


try:
    import torch  # noqa: F401  (its libraries must be loaded before _C)

    from torchq import _C
except ImportError as error:
    raise ImportError(why_missing(error, Path(__file__).parent), name=error.name, path=error.path) from error
