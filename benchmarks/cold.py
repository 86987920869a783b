"""What cold weights cost: many different layers called in turn, against one layer called again and again.

    taskset -c 0 python -m benchmarks.cold
    python -m benchmarks.cold --threads 2 --rows 16 --layers 3072x768

A model of BERT's size reads 85 MB of int8 weights in a forward, which no cache holds. Benchmarks of one layer keep its
weights in cache. Here 85 MB of layers of one shape are called in turn (cold), and one of them as many times (warm).
The last columns are what a layer takes at least: reading its weights at the memory's measured bandwidth, and its
products at the measured peak. Where the two overlap, a cold layer takes the longer of them.
"""

import argparse
from pathlib import Path

import torch
from torch import nn

import torchq
from benchmarks.demo import markdown
from benchmarks.roofline import Roofline
from benchmarks.timing import interleaved, machine

SHAPES = [(768, 768), (3072, 768), (768, 3072)]
BYTES = 85e6  # of the weights in turn
ROWS = (1, 2, 4, 8, 16, 32, 128)


def measure(n: int, k: int, rows: list[int], rounds: int) -> dict[int, tuple[float, float]]:
    """By row count: the seconds of a cold and of a warm layer."""
    torch.manual_seed(0)
    template = torchq.QuantizedLinear.from_float(nn.Linear(k, n))
    layers = [torchq.QuantizedLinear.from_float(nn.Linear(k, n)) for _ in range(round(BYTES / (n * k)))]
    found = {}
    for m in rows:
        x = torch.randn(m, k)

        def cold(x: torch.Tensor = x) -> None:
            for layer in layers:
                layer(x)

        def warm(x: torch.Tensor = x) -> None:
            for _ in layers:
                template(x)

        times = interleaved({"cold": cold, "warm": warm}, rounds=rounds)
        found[m] = times["cold"] / len(layers), times["warm"] / len(layers)
    return found


def shape_of(text: str) -> tuple[int, int]:
    """An argument such as 3072x768: N and K."""
    n, k = map(int, text.split("x"))
    return n, k


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", type=shape_of, metavar="NxK", default=SHAPES)
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--markdown", type=Path, help="write the table here as well")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    roofline = Roofline()
    peak, bandwidth = roofline.peak(torchq.kernels.active()) * arguments.threads, roofline.bandwidth(256 << 20)
    rows = [["M x N x K", "cold", "warm", "cold over warm", "reading", "products"]]
    with torch.inference_mode():
        for n, k in arguments.layers:
            for m, (cold, warm) in measure(n, k, arguments.rows, arguments.rounds).items():
                limits = [n * k / bandwidth, 2 * m * n * k / peak]
                cells = [f"{1e6 * t:.1f} us" for t in (cold, warm)] + [f"{cold / warm:.2f}"]
                rows.append([f"{m}x{n}x{k}", *cells, *(f"{1e6 * t:.1f} us" for t in limits)])
    text = f"{markdown(rows)}\n\n{machine()}; memory {bandwidth / 1e9:.1f} GB/s, peak {peak / 1e9:.0f} Gop/s."
    print(text)
    if arguments.markdown:
        arguments.markdown.write_text(text + "\n")


if __name__ == "__main__":
    main()
