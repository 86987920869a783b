"""Whole transformers, as their users call them, against their peers: latency and the error of the output.

    taskset -c 0 python -m benchmarks.transformers                                   # one thread
    python -m benchmarks.transformers --threads 2 --json out.json --markdown out.md
    python -m benchmarks.transformers --cells BERT --contestants openvino torch.ao   # some, by their first letters

Models are built from their configs (benchmarks/transformer_models.py), and every engine runs through its best API
(benchmarks/transformer_peers.py). In a cell all contestants run in one process, interleaved, and each waits until the
one before burns no CPU any more. Times are the best of several rounds. Beside each stands the SQNR of the output
against float32; with `wrong`, where it is so low that torchq's speed is not compared with it. A contestant that can't
be built says why.

Engines get a minute or two to build each cell the first time. Graphs of peers are kept in build/transformers.
"""

import argparse
import gc
import json
import logging
import math
import statistics
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Generator, nn

from benchmarks.accuracy_peers import Task
from benchmarks.demo import markdown
from benchmarks.peers import Peer, Run, available, wrong
from benchmarks.roofline import Roofline
from benchmarks.timing import add_clock, interleaved, machine, settle
from benchmarks.transformer_models import CELLS, Cell
from benchmarks.transformer_peers import COMPILED, CONTESTANTS, OURS, USUAL
from torchq.numerics.metrics import sqnr_db

SEQUENCES = 16  # for calibration
TOKENS = 64  # a decoding model is calibrated on single tokens, and these are its fewest
MIN_SQNR_DB = 6.0  # below this it is a bug and not quantization
FLOAT, TORCH_AO = "torch float32", "torch.ao int8"


# ---- Measuring ------------------------------------------------------------------------------------------------------


def task_of(cell: Cell) -> tuple[Task, torch.Tensor]:
    """The model with its calibration batches, and the input to time."""
    torch.manual_seed(0)
    batches = (TOKENS if cell.kind == "decoding" else SEQUENCES) // cell.batch
    generator = Generator().manual_seed(1)
    calibration = [cell.sample(cell.batch, generator) for _ in range(batches)]
    return Task(cell.name, cell.model(), calibration, []), cell.sample(cell.batch, generator)


def measure(cell: Cell, peers: list[Peer], threads: int, rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Milliseconds and output SQNR of each contestant, and for those that failed the reason."""
    task, x = task_of(cell)
    runs: dict[str, Run] = {}
    errors, failed = {}, {}
    with torch.no_grad():
        exact = task.model(x)
    for peer in peers:
        try:
            with torch.no_grad():
                run = peer.make(task, x, threads)
            with torch.inference_mode():
                error = sqnr_db(exact, run().float())
            if not error > MIN_SQNR_DB:
                raise RuntimeError(f"output SQNR {error:.1f} dB, the answer is wrong")
        except Exception as problem:
            failed[peer.name] = f"{type(problem).__name__}: {' '.join(str(problem).split())[:200]}"
        else:
            runs[peer.name], errors[peer.name] = run, error
    with torch.inference_mode():
        times = interleaved(runs, rounds=rounds, seconds=0.1, before=settle, clock=clock)
    return {
        "cell": cell.name,
        "kind": cell.kind,
        "ms": {name: t * 1e3 for name, t in times.items()},
        "sqnr_db": errors,
        "wrong": wrong(errors, OURS) if OURS in errors else [],
        "failed": failed,
        "weights": weights_of(task.model),
    }


def weights_of(model: nn.Module) -> int:
    """The elements of all matrices that a token is multiplied with: the bytes to read for it in int8."""
    from transformers.pytorch_utils import Conv1D

    return sum(module.weight.numel() for module in model.modules() if isinstance(module, (nn.Linear, Conv1D)))


# ---- The tables -----------------------------------------------------------------------------------------------------


def fastest(result: dict[str, Any], contestant: str) -> str | None:
    """The setting of a contestant that is fastest in this cell, of those whose answers are right."""
    right = result["ms"].keys() - result["wrong"]
    names = [name for name in result["ms"] if name in right and name.partition(":")[0] == contestant]
    return min(names, key=lambda name: result["ms"][name], default=None)


def shown(result: dict[str, Any], name: str | None) -> str:
    """Milliseconds, and the SQNR in parentheses."""
    if name not in result["ms"]:
        return "-"
    return f"{result['ms'][name]:.2f} ({result['sqnr_db'][name]:.1f}{', wrong' if name in result['wrong'] else ''})"


def table(results: list[dict[str, Any]], peers: list[Peer]) -> str:
    """A row per cell, a column per contestant; then what could not be built, and what is wrong."""
    contestants = list(dict.fromkeys(peer.name.partition(":")[0] for peer in peers))
    header = ["ms (dB)"]
    for contestant in contestants:
        settings = sum(peer.name.startswith(f"{contestant}:") for peer in peers)
        header += [USUAL] if any(peer.name == USUAL for peer in peers) and USUAL.startswith(contestant) else []
        header += [f"{contestant}, best" if settings > 1 else contestant]
    rows = [header]
    for result in results:
        row = [result["cell"]]
        for name in header[1:]:
            chosen = name if name == USUAL else fastest(result, name.removesuffix(", best"))
            row.append(shown(result, chosen))
        rows.append(row)
    failures: dict[str, list[str]] = {}
    for result in results:
        for name, reason in result["failed"].items():
            failures.setdefault(f"{name}: {reason}", []).append(result["cell"])
    lines = [f"- {', '.join(cells)}: {failure}" for failure, cells in failures.items()]
    saturated = [f"- {result['cell']}: {name} {shown(result, name)}" for result in results for name in result["wrong"]]
    notes = [*(["", "Not built:", *lines] if lines else []), *(["", "Not compared:", *saturated] if saturated else [])]
    return "\n".join([markdown(rows), *notes])


def ratios(results: list[dict[str, Any]], ours: list[str], theirs: list[str]) -> dict[str, float]:
    """By cell: the time of the fastest of the contestants `theirs` over that of the fastest of `ours`."""
    found = {}
    for result in results:
        times = [
            [result["ms"][name] for name in (fastest(result, contestant) for contestant in side) if name]
            if side != [USUAL]
            else [result["ms"][name] for name in side if name in result["ms"] and name not in result["wrong"]]
            for side in (ours, theirs)
        ]
        if all(times):
            found[result["cell"]] = min(times[1]) / min(times[0])
    return found


def verdict(text: str, found: dict[str, float]) -> list[str]:
    """A line with the geometric mean, and the cells that are slower."""
    if not found:
        return []
    slower = [f"{cell} {ratio:.2f}x" for cell, ratio in found.items() if ratio < 1]
    mean, least = statistics.geometric_mean(found.values()), min(found.values())
    return [
        f"- {text}: geometric mean {mean:.2f}x, least {least:.2f}x, slower in {len(slower)} of {len(found)}"
        f"{': ' if slower else ''}{', '.join(slower)}"
    ]


def summary(results: list[dict[str, Any]], peers: list[Peer], bandwidth: float) -> str:
    """Torchq against each, over the encoders and over decoding; and where a peer's answer is nearer to float32."""
    encoders = [result for result in results if result["kind"] == "encoder"]
    decoding = [result for result in results if result["kind"] == "decoding"]
    lines = verdict(f"encoders, {OURS} over {USUAL}", ratios(encoders, [OURS], [USUAL]))
    lines += verdict(f"encoders, {OURS} over the best of openvino int8", ratios(encoders, [OURS], ["openvino int8"]))
    best = f"encoders, the better of {OURS} and {COMPILED}"
    lines += verdict(f"{best} over {USUAL}", ratios(encoders, [OURS, COMPILED], [USUAL]))
    others = [TORCH_AO, "onnxruntime int8"]
    lines += verdict(f"all, {OURS} over the best of {' and '.join(others)}", ratios(results, [OURS], others))
    lines += verdict(f"decoding, {OURS} over {TORCH_AO}", ratios(decoding, [OURS], [TORCH_AO]))
    for result in decoding:
        if OURS in result["ms"]:
            limit = result["weights"] / bandwidth * 1e3
            lines.append(
                f"- {result['cell']}: {result['ms'][OURS] / limit:.2f}x of reading {result['weights'] / 1e6:.0f} MB of "
                f"weights at {bandwidth / 1e9:.1f} GB/s, {limit:.2f} ms"
            )
    int8 = [peer.name for peer in peers if peer.int8 and peer.name not in (OURS, COMPILED)]
    for result in results:
        errors = result["sqnr_db"]
        nearer = [
            f"{name} {errors[name]:.1f} dB" for name in int8 if errors.get(name, -math.inf) >= errors.get(OURS, 0)
        ]
        if nearer and OURS in errors:
            lines.append(f"- {result['cell']}, not less exact than {OURS} ({errors[OURS]:.1f} dB): {', '.join(nearer)}")
    return "\n".join(lines)


def versions() -> str:
    """Of the packages that the contestants come from."""
    found = []
    for package in ("transformers", "openvino", "nncf", "onnxruntime", "onnx", "onnxscript"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def parser_of(text: str | None, cells: Sequence[Cell]) -> argparse.ArgumentParser:
    """The arguments that benchmarks of cells have in common."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", metavar="PREFIX", help=f"of {', '.join(cell.name for cell in cells)}")
    parser.add_argument("--contestants", nargs="+", metavar="PREFIX", help=f"only these and {OURS}")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    add_clock(parser)
    return parser


def begin(
    arguments: argparse.Namespace, cells: Sequence[Cell], contestants: Sequence[Peer]
) -> tuple[list[Cell], list[Peer]]:
    """Sets threads and silence. Returns the cells and the contestants asked for, and prints which are not installed."""
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore")  # the exporters of peers warn about much
    logging.disable(logging.WARNING)
    wanted = ("torchq", *arguments.contestants) if arguments.contestants else ("",)
    peers, skipped = available([peer for peer in contestants if peer.name.startswith(wanted)])
    print("\n".join(skipped), end="\n" if skipped else "")
    return [cell for cell in cells if cell.name.startswith(tuple(arguments.cells or [""]))], peers


def main() -> None:
    """Measures the cells and prints the table."""
    parser = parser_of(__doc__, CELLS)
    parser.add_argument("--json", type=Path, help="write every figure here")
    parser.add_argument("--markdown", type=Path, help="write the table here as well")
    arguments = parser.parse_args()
    cells, peers = begin(arguments, CELLS, CONTESTANTS)
    results = []
    for cell in cells:
        results.append(measure(cell, peers, arguments.threads, arguments.rounds, arguments.clock))
        gc.collect()
        print(f"{cell.name}: {'; '.join(f'{n} {shown(results[-1], n)}' for n in results[-1]['ms'])}", flush=True)
    bandwidth = Roofline().bandwidth(256 << 20)
    text = "\n\n".join([table(results, peers), summary(results, peers, bandwidth), f"{machine()}, {versions()}."])
    print("\n" + text)
    if arguments.json:
        found = {"machine": machine(), "versions": versions(), "bandwidth": bandwidth, "results": results}
        arguments.json.write_text(json.dumps(found, indent=1))
    if arguments.markdown:
        arguments.markdown.write_text(text + "\n")


if __name__ == "__main__":
    main()
