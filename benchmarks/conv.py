"""Convolutions in int8, layer by layer, against torch float32, ONNX Runtime int8 and OpenVINO int8.

    taskset -c 0 python -m benchmarks.conv                       # all layers, as within a network: codes in, codes out
    taskset -c 0 python -m benchmarks.conv --kind floats         # floats in, floats out, channels first
    taskset -c 0 python -m benchmarks.conv --networks resnet50   # some of them

All int8 contestants are static and share scales, zero points and codes of the weights, but for the peers with 7 bits.
Every answer is first compared with float32: times of peers whose answers are wrong are marked with `!`, and torchq's
speed is not compared with them. Times are the best of interleaved rounds; `%` is of the products' time at the peak that
is measured on registers.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch

from benchmarks.conv_peers import Layer, Shape, answer, contestants
from benchmarks.demo import markdown
from benchmarks.peers import wrong
from benchmarks.roofline import Roofline
from benchmarks.timing import add_clock, interleaved, machine, settle
from torchq import kernels
from torchq.numerics.metrics import sqnr_db

MIN_SQNR_DB = 25.0  # with codes of y there are two roundings; below this it is a bug


def resnet50() -> list[Shape]:
    """The 23 distinct ones."""
    shapes = [Shape("resnet50", 3, 64, 7, 2, (224, 224))]
    inputs, size = 64, 56
    for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        out = size // stride
        shapes += [
            Shape("resnet50", inputs, width, 1, 1, (size, size)),
            Shape("resnet50", width, width, 3, stride, (size, size)),
            Shape("resnet50", width, 4 * width, 1, 1, (out, out)),
            Shape("resnet50", inputs, 4 * width, 1, stride, (size, size)),
            Shape("resnet50", 4 * width, width, 1, 1, (out, out)),
            Shape("resnet50", width, width, 3, 1, (out, out)),
        ]
        inputs, size = 4 * width, out
    return list(dict.fromkeys(shapes))


def mobilenet_v2() -> list[Shape]:
    """The distinct ones."""
    name, shapes, inputs, size = "mobilenet_v2", [Shape("mobilenet_v2", 3, 32, 3, 2, (224, 224))], 32, 112
    for factor, outputs, repeats, first_stride in (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ):
        for i in range(repeats):
            stride, wide = first_stride if i == 0 else 1, inputs * factor
            if factor > 1:
                shapes.append(Shape(name, inputs, wide, 1, 1, (size, size)))
            shapes.append(Shape(name, wide, wide, 3, stride, (size, size), groups=wide))
            size //= stride
            shapes.append(Shape(name, wide, outputs, 1, 1, (size, size)))
            inputs = outputs
    return list(dict.fromkeys([*shapes, Shape(name, 320, 1280, 1, 1, (7, 7))]))


def wav2vec2() -> list[Shape]:
    """The extractor, on 2 seconds of audio."""
    shapes, inputs, length = [], 1, 32000
    for kernel, stride in ((10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2)):
        shapes.append(Shape("wav2vec2", inputs, 512, kernel, stride, (length,), padded=False))
        inputs, length = 512, shapes[-1].out_size[0]
    return shapes


def whisper() -> list[Shape]:
    """The stem of Whisper-base, on 30 seconds."""
    return [Shape("whisper", 80, 512, 3, 1, (3000,)), Shape("whisper", 512, 512, 3, 2, (3000,))]


def conformer() -> list[Shape]:
    """The convolution module of a block, on 10 seconds."""
    return [
        Shape("conformer", 256, 512, 1, 1, (250,)),
        Shape("conformer", 256, 256, 31, 1, (250,), groups=256),
        Shape("conformer", 256, 256, 1, 1, (250,)),
    ]


NETWORKS = {f.__name__: f for f in (resnet50, mobilenet_v2, wav2vec2, whisper, conformer)}
PEERS = ("ONNX Runtime", "OpenVINO", "ONNX Runtime, 7 bits", "OpenVINO, 7 bits")


class Times(NamedTuple):
    """Seconds of each contestant, and the names of those whose answers are wrong."""

    seconds: dict[str, float]
    wrong: list[str]

    @property
    def best(self) -> float:
        """Of the int8 peers whose answers are right."""
        return min(self.seconds[name] for name in PEERS if name not in self.wrong)


def measure(shape: Shape, kind: str, rounds: int, clock: Callable[[], float]) -> Times:
    """Times every contestant, and compares every answer with float32."""
    layer = Layer(shape)
    runs = contestants(layer, kind)
    errors = {name: sqnr_db(layer.y, answer(layer, kind, name, run)) for name, run in runs.items()}
    if errors["torchq"] < MIN_SQNR_DB:
        raise RuntimeError(f"torchq, {shape}: {errors['torchq']:.1f} dB, the answer is wrong")
    with torch.no_grad():
        before = settle if torch.get_num_threads() > 1 else lambda: None
        seconds = interleaved(runs, rounds=rounds, seconds=0.002, before=before, clock=clock)
    return Times(seconds, wrong(errors, "torchq"))


def row(shape: Shape, times: Times, peak: float) -> list[str]:
    """Of the table."""
    ours = times.seconds["torchq"]
    cells = [shape.network, str(shape), str(shape.depth), f"{ours * 1e6:.0f}", f"{shape.products / peak / ours:.0%}"]
    others = [
        f"{seconds * 1e6:.0f}{'!' if name in times.wrong else ''}"
        for name, seconds in times.seconds.items()
        if name != "torchq"
    ]
    return [*cells, *others, f"{times.best / ours:.2f}"]


def summary(found: list[tuple[Shape, Times]], peak: float) -> str:
    """A line for each network, for all, and for the layers that must come near the peak."""
    lines = []
    for network in dict.fromkeys(shape.network for shape, _ in found):
        own = [times for shape, times in found if shape.network == network]
        lines.append(f"{network}: " + compared(own))
    lines.append("all: " + compared([times for _, times in found]))
    deep = [s.products / peak / t.seconds["torchq"] for s, t in found if s.groups == 1 and s.depth >= 256 and large(s)]
    if deep:
        lines.append(f"dense layers with K >= 256 and 14 x 14 outputs or more: at least {min(deep):.0%} of the peak")
    return "\n".join(lines)


def large(shape: Shape) -> bool:
    """Whether the output has as many pixels as 14 x 14."""
    return torch.Size(shape.out_size).numel() >= 14 * 14


def compared(times: list[Times]) -> str:
    """Geometric means over layers; and sums, marked where an answer is wrong."""
    ratios = [each.best / each.seconds["torchq"] for each in times]
    total = {name: sum(each.seconds[name] for each in times) * 1e3 for name in times[0].seconds}
    failed = {name for each in times for name in each.wrong}
    sums = ", ".join(f"{name} {ms:.2f} ms{'!' if name in failed else ''}" for name, ms in total.items())
    return f"{statistics.geometric_mean(ratios):.2f}x the best int8 peer, least {min(ratios):.2f}x; sums: {sums}"


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--kind", choices=["codes", "floats"], default="codes")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    add_clock(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    peak = Roofline().peak(kernels.active()) / 2 * options.threads  # multiply-adds a second
    shapes = [shape for name in options.networks for shape in NETWORKS[name]()]
    found = [(shape, measure(shape, options.kind, options.rounds, options.clock)) for shape in shapes]
    columns = [name for name in found[0][1].seconds if name != "torchq"]
    header = ["network", "layer, kernel / stride, size", "K", "torchq", "%", *columns, "x"]
    print(f"{machine()}\n{options.kind} in and out; microseconds, ! where the answer is wrong")
    print("x: the time of the best int8 peer whose answer is right by torchq's\n")
    print(markdown([header, *(row(shape, times, peak) for shape, times in found)]))
    print(f"\n{summary(found, peak)}")


if __name__ == "__main__":
    main()
