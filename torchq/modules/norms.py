"""Norms behind a layer that are a factor and an offset for each channel, which the layer's weight can have.

norm(x · wᵀ + b) = x · (w · g)ᵀ + (b · g + offset)        of a batch norm in eval mode: g = gain / sqrt(variance + eps)

Batch norms of torch are known by their class, and some that go on with children by their code (`norm_row.py`): these
children then are called as before. Other norms are known by what they compute, such as the FrozenBatchNorm2d that
many models have a copy of: their code is read, since code that somebody could notice must not run, and then run.
"""

import functools
import inspect
import types
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from torchq.modules.base import Matrix
from torchq.modules.folding import IDLE
from torchq.modules.norm_row import RANKS, row_of
from torchq.modules.plain_code import ARITHMETIC, PRODUCTS, forward_of, is_plain_value, odd_step
from torchq.modules.refusals import not_settable

_WORDS = ARITHMETIC | PRODUCTS | {"batch_norm", "requires_grad"}
_SIZES = [1e-3, 0.1, 0.7, 1.0, 2.5, 3.5, 6.5, 20.0, 1e4]
_PROBE = [0.0, *_SIZES, *(-size for size in _SIZES)]
_CLOSE = 1e-5  # relative: what it may lose that computes in float32 whatever it gets


class IncludedNorm(nn.Sequential):
    """What stands in the place of a norm that the layer before it includes: the children that its code went on with."""

    @classmethod
    def of(cls, norm: nn.Module) -> "IncludedNorm":
        """That of a norm. What the norm's code may have asked for, to go on with its children, can't be set."""
        row = behind(norm)
        included = cls(OrderedDict((name, norm.get_submodule(name)) for name in row))
        if row:
            vars(included)["_settings"] = frozenset(name for name in vars(norm) if name[0] != "_") - {"training"}
        return included

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OF_NORMS or name in vars(self).get("_settings", ()):
            raise not_settable(name, "a norm that the weight of the int8 layer before it includes")
        super().__setattr__(name, value)


_OF_NORMS = ("eps", "weight", "bias", "running_mean", "running_var")


def behind(norm: nn.Module) -> tuple[str, ...]:
    """The names of the children that a norm calls on what it has computed, in order.

    >>> behind(nn.BatchNorm2d(4))
    ()
    """
    return row_of(norm) or ()


def full_row(name: str, norm: nn.Module) -> list[str]:
    """The name of a norm, and those of the children behind it that have an effect in eval mode."""
    return [name, *(f"{name}.{key}" for key in behind(norm) if type(norm._modules[key]) not in IDLE)]


def is_foldable(module: nn.Module | None, rank: int | None = None) -> bool:
    """Whether it multiplies and shifts each channel of inputs of this rank, or of some rank, and nobody watches it.

    What children of its own make of that (`behind`) does not count.

    >>> is_foldable(nn.BatchNorm2d(4)), is_foldable(nn.BatchNorm2d(4, track_running_stats=False))
    (True, False)
    >>> is_foldable(nn.BatchNorm2d(4), rank=3), is_foldable(nn.LayerNorm(4))
    (False, False)
    """
    if module is None or "forward" in vars(module) or (module._modules and row_of(module) is None):
        return False
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if any(hooks):
        return False
    ranks = _ranks(module)
    return bool(ranks) if rank is None else rank in ranks


def folded(matrix: Matrix, norm: nn.Module) -> Matrix:
    """The matrix of a layer together with the norm behind it, float32.

    >>> norm = nn.BatchNorm1d(2).eval()
    >>> _ = norm.running_mean.fill_(1.0)
    >>> [each.tolist() for each in folded(Matrix(torch.eye(2), None), norm)]
    [[[0.9999949932098389, 0.0], [0.0, 0.9999949932098389]], [-0.9999949932098389, -0.9999949932098389]]
    """
    gain, offset = factors(norm)
    bias = torch.zeros(len(gain), dtype=torch.float64, device="cpu") if matrix.bias is None else matrix.bias.detach()
    weight = (matrix.weight.detach() * gain.unsqueeze(1)).float()
    return Matrix(weight, (bias.double() * gain + offset).float())


def factors(norm: Any) -> tuple[Tensor, Tensor]:
    """What a norm in eval mode multiplies each channel by, and what it adds, float64.

    >>> gain, offset = factors(nn.BatchNorm2d(3, eps=0.0))
    >>> gain.tolist(), offset.tolist()
    ([1.0, 1.0, 1.0], [0.0, 0.0, 0.0])
    """
    if _batch_norm(norm) is None:
        return _Forward.of(norm).factors(_tensors(norm), _ranks(norm))
    gain = (norm.running_var.detach().double() + norm.eps).rsqrt()
    gain = gain if norm.weight is None else gain * norm.weight.detach().double()
    offset = -norm.running_mean.detach().double() * gain
    return gain, offset if norm.bias is None else offset + norm.bias.detach().double()


# ---- Recognition ----------------------------------------------------------------------------------------------------


def _ranks(module: nn.Module) -> frozenset[int]:
    """The ranks of inputs (N, C, *spatial) for which it is a factor and an offset for each channel."""
    tensors, batch_norm = _tensors(module), _batch_norm(module)
    if batch_norm is not None:
        fixed = {"running_mean", "running_var"} <= tensors.keys()
        return frozenset({RANKS[batch_norm]} if fixed else ())
    sizes = {tensor.numel() for tensor in tensors.values()} - {1}
    function, kind = forward_of(type(module)), type(module)
    own = isinstance(function, types.FunctionType) and not kind.__module__.startswith("torch.nn.")
    if len(sizes) != 1 or not own:
        return frozenset()
    shapes = tuple((name, tuple(tensor.shape)) for name, tensor in tensors.items())
    return _proven_ranks(_Forward.of(module), shapes, sizes.pop())


def _batch_norm(module: nn.Module) -> type[nn.Module] | None:
    """Which of torch's batch norms it is, or computes as."""
    kind = next((kind for kind in RANKS if isinstance(module, kind)), None)
    return None if kind is None or row_of(module) is None else kind


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    held = {**module._parameters, **module._buffers}
    return {name: tensor.detach() for name, tensor in held.items() if tensor is not None and tensor.is_floating_point()}


class _Forward(NamedTuple):
    """A forward, and what it may know of its module: the class, and attributes that are numbers and strings."""

    kind: type[nn.Module]
    function: Any  # of Python, as `(module, x)`
    numbers: tuple[tuple[str, Any], ...]

    @staticmethod
    def of(module: nn.Module) -> "_Forward":
        """That of a module."""
        numbers = {key: value for key, value in vars(module).items() if is_plain_value(value) and key != "training"}
        return _Forward(type(module), type(module).forward, tuple(sorted(numbers.items(), key=str)))

    def stand_in(self, tensors: Mapping[str, Tensor]) -> nn.Module:
        """A module in eval mode that holds these tensors, and shares nothing with the user's."""
        module: nn.Module = object.__new__(self.kind)
        held = {"_parameters": {}, "_buffers": {}, "_modules": {}, "training": False}
        vars(module).update(self.numbers, **held, **tensors)
        return module

    def run(self, tensors: Mapping[str, Tensor], x: Tensor) -> Any:
        """What it gives for x, with copies of these tensors in float64."""
        module = self.stand_in({name: tensor.double().clone() for name, tensor in tensors.items()})
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return self.function(module, x.clone())

    def factors(self, tensors: Mapping[str, Tensor], ranks: frozenset[int]) -> tuple[Tensor, Tensor]:
        """What each channel is multiplied by, and what is added, float64."""
        channels = max(tensor.numel() for tensor in tensors.values())
        zeros = torch.zeros((1, channels) + (1,) * (min(ranks) - 2), dtype=torch.float64, device="cpu")
        offset = self.run(tensors, zeros).double().flatten()
        return self.run(tensors, zeros + 1).double().flatten() - offset, offset


@functools.lru_cache(maxsize=256)
def _proven_ranks(forward: _Forward, shapes: tuple[tuple[str, tuple[int, ...]], ...], channels: int) -> frozenset[int]:
    """The ranks for which this forward, with any tensors of these shapes, is a factor and an offset."""
    generator = Generator("cpu").manual_seed(0)
    tensors = {
        name: torch.rand(shape, generator=generator, device="cpu", dtype=torch.float32) + 0.5 for name, shape in shapes
    }
    words = _WORDS | tensors.keys()
    arguments = inspect.signature(forward.function).parameters
    if len(arguments) != 2 or odd_step(forward.function, forward.stand_in(tensors), words) is not None:
        return frozenset()
    return frozenset(rank for rank in (3, 4, 5) if _is_affine(forward, tensors, channels, rank))


def _is_affine(forward: _Forward, tensors: Mapping[str, Tensor], channels: int, rank: int) -> bool:
    """Whether all values of a channel of such an input are multiplied by the same and shifted by the same."""
    spatial = [size for size in (2, 3, 5, 7) if size != channels][: rank - 2]
    probe = torch.tensor(_PROBE, dtype=torch.float64, device="cpu")
    places = torch.arange(2 * channels * torch.Size(spatial).numel(), dtype=torch.long, device="cpu")
    x = probe[(places * 7) % len(probe)].reshape(2, channels, *spatial)
    try:
        gain, offset = (each.reshape(-1, *[1] * (rank - 2)) for each in forward.factors(tensors, frozenset({rank})))
        y = forward.run(tensors, x)
        if type(y) is not Tensor or y.shape != x.shape or len(gain) != channels or not y.is_floating_point():
            return False
        size = (x * gain).abs() + offset.abs()
        return bool(((y.double() - (x * gain + offset)).abs() <= _CLOSE * size).all())
    except Exception:  # a forward that takes no such input
        return False
