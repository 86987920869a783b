"""nn.TransformerEncoder in int8 against torch's float32, with and without padding: time, and SQNR of the real rows.

taskset -c 0 python -m benchmarks.encoder
python -m benchmarks.encoder --threads 2

6 layers of 512, 8 heads, a feed forward of 2048, random weights. torch runs as it is called: by its own fused kernels,
which skip padding by nested tensors. It exits with an error where an answer is wrong: less than 30 dB, or another value
in a row of padding.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.demo import markdown
from benchmarks.timing import interleaved, machine
from torchq import convert
from torchq.numerics.metrics import sqnr_db

WIDTH, HEADS, FEED_FORWARD, LAYERS = 512, 8, 2048, 6
LEAST_DB = 30.0
TORCH = "torch"

# Batch, tokens, and the share of padding: the first sequence has all tokens, the others fewer.
CALLS = [(1, 16, 0.0), (1, 128, 0.0), (8, 64, 0.0), (8, 128, 0.5), (8, 128, 0.8), (32, 64, 0.8)]


def padding(batch: int, tokens: int, share: float) -> Tensor | None:
    """A mask that is True for this share of all tokens, at the ends of the sequences; None for no padding."""
    if share == 0:
        return None
    left = round(batch * tokens * (1 - share)) - tokens  # for all but the first
    lengths = [tokens, *(left // (batch - 1) + (i < left % (batch - 1)) for i in range(batch - 1))]
    return torch.arange(tokens) >= torch.tensor(lengths)[:, None]


def models() -> dict[str, nn.Module]:
    """The float encoder, and both that are made of it."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, FEED_FORWARD, batch_first=True)
    encoder = nn.TransformerEncoder(layer, LAYERS).eval()
    data = [torch.randn(4, 64, WIDTH) for _ in range(4)]
    return {TORCH: encoder, "without data": convert(encoder), "calibrated": convert(encoder, data, progress=False)}


def row(encoders: dict[str, nn.Module], batch: int, tokens: int, share: float) -> list[str]:
    """The time of torch's, and of each other with its ratio and SQNR."""
    x, mask = torch.randn(batch, tokens, WIDTH), padding(batch, tokens, share)
    calls: dict[str, Callable[[], Tensor]] = {
        name: lambda encoder=encoder: encoder(x, src_key_padding_mask=mask)  # type: ignore[misc]
        for name, encoder in encoders.items()
    }
    hidden = torch.zeros(batch, tokens, dtype=torch.bool) if mask is None else mask
    exact, times = calls[TORCH](), interleaved(calls, rounds=7, seconds=0.2)
    cells = []
    for name in encoders:
        y = calls[name]()
        db = sqnr_db(exact[~hidden], y[~hidden])
        if db < LEAST_DB or not torch.equal(y[hidden], exact[hidden]):
            raise SystemExit(f"{name}, {batch} x {tokens}, {share:.0%} padding: a wrong answer, {db:.1f} dB.")
        ratio = "" if name == TORCH else f" ({times[TORCH] / times[name]:.2f}x, {db:.0f} dB)"
        cells.append(f"{times[name] * 1e3:.1f}{ratio}")
    return [f"{batch} x {tokens}, {share:.0%}", *cells]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    encoders = models()
    with torch.inference_mode():
        rows = [row(encoders, *call) for call in CALLS]
    print(markdown([["tokens, padding", "torch, ms", "torchq without data, ms", "torchq calibrated, ms"], *rows]))
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
