"""All of torchq on one page: trains a network, converts it, and prints accuracy, size and speed.

    make demo        or        python -m benchmarks.demo

A small network learns real handwritten digits (scikit-learn's load_digits: 1797 images of 8 x 8), is converted to int8
with an ordinary DataLoader, and is compared with itself in float and in simulated int8.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import torchq
from benchmarks.timing import interleaved, machine
from torchq.numerics.metrics import sqnr_db

Forward = Callable[[Tensor], Tensor]

BATCHES = (1, 16, 128)
WIDTH = 1024


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Train and test split of the digits, pixels in [0, 1]: (image (64,), label)."""
    data = load_digits()
    images, labels = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:1300], order[1300:]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def trained(train: TensorDataset, epochs: int = 8, width: int = WIDTH) -> nn.Module:
    """64-width-width-10 with ReLU, trained by Adam."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    loader = DataLoader(train, batch_size=64, shuffle=True, generator=torch.Generator().manual_seed(0))
    for _ in range(epochs):
        for image, label in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(image), label).backward()
            optimizer.step()
    return model.eval()


def accuracy(model: Forward, images: Tensor, labels: Tensor) -> float:
    """Share of correctly classified images, in %."""
    return 100 * float((model(images).argmax(dim=1) == labels).float().mean())


def simulated(qmodel: Forward) -> Forward:
    """The converted model in fake-quantized float."""

    def run(x: Tensor) -> Tensor:
        with torchq.simulate():
            return qmodel(x)

    return run


@torch.inference_mode()
def compare(model: nn.Module, qmodel: nn.Module, test: TensorDataset) -> str:
    """The table for one model: accuracy, output SQNR, and latency per batch size, of float, simulated and int8."""
    images, labels = test.tensors
    exact = model(images)
    runs: dict[str, Forward] = {"float": model, "simulated": simulated(qmodel), "int8": qmodel}
    times = {}
    for batch in BATCHES:
        x = images[:batch].contiguous()
        times[batch] = interleaved({name: partial(run, x) for name, run in runs.items()})
    head = ["", "accuracy", "output SQNR", *(f"batch {b}" for b in BATCHES)]
    rows = []
    for name, run in runs.items():
        error = "-" if name == "float" else f"{sqnr_db(exact, run(images)):.1f} dB"
        cells = [f"{times[b][name] * 1e6:.0f} us ({times[b]['float'] / times[b][name]:.2f}x)" for b in BATCHES]
        rows.append([name, f"{accuracy(run, images, labels):.2f} %", error, *cells])
    return markdown([head, *rows])


def markdown(rows: list[list[str]]) -> str:
    """A Markdown table with aligned columns, so that it is readable as text."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def main() -> None:
    """Trains, converts, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="torch.set_num_threads (default: torch's own choice)")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    train, test = digits()
    start = time.perf_counter()
    model = trained(train)
    print(f"trained 64-{WIDTH}-{WIDTH}-10 on {len(train)} digits in {time.perf_counter() - start:.1f} s\n")

    start = time.perf_counter()
    qmodel = torchq.convert(model, DataLoader(train, batch_size=64))
    print(f"torchq.convert took {time.perf_counter() - start:.2f} s\n")
    print(torchq.report(qmodel), end="\n\n")
    print(compare(model, qmodel, test), end="\n\n")
    print(f"{machine()}\nLatency: best of interleaved rounds; the speed-up is over this torch's own float32.")


if __name__ == "__main__":
    main()
