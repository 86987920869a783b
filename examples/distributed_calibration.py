"""Calibration by several processes, each on its own part of the data. All of them end with the same int8 model.

    torchrun --nproc-per-node 2 examples/distributed_calibration.py

Alone, `python examples/distributed_calibration.py` starts two processes by itself.
"""

import argparse
import hashlib
import os

import torch
from data import digits
from torch import distributed, nn
from torch.utils.data import DataLoader, Subset

import torchq


def train(images: torch.Tensor, labels: torch.Tensor, steps: int) -> nn.Module:
    """Gives the same network in every process: same seed, same data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model.eval()


def fingerprint(qmodel: nn.Module) -> str:
    """Gives a hash of all that the model stores."""
    tensors = qmodel.state_dict()
    return hashlib.sha256(b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))).hexdigest()[:16]


def work(steps: int) -> None:
    """What each process does."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank, size = distributed.get_rank(), distributed.get_world_size()
    training, test = digits()
    model = train(*training.tensors, steps)

    own = Subset(training, range(rank, len(training), size))  # as a DistributedSampler would deal it
    qmodel = torchq.convert(model, DataLoader(own, batch_size=64), group=distributed.group.WORLD, progress=False)

    prints: list[str] = [""] * size
    distributed.all_gather_object(prints, fingerprint(qmodel))
    if rank == 0:
        images, labels = test.tensors
        for name, each in (("float", model), ("int8", qmodel)):
            accuracy = 100 * (each(images).argmax(dim=1) == labels).float().mean().item()
            print(f"{name}: accuracy {accuracy:.2f} %")
        print(f"{size} processes, {len(own)} images in this one; the same int8 model in all: {len(set(prints)) == 1}")
    distributed.barrier()  # no process ends while another works
    distributed.destroy_process_group()


def main() -> None:
    """Works, in a process of torchrun; else starts two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    if "RANK" in os.environ:
        work(options.steps)
    else:
        from torch.distributed.run import main as torchrun

        torchrun(["--nproc-per-node", "2", "--standalone", __file__, "--steps", str(options.steps)])


if __name__ == "__main__":
    main()
