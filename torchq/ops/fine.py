"""A product whose input has two codes for each value: the op `linear_fine`, with its fake. Schema: csrc/fine_op.cpp."""

import torch
from torch import Tensor

from torchq.ops.elsewhere import check_devices

__all__ = ["linear_fine"]


def linear_fine(x: Tensor, packed: Tensor, activation: int = 0) -> Tensor:
    """`ops.linear_dynamic` with 16 bits of each value of x: what the codes of a row leave is quantized as a row, too.

    `y = act(product(x) + (product(rest) - bias))`, where product is `linear_dynamic` and `rest = x - x̂`: x̂ is what the
    codes of x stand for, `(code - zero_point) * scale`, divided by the channel_scale, if any. Each operation is rounded
    once, in float32. Of the errors of x 1 in 255 is left; those of the weight stay.

    Args:
        x: float32 (..., K). A row with NaN or infinity gives a row of NaN.
        packed: from `ops.pack`.
        activation: an `ops.Activation`.

    Returns:
        float32 (..., N).

    Raises:
        RuntimeError: another dtype, shape or device.

    >>> from torchq import ops
    >>> packed = ops.pack(torch.tensor([[127]], dtype=torch.int8).repeat(1, 2), torch.full((1,), 1 / 127))
    >>> x = torch.tensor([[1.0, 0.001]])
    >>> [round(product(x, packed).item(), 4) for product in (ops.linear_dynamic, linear_fine)]
    [1.0, 1.001]
    """
    return torch.ops.torchq.linear_fine(x, packed, activation)  # type: ignore[no-any-return]


@torch.library.register_fake("torchq::linear_fine")
def _(x: Tensor, packed: Tensor, activation: int = 0) -> Tensor:
    from torchq.ops import out_features  # it is made of this

    check_devices("linear_fine", "x", x, "the packed weight", packed)
    return x.new_empty((*x.shape[:-1], out_features(packed, x.shape[-1])))
