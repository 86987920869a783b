"""What calibration costs: CPU time of `convert` on a transformer of 100 M parameters, against its float forward passes.

    taskset -c 0 python -m benchmarks.calibration                # auto, the most that convert does by itself
    taskset -c 0 python -m benchmarks.calibration --rounding nearest --outliers 5

The limit is 1.5 times the float forward passes over the same loader, plus 20 s. All on one thread, in CPU time, which
other work on the machine disturbs less than the clock; the float passes are timed before and after, and the faster of
the two counts.
"""

import argparse
import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import torchq
from benchmarks.smoothing import transformer

WIDTH, BLOCKS, HEADS, TOKENS = 768, 12, 12, 10_000
LOADER = (8, 8, 128)  # batches, sequences of each, tokens of each
FACTOR, EXTRA = 1.5, 20.0
PARTS = ("calibrate", "make_plan", "smooth", "round_weights", "describe", "apply_plan")


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
def timed_parts() -> Iterator[dict[str, float]]:
    """Inside, the CPU time of each part of `convert` is added up."""
    seconds = dict.fromkeys(PARTS, 0.0)
    module = importlib.import_module("torchq.convert")

    def timed(name: str, part: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return part(*args, **kwargs)
            finally:
                seconds[name] += time.process_time() - start

        return call

    with ExitStack() as stack:
        for name in PARTS:
            stack.enter_context(patch.object(module, name, timed(name, getattr(module, name))))
        yield seconds


def main() -> None:
    """Prints the times, and whether they are within the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounding", nargs="+", default=["nearest", "auto"], help="of QConfig")
    parser.add_argument("--outliers", type=int, default=0, help="outlier channels of each norm")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = language_model(arguments.outliers)
    loader = list(torch.randint(TOKENS, LOADER, generator=torch.Generator().manual_seed(0)))
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {LOADER} tokens", flush=True)
    float_seconds(model, loader[:1])
    passes = float_seconds(model, loader)
    for rounding in arguments.rounding:
        with timed_parts() as parts:
            start = time.process_time()
            torchq.convert(model, loader, config=torchq.QConfig(rounding=rounding))
            total = time.process_time() - start
        passes = min(passes, float_seconds(model, loader))
        limit = FACTOR * passes + EXTRA
        print(f"float passes {passes:.1f} s, convert with rounding={rounding!r} {total:.1f} s: ", end="")
        print(", ".join(f"{name} {parts[name]:.1f}" for name in PARTS if parts[name]))
        verdict = "ok" if total <= limit else "ABOVE"
        print(f"limit {FACTOR} x {passes:.1f} + {EXTRA:g} = {limit:.1f} s: {verdict}", flush=True)


if __name__ == "__main__":
    main()
