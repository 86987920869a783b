"""Random numbers, from a generator with its own seed or from one passed in, and the limits of float32."""

import torch
from torch import Generator, Tensor

FLT_MIN = torch.finfo(torch.float32).tiny
FLT_MAX = torch.finfo(torch.float32).max


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_int8(*shape: int, generator: Generator) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)


def random_float(*shape: int, generator: Generator) -> Tensor:
    """Rows of different spread and mean, like tokens."""
    spread, centre = torch.rand(2, *shape[:-1], 1, generator=generator) * 3
    return torch.randn(shape, generator=generator) * spread + centre - 1


def random_weight(n: int, k: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """An int8 weight (n, k), its scale (n,) and bias (n,)."""
    scale = torch.rand(n, generator=generator) * 0.02 + 1e-3
    return random_int8(n, k, generator=generator), scale, torch.randn(n, generator=generator)
