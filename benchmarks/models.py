"""The networks that benchmarks/accuracy.py measures, trained from scratch on data that every machine has.

    python -m benchmarks.models           # trains what build/models lacks, and prints each one's accuracy

An MLP, a convolutional network and a vision transformer learn scikit-learn's handwritten digits; a GPT-style and a
BERT-style transformer learn the bytes of Python's own standard library. All are plain torch.nn. `with_outliers` makes a
twin of each that computes the same function but has outlier channels in its activations, as large language models have.
"""

import argparse
import copy
import hashlib
import math
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from tqdm import tqdm

from benchmarks import demo
from torchq.numerics.metrics import sqnr_db

CACHE = Path(__file__).parents[1] / "build" / "models"
IGNORED = -100  # targets that neither the loss nor the metrics count, as in F.cross_entropy
BYTES, MASK = 128, 0  # the vocabulary is ASCII; no source file contains NUL
OUTLIER_FACTOR, OUTLIER_SHARE = 50.0, 1 / 32
MIN_TWIN_DB = 100.0  # float32 rounds at about 140 dB, and a few layers of it add up


class Batch(NamedTuple):
    """Inputs and targets. A target is IGNORED where the model has nothing to predict."""

    inputs: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Recipe:
    """How one network is made. The cache key has all values."""

    kind: str
    width: int
    depth: int
    steps: int
    batch: int
    learning_rate: float
    context: int = 0  # tokens, of text
    position: float = 0.02  # initial standard deviation of the position embeddings; that of the tokens is 1
    seed: int = 0


RECIPES = {
    "digits MLP": Recipe("mlp", width=1024, depth=2, steps=168, batch=64, learning_rate=1e-3),
    "digits CNN": Recipe("cnn", width=32, depth=2, steps=400, batch=64, learning_rate=2e-3),
    "digits ViT": Recipe("vit", width=128, depth=4, steps=600, batch=64, learning_rate=1e-3),
    "text GPT": Recipe("gpt", width=128, depth=4, steps=600, batch=16, learning_rate=2e-3, context=128),
    # BERT has 5 targets a row, where GPT has 128, so it learns slowly. With a context of 128 bytes, or with small
    # initial positions, it learns for thousands of steps only how frequent each byte is.
    "text BERT": Recipe("bert", 128, depth=4, steps=2500, batch=32, learning_rate=2e-3, context=32, position=0.2),
}
HEADS, PATCH, SIDE, CLASSES = 4, 2, 8, 10
DIGITS = ("mlp", "cnn", "vit")


# ---- The networks ---------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A pre-norm transformer block: x + attention(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(self, width: int, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) -> (B, T, width)."""
        h = self.norm1(x)
        q, k, v = (layer(h).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """Blocks over embedded tokens and learned positions, a norm, and a linear head."""

    def __init__(
        self, embed: nn.Module, tokens: int, width: int, depth: int, classes: int, causal: bool, position: float
    ) -> None:
        super().__init__()
        self.embed = embed
        self.position = nn.Parameter(position * torch.randn(tokens, width))
        self.blocks = nn.Sequential(*(Block(width, causal) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, T), or another input of `embed` -> logits (B, T, classes)."""
        return self.head(self.features(x))  # type: ignore[no-any-return]

    def features(self, x: Tensor) -> Tensor:
        """The normed output of the last block, (B, T, width)."""
        return self.norm(self.blocks(self.embed(x) + self.position))  # type: ignore[no-any-return]


class Patches(nn.Module):
    """Cuts images (B, 64) of 8 x 8 into (B, 16, width): a linear map of each patch of 2 x 2, and no convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(PATCH * PATCH, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 64) -> (B, 16, width)."""
        n = SIDE // PATCH
        patches = x.unflatten(-1, (n, PATCH, n, PATCH)).transpose(2, 3).flatten(3).flatten(1, 2)
        return self.project(patches)  # type: ignore[no-any-return]


class VisionTransformer(Transformer):
    """A Transformer over patches, whose head reads the mean token."""

    def __init__(self, width: int, depth: int, position: float) -> None:
        super().__init__(Patches(width), (SIDE // PATCH) ** 2, width, depth, CLASSES, False, position)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 64) -> logits (B, 10)."""
        return self.head(self.features(x).mean(dim=1))  # type: ignore[no-any-return]


class Residual(nn.Module):
    """A sum of x and what a chain of convolutions with norms makes of it: two of 3 x 3, or a depthwise one inside."""

    def __init__(self, width: int, *, depthwise: bool) -> None:
        super().__init__()
        wide = 2 * width if depthwise else width
        self.expand = nn.Conv2d(width, wide, 1 if depthwise else 3, padding="same", bias=False)
        self.norm1, self.act1 = nn.BatchNorm2d(wide), nn.ReLU()
        self.middle = nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False) if depthwise else nn.Identity()
        self.norm2: nn.Module = nn.BatchNorm2d(wide) if depthwise else nn.Identity()
        self.act2: nn.Module = nn.ReLU() if depthwise else nn.Identity()
        self.project = nn.Conv2d(wide, width, 1 if depthwise else 3, padding="same", bias=False)
        self.norm3, self.act3 = nn.BatchNorm2d(width), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, H, W) -> the same."""
        y = self.act1(self.norm1(self.expand(x)))
        y = self.act2(self.norm2(self.middle(y)))
        return self.act3(self.norm3(self.project(y)) + x)  # type: ignore[no-any-return]


class ConvolutionalNetwork(nn.Module):
    """A stem, residual blocks with and without depthwise convolutions at two resolutions, and a linear head."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        blocks = [Residual(width, depthwise=depthwise) for _ in range(depth) for depthwise in (False, True)]
        self.blocks, self.pool = nn.Sequential(*blocks), nn.MaxPool2d(2)
        self.head = nn.Linear(width * (SIDE // 2) ** 2, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 64) -> logits (B, 10)."""
        x = self.blocks(self.stem(x.reshape(-1, 1, SIDE, SIDE)))
        return self.head(self.pool(x).flatten(1))  # type: ignore[no-any-return]


def network(recipe: Recipe) -> nn.Module:
    """The untrained network of a recipe."""
    torch.manual_seed(recipe.seed)
    width, depth = recipe.width, recipe.depth
    if recipe.kind == "mlp":
        sizes = [SIDE * SIDE, *[width] * depth]
        hidden = [m for k, n in pairwise(sizes) for m in (nn.Linear(k, n), nn.ReLU())]
        return nn.Sequential(*hidden, nn.Linear(width, CLASSES))
    if recipe.kind == "cnn":
        return ConvolutionalNetwork(width, depth)
    if recipe.kind == "vit":
        return VisionTransformer(width, depth, recipe.position)
    embed, causal = nn.Embedding(BYTES, width), recipe.kind == "gpt"
    return Transformer(embed, recipe.context, width, depth, BYTES, causal, recipe.position)


# ---- Data -----------------------------------------------------------------------------------------------------------


class Data:
    """Training and held-out batches: of digits, the next byte ("gpt"), or masked bytes ("bert")."""

    def __init__(self, kind: str, context: int = 0) -> None:
        self.kind, self.context = kind, context
        if kind in DIGITS:
            self.splits = {name: split.tensors for name, split in zip(("train", "test"), demo.digits(), strict=True)}
            self.fingerprint = ""
        else:
            train, test = standard_library()
            self.splits = {"train": (train,), "test": (test,)}
            self.fingerprint = hashlib.sha256(train.to(torch.uint8).numpy().tobytes()).hexdigest()

    def batches(self, split: str, size: int, seed: int) -> Iterator[Batch]:
        """Endless random batches of one split; the same seed gives the same batches."""
        generator = torch.Generator().manual_seed(seed)
        source = self.splits[split]
        while True:
            if self.kind in DIGITS:
                pick = torch.randint(len(source[0]), (size,), generator=generator)
                yield Batch(source[0][pick], source[1][pick])
            else:
                start = torch.randint(len(source[0]) - self.context, (size, 1), generator=generator)
                yield self._ask(source[0][start + torch.arange(self.context + 1)], generator)

    def held_out(self, size: int) -> Iterator[Batch]:
        """All whole batches of the test split, in order."""
        source, generator = self.splits["test"], torch.Generator().manual_seed(0)
        if self.kind in DIGITS:
            pairs = zip(*(tensor.split(size) for tensor in source), strict=True)
            yield from (Batch(*pair) for pair in pairs if len(pair[0]) == size)
            return
        windows = source[0].unfold(0, self.context + 1, self.context)
        yield from (self._ask(w, generator) for w in windows.split(size) if len(w) == size)

    def _ask(self, windows: Tensor, generator: torch.Generator) -> Batch:
        """Inputs and targets from windows (B, context + 1) of bytes: the next byte, or the 15 % that are masked."""
        if self.kind == "gpt":
            return Batch(windows[:, :-1].clone(), windows[:, 1:].clone())
        tokens = windows[:, :-1].clone()
        masked = torch.rand(tokens.shape, generator=generator) < 0.15
        return Batch(tokens.masked_fill(masked, MASK), tokens.masked_fill(~masked, IGNORED))


def standard_library() -> tuple[Tensor, Tensor]:
    """The ASCII bytes of the top-level modules of Python's standard library; every tenth file is held out for test."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = [path.read_bytes() for path in sorted(folder.glob("*.py"))]
    if len(files) < 20:
        raise RuntimeError(f"benchmarks.models: {folder} has {len(files)} Python sources, expected at least 20.")
    parts = (files[1::10], [data for i, data in enumerate(files) if i % 10 != 1])
    test, train = (torch.frombuffer(bytearray(b"\n".join(part)), dtype=torch.uint8) for part in parts)
    return train[train < BYTES].long(), test[test < BYTES].long()


# ---- Training -------------------------------------------------------------------------------------------------------


def trained(recipe: Recipe, data: Data, *, progress: bool = True) -> nn.Module:
    """A network of this recipe, trained by AdamW with warm-up and cosine decay. It depends only on recipe and data."""
    model = network(recipe).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.01)
    warm_up = max(1, recipe.steps // 20)

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / warm_up) * (0.55 + 0.45 * math.cos(math.pi * step / recipe.steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    batches = data.batches("train", recipe.batch, recipe.seed)
    for _ in tqdm(range(recipe.steps), desc=f"training {recipe.kind}", disable=None if progress else True):
        inputs, targets = next(batches)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten(), ignore_index=IGNORED)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def load(recipe: Recipe, data: Data, *, cache: Path = CACHE) -> nn.Module:
    """The trained network, from the cache if it has one for the same recipe, data and torch."""
    key = hashlib.sha256(repr((recipe, data.fingerprint, torch.__version__)).encode()).hexdigest()[:12]
    path = cache / f"{recipe.kind}-{key}.pt"
    if path.exists():
        model = network(recipe).eval()
        model.load_state_dict(torch.load(path, weights_only=True))
        return model
    model = trained(recipe, data)
    cache.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)
    return model


# ---- Outliers -------------------------------------------------------------------------------------------------------


def rescalable(model: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Linear | nn.Conv2d]]]:
    """Each module whose output channels may be scaled, with the layers that read them. Nothing else reads them.

    A factor on a channel of a norm or Linear passes through a ReLU (if positive) and a mean over tokens.
    """
    for module in model.modules():
        if isinstance(module, nn.Sequential):
            children = list(module)
            for first, between, last in zip(children, children[1:], children[2:], strict=False):
                if isinstance(first, nn.Linear) and isinstance(between, nn.ReLU) and isinstance(last, nn.Linear):
                    yield first, [last]
        elif isinstance(module, Residual):  # in a depthwise convolution each channel goes on by itself
            yield (module.norm1 if isinstance(module.norm2, nn.Identity) else module.norm2), [module.project]
        elif isinstance(module, Block):
            yield module.norm1, [module.query, module.key, module.value]
            yield module.norm2, [cast(nn.Linear, module.mlp[0])]
        elif isinstance(module, Transformer):
            yield module.norm, [module.head]


@torch.no_grad()
def with_outliers(model: nn.Module, *, factor: float = OUTLIER_FACTOR, share: float = OUTLIER_SHARE) -> nn.Module:
    """A copy that computes the same function, but in which a `share` of each Linear's inputs is `factor` x larger.

    The weight and bias of these channels are multiplied by `factor` in the module before, and the columns that read
    them are divided by it: `(x ∘ s) · (w / s)ᵀ = x · wᵀ`.

    >>> _ = torch.manual_seed(0)
    >>> model, x = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4)), torch.randn(2, 8)
    >>> torch.allclose(with_outliers(model)(x), model(x), atol=1e-6)
    True
    """
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for producer, readers in rescalable(model):
        channels = readers[0].weight.shape[1]
        chosen = torch.randperm(channels, generator=generator)[: max(1, int(share * channels))]
        for parameter in producer.parameters():
            parameter[chosen] *= factor
        for reader in readers:
            reader.weight[:, chosen] /= factor
    return model


def check_twin(model: nn.Module, twin: nn.Module, inputs: Tensor) -> None:
    """Raises RuntimeError unless both compute the same, up to float32 rounding."""
    with torch.no_grad():
        agreement_db = sqnr_db(model(inputs), twin(inputs))
    if not agreement_db >= MIN_TWIN_DB:
        raise RuntimeError(
            f"benchmarks.models: the outlier twin agrees with its model to {agreement_db:.1f} dB, expected "
            f"{MIN_TWIN_DB:g} dB or more: `rescalable` names a reader too few, or a pair that is not linear."
        )


def main() -> None:
    """Trains all, and prints seconds and held-out accuracy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=RECIPES, default=list(RECIPES))
    for name in parser.parse_args().models:
        recipe = RECIPES[name]
        data, start = Data(recipe.kind, recipe.context), time.perf_counter()
        model = load(recipe, data)
        seconds = time.perf_counter() - start
        with torch.inference_mode():
            pairs = [(model(batch.inputs).argmax(dim=-1), batch.targets) for batch in data.held_out(16)]
        hits = sum(int((said == asked).sum()) for said, asked in pairs)
        count = sum(int((asked != IGNORED).sum()) for _, asked in pairs)
        print(f"{name}: {seconds:.0f} s, {100 * hits / count:.2f} % of {count} held-out targets", flush=True)


if __name__ == "__main__":
    main()
