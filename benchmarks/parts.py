"""What stands around the products of a model, against torch's own; and a layer's settings against each other.

taskset -c 0 python -m benchmarks.parts

The first table has LayerNorm; rows into codes, beside their least and largest values by torch's `aminmax` and by `amin`
and `amax`; look-ups in a table of 30522 x 768 with residuals and without (`embeddings="int8"`); and an attention whose
weights nobody reads. The second has layers whose input has a range for each row, the same smoothed, static layers, and
layers with two codes for each value. CPU time of one thread.
"""

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from benchmarks.demo import markdown
from benchmarks.timing import interleaved, machine
from torchq import QuantizedLinear, convert, ops
from torchq.modules.embedding import QuantizedEmbedding
from torchq.modules.fine_linear import FineLinear
from torchq.numerics.qparams import QParams

Calls = dict[str, Callable[[], object]]
LAYERS = [(768, 768), (3072, 768), (768, 3072)]


def norm(rows: int, width: int) -> Calls:
    """nn.LayerNorm as it is, and in a converted model."""
    x, exact = torch.randn(rows, width), nn.LayerNorm(width)
    int8 = convert(nn.Sequential(nn.Linear(width, width), exact))[1]
    return {"torch": lambda: exact(x), "torchq": lambda: int8(x)}


def codes(rows: int, width: int) -> Calls:
    """A scale, a zero point and codes for each row; torch has only the first step of it."""
    x = torch.randn(rows, width)
    extremes = {"torch": lambda: x.aminmax(dim=1), "torchq": lambda: ops.quantize_per_token(x)}
    return {**extremes, "amin and amax": lambda: (x.amin(1), x.amax(1))}


def look_up(rows: int) -> Calls:
    """The first rows of a table, which stay in cache."""
    table, ids = nn.Embedding(30522, 768), torch.arange(rows)
    fine, plain = (QuantizedEmbedding.from_float(table, finely=finely) for finely in (True, False))
    return {"torch": lambda: table(ids), "torchq": lambda: fine(ids), '"int8"': lambda: plain(ids)}


def attention(tokens: int) -> Calls:
    """Called as most callers do, who drop the weights that it returns; and with the weights read."""
    exact = nn.MultiheadAttention(512, 8, batch_first=True).eval()
    int8, x = convert(nn.Sequential(exact))[0], torch.randn(1, tokens, 512)
    calls = {"torch": lambda: exact(x, x, x), "torchq": lambda: int8(x, x, x)}
    return {**calls, "torchq, read": lambda: int8(x, x, x)[1].sum()}


def parts() -> Iterator[tuple[str, Calls]]:
    """The rows of the first table."""
    for rows, width in ((16, 768), (128, 768), (1024, 384)):
        yield f"LayerNorm, {rows} x {width}", norm(rows, width)
    for rows, width in ((128, 768), (1024, 384)):
        yield f"rows into codes, {rows} x {width}", codes(rows, width)
    for rows in (1, 16, 128):
        yield f"look-up, {rows} rows", look_up(rows)
    yield "nn.MultiheadAttention, 512 tokens of 512", attention(512)


def settings(m: int, n: int, k: int) -> Calls:
    """The calls of a layer in each setting."""
    linear, x = nn.Linear(k, n), torch.randn(m, k)
    layers: dict[str, Callable[[Tensor], Tensor]] = {
        "a range for each row": QuantizedLinear.from_float(linear),
        "smoothed": QuantizedLinear.from_float(linear, channel_scale=torch.ones(k)),
        "static": QuantizedLinear.from_float(linear, input_qparams=QParams(1 / 32, 128)),
        "two codes": FineLinear.adopt(QuantizedLinear.from_float(linear)),
    }
    return {name: lambda layer=layer: layer(x) for name, layer in layers.items()}  # type: ignore[misc]


def timed(calls: Calls) -> list[str]:
    """The first one's microseconds, and each other's with its ratio to that."""
    seconds = list(interleaved(calls, rounds=25, seconds=0.005, clock=time.thread_time).values())
    return [f"{seconds[0] * 1e6:.1f}", *(f"{s * 1e6:.1f} ({s / seconds[0]:.3f})" for s in seconds[1:])]


def main() -> None:
    """Prints both tables."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.inference_mode():
        rows = [["us", "torch", "torchq", "another way"]]
        for name, calls in parts():
            cells = timed(calls)
            rows.append([name, *cells[:2], f"{list(calls)[2]}: {cells[2]}" if len(cells) > 2 else "-"])
        print(markdown(rows), "\n")
        shapes = [(m, n, k) for n, k in LAYERS for m in (1, 16, 128)]
        found = [["x".join(map(str, shape)), *timed(settings(*shape))] for shape in shapes]
        print(markdown([["M x N x K, us", *settings(1, 1, 1)], *found]))
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
