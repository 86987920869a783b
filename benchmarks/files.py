"""save() and load() of a transformer of 100 million weights: seconds, and bytes against float32's.

    taskset -c 0 python -m benchmarks.files

The load is of a model on the meta device, with the file in the page cache. The answer is checked.
"""

import os
import tempfile
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import torchq

VOCABULARY, WIDTH, LAYERS = 20000, 768, 12


class Net(nn.Module):
    """An encoder of BERT-base's shape."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, WIDTH // 64, 4 * WIDTH, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, LAYERS)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (B, T) -> (B, T, WIDTH)."""
        return self.encoder(self.table(ids))  # type: ignore[no-any-return]


def main() -> None:
    """Prints one line for each."""
    torch.set_num_threads(1)
    model = Net().eval()
    count = sum(parameter.numel() for parameter in model.parameters())
    qmodel = torchq.convert(model)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "m.safetensors")
        saving = min(_seconds(lambda: torchq.save(qmodel, path)) for _ in range(3))
        size = os.path.getsize(path)
        loading = min(_seconds(lambda: torchq.load(path, _empty())) for _ in range(5))
        ids = torch.arange(16).reshape(1, 16)
        assert torch.equal(torchq.load(path, _empty())(ids), qmodel(ids))
    print(f"{count / 1e6:.1f} million parameters, {size / 1e6:.1f} MB: {size / count:.3f} of a quarter of float32")
    print(f"save {saving:.2f} s, load {loading:.2f} s, kernel {torchq.kernels.active()}, torch {torch.__version__}")


def _empty() -> Net:
    with torch.device("meta"):
        return Net().eval()


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
