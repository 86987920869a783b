"""Batch inference on Ray Data: workers that load one int8 file, and map its float tensors instead of copying them.

    python examples/batch_inference.py --workers 2 --rows 20000

It needs Ray: pip install 'ray[data]'. The same class serves any engine that keeps an object in each worker and gives it
batches of arrays.
"""

import argparse
import os
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import ray
import torch
from torch import Tensor, nn

import torchq

WORDS, LENGTH = 20_000, 16


class Classifier(nn.Module):
    """Words of a text, as numbers -> one of eight topics."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(WORDS, 128)
        self.layers = nn.Sequential(nn.Linear(128, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 8))

    def forward(self, ids: Tensor) -> Tensor:
        """(N, LENGTH) -> (N, 8)."""
        scores: Tensor = self.layers(self.words(ids))
        return scores


def texts(rows: int) -> Tensor:
    """Gives made-up texts."""
    return torch.randint(WORDS, (rows, LENGTH), generator=torch.Generator().manual_seed(0))


def make_file(path: Path) -> nn.Module:
    """Converts and saves. This happens elsewhere, once. The table stays in float here, to show that it is mapped."""
    torch.manual_seed(0)
    config = torchq.QConfig(embeddings=False)
    qmodel = torchq.convert(Classifier().eval(), texts(512).split(64), config=config)
    torchq.save(qmodel, path)
    return qmodel


class Worker:
    """Ray makes one in each worker process, and calls it with batches."""

    def __init__(self, path: str) -> None:
        torch.set_num_threads(1)  # the workers are parallel already
        with torch.device("meta"):
            empty = Classifier().eval()
        self.model = torchq.load(path, empty)
        self.maps_file = os.path.realpath(path) in Path("/proc/self/maps").read_text()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A batch with "ids" -> with "topic", and which process that was."""
        with torch.inference_mode():
            scores = self.model(torch.from_numpy(batch["ids"].copy()))
        process, mapped = (np.full(len(scores), value) for value in (os.getpid(), self.maps_file))
        return {"ids": batch["ids"], "topic": scores.argmax(1).numpy(), "process": process, "maps_file": mapped}


def main() -> None:
    """Runs all texts through the workers, and compares with this process."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rows", type=int, default=20_000)
    options = parser.parse_args()
    ray.init(num_cpus=options.workers, include_dashboard=False, object_store_memory=2**27, logging_level="ERROR")
    ray.data.DataContext.get_current().enable_progress_bars = False
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "classifier.safetensors"
        qmodel = make_file(path)
        rows = ray.data.from_items([{"ids": row} for row in texts(options.rows).numpy()])
        workers = ray.data.ActorPoolStrategy(size=options.workers)
        done = rows.map_batches(
            Worker, fn_constructor_kwargs={"path": str(path)}, batch_size=256, compute=workers
        ).to_pandas()
    ray.shutdown()
    with torch.inference_mode():
        topics = qmodel(torch.tensor(np.stack(done["ids"]))).argmax(1)
    same = torch.equal(topics, torch.tensor(done["topic"].to_numpy()))
    print(f"{len(done)} texts in {done['process'].nunique()} processes, by topic: {Counter(done['topic'].tolist())}")
    print(f"every worker maps the file: {bool(done['maps_file'].all())}")
    print(f"the topics of one process: {same}")


if __name__ == "__main__":
    main()
