"""How torchq's costs grow: with rows and columns, with size, with threads, and with the model that is converted.

    taskset -c 0 python -m benchmarks.scaling tails growth   # one thread, pinned
    python -m benchmarks.scaling threads                     # needs two idle cores
    taskset -c 0 python -m benchmarks.scaling convert --rounds 3

* tails: one more row or column should cost about its share. A step is time(n + 1) / time(n). More than 1.25 is a cliff,
  unless the number of rows, or of panels of 16 columns, itself grows by more.
* growth: time / (M N K) at M = N = K should be constant.
* threads: two should never be slower than one (unless another process uses the second core).
* convert: packing, conversion, and its peak memory, in fresh processes, for few large layers and for many small ones.

Times are the best of interleaved rounds, of `QuantizedLinear` on a float tensor: dynamic per-token scheme, with bias.
"""

import argparse
import itertools
import math
import multiprocessing
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import torchq
from benchmarks.demo import markdown
from benchmarks.timing import interleaved, machine
from torchq import kernels, ops
from torchq.modules.quantized_linear import QuantizedLinear

Shape = tuple[int, int, int]  # M, N, K
PARTS = ("tails", "growth", "threads", "convert")
PANEL, ALLOWED_STEP = 16, 1.25  # columns per panel; the last panel is padded
ROW_LAYERS = [(768, 768), (1024, 1024)]
COLUMNS = [(16, n, 768) for n in (*range(1, 201), *range(250, 261), *range(500, 521))]
THREAD_LAYERS = [(768, 768), (4096, 1024), (4096, 4096)]
THREAD_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
WIDTH, HIDDEN, BLOCKS = 2048, 8192, 3  # the few large layers: 100.7 million weights
ENCODER_WIDTH, HEADS, ENCODER_BLOCKS = 768, 12, 12  # the many small layers, of a transformer: 85.5 million
LOADER = (4, 64)  # batches, rows per batch


def layer_call(shape: Shape, layers: dict[tuple[int, int], QuantizedLinear]) -> Callable[[], object]:
    """A call of a layer at (M, N, K). Shapes with the same (N, K) share one layer, so that caches hold one weight."""
    m, n, k = shape
    if (n, k) not in layers:
        layers[n, k] = QuantizedLinear.from_float(nn.Linear(k, n))
    return partial(layers[n, k], torch.randn(m, k))


def measure(shapes: Iterable[Shape], rounds: int, seconds: float) -> dict[Shape, float]:
    """The seconds of one call at each shape, interleaved."""
    layers: dict[tuple[int, int], QuantizedLinear] = {}
    by_name = {str(shape): shape for shape in shapes}
    calls = {name: layer_call(shape, layers) for name, shape in by_name.items()}
    return {by_name[name]: t for name, t in interleaved(calls, rounds=rounds, seconds=seconds).items()}


def picoseconds(shape: Shape, seconds: float) -> float:
    """Picoseconds per multiply-add of the unpadded problem."""
    return seconds / math.prod(shape) * 1e12


class Sweep(NamedTuple):
    """Times along one dimension of the problem: axis 0 is M, 1 is N."""

    name: str
    axis: int
    times: dict[Shape, float]

    def steps(self) -> list[tuple[Shape, Shape]]:
        """The pairs of shapes that differ by one row, or one column."""
        pairs = itertools.pairwise(sorted(self.times))
        return [(a, b) for a, b in pairs if b[self.axis] == a[self.axis] + 1]

    def allowed(self, before: Shape, after: Shape) -> float:
        """The largest ratio allowed for this step: 1.25, or the growth of the padded work if that is more."""
        unit = PANEL if self.axis == 1 else 1
        return max(ALLOWED_STEP, math.ceil(after[self.axis] / unit) / math.ceil(before[self.axis] / unit))


def row_sizes(tile_rows: int) -> list[int]:
    """M = 1..33, and the neighbours of each multiple of the tile's rows up to 130."""
    near = {multiple + d for multiple in range(tile_rows, 131, tile_rows) for d in (-1, 0, 1)}
    return sorted({*range(1, 34), *near} - {0})


def tails(rounds: int) -> list[Sweep]:
    """The sweeps over M and over N."""
    sizes = row_sizes(kernels.tile(kernels.active())[0])
    sweeps = [
        Sweep(f"M at N = {n}, K = {k}", 0, measure([(m, n, k) for m in sizes], rounds, 0.004)) for n, k in ROW_LAYERS
    ]
    return [*sweeps, Sweep("N at M = 16, K = 768", 1, measure(COLUMNS, rounds, 0.004))]


def tails_table(sweeps: list[Sweep], rounds: int, worst: int = 4) -> str:
    """The worst steps of each sweep, each timed again as a pair, which other work on the machine disturbs less."""
    rows = [["sweep", "step", "us", "ps per multiply-add", "ratio", "allowed", ""]]
    for sweep in sweeps:
        excess = {(a, b): sweep.times[b] / sweep.times[a] / sweep.allowed(a, b) for a, b in sweep.steps()}
        for a, b in sorted(excess, key=lambda pair: -excess[pair])[:worst]:
            again = measure([a, b], 3 * rounds, 0.01)
            ratio, limit = again[b] / again[a], sweep.allowed(a, b)
            cells = [f"{a[sweep.axis]} -> {b[sweep.axis]}", f"{again[a] * 1e6:.1f} -> {again[b] * 1e6:.1f}"]
            cells += [f"{picoseconds(a, again[a]):.2f} -> {picoseconds(b, again[b]):.2f}", f"{ratio:.2f}"]
            rows.append([sweep.name, *cells, f"{limit:.2f}", "CLIFF" if ratio > limit else "ok"])
    return markdown(rows)


def tails_profile(sweeps: list[Sweep]) -> str:
    """Time per multiply-add at a few sizes of each sweep."""
    sizes = (1, 2, 4, 6, 7, 8, 16, 17, 32, 33, 64, 65, 128, 129)
    rows = [["ps per multiply-add", *map(str, sizes)]]
    for sweep in sweeps:
        cost = {shape[sweep.axis]: picoseconds(shape, t) for shape, t in sweep.times.items()}
        rows.append([sweep.name, *(f"{cost[size]:.2f}" if size in cost else "-" for size in sizes)])
    return markdown(rows)


def plot(sweeps: list[Sweep], path: Path) -> None:
    """Microseconds, and picoseconds per multiply-add, along each sweep."""
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(len(sweeps), 2, figsize=(12, 4 * len(sweeps)), squeeze=False)
    for sweep, (left, right) in zip(sweeps, grid, strict=True):
        shapes = sorted(sweep.times)
        sizes = [shape[sweep.axis] for shape in shapes]
        left.plot(sizes, [sweep.times[shape] * 1e6 for shape in shapes], ".-")
        right.plot(sizes, [picoseconds(shape, sweep.times[shape]) for shape in shapes], ".-")
        left.set(xlabel=sweep.name, ylabel="us")
        right.set(xlabel=sweep.name, ylabel="ps per multiply-add", yscale="log")
    figure.savefig(path, dpi=120, bbox_inches="tight")


def growth_table(rounds: int, *, full: bool) -> str:
    """Time per multiply-add at M = N = K."""
    sizes = [64 << i for i in range(8 if full else 7)]
    times = measure([(size, size, size) for size in sizes], rounds, 0.02)
    costs = {shape: picoseconds(shape, t) for shape, t in times.items()}
    rows = [["M = N = K", "time", "Gop/s", "ps per multiply-add", "over the least"]]
    for shape, cost in costs.items():
        cells = [f"{times[shape] * 1e6:.1f} us", f"{2e3 / cost:.0f}", f"{cost:.2f}"]
        rows.append([str(shape[0]), *cells, f"{cost / min(costs.values()):.2f}"])
    return markdown(rows)


def wait_for_idle(seconds: float = 2.0) -> None:
    """Waits until all cores have been idle for a tenth of a second, or for `seconds` at most."""
    deadline = time.perf_counter() + seconds
    busy = math.inf
    while busy > 0.1 and time.perf_counter() < deadline:
        before = [int(field) for field in Path("/proc/stat").read_text().split()[1:9]]
        time.sleep(0.1)
        after = [int(field) for field in Path("/proc/stat").read_text().split()[1:9]]
        spent = [b - a for a, b in zip(before, after, strict=True)]
        busy = 1 - (spent[3] + spent[4]) / max(1, sum(spent))


def threads_table(rounds: int) -> str:
    """One thread's time and the speed-up of two, thread counts interleaved."""
    rows = [["N x K", *(f"M = {m}" for m in THREAD_ROWS)]]
    slower = []
    for n, k in THREAD_LAYERS:
        layers: dict[tuple[int, int], QuantizedLinear] = {}
        calls = {str(m): layer_call((m, n, k), layers) for m in THREAD_ROWS}
        best = {threads: dict.fromkeys(calls, math.inf) for threads in (1, 2)}
        for _ in range(rounds):
            wait_for_idle()
            for threads, times in best.items():
                torch.set_num_threads(threads)
                latest = interleaved(calls, rounds=1, seconds=0.005)
                times.update({m: min(t, latest[m]) for m, t in times.items()})
        ratios = {m: best[1][m] / best[2][m] for m in calls}
        slower += [f"{m}x{n}x{k}" for m, ratio in ratios.items() if ratio < 0.97]  # 3 % is noise
        rows.append([f"{n} x {k}", *(f"{best[1][m] * 1e6:.0f} us, {ratio:.2f}x" for m, ratio in ratios.items())])
    return f"{markdown(rows)}\n\nSlower with two threads: {', '.join(slower) or 'none'}."


class EncoderBlock(nn.Module):
    """A block of a transformer, with a layer each for query, key and value."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(rows, width), one sequence."""
        y = self.norm(x)
        heads = (layer(y).unflatten(1, (HEADS, -1)).transpose(0, 1) for layer in (self.query, self.key, self.value))
        x = x + self.out(nn.functional.scaled_dot_product_attention(*heads).transpose(0, 1).flatten(1))
        return x + self.mlp(self.mlp_norm(x))  # type: ignore[no-any-return]


def large_layers() -> nn.Sequential:
    """Six layers of 64 MiB."""
    blocks = [nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, WIDTH)) for _ in range(BLOCKS)]
    return nn.Sequential(*blocks)


def transformer() -> nn.Sequential:
    """73 layers of 2 and 9 MiB."""
    blocks = [EncoderBlock(ENCODER_WIDTH) for _ in range(ENCODER_BLOCKS)]
    return nn.Sequential(*blocks, nn.Linear(ENCODER_WIDTH, ENCODER_WIDTH))


MODELS: dict[str, tuple[Callable[[], nn.Sequential], int]] = {  # the model, and the columns of its input
    "6 large layers": (large_layers, WIDTH),
    "transformer": (transformer, ENCODER_WIDTH),
}


class Conversion(NamedTuple):
    """One conversion in its own process: seconds, and bytes beyond those of the process without a model."""

    seconds: float
    forward_seconds: float  # of the float model, over the same loader
    before: int
    peak: int
    after: int
    weights: int
    largest: int  # bytes of the largest layer's weights


def resident(field: str) -> int:
    """Memory of this process in bytes: VmRSS, the present size, or VmHWM, the peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


@torch.no_grad()
def convert_once(threads: int, *, name: str, loader: bool, inplace: bool) -> Conversion:
    """Converts one of MODELS, after a small model, so that all libraries are loaded."""
    torch.set_num_threads(threads)
    torchq.convert(nn.Sequential(nn.Linear(64, 64)), [torch.randn(64, 64)] if loader else None)
    make, columns = MODELS[name]
    batches = [torch.randn(LOADER[1], columns) for _ in range(LOADER[0])] if loader else None
    empty = resident("VmRSS")
    model = make()
    weights = [layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear)]
    start = time.perf_counter()
    for batch in batches or []:
        model(batch)
    forward_seconds = time.perf_counter() - start
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS (man 5 proc)
    start = time.perf_counter()
    converted = torchq.convert(model, batches, inplace=inplace)
    seconds, peak = time.perf_counter() - start, resident("VmHWM")
    del model
    after = resident("VmRSS")
    del converted
    sizes = before - empty, peak - empty, after - empty
    return Conversion(seconds, forward_seconds, *sizes, sum(weights), max(weights))


def convert_table(rounds: int) -> str:
    """Seconds, and memory as a multiple of the float model's bytes: the best of `rounds` fresh processes."""
    cases = list(itertools.product(MODELS, (False, True), (False, True)))
    runs: dict[tuple[str, bool, bool], list[Conversion]] = {case: [] for case in cases}
    for _ in range(rounds):
        for (name, loader, inplace), results in runs.items():
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                threads = torch.get_num_threads()
                results.append(pool.submit(convert_once, threads, name=name, loader=loader, inplace=inplace).result())
    rows = [["model", "loader", "inplace", "convert", "ns per weight", "float forward", "before", "peak", "after"]]
    rows[0] += ["extra", "extra layers"]
    for (name, loader, inplace), results in runs.items():
        seconds, weights = min(r.seconds for r in results), results[0].weights
        peak, before = min(r.peak for r in results), min(r.before for r in results)
        rows.append(
            [name, f"{LOADER[0]} x {LOADER[1]} rows" if loader else "none", str(inplace), f"{seconds:.2f} s"]
            + [f"{seconds / weights * 1e9:.1f}", f"{min(r.forward_seconds for r in results):.2f} s"]
            + [f"{size / (4 * weights):.2f}x" for size in (before, peak, min(r.after for r in results))]
            + [f"{(peak - before) >> 20} MiB", f"{(peak - before) / (4 * results[0].largest):.2f}"]
        )
    note = (
        f"{len(runs)} fresh processes a round; before, peak and after are resident bytes over the float model's "
        "(after: with the float model released), extra is peak - before, and that over the largest layer in float."
    )
    return f"{markdown(rows)}\n\n{note}"


def pack_table(rounds: int) -> str:
    """The time of ops.pack per byte of int8 weight, against a plain copy of these bytes."""
    rows = [["N x K", "pack", "ns per byte", "GB/s", "clone() of the same"]]
    for n, k in [(768, 768), (4096, 1024), (4096, 4096), (HIDDEN, WIDTH), (WIDTH, HIDDEN), (1000, 515)]:
        weight, scale = torch.randint(-128, 128, (n, k), dtype=torch.int8), torch.ones(n)
        times = interleaved({"pack": partial(ops.pack, weight, scale), "clone": weight.clone}, rounds=rounds)
        cost = times["pack"] / weight.numel() * 1e9
        clone = f"{times['clone'] / weight.numel() * 1e9:.3f} ns per byte"
        rows.append([f"{n} x {k}", f"{times['pack'] * 1e3:.2f} ms", f"{cost:.3f}", f"{1 / cost:.1f}", clone])
    return markdown(rows)


def main() -> None:
    """Measures the parts asked for and prints their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1, help="of tails, growth and convert")
    parser.add_argument("--full", action="store_true", help="growth: up to 8192")
    parser.add_argument("--plot", type=Path, help="tails: write the sweeps here (needs matplotlib)")
    arguments = parser.parse_args()
    parts, rounds = arguments.parts or PARTS, arguments.rounds
    if not set(parts) <= set(PARTS):
        parser.error(f"expected parts of {', '.join(PARTS)}, got {', '.join(parts)}")
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)

    with torch.inference_mode():
        if "tails" in parts:
            sweeps = tails(rounds)
            print(f"## Tails\n\n{tails_profile(sweeps)}\n\n{tails_table(sweeps, rounds)}\n", flush=True)
            if arguments.plot:
                plot(sweeps, arguments.plot)
        if "growth" in parts:
            print(f"## Growth\n\n{growth_table(rounds, full=arguments.full)}\n", flush=True)
        if "threads" in parts:
            print(f"## Threads\n\n{threads_table(rounds)}\n", flush=True)
            torch.set_num_threads(arguments.threads)
        if "convert" in parts:
            print(f"## Packing\n\n{pack_table(rounds)}\n", flush=True)
    if "convert" in parts:  # outside inference_mode, as a user would convert
        print(f"## Convert\n\n{convert_table(rounds)}\n", flush=True)
    print(f"{machine()}. Best of {rounds} interleaved rounds.")


if __name__ == "__main__":
    main()
