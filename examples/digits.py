"""A small network for handwritten digits: train, convert, look, compare. The shortest whole example.

python examples/digits.py
"""

import argparse
import time

import torch
from data import digits
from torch import nn
from torch.utils.data import DataLoader

import torchq


def train(data, width: int, epochs: int) -> nn.Module:
    """Gives 64-width-width-10 with ReLU, trained by Adam."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for images, labels in DataLoader(data, batch_size=64, shuffle=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return model.eval()


def best_time(model: nn.Module, images: torch.Tensor) -> float:
    """Gives the shortest of 200 calls, in microseconds."""
    times = []
    for _ in range(200):
        start = time.perf_counter()
        model(images)
        times.append(time.perf_counter() - start)
    return 1e6 * min(times)


@torch.inference_mode()
def main() -> None:
    """Trains, converts, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--epochs", type=int, default=8)
    options = parser.parse_args()

    training, test = digits()
    with torch.inference_mode(False):
        model = train(training, options.width, options.epochs)
    qmodel = torchq.convert(model, DataLoader(training, batch_size=64))
    print(torchq.report(qmodel), end="\n\n")

    images, labels = test.tensors
    for name, each in (("float", model), ("int8", qmodel)):
        accuracy = 100 * (each(images).argmax(dim=1) == labels).float().mean().item()
        print(f"{name}: accuracy {accuracy:.2f} %, {best_time(each, images[:16]):.0f} us for 16 images")


if __name__ == "__main__":
    main()
