"""The pictures of the documentation, drawn from what other benchmarks have measured.

    python -m benchmarks.pictures              # draws all of docs/img/*.svg again
    taskset -c 0 python -m benchmarks.pictures --measure   # measures the frontier first: docs/measured/frontier.json

row.svg is a row of values on its way through a layer, computed by torchq. roofline-*.svg come from docs/measured,
models.svg from the table of docs/performance-models.md, frontier.svg from docs/measured/frontier.json.
"""

import argparse
import json
import re
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

import torchq
from benchmarks.models import RECIPES, Data, load
from benchmarks.svg import Axes, Canvas
from benchmarks.timing import interleaved, machine
from torchq.planning.budget import return_to_float, sensitivity
from torchq.planning.tables import settled

DOCS = Path(__file__).parents[1] / "docs"
MEASURED = DOCS / "measured" / "frontier.json"
ROOFS = {  # one core: docs/performance.md, measured with the grids
    "zen4": ("AMD Zen 4, one core", 473, {"L2 106 GB/s": 106, "L3 98 GB/s": 98, "memory 24 GB/s": 24}, (2, 800)),
    "amx": ("Intel, AMX, one core", 7736, {"L2 173 GB/s": 173, "L3 29 GB/s": 29, "memory 14 GB/s": 14}, (2, 12000)),
}


# ---- A row through a layer -------------------------------------------------------------------------------------------


def draw_row(path: Path) -> None:
    """Four values and two outputs, in numbers: floats, codes, sums, floats."""
    x = torch.tensor([[-0.25, 0.5, 1.0, 2.3]])
    weight = torch.tensor([[1.0, -0.5, 0.25, 0.0], [0.0, 0.1, 0.2, 1.27]])
    codes, scale, zero = torchq.ops.quantize_per_token(x)
    channel = weight.abs().amax(dim=1) / 127
    wq = (weight / channel[:, None]).round().to(torch.int8)
    raw = codes.long()
    sums = raw @ wq.long().T - int(zero) * wq.long().sum(dim=1)
    y = torchq.ops.linear_dynamic(x, torchq.ops.pack(wq, channel))
    exact = x @ weight.T

    canvas = Canvas(760, 390, "Four floats become codes, are multiplied by int8 weights, and become floats again")
    row = partial(_cells, canvas)
    canvas.text(24, 34, "One row through a layer", "ink title")
    row(24, 84, "x, float32", [f"{value:.2f}" for value in x[0].tolist()])
    canvas.text(24, 140, f"range [{x.min():.2f}, {x.max():.2f}]", "soft")
    canvas.text(24, 158, f"scale {float(scale):.2f}, zero point {int(zero)}", "soft")
    canvas.path([(264, 98), (330, 98)], "line", arrow=True)
    canvas.text(297, 90, "quantize", "soft small", anchor="middle")
    row(338, 84, "codes, u8", [str(value) for value in raw[0].tolist()], kind="ours")
    canvas.path([(444, 122), (444, 186)], "line", arrow=True)
    canvas.text(454, 150, "multiply and add, exact in int32:", "soft small")
    canvas.text(454, 166, "VPDPBUSD, TDPBUSD, SDOT, USMMLA", "soft small mono")
    for i, (weights, step) in enumerate(zip(wq.tolist(), channel.tolist(), strict=True)):
        label = "weights, int8, a scale for each output" if i == 0 else ""
        row(338, 210 + 36 * i, label, [str(value) for value in weights], kind="third")
        canvas.text(588, 229 + 36 * i, f"· {step:.4f}", "soft mono")
    canvas.path([(330, 243), (264, 243)], "line", arrow=True)
    row(24, 229, "sums less zero point, int32", [str(value) for value in sums[0].tolist()], kind="ours", width=116)
    canvas.path([(140, 266), (140, 318)], "line", arrow=True)
    canvas.text(150, 288, "times both scales, plus the bias,", "soft small")
    canvas.text(150, 304, "then the activation: in the same pass", "soft small")
    row(24, 334, "y, float32", [f"{value:.4f}" for value in y[0].tolist()], width=116)
    canvas.text(280, 353, "exact: " + ", ".join(f"{value:.4f}" for value in exact[0].tolist()), "soft mono")
    canvas.write(path)


def _cells(
    canvas: Canvas, x: float, y: float, label: str, values: list[str], kind: str = "ink", width: int = 58
) -> None:
    canvas.text(x, y - 8, label, "soft small")
    for i, value in enumerate(values):
        canvas.box(x + i * (width + 2), y, width, 28, radius=4)
        canvas.text(x + i * (width + 2) + width / 2, y + 19, value, f"{kind} mono", anchor="middle")


# ---- Rooflines -------------------------------------------------------------------------------------------------------


def grid_of(page: Path) -> list[tuple[int, float, float]]:
    """From a page of docs/measured: rows M, and the Gop/s of torchq and of the best int8 peer, shape by shape."""
    found = []
    for line in page.read_text().splitlines():
        shape = re.match(r"\| (\d+)x(\d+)x(\d+) +\| ([\d.]+) us +\| [^,|]*, ([\d.]+) us", line)
        if shape:
            m, n, k = map(int, shape.groups()[:3])
            ours, theirs = (2 * m * n * k / float(us) / 1e3 for us in shape.groups()[3:])
            found.append((m, ours, theirs))
    return found


def draw_roofline(path: Path, cpu: str) -> None:
    """Operations a second over operations a byte of weight, below the machine's limits."""
    name, peak, bandwidths, ends = ROOFS[cpu]
    shapes = grid_of(DOCS / "measured" / f"linear-{cpu}-1-thread.md")
    canvas = Canvas(760, 470, f"Roofline of {name}: torchq and the best int8 peer over {len(shapes)} shapes")
    axes = Axes(canvas, (70, 70, 560, 410), (1.6, 2600), ends, log=True)
    canvas.text(24, 30, f"Roofline, {name}, {len(shapes)} layers", "ink title")
    ticks = [value for value in (1, 10, 100, 1000, 10000) if ends[0] <= value <= ends[1]]
    axes.frame([2, 8, 32, 128, 512, 2048], ticks, "operations for each byte of weight (2 · rows)", "Gop/s")
    for bandwidth in bandwidths.values():
        bend = peak / bandwidth
        start = max(1.6, ends[0] / bandwidth)
        canvas.path([axes.at(start, start * bandwidth), axes.at(bend, peak)], "line", dashed=True)
    canvas.path([axes.at(peak / max(bandwidths.values()), peak), axes.at(2600, peak)], "line")
    for m, ours, theirs in shapes:
        canvas.cross(*axes.at(2 * m, theirs), "theirs-line", 3.5)
        canvas.dot(*axes.at(2 * m, ours), "ours", 3.5)
    right = 580
    canvas.dot(right, 96, "ours")
    canvas.text(right + 14, 100, "torchq")
    canvas.cross(right, 118, "theirs-line")
    canvas.text(right + 14, 122, "best int8 peer")
    canvas.text(right, 160, f"line: peak, {peak} Gop/s", "soft")
    canvas.text(right, 182, "dashed, from the left:", "soft")
    for i, label in enumerate(bandwidths):
        canvas.text(right + 14, 202 + 20 * i, label, "soft")
    canvas.write(path)


# ---- Whole models ----------------------------------------------------------------------------------------------------


def models() -> dict[str, dict[str, tuple[float, float]]]:
    """From docs/performance-models.md: for each cell, (ms, dB) of torchq, OpenVINO and torch.ao."""
    found = {}
    for line in (DOCS / "performance-models.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        pairs = [re.match(r"([\d.]+) \(([\d.]+)\)$", cell) for cell in cells]
        if len(cells) == 6 and pairs[1] and pairs[2] and pairs[3]:
            columns = {"torchq": pairs[1], "OpenVINO": pairs[3], "torch.ao": pairs[4]}
            found[cells[0]] = {who: (float(p[1]), float(p[2])) for who, p in columns.items() if p}
    return found


def draw_models(path: Path) -> None:
    """For each model a row: the SQNR of its output, and its time, torchq's being 1."""
    cells = models()
    lower = 84 + 28 * len(cells)
    canvas = Canvas(760, lower + 60, "Accuracy and time of whole models by torchq, OpenVINO and torch.ao in int8")
    canvas.text(24, 30, f"{len(cells)} whole models in int8, one thread of Zen 4, eager mode", "ink title")
    accuracy = Axes(canvas, (244, 84, 470, lower), (10, 46), (len(cells) - 0.5, -0.5))
    time_over = Axes(canvas, (500, 84, 740, lower), (0.85, 1.85), (len(cells) - 0.5, -0.5))
    accuracy.frame([10, 20, 30, 40], [], "SQNR, dB: more is better", "")
    time_over.frame([1, 1.25, 1.5, 1.75], [], "time, torchq = 1: less is better", "")
    kinds = {"torch.ao": "third", "OpenVINO": "theirs", "torchq": "ours"}
    for i, (name, contestants) in enumerate(cells.items()):
        canvas.text(24, accuracy.at(10, i)[1] + 4, name)
        for who, kind in kinds.items():
            if who in contestants:
                ms, db = contestants[who]
                canvas.dot(*accuracy.at(db, i), kind, 5)
                canvas.dot(*time_over.at(ms / contestants["torchq"][0], i), kind, 5)
    for i, (who, kind) in enumerate(reversed(kinds.items())):
        canvas.dot(248 + 90 * i, 58, kind, 5)
        canvas.text(258 + 90 * i, 62, who)
    canvas.write(path)


# ---- The frontier ----------------------------------------------------------------------------------------------------


def measure() -> dict[str, Any]:
    """The digits ViT: SQNR and speed-up with n layers in float, the most sensitive first, as a budget returns them."""
    torch.set_num_threads(1)
    recipe = RECIPES["digits ViT"]
    data = Data(recipe.kind)
    model = load(recipe, data).eval()
    calibration = [batch.inputs for batch, _ in zip(data.batches("train", 32, seed=1), range(16), strict=False)]
    test = data.splits["test"][0][:256]
    with torch.inference_mode():
        exact = model(test)

    plan = torchq.plan_of(torchq.convert(model, calibration))
    order = list(sensitivity(model, plan, lambda each: each(calibration[0])))
    kept = sorted({*range(0, len(order), 3), 1, 2, len(order) - 1})
    plans = {n: settled(return_to_float(plan, dict.fromkeys(order[:n], "for the picture"))) for n in kept}
    candidates = {n: torchq.apply_plan(model, each) for n, each in plans.items()}
    with torch.inference_mode():
        db = {n: torchq.sqnr_db(exact, candidate(test)) for n, candidate in candidates.items()}
        calls = {str(n): partial(each, calibration[0]) for n, each in candidates.items()}
        seconds = interleaved({"float": partial(model, calibration[0]), **calls}, rounds=12, clock=time.thread_time)
    steps = {str(n): {"db": round(db[n], 2), "speedup": round(seconds["float"] / seconds[str(n)], 3)} for n in kept}
    return {"machine": machine(), "layers": len(order), "steps": steps}


def draw_frontier(path: Path) -> None:
    """SQNR over speed-up, one dot for each number of layers that returned to float."""
    measured = json.loads(MEASURED.read_text())
    layers, steps = measured["layers"], {int(n): step for n, step in measured["steps"].items()}
    inside = {n: step for n, step in steps.items() if n < layers}
    fastest = max(step["speedup"] for step in inside.values())
    best = max(step["db"] for step in inside.values())
    canvas = Canvas(760, 460, "The frontier of an accuracy budget: accuracy over speed-up")
    axes = Axes(canvas, (70, 70, 720, 380), (0.9, fastest + 0.2), (40, best + 5))
    canvas.text(24, 30, f"Digits ViT: {layers} layers return to float, the most sensitive first", "ink title")
    xs = [x / 2 for x in range(2, int(2 * fastest + 1))]
    axes.frame(xs, range(40, int(best) + 5, 10), "speed-up over float", "SQNR of the output, dB")
    canvas.path([axes.at(step["speedup"], step["db"]) for step in inside.values()], "ours-line")
    for n, step in inside.items():
        place = axes.at(step["speedup"], step["db"])
        canvas.dot(*place, "ours", 4.5)
        canvas.text(place[0] + 8, place[1] - 6, "all in int8" if n == 0 else str(n), "soft small")
    canvas.text(24, 446, "A number: layers in float. With all of them it is the float model, at 1.", "soft small")
    canvas.write(path)


def main() -> None:
    """Measures if asked, and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="measure the frontier first")
    arguments = parser.parse_args()
    if arguments.measure:
        MEASURED.write_text(json.dumps(measure(), indent=1) + "\n")
    images = DOCS / "img"
    draw_row(images / "row.svg")
    draw_models(images / "models.svg")
    draw_frontier(images / "frontier.svg")
    for cpu in ROOFS:
        draw_roofline(images / f"roofline-{cpu}.svg", cpu)


if __name__ == "__main__":
    main()
