"""What `import torch` runs where torchq is installed: it makes `torch.ops.torchq` import torchq at its first use.

So a program from torch.export that holds torchq's ops loads in a process that does not import torchq itself. torch
calls `announce`, because the package names it as a "torch.backends" entry point (pyproject.toml). The environment
variable TORCH_DEVICE_BACKEND_AUTOLOAD=0 turns such calls off. This module is beside the package: from within, it would
import all of torchq at every `import torch`.
"""

import importlib
from typing import Any

import torch
from torch._ops import _OpNamespace


class _Ops(_OpNamespace):
    """The namespace `torch.ops.torchq`, whose first op that is asked for imports torchq."""

    __module__ = _OpNamespace.__module__  # ops are named after it, in programs too

    def __getattr__(self, op_name: str) -> Any:
        if not op_name.startswith("__"):
            importlib.import_module("torchq")
        return super().__getattr__(op_name)


def announce() -> None:
    """Puts the namespace in its place, unless torchq is imported already."""
    if "torchq" not in vars(torch.ops):
        setattr(torch.ops, "torchq", _Ops("torchq"))  # noqa: B010 mypy knows no attribute of this name
