"""What the ops do with tensors of other devices than the CPU: they say so. But packed weights may be read anywhere.

A model is moved as a whole, and a GPU is where it is trained. What was moved by mistake is an error that says what to
do, in place of torch's list of backends. `pack` and `unpack` are no arithmetic, though: state_dict, `torchq.save` and
`layer.weight` give the values on the device of the module, computed on the CPU.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter, tree_map_only

from torchq import _C as _C  # which defines the ops

_OTHERS = "CompositeExplicitAutograd"
"""torch's key for all backends that have no kernel of their own: CUDA, MPS, XPU, sparse tensors, ..."""

_library = torch.library.Library("torchq", "IMPL")  # as long as this lives, its kernels are there


def check_devices(op: str, name: str, x: Tensor, other: str, y: Tensor) -> None:
    """Raises a RuntimeError if the arguments of these names are on different devices: what fakes check."""
    torch._check(
        x.device == y.device,
        lambda: f"torchq::{op}: {name} is on {x.device}, {other} on {y.device}. Move both to the CPU.",
    )


def _refusal(op: str) -> Callable[..., Any]:
    """A kernel that raises an error."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        given = {_place(value): None for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)}
        raise RuntimeError(
            f"torchq::{op}: int8 runs on the CPU, with dense tensors; got some on {' and on '.join(given)}. Move the "
            "model and its input there: model.cpu(), x.cpu()."
        )

    return refuse


def _place(value: Tensor) -> str:
    return str(value.device) if value.layout == torch.strided else f"{value.device} ({value.layout})"


def _on_the_cpu(op: Any) -> Callable[..., Any]:
    """A kernel that computes on the CPU, and gives the result where the first tensor is."""
    refuse = _refusal(op.name().rpartition("::")[2])

    def compute(first: Tensor, *args: Any, **kwargs: Any) -> Any:
        given = (value for value in tree_iter((first, args, kwargs)) if isinstance(value, Tensor))
        if any(value.layout != torch.strided for value in given):
            return refuse(first, *args, **kwargs)
        args, kwargs = tree_map_only(Tensor, lambda value: value.cpu(), (args, kwargs))
        return tree_map_only(Tensor, lambda value: value.to(first.device), op(first.cpu(), *args, **kwargs))

    return compute


READING = ("pack", "unpack")
COMPUTING = (
    *("gemm", "linear_dynamic", "linear_static", "linear_fine", "activate", "quantize_per_token", "count_bins"),
    *("layer_norm", "rms_norm", "attention", "convolution", "embedding", "recurrent", "round_with_feedback"),
    *("quantize_weight", "squared_error"),
)
for _name in READING:
    _library.impl(_name, _on_the_cpu(getattr(torch.ops.torchq, _name).default), _OTHERS)
for _name in COMPUTING:
    _library.impl(_name, _refusal(_name), _OTHERS)
