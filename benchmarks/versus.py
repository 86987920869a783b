"""Compares this checkout with another one: checks that all outputs are the same, and prints what is faster or slower.

python -m benchmarks.versus ../torchq-before
python -m benchmarks.versus ../torchq-before --quick

The other folder holds a checkout with a built torchq. Both register the same torch ops, so each runs in its own
process: a worker that waits for requests on its standard input. The workers are pinned to one core and take turns, row
by row and round by round. So only one works at a time, and changes of the clock affect both. Each figure is the best of
many short rounds. The workers are started several times, because the addresses of a process's memory change the time of
a call by up to 5 %. Exits with 1 if an output differs.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SHAPES = [(64, 64), (768, 768), (3072, 768), (768, 3072), (1024, 1024), (4096, 1024), (71, 100)]
ROWS = [1, 4, 7, 16, 33, 128, 512]
QUICK_SHAPES, QUICK_ROWS = [(64, 64), (768, 768), (71, 100)], [1, 7, 16, 128]


# ---- The worker: its own process, with the torchq of its folder -----------------------------------------------------


class Pair(NamedTuple):
    """Scale and zero point, in a form that every version of torchq accepts."""

    scale: float
    zero_point: int


X_PAIR, Y_PAIR = Pair(0.03, 128), Pair(0.05, 117)
Call = Callable[[], Any]


def cases(quick: bool) -> dict[str, Call]:
    """The calls to time, by name."""
    import torch

    found: dict[str, Call] = {}
    torch.manual_seed(0)
    for n, k in ((1, 1), (64, 64)):
        found |= _calls(n, k)
    for n, k in QUICK_SHAPES if quick else SHAPES:
        layers = _layers(n, k)
        for m in [*(QUICK_ROWS if quick else ROWS), *([1024] if (n, k) == (64, 64) else [])]:  # 1024: mostly epilogue
            x = torch.randn(m, k)
            codes = torch.randint(0, 256, (m, k), dtype=torch.uint8)
            inputs = {"dynamic": x, "dynamic, bf16": x.bfloat16(), "static to u8": x, "u8 to u8": codes}
            for scheme, layer in layers.items():
                if scheme in ("dynamic", "static to u8") or (n, k) == (768, 768):
                    found[f"{m}x{n}x{k} {scheme}"] = _bind(layer, inputs[scheme])
    return found


def _bind(function: Callable[..., Any], *arguments: Any) -> Call:
    return lambda: function(*arguments)


def _layers(n: int, k: int) -> dict[str, Callable[..., Any]]:
    import torch
    from torch import nn

    from torchq import QuantizedLinear

    linear = nn.Linear(k, n)
    dynamic = QuantizedLinear.from_float(linear)

    def to_codes(x: Any) -> Any:  # by the op, whose form has not changed since 0.1.0
        return torch.ops.torchq.linear_static(x, dynamic.packed, *X_PAIR, torch.uint8, *Y_PAIR)

    return {
        "dynamic": dynamic,
        "dynamic, bf16": dynamic,
        "static to u8": to_codes,
        "u8 to u8": to_codes,
    }


def _calls(n: int, k: int) -> dict[str, Call]:
    """For one row: a whole call of the layer, and calls of the ops alone."""
    import torch
    from torch import nn

    from torchq import ops

    layer, x = _layers(n, k)["dynamic"], torch.randn(1, k)
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    packed, a = ops.pack(weight, torch.full((n,), 0.01)), torch.randint(-128, 128, (1, k), dtype=torch.int8)
    dynamic, static = torch.ops.torchq.linear_dynamic.default, torch.ops.torchq.linear_static.default
    return {
        f"call {n}x{k}: QuantizedLinear": _bind(layer, x),
        f"call {n}x{k}: nn.Module's __call__": _bind(nn.Module.__call__, layer, x),
        f"call {n}x{k}: the op linear_dynamic": _bind(dynamic, x, packed, 0),
        f"call {n}x{k}: the op linear_static": _bind(static, x, packed, 0.05, 3, torch.float32, 1.0, 0, 0),
        f"call {n}x{k}: the op gemm": _bind(torch.ops.torchq.gemm.default, a, packed),
    }


def digest(result: Any) -> str:
    """The first 16 hex digits of the SHA-256 of dtype, shape and bytes."""
    import torch

    found = hashlib.sha256(f"{result.dtype} {tuple(result.shape)};".encode())
    found.update(result.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def timed(call: Call, repeats: int) -> float:
    """Seconds of one call: the mean of `repeats`, after one untimed call."""
    call()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def work(quick: bool) -> None:
    """Answers requests, one JSON value per line: null asks for all hashes, [name, repeats] for the time of a call."""
    import torch

    import torchq

    torch.set_num_threads(1)
    with torch.inference_mode():
        found = cases(quick)
        for line in sys.stdin:
            request = json.loads(line)
            answer: object
            if request is None:
                answer = {"file": torchq.__file__, "hashes": {name: digest(call()) for name, call in found.items()}}
            else:
                answer = timed(found[request[0]], request[1])
            print(json.dumps(answer), flush=True)


# ---- The referee ----------------------------------------------------------------------------------------------------


class Worker:
    """A process that times the torchq in a folder."""

    def __init__(self, folder: Path, quick: bool, core: int) -> None:
        code = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='worker')['work'](sys.argv[2] == 'quick')"
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, str(Path(__file__).resolve()), "quick" if quick else "whole"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(self.process.pid, {core})

    def ask(self, request: object) -> Any:
        """Sends a request and waits for its answer."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"versus: the worker in {self.folder} stopped. Is torchq built there?")
        return json.loads(line)

    def hashes(self) -> dict[str, str]:
        """The hash of every output, by name. Exits if the worker has imported torchq from another folder."""
        answer = self.ask(None)
        if not Path(answer["file"]).resolve().is_relative_to(self.folder):
            raise SystemExit(f"versus: {self.folder} holds no torchq; its worker found {answer['file']}")
        return answer["hashes"]  # type: ignore[no-any-return]

    def close(self) -> None:
        """Ends the process by closing its input."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


Times = dict[str, tuple[float, float]]
"""For each case, by name, the best times: old and new."""


def compare(old: Worker, new: Worker, names: list[str], rounds: int, seconds: float) -> Times:
    """Lets two workers take turns. They alternate in going first."""
    repeats = {name: max(1, int(seconds / min(old.ask([name, 1]) for _ in range(3)))) for name in names}
    best: Times = dict.fromkeys(names, (float("inf"), float("inf")))
    for turn in range(rounds):
        for name in names:
            workers = (old, new) if turn % 2 else (new, old)
            times = {worker: worker.ask([name, repeats[name]]) for worker in workers}
            best[name] = min(best[name][0], times[old]), min(best[name][1], times[new])
    return best


def report(best: Times) -> str:
    """A row for each case, and the geometric mean."""
    from benchmarks.demo import markdown

    ratios = {name: old / new for name, (old, new) in best.items()}
    rows = [["what", "old", "new", "old / new"]]
    for name, (old, new) in best.items():
        rows.append([name, f"{old * 1e6:.2f} us", f"{new * 1e6:.2f} us", f"{ratios[name]:.3f}"])
    least = min(ratios, key=lambda name: ratios[name])
    mean = statistics.geometric_mean(ratios.values())
    return f"{markdown(rows)}\n\nGeometric mean of old / new {mean:.3f}, least {ratios[least]:.3f} ({least})."


def main() -> None:
    """Compares and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="a folder with a built torchq: the old one")
    parser.add_argument("--quick", action="store_true", help="few shapes")
    parser.add_argument("--starts", type=int, default=5, help="of the workers")
    parser.add_argument("--rounds", type=int, default=20, help="after each start")
    parser.add_argument("--milliseconds", type=float, default=2.0, help="of one turn, at least")
    parser.add_argument("--core", type=int, default=(os.cpu_count() or 1) - 1, help="where both workers are pinned")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    arguments = parser.parse_args()
    best: Times = {}
    for _ in range(arguments.starts):
        old, new = (Worker(folder, arguments.quick, arguments.core) for folder in (arguments.other.resolve(), ROOT))
        expected, found = old.hashes(), new.hashes()
        different = [name for name in expected if found.get(name) != expected[name]]
        if different:
            raise SystemExit("versus: other bits: " + "; ".join(different))
        names = [name for name in expected if arguments.only in name]
        for name, times in compare(old, new, names, arguments.rounds, arguments.milliseconds / 1e3).items():
            best[name] = min(times[0], best.get(name, times)[0]), min(times[1], best.get(name, times)[1])
        old.close()
        new.close()
    print(report(best))
    print(f"The outputs of all {len(expected)} are the same bits.")


if __name__ == "__main__":
    main()
