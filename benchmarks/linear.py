"""One linear layer as a user calls it, against its peers: latency by shape, answers checked, peers interleaved.

    python -m benchmarks.linear                              # a few shapes
    taskset -c 0 python -m benchmarks.linear --grid full     # the whole grid, one thread pinned
    python -m benchmarks.linear --json out.json --plot out.png

torchq is `QuantizedLinear` on a float tensor: dynamic per-token scheme, with bias. Every peer runs through its best API
(benchmarks/peers.py). Times are the best of interleaved rounds. Each answer is first compared with float. Peers whose
answers are wrong are listed in a table of their own, and torchq's speed is not compared with theirs.
"""

import argparse
import json
import math
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import torchq
from benchmarks.demo import markdown
from benchmarks.peers import PEERS, Peer, available, wrong
from benchmarks.roofline import Roofline
from benchmarks.timing import add_clock, interleaved, machine, settle
from torchq.numerics.metrics import sqnr_db

LAYERS = [(768, 768), (3072, 768), (768, 3072), (1024, 1024), (4096, 1024), (4096, 4096), (11008, 4096), (64, 64)]
LAYERS += [(1000, 2048), (127, 515)]
GRIDS = {
    "quick": [(m, n, k) for n, k in [(768, 768), (4096, 1024)] for m in (1, 16, 128)]
    + [(1, 4096, 4096), (512, 4096, 4096)],
    "full": [(m, n, k) for n, k in LAYERS for m in (1, 2, 4, 8, 16, 32, 64, 128, 512, 1024)],
}
MIN_SQNR_DB = 20.0  # below this it is a bug and not quantization: 8 bits give about 40 dB on normal data


def measure(
    shape: tuple[int, int, int], peers: list[Peer], threads: int, rounds: int, clock: Callable[[], float]
) -> dict[str, Any]:
    """Microseconds and output SQNR of each contestant at (M, N, K)."""
    m, n, k = shape
    torch.manual_seed(0)
    linear, x = nn.Linear(k, n), torch.randn(m, k)
    exact = linear(x)
    runs, errors = {}, {}
    for peer in peers:
        run = peer.make(linear, x, threads)
        errors[peer.name] = sqnr_db(exact, run().float())
        runs[peer.name] = run
    if errors["torchq"] < MIN_SQNR_DB:
        raise RuntimeError(f"torchq at {shape}: output SQNR {errors['torchq']:.1f} dB, the answer is wrong")
    times = interleaved(runs, rounds=rounds, before=settle if threads > 1 else lambda: None, clock=clock)
    us = {name: t * 1e6 for name, t in times.items()}
    return {"shape": shape, "us": us, "sqnr_db": errors, "wrong": wrong(errors, "torchq")}


def limit(shape: tuple[int, int, int], machine_limits: dict[str, Any], roofline: Roofline, threads: int) -> float:
    """A lower bound on the microseconds of a call: allocating the output, plus multiplying or reading the weights.

    Of the last two, the slower one counts. Multiplying is bounded by the measured peak on registers, and reading by the
    measured bandwidth of the nearest cache that holds a thread's share of the weights.
    """
    m, n, k = shape
    multiply = 2 * m * n * k / machine_limits["peak"]
    read = n * k / (threads * roofline.bandwidth(n * k // threads))
    return float(1e6 * (machine_limits["new_tensor"] + max(multiply, read)))


def best(result: dict[str, Any], names: list[str]) -> tuple[str, float]:
    """The fastest of these contestants whose answer is right, and its time in microseconds."""
    times: dict[str, float] = result["us"]
    name = min((name for name in names if name not in result["wrong"]), key=lambda candidate: times[candidate])
    return name, times[name]


def table(results: list[dict[str, Any]], peers: list[Peer]) -> str:
    """A row per shape: torchq, the best int8 peer and the best float32 of all, and torchq's speed-up over each.

    Further columns: the limit, the share of it that torchq reaches, and the largest possible speed-up over the peer.
    """
    int8 = [peer.name for peer in peers if peer.int8 and peer.name != "torchq"]
    float32 = [peer.name for peer in peers if not peer.int8 and "float32" in peer.name]
    header = ["M x N x K", "torchq", "best int8 peer", "x", "best float32", "x", "torch float32", "x"]
    rows = [[*header, "limit", "reached", "x at limit"]]
    for result in results:
        ours = result["us"]["torchq"]
        row = ["x".join(map(str, result["shape"])), f"{ours:.1f} us"]
        for name, time in (best(result, int8), best(result, float32)):
            row += [f"{name}, {time:.1f} us", f"{time / ours:.2f}"]
        torch_time = result["us"]["torch float32"]
        bound = result["limit_us"]
        row += [f"{torch_time:.1f} us", f"{torch_time / ours:.2f}"]
        rows.append([*row, f"{bound:.1f} us", f"{bound / ours:.0%}", f"{best(result, int8)[1] / bound:.2f}"])
    return "\n\n".join([markdown(rows), summary(results, int8), *wrong_answers(results)])


def wrong_answers(results: list[dict[str, Any]]) -> list[str]:
    """A table of the contestants that were wrong somewhere: their times, and there the SQNR."""
    names = [name for name in results[0]["us"] if any(name in result["wrong"] for result in results)]
    if not names:
        return []
    rows = [["M x N x K", *names]]
    for result in results:
        cells = [
            f"{result['us'][name]:.1f} us" + (f", {result['sqnr_db'][name]:.1f} dB" if name in result["wrong"] else "")
            for name in names
        ]
        rows.append(["x".join(map(str, result["shape"])), *cells])
    return ["Where an SQNR stands beside the time the answer is wrong, and not compared:", markdown(rows)]


def summary(results: list[dict[str, Any]], int8: list[str]) -> str:
    """Torchq against the best int8 peer of each shape, and the speed-up that the machine's limits would allow."""
    peer = [best(result, int8)[1] for result in results]
    ratios = [time / result["us"]["torchq"] for time, result in zip(peer, results, strict=True)]
    ceilings = [time / result["limit_us"] for time, result in zip(peer, results, strict=True)]
    return (
        f"Against the best int8 peer of each shape: geometric mean {statistics.geometric_mean(ratios):.2f}x, least "
        f"{min(ratios):.2f}x, slower at {sum(ratio < 1 for ratio in ratios)} of {len(ratios)} shapes, below 1.05x at "
        f"{sum(ratio < 1.05 for ratio in ratios)}. At the machine's limits it would be "
        f"{statistics.geometric_mean(ceilings):.2f}x, least {min(ceilings):.2f}x."
    )


def plot(results: list[dict[str, Any]], limits: dict[str, Any], path: Path) -> None:
    """Roofline plot: operations per second over operations per byte of weight, for torchq and the best int8 peer."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 6))
    for label, names, marker in (("torchq", ["torchq"], "o"), ("best int8 peer", limits["int8_peers"], "x")):
        ops = [2 * math.prod(r["shape"]) for r in results]
        rate = [o / best(r, names)[1] / 1e3 for o, r in zip(ops, results, strict=True)]
        axes.scatter([2 * r["shape"][0] for r in results], rate, label=label, marker=marker, alpha=0.7)
    intensity = [2.0 * 2**i for i in range(11)]
    peak = limits["peak"] / 1e9
    axes.plot(intensity, [peak] * len(intensity), "k-", label=f"peak {peak:.0f} Gop/s")
    for name, bandwidth in limits["bandwidth"].items():
        roof = [min(peak, i * bandwidth / 1e9) for i in intensity]
        axes.plot(intensity, roof, "--", alpha=0.5, label=f"{name} {bandwidth / 1e9:.0f} GB/s")
    axes.set(xscale="log", yscale="log", xlabel="operations per byte of weight (2 M)", ylabel="Gop/s")
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def limits(peers: list[Peer], roofline: Roofline, threads: int) -> dict[str, Any]:
    """The machine's limits, measured in this run for one thread and multiplied by the number of threads."""
    sizes = {"L2": 512 << 10, "L3": 8 << 20, "memory": 256 << 20}
    return {
        "peak": roofline.peak(torchq.kernels.active()) * threads,
        "bandwidth": {
            name: roofline.bandwidth(size) * (threads if name == "L2" else 1) for name, size in sizes.items()
        },
        "new_tensor": interleaved({"empty": lambda: torch.empty(1, 1)})["empty"],
        "int8_peers": [peer.name for peer in peers if peer.int8 and peer.name != "torchq"],
    }


def main() -> None:
    """Measures the grid and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", choices=GRIDS, default="quick")
    parser.add_argument("--layers", nargs="+", metavar="NxK", help="only these of the grid")
    parser.add_argument("--contestants", nargs="+", metavar="PREFIX", help="only these, torchq and torch float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    add_clock(parser)
    parser.add_argument("--json", type=Path, help="write every figure here")
    parser.add_argument("--markdown", type=Path, help="write the table here as well")
    parser.add_argument("--plot", type=Path, help="write a roofline plot here (needs matplotlib)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", category=UserWarning)  # the peers warn about caching and deprecation

    wanted = ("torchq", "torch float32", *arguments.contestants) if arguments.contestants else ("",)
    peers, skipped = available([peer for peer in PEERS if peer.name.startswith(wanted)])
    print("\n".join(skipped), end="\n" if skipped else "")
    roofline = Roofline()
    roof = limits(peers, roofline, arguments.threads)
    results = []
    with torch.inference_mode():
        for shape in GRIDS[arguments.grid]:
            if arguments.layers and f"{shape[1]}x{shape[2]}" not in arguments.layers:
                continue
            results.append(measure(shape, peers, arguments.threads, arguments.rounds, arguments.clock))
            results[-1]["limit_us"] = limit(shape, roof, roofline, arguments.threads)
            name, time = best(results[-1], roof["int8_peers"])
            print(
                f"{shape}: torchq {results[-1]['us']['torchq']:.1f} us, best int8 peer {name} {time:.1f} us", flush=True
            )
    bandwidth = ", ".join(f"{name} {value / 1e9:.0f} GB/s" for name, value in roof["bandwidth"].items())
    text = f"{table(results, peers)}\n\n{machine()}; peak {roof['peak'] / 1e9:.0f} Gop/s, {bandwidth}."
    print("\n" + text)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "limits": roof, "results": results}, indent=1))
    if arguments.markdown:
        arguments.markdown.write_text(text + "\n")
    if arguments.plot:
        plot(results, roof, arguments.plot)


if __name__ == "__main__":
    main()
