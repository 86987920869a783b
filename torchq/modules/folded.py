"""Folded: what stands in the place of a module whose work a QuantizedLinear does."""

from typing import Any

from torch import nn
from torch.compiler import is_dynamo_compiling

from torchq import _C


class Folded(nn.Identity):
    """What a module leaves behind whose work a QuantizedLinear does: gives x back, 0.1 us instead of 0.8.

    >>> Folded()(1)
    1
    """

    def __call__(self, x: Any) -> Any:
        """Gives x."""
        if is_dynamo_compiling() or not _C.is_plain(self, Folded):
            return super().__call__(x)
        return x
