"""Quantization-aware training: where int8 alone costs too much, a few hundred steps on int8 values bring it back.

A narrow network with one scale for a whole weight, and two channels of each hidden layer 50 times as large as the
others, which is the same float function.

    python examples/qat.py
"""

import argparse

import torch
from data import digits
from torch import nn

import torchq


def step(model: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor, labels: torch.Tensor) -> None:
    """One step of training."""
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(images), labels).backward()
    optimizer.step()


def train(images: torch.Tensor, labels: torch.Tensor, steps: int) -> nn.Module:
    """Gives 64-16-16-10, trained, with two outlier channels in each hidden layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        step(model, optimizer, images, labels)
    with torch.no_grad():
        for one, after in ((model[0], model[2]), (model[2], model[4])):
            one.weight[:2] *= 50
            one.bias[:2] *= 50
            after.weight[:, :2] /= 50
    return model


def main() -> None:
    """Trains, converts, trains on int8 values, converts again, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()

    (images, labels), (test_images, test_labels) = (split.tensors for split in digits())
    model, batches = train(images, labels, 150).eval(), images.split(64)

    def accuracy(each: nn.Module) -> float:
        with torch.no_grad():
            return 100 * (each(test_images).argmax(dim=1) == test_labels).float().mean().item()

    settings = {"weight": "per_tensor", "activation": "static", "smoothing": "none"}
    converted = torchq.convert(model, batches, config=torchq.QConfig(**settings, rounding="nearest", min_sqnr_db=-100))

    prepared = torchq.prepare_qat(model, batches, config=torchq.QConfig(**settings)).train()
    optimizer = torch.optim.Adam(prepared.parameters(), lr=1e-3)
    for _ in range(options.steps):
        step(prepared, optimizer, images, labels)
    trained = torchq.convert(prepared.eval(), batches)

    print(f"float:     {accuracy(model):.2f} %")
    print(f"converted: {accuracy(converted):.2f} %")
    print(f"trained:   {accuracy(trained):.2f} %, after {options.steps} steps on int8 values")
    with torch.no_grad(), torchq.simulate():
        print("what was trained is what runs:", torch.equal(trained(test_images), prepared(test_images)))


if __name__ == "__main__":
    main()
