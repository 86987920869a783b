"""simulate(): int8 layers compute in fake-quantized float; and who is inside of it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from torchq import _C
from torchq.scopes import Scoped

anywhere = False
"""Whether any thread simulates. Where none does, no thread need look into its context."""


def _set_anywhere(yes: bool) -> None:
    global anywhere
    anywhere = yes
    _C.set_simulating(yes)


simulating: Scoped[bool] = Scoped("torchq.simulate", _set_anywhere)
"""Whether this thread and task simulates."""


def is_watched() -> bool:
    """Whether this thread simulates, or torch's profiler would see other operations."""
    return torch.autograd.profiler._is_profiler_enabled or (anywhere and bool(simulating.get()))


@contextmanager
def simulate() -> Iterator[None]:
    """Inside, every QuantizedLinear computes in float on fake-quantized values: `dequantize(quantize(x)) · wᵀ + b`.

    It has the quantization error of int8, but not the speed. The integer path differs from it only by the float32
    rounding of the sums. (If a layer's output is requantized to u8, such a rounding can cross a tie and change a code
    by one.)

    It holds for its own thread and asyncio task: other threads go on in int8, also those that were started inside. A
    DataLoader's workers are processes; forked inside, they simulate as well.

    >>> import torch, torchq
    >>> layer = torchq.QuantizedLinear.from_float(torch.nn.Linear(8, 4))
    >>> x = torch.ones(2, 8)
    >>> with simulate():
    ...     expected = layer(x)
    >>> torch.allclose(layer(x), expected, atol=1e-6)
    True
    """
    with simulating.of(True):
        yield
