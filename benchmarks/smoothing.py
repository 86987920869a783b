"""Gain and cost of smoothing and rounding: output SQNR and CPU time of `convert` for a small transformer.

taskset -c 1 python -m benchmarks.smoothing
"""

import time

import torch
from torch import Tensor, nn

from torchq import QConfig, convert
from torchq.config import ActivationScheme, Rounding, SmoothingScheme
from torchq.numerics.metrics import sqnr_db

WIDTH, LAYERS, OUTLIERS = 512, 4, 5
CHOICES: list[tuple[ActivationScheme, Rounding]] = [("auto", "nearest"), ("auto", "auto"), ("static", "auto")]
SMOOTHING: list[SmoothingScheme] = ["none", "auto"]
CONFIGS = [QConfig(activation=a, rounding=r, smoothing=s) for a, r in CHOICES for s in SMOOTHING]


class Block(nn.Module):
    """A pre-norm transformer block made of plain Linears."""

    def __init__(self, width: int, heads: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) -> (batch, tokens, width)."""
        y = self.norm1(x)
        q, k, v = (f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
        z: Tensor = x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))
        return z


def transformer(outliers: int, width: int = WIDTH, layers: int = LAYERS, heads: int = 8) -> nn.Sequential:
    """Random weights; `outliers` channels of each norm 50 times as large, and the next weights 50 times smaller."""
    torch.manual_seed(0)
    blocks = [Block(width, heads) for _ in range(layers)]
    for block in blocks:
        for norm, readers in ((block.norm1, (block.q, block.k, block.v)), (block.norm2, (block.fc1,))):
            channels = torch.randperm(width)[:outliers]
            norm.weight[channels] *= 50
            norm.bias[channels] *= 50
            for reader in readers:
                reader.weight[:, channels] /= 50
    return nn.Sequential(nn.Linear(64, width), *blocks, nn.LayerNorm(width), nn.Linear(width, 64)).eval()


@torch.no_grad()
def main() -> None:
    """Prints one row per model and configuration."""
    torch.set_num_threads(1)
    *data, x = torch.randn(9, 8, 64, 64, generator=torch.Generator().manual_seed(0))
    print("| outlier channels | activation | smoothing | rounding | convert | output SQNR |")
    print("|---|---|---|---|---|---|")
    for outliers in (0, OUTLIERS):
        model = transformer(outliers)
        expected = model(x)
        for config in CONFIGS:
            start = time.process_time()
            qmodel = convert(model, data, config=config)
            seconds = time.process_time() - start
            choices = f"{config.activation} | {config.smoothing} | {config.rounding}"
            print(f"| {outliers} | {choices} | {seconds:.1f} s | {sqnr_db(expected, qmodel(x)):.1f} dB |", flush=True)


if __name__ == "__main__":
    main()
