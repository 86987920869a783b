"""Whole trained networks in int8, torchq against its peers: SQNR of the outputs, task metric, latency.

    taskset -c 0 python -m benchmarks.accuracy                  # all; the first run trains (benchmarks/models.py)
    python -m benchmarks.accuracy --quick                       # the MLP, on few batches, in seconds
    python -m benchmarks.accuracy --models "text GPT" --contestants torchq onnxruntime --json out.json --markdown out.md

Every network is measured twice: as trained, and as a twin with outlier channels that computes the same function. All
contestants quantize the same float model, calibrate on the same inputs and are tested on the same held-out batches. If
a contestant has several settings (benchmarks/accuracy_peers.py), the one with the highest SQNR on that model counts,
also for the latency. torchq auto is `torchq.convert(model, loader)`.
"""

import argparse
import contextlib
import io
import json
import logging
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812

import torchq
from benchmarks import models
from benchmarks.accuracy_peers import CONTESTANTS, FLOAT, OURS, STEPS, Task
from benchmarks.demo import markdown
from benchmarks.peers import Peer, Run, available
from benchmarks.timing import interleaved, machine
from torchq.numerics.metrics import sqnr_db

BATCH = {"mlp": 32, "cnn": 32, "vit": 32, "gpt": 8, "bert": 32}  # rows per batch, for calibration, test and timing
CALIBRATION_BATCHES, TEST_BATCHES = 16, 32  # at most; there may be fewer test batches
TWIN = ", outliers"


def tasks(names: Sequence[str], calibration: int, test: int) -> Iterator[Task]:
    """Each named model, followed by its outlier twin, with at most so many batches."""
    for name in names:
        recipe = models.RECIPES[name]
        data = models.Data(recipe.kind, recipe.context)
        model = models.load(recipe, data)
        twin = models.with_outliers(model)
        size = BATCH[recipe.kind]
        calibration_inputs = [batch.inputs for batch in islice(data.batches("train", size, seed=1), calibration)]
        asked = list(islice(data.held_out(size), test))
        models.check_twin(model, twin, asked[0].inputs)
        yield Task(name, model, calibration_inputs, asked)
        yield Task(name + TWIN, twin, calibration_inputs, asked)


# ---- Measuring ------------------------------------------------------------------------------------------------------


def measure(task: Task, contestants: Sequence[Peer], *, threads: int = 1, rounds: int = 9) -> dict[str, Any]:
    """SQNR and metrics of each contestant on the task's test batches, and the latency of each one's best setting.

    A contestant that cannot run this model has an "error" instead.
    """
    x = task.test[0].inputs.clone()
    exact = answers(lambda: task.model(x), x, task)
    results: dict[str, dict[str, Any]] = {}
    runs: dict[str, Run] = {}
    for peer in contestants:
        start = time.perf_counter()
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # hides the peers' progress output
                runs[peer.name] = peer.make(task, x, threads)
            given = answers(runs[peer.name], x, task)
        except Exception as error:  # any failure of a peer is its result
            results[peer.name] = {"error": f"{type(error).__name__}: {error}".partition("\n")[0]}
            print(f"{task.name}: {peer.name}: skipped, {results[peer.name]['error']}", flush=True)
            continue
        result = {"sqnr_db": sqnr_db(exact, given), **score(given, task), "int8": peer.int8}
        results[peer.name] = result
        print(
            f"{task.name}: {peer.name}: {result['sqnr_db']:.1f} dB, {result['accuracy']:.2f} % "
            f"({time.perf_counter() - start:.0f} s)",
            flush=True,
        )
    x.copy_(task.test[0].inputs)
    with torch.inference_mode():
        times = interleaved({name: runs[name] for name in best_settings(results).values()}, rounds=rounds)
    for name, seconds in times.items():
        results[name]["us"] = seconds * 1e6
    return {"model": task.name, "contestants": results}


@torch.inference_mode()
def answers(run: Run, x: torch.Tensor, task: Task) -> torch.Tensor:
    """The outputs on all test batches. Each batch is copied into x before the run."""
    outputs = []
    for batch in task.test:
        x.copy_(batch.inputs)
        outputs.append(run().float().clone())  # engines write every answer into the same tensor
    return torch.cat(outputs)


def score(outputs: torch.Tensor, task: Task) -> dict[str, float]:
    """Top-1 accuracy in %, and perplexity `exp(cross entropy)`, over the targets that are not IGNORED."""
    logits, targets = outputs.flatten(0, -2), torch.cat([batch.targets for batch in task.test]).flatten()
    counted = targets != models.IGNORED
    hits = (logits.argmax(dim=-1) == targets)[counted]
    loss = F.cross_entropy(logits, targets, ignore_index=models.IGNORED)
    return {"accuracy": 100 * float(hits.double().mean()), "perplexity": math.exp(float(loss))}


def layers(task: Task) -> list[dict[str, Any]]:
    """What torchq auto chose for each layer, with the SQNR of the layer's own output, and why."""
    reports: list[dict[str, Any]] = torchq.report(torchq.convert(task.model, task.calibration)).to_dict()["layers"]
    return reports


def best_settings(results: dict[str, dict[str, Any]]) -> dict[str, str]:
    """For each contestant that could run, its full name with the setting of the highest SQNR."""
    best: dict[str, str] = {}
    for name, result in results.items():
        contestant = name.partition(":")[0]
        if "error" in result:
            continue
        if contestant not in best or result["sqnr_db"] > results[best[contestant]]["sqnr_db"]:
            best[contestant] = name
    return best


# ---- Reporting ------------------------------------------------------------------------------------------------------


def table(result: dict[str, Any]) -> str:
    """One model's table, the most accurate contestant first, and a line for each contestant that could not run."""
    results = result["contestants"]
    best = best_settings(results)
    exact = results[FLOAT]
    rows = [["contestant", "setting", "SQNR", "accuracy", "points lost", "perplexity", "latency"]]
    for contestant, name in sorted(best.items(), key=lambda pair: -results[pair[1]]["sqnr_db"]):
        r = results[name]
        rows.append(
            [
                contestant,
                name.partition(": ")[2] or "-",
                f"{r['sqnr_db']:.1f} dB" if r["int8"] else "-",
                f"{r['accuracy']:.2f} %",
                f"{exact['accuracy'] - r['accuracy']:+.2f}",
                f"{r['perplexity']:.4f}",
                f"{r['us']:.0f} us",
            ]
        )
    failed = [f"* {name}: skipped, {r['error']}" for name, r in results.items() if "error" in r]
    return "\n".join([f"### {result['model']}", "", markdown(rows), *(["", *failed] if failed else [])])


def summary(results: list[dict[str, Any]]) -> str:
    """Torchq auto against the most accurate int8 peer of each model: the mean gap in dB, and the points lost."""
    rows = [["model", OURS, "best peer", "gap", "points lost", "peer's"]]
    gaps: list[float] = []
    lost: dict[str, list[float]] = {"the models": [], "the outlier twins": []}
    for result in results:
        found = result["contestants"]
        peers = {n: r for n, r in found.items() if r.get("int8") and not n.startswith("torchq")}
        if "sqnr_db" not in found.get(OURS, {}) or not peers:
            continue
        ours, exact = found[OURS], found[FLOAT]["accuracy"]
        peer = max(peers, key=lambda name: peers[name]["sqnr_db"])
        gaps.append(ours["sqnr_db"] - peers[peer]["sqnr_db"])
        points = exact - ours["accuracy"]
        lost["the outlier twins" if result["model"].endswith(TWIN) else "the models"].append(points)
        rows.append(
            [
                result["model"],
                f"{ours['sqnr_db']:.1f} dB",
                f"{peer}, {peers[peer]['sqnr_db']:.1f} dB",
                f"{gaps[-1]:+.1f} dB",
                f"{points:+.2f}",
                f"{exact - peers[peer]['accuracy']:+.2f}",
            ]
        )
    if not gaps:
        return "No model was measured with both torchq auto and an int8 peer."
    mean = sum(gaps) / len(gaps)  # the mean in decibels is the geometric mean of the ratios
    worst = ", ".join(f"{max(points):+.2f} on {kind}" for kind, points in lost.items() if points)
    return (
        f"{markdown(rows)}\n\n{OURS} against the best peer of each model: {mean:+.1f} dB in the geometric middle, "
        f"least {min(gaps):+.1f} dB, behind on {sum(gap < 0 for gap in gaps)} of {len(gaps)}. "
        f"Most points of accuracy lost: {worst}."
    )


def layer_table(result: dict[str, Any]) -> str:
    """The layers of torchq auto, worst first."""
    worst = sorted(result["layers"], key=lambda layer: math.inf if layer["sqnr_db"] is None else layer["sqnr_db"])
    rows = [["layer", "scheme", "SQNR", "reason"]]
    for layer in worst[:LAYERS_SHOWN]:
        error = "-" if layer["sqnr_db"] is None else f"{layer['sqnr_db']:.1f} dB"
        rows.append([layer["name"], layer["kind"], error, layer["reason"]])
    kinds = [layer["kind"] for layer in result["layers"]]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
    return f"{OURS} on {result['model']}: {counts}. The worst layers:\n\n{markdown(rows)}"


LAYERS_SHOWN = 4


def chosen(prefixes: Sequence[str] | None) -> list[Peer]:
    """Float, and the contestants and steps whose name starts with one of these. Without any, all contestants."""
    if not prefixes:
        return CONTESTANTS
    return [p for p in [*CONTESTANTS, *STEPS] if p.name == FLOAT or p.name.startswith(tuple(prefixes))]


def main() -> None:
    """Measures each model and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=models.RECIPES, metavar="NAME", help=", ".join(models.RECIPES))
    parser.add_argument("--contestants", nargs="+", metavar="PREFIX", help="only those whose names start so, and float")
    parser.add_argument("--quick", action="store_true", help="few batches and rounds; the MLP, unless --models")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write every figure here, those of every setting and layer too")
    parser.add_argument("--markdown", type=Path, help="write the tables here as well")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore")  # the peers warn about caching, deprecation and tracing
    logging.disable(logging.WARNING)

    contestants, skipped = available(chosen(arguments.contestants))
    print("\n".join(skipped), end="\n" if skipped else "")
    names = arguments.models or list(models.RECIPES)[: 1 if arguments.quick else None]
    counts, rounds = ((4, 16), 3) if arguments.quick else ((CALIBRATION_BATCHES, TEST_BATCHES), arguments.rounds)
    results = []
    for task in tasks(names, *counts):
        result = measure(task, contestants, threads=arguments.threads, rounds=rounds)
        results.append({**result, "layers": layers(task)})
        if arguments.json:  # after each model, since the whole run takes long
            arguments.json.write_text(json.dumps({"machine": machine(), "results": results}, indent=1))
    text = "\n\n".join([summary(results), *(f"{table(r)}\n\n{layer_table(r)}" for r in results), f"{machine()}."])
    print("\n" + text)
    if arguments.markdown:
        arguments.markdown.write_text(text + "\n")


if __name__ == "__main__":
    main()
