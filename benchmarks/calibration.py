"""What calibration costs: CPU time of `convert` for a transformer of 100 M parameters, against float forward passes.

    taskset -c 0 python -m benchmarks.calibration                # rounding nearest, and auto, convert's default
    taskset -c 0 python -m benchmarks.calibration --rounding nearest --outliers 5
    taskset -c 0 python -m benchmarks.calibration --sharing      # what one record for q, k and v saves
    taskset -c 0 python -m benchmarks.calibration --cells BERT ResNet   # cells of transformers and conv_models

The limit is 1.5 times the float forward passes over the same loader, plus 20 s. Everything runs on one thread and is
measured in CPU time, which other work on the machine affects less than wall-clock time. The float passes are timed
before and after, and the faster of the two counts. Each cell runs in a process of its own, whose peak memory beyond the
float model is measured too.
"""

import argparse
import importlib
import logging
import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import torchq
from benchmarks import conv_models, transformer_models
from benchmarks.demo import markdown
from benchmarks.scaling import resident
from benchmarks.smoothing import transformer
from benchmarks.timing import machine
from benchmarks.transformers import task_of
from torchq.calibration.calibrate import calibrate
from torchq.calibration.record import Record
from torchq.calibration.sharing import _Stream
from torchq.config import Rounding
from torchq.modules.registry import find_layers
from torchq.numerics.metrics import sqnr_db
from torchq.observers import Histogram

WIDTH, BLOCKS, HEADS, TOKENS = 768, 12, 12, 10_000
LOADER = (8, 8, 128)  # batches, sequences of each, tokens of each
FACTOR, EXTRA = 1.5, 20.0
CELLS = [*transformer_models.CELLS, *conv_models.CELLS]
PARTS = ("calibrate", "choose", "smooth", "fuse", "round_weights", "describe", "applied")


@torch.no_grad()
def language_model(outliers: int) -> nn.Module:
    """100.4 M parameters with random values: token embedding, 12 pre-norm blocks, head."""
    model = transformer(outliers, width=WIDTH, layers=BLOCKS, heads=HEADS)
    return nn.Sequential(nn.Embedding(TOKENS, WIDTH), *list(model)[1:-1], nn.Linear(WIDTH, TOKENS)).eval()


@torch.no_grad()
def float_seconds(model: nn.Module, loader: list[Tensor]) -> float:
    """CPU time of the plain forward passes."""
    start = time.process_time()
    for batch in loader:
        model(batch)
    return time.process_time() - start


@contextmanager
def timed_parts(parts: dict[str, Any]) -> Iterator[dict[str, float]]:
    """Inside, adds up the CPU time of functions. `parts` has their names, each with the owner in which to patch it."""
    seconds = dict.fromkeys(parts, 0.0)

    def timed(name: str, part: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return part(*args, **kwargs)
            finally:
                seconds[name] += time.process_time() - start

        return call

    with ExitStack() as stack:
        for name, owner in parts.items():
            stack.enter_context(patch.object(owner, name, timed(name, getattr(owner, name))))
        yield seconds


def print_sharing(model: nn.Module, loader: list[Tensor]) -> None:
    """Prints what binning and XᵀX cost if layers share the record of a tensor, and if each has its own."""
    config, layers = torchq.QConfig(smoothing="none"), find_layers(model)
    costs: dict[str, tuple[dict[str, float], float]] = {}
    for name, sharing in (("a record for each layer", False), ("a record for each tensor", True)):
        with ExitStack() as stack:
            if not sharing:
                stack.enter_context(patch.object(_Stream, "is_latest", lambda self, x: False))
            seconds = stack.enter_context(timed_parts({"observe": Histogram, "_sum_products": Record}))
            records = calibrate(model, loader, layers, config).records.values()
        grams = {id(record): record.gram.nbytes for record in records if record.gram is not None}
        costs[name] = seconds, sum(grams.values()) / 2**20
        print(f"{name}: binning {seconds['observe']:.2f} s, XᵀX {seconds['_sum_products']:.2f} s", end="")
        print(f" and {costs[name][1]:.0f} MiB", flush=True)
    (before, large), (after, small) = costs.values()
    saved = [1 - after[key] / before[key] for key in ("observe", "_sum_products")]
    print(f"saved: {saved[0]:.0%} of the binning, {saved[1]:.0%} of XᵀX, {1 - small / large:.0%} of its memory")


def print_times(model: nn.Module, loader: list[Tensor], roundings: list[Rounding]) -> None:
    """Prints the times of `convert` and of its parts, and whether they are within the limit."""
    float_seconds(model, loader[:1])
    passes = float_seconds(model, loader)
    for rounding in roundings:
        with timed_parts(dict.fromkeys(PARTS, importlib.import_module("torchq.conversion"))) as parts:
            start = time.process_time()
            torchq.convert(model, loader, config=torchq.QConfig(rounding=rounding))
            total = time.process_time() - start
        passes = min(passes, float_seconds(model, loader))
        limit = FACTOR * passes + EXTRA
        print(f"float passes {passes:.1f} s, convert with rounding={rounding!r} {total:.1f} s: ", end="")
        print(", ".join(f"{name} {parts[name]:.1f}" for name in PARTS if parts[name]))
        verdict = "ok" if total <= limit else "ABOVE"
        print(f"limit {FACTOR} x {passes:.1f} + {EXTRA:g} = {limit:.1f} s: {verdict}", flush=True)


def cell_row(name: str) -> list[str]:
    """A row of the table of cells: what converting this one costs, with as many inputs as the other benchmarks have."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    cell = next(cell for cell in CELLS if cell.name == name)
    task, x = task_of(cell)
    loader = list(task.calibration)
    float_seconds(task.model, loader[:1])
    passes, before = float_seconds(task.model, loader), resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS (man 5 proc)
    start = time.process_time()
    qmodel = torchq.convert(task.model, loader)
    total, peak = time.process_time() - start, resident("VmHWM")
    start = time.process_time()
    torchq.convert(task.model)
    without = time.process_time() - start
    passes = min(passes, float_seconds(task.model, loader))
    with torch.inference_mode():
        error = sqnr_db(task.model(x), qmodel(x))
    millions, limit = sum(p.numel() for p in task.model.parameters()) / 1e6, FACTOR * passes + EXTRA
    verdict = f"{limit:.1f} s{'' if total <= limit else ': ABOVE'}"
    row = [name, f"{millions:.0f} M", f"{passes:.1f} s", f"{total:.1f} s", verdict, f"{without:.1f} s"]
    return [*row, f"{(peak - before) >> 20} MiB", f"{error:.1f} dB"]


def print_cells(prefixes: list[str]) -> None:
    """Prints the table of the cells whose names start so."""
    rows = [["cell", "parameters", "float passes", "convert", "limit", "without data", "extra memory", "SQNR"]]
    for name in dict.fromkeys(cell.name for cell in CELLS if cell.name.startswith(tuple(prefixes))):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            rows.append(pool.submit(cell_row, name).result())
        print(" ".join(rows[-1]), flush=True)
    print(f"\n{markdown(rows)}\n\n{machine()}")


def main() -> None:
    """Prints what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounding", nargs="+", default=["nearest", "auto"], help="of QConfig")
    parser.add_argument("--outliers", type=int, default=0, help="outlier channels of each norm")
    parser.add_argument("--sharing", action="store_true", help="what one record for q, k and v saves, instead")
    parser.add_argument("--cells", nargs="+", metavar="PREFIX", help="these models of other benchmarks, instead")
    arguments = parser.parse_args()
    if arguments.cells:
        print_cells(arguments.cells)
        return
    torch.set_num_threads(1)
    model = language_model(arguments.outliers)
    loader = list(torch.randint(TOKENS, LOADER, generator=torch.Generator().manual_seed(0)))
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {LOADER} tokens", flush=True)
    if arguments.sharing:
        print_sharing(model, loader)
    else:
        print_times(model, loader, arguments.rounding)


if __name__ == "__main__":
    main()
