"""An accuracy budget: as much becomes int8 as your own metric allows.

The images come from a sensor that adds a large constant, which the trained network takes back in its first bias. Eight
bits for values from 150 to 151 leave little of an image, so that layer costs accuracy in int8. The others do not.
`convert` finds that out by the metric.

    python examples/accuracy_budget.py --max-drop 0.01
"""

import argparse

import torch
from data import digits
from torch import nn

import torchq

OFFSET = 150


def train(images: torch.Tensor, labels: torch.Tensor, steps: int) -> nn.Module:
    """Gives a trained network that takes images of the sensor."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    with torch.no_grad():
        model[0].bias -= OFFSET * model[0].weight.sum(dim=1)
    return model.eval()


def main() -> None:
    """Trains, converts without and with a budget, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-drop", type=float, default=0.01, help="how much accuracy may be lost, from 0 to 1")
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()

    (images, labels), (test_images, test_labels) = (split.tensors for split in digits())
    model = train(images, labels, options.steps)
    batches, test_images = (images + OFFSET).split(64), test_images + OFFSET

    def accuracy(each: nn.Module) -> float:
        return (each(test_images).argmax(dim=1) == test_labels).float().mean().item()

    config = torchq.QConfig(min_sqnr_db=-100)  # only the metric decides, and no limit in dB
    everything = torchq.convert(model, batches, config=config)
    within = torchq.convert(model, batches, config=config, evaluate=accuracy, max_drop=options.max_drop)

    for name, each in (("float", model), ("all int8", everything), ("within the budget", within)):
        print(f"{name}: accuracy {100 * accuracy(each):.2f} %")
    print("left in float:", *(name for name, layer in within.torchq_plan.layers.items() if not layer.is_int8))
    print(torchq.plan_of(within).frontier)


if __name__ == "__main__":
    main()
