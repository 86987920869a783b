"""torchq.ops.attention in each scheme against torch's scaled_dot_product_attention in float32: time, and SQNR.

taskset -c 1 python -m benchmarks.attention
python -m benchmarks.attention --threads 2

q, k and v lie in memory as a model's view and transpose leave them; in decoding, keys and values as a cache has them.
The SQNR is against float64, of normal data. One thread is timed by its CPU time, so that other work disturbs less.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.demo import markdown
from benchmarks.timing import interleaved, machine
from torchq.numerics.metrics import sqnr_db
from torchq.ops import ATTENTION_SCHEMES, attention

# Batch, heads, rows, keys, head size.
SHAPES = [
    (1, 12, 128, 128, 64),
    (1, 12, 16, 16, 64),
    (1, 12, 32, 32, 64),
    (1, 12, 48, 48, 64),
    (1, 12, 64, 64, 64),
    (8, 12, 128, 128, 64),
    (16, 12, 64, 64, 32),
    (1, 12, 197, 197, 64),
    (1, 8, 1500, 1500, 64),
    (1, 12, 1, 512, 64),
    (1, 1, 2, 2, 64),  # hardly more than the call
]
TORCH = "torch"


def operands(batch: int, heads: int, rows: int, keys: int, size: int) -> list[Tensor]:
    """Random q, k and v."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, n, heads, size, generator=generator).transpose(1, 2) for n in (rows, keys, keys))
    return [q, k, v] if rows > 1 else [q, k.contiguous(), v.contiguous()]


def contestants(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Torch's own, and each scheme of torchq."""
    calls: dict[str, Callable[[], Tensor]] = {TORCH: lambda: scaled_dot_product_attention(q, k, v)}
    for scheme in ATTENTION_SCHEMES:
        calls[scheme] = lambda scheme=scheme: attention(q, k, v, scheme=scheme)  # type: ignore[misc]
    return calls


def row(shape: tuple[int, int, int, int, int]) -> list[str]:
    """The time of torch's, and of each scheme with its ratio and SQNR."""
    q, k, v = operands(*shape)
    exact = scaled_dot_product_attention(q.double(), k.double(), v.double())
    calls = contestants(q, k, v)
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times = interleaved(calls, rounds=25 if shape[2] < 1000 else 5, seconds=0.004, clock=clock)
    cells = [f"{times[TORCH] * 1e6:.0f}"]
    for scheme in ATTENTION_SCHEMES:
        error = sqnr_db(exact, calls[scheme]().double())
        cells.append(f"{times[scheme] * 1e6:.0f} ({times[TORCH] / times[scheme]:.2f}x, {error:.0f} dB)")
    return [", ".join(map(str, shape)), *cells]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    with torch.inference_mode():
        rows = [row(shape) for shape in SHAPES]
    print(markdown([["batch, heads, rows, keys, size", "torch, us", *ATTENTION_SCHEMES], *rows]))
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
