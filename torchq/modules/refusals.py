"""What int8 layers say of inputs they cannot take, where torch's own words would not help."""

import torch
from torch import Tensor


def not_codes(layer: str = "QuantizedLinear") -> TypeError:
    """The error of uint8 input, where no layer hands over codes."""
    return TypeError(
        f"{layer}: x must be float32, bfloat16 or float16, got uint8. Convert it first, as the float model would need "
        "it: x.float()."
    )


def not_settable(name: str, of: str) -> AttributeError:
    """The error of an attribute that the float module computes with, and this one can't any more.

    >>> str(not_settable("groups", "a QuantizedConv2d"))[:51]
    "torchq: 'groups' can't be set of a QuantizedConv2d."
    """
    return AttributeError(
        f"torchq: {name!r} can't be set of {of}. Set it in the float model before convert(), or leave this layer in "
        "float with QConfig(exclude=(name,))."
    )


def refuse_layout(x: Tensor, layer: str = "QuantizedLinear") -> None:
    """Raises a TypeError for what is no dense tensor: nested, sparse, or in a layout of another library.

    >>> refuse_layout(torch.ones(2, 2))
    >>> refuse_layout(torch.ones(2, 2).to_sparse())
    Traceback (most recent call last):
    TypeError: QuantizedLinear: x must be dense, got torch.sparse_coo. Pass x.to_dense() instead.
    """
    if x.is_nested:
        raise TypeError(
            f"{layer}: x must be dense, got a nested tensor. Pass it padded instead, as "
            "torch.nested.to_padded_tensor(x, 0.0), or its rows alone, as x.values()."
        )
    if x.layout != torch.strided:
        raise TypeError(f"{layer}: x must be dense, got {x.layout}. Pass x.to_dense() instead.")
    if x.is_quantized:
        raise TypeError(f"{layer}: x must hold floats, got {x.dtype}. Pass x.dequantize() instead.")


def explained(error: RuntimeError, x: Tensor, layer: str = "QuantizedLinear") -> Exception:
    """What to raise in place of an op's error: one that says more, or of a better class, or the error itself."""
    if isinstance(x, Tensor):
        try:
            refuse_layout(x, layer)
        except TypeError as refusal:
            return refusal
    if "torchq::" in str(error) and ": out of memory for " in str(error):
        return MemoryError(str(error))
    return error
