"""What the examples learn from, without a download: scikit-learn's digits, and Python's own standard library."""

import re
import sysconfig
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import TensorDataset

WORD = re.compile(r"[A-Za-z]+|\d|[^\w\s]")
PACKAGES = ("asyncio", "email", "unittest", "xml")


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Gives 1300 images (64,) of handwritten digits with their labels to train on, and 497 to test."""
    data = load_digits()
    images, labels = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return TensorDataset(images[order[:1300]], labels[order[:1300]]), TensorDataset(
        images[order[1300:]], labels[order[1300:]]
    )


def sources(package: str) -> str:
    """Gives the text of a package of the standard library."""
    folder = Path(sysconfig.get_path("stdlib")) / package
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.py")))


def snippets(words: int = 32, of_each: int = 1500, packages: tuple[str, ...] = PACKAGES) -> tuple[list[str], Tensor]:
    """Gives pieces of packages, `words` long, and for each the number of its package, in a random order."""
    texts, labels = [], []
    for label, package in enumerate(packages):
        found = WORD.findall(sources(package))
        pieces = [" ".join(found[i : i + words]) for i in range(0, len(found) - words, words)][:of_each]
        texts += pieces
        labels += [label] * len(pieces)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    return [texts[i] for i in order], torch.tensor([labels[i] for i in order])
