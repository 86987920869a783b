"""A coarse check of int8 against torch's own float32: one ratio for each of a few shapes, dynamic and static.

    python -m benchmarks.guard

With 16 rows or more, int8 is 4 to 8 times as fast on the machines of docs/performance.md. A ratio near 1 means a kernel
that was not used, a spilled accumulator or an extra copy. Times are only printed, since the machine may be busy. A
wrong answer, or a call computed by another kernel than the active one, exits with 1.
"""

import sys

import torch
from torch import Tensor, nn

from benchmarks.timing import interleaved, machine
from torchq import QConfig, convert, kernels
from torchq.numerics.metrics import sqnr_db

SHAPES = [(16, 768, 768), (64, 1024, 1024), (128, 3072, 768)]
SCHEMES = ["dynamic", "static"]
LOW = 1.0
"""A lower ratio gets a note in the output."""
MIN_SQNR_DB = 30.0
"""The minimum SQNR of an answer. Int8 gives 38 dB or more for these normal inputs; a bug gives far less."""


def compared(shape: tuple[int, int, int], scheme: str) -> tuple[float, float]:
    """The speed-up of int8 over float32, and the SQNR of its answer in dB."""
    m, n, k = shape
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(k, n)).eval()
    x = torch.randn(m, k)
    qmodel = convert(model, [x], config=QConfig(activation=scheme))  # type: ignore[arg-type]
    quality = sqnr_db(model(x), answer(qmodel, x))
    times = interleaved({"float": lambda: model(x), "int8": lambda: qmodel(x)}, rounds=10, seconds=0.005)
    return times["float"] / times["int8"], quality


def answer(qmodel: nn.Module, x: Tensor) -> Tensor:
    """The model's output, after checking that the active kernel computed it."""
    y: Tensor = qmodel(x)
    if kernels.last_used() != kernels.active():
        sys.exit(f"{kernels.last_used()} ran, and {kernels.active()} is active")
    return y


@torch.inference_mode()
def main() -> None:
    """Prints a line for each shape and scheme; exits with 1 if an answer is wrong."""
    torch.set_num_threads(1)  # on a busy machine two threads would wait for each other
    print(machine())
    wrong = 0
    for shape in SHAPES:
        for scheme in SCHEMES:
            ratio, quality = compared(shape, scheme)
            note = "" if ratio >= LOW else "  slower than float32: see docs/performance.md before merging"
            if quality < MIN_SQNR_DB:
                note, wrong = f"  WRONG: {quality:.1f} dB", wrong + 1
            name = "x".join(map(str, shape))
            print(f"{name:>14} {scheme:8} {ratio:5.2f}x float32, {quality:.1f} dB{note}")
    if wrong:
        sys.exit(f"{wrong} wrong answers")


if __name__ == "__main__":
    main()
