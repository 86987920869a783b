"""Rounding weights with feedback, GPTQ's inner loop: the op `round_with_feedback`, with its fake."""

import torch
from torch import Tensor

from torchq.ops.elsewhere import check_devices

__all__ = ["round_with_feedback"]

_round_with_feedback = torch.ops.torchq.round_with_feedback.default


def round_with_feedback(targets: Tensor, weight: Tensor, factor: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds the rows of a weight to int8, the last one first; each makes up for the errors of those behind it.

    `target_j = targets_j + Σ_{i > j} factor_ji · error_i`, `code = clamp(rne(target · (1 / scale)), -127, 127)` and
    `error = weight - code · scale`. Each sum has its terms in order, by fma: every CPU gives the same bits.

    Args:
        targets: float32 (rows, columns).
        weight: float32 (rows, columns).
        factor: float32 (rows, rows), of which only what is above the diagonal is read.
        scale: float32 (columns,), positive.

    Returns:
        Codes, int8, and errors, float32, both (rows, columns).

    Raises:
        RuntimeError: another dtype, shape or device.

    >>> weight = torch.tensor([[0.4], [0.4]])
    >>> round_with_feedback(weight, weight, torch.tensor([[1.0, 0.5], [0.0, 1.0]]), torch.ones(1))
    (tensor([[1],
            [0]], dtype=torch.int8), tensor([[-0.6000],
            [ 0.4000]]))
    """
    return _round_with_feedback(targets, weight, factor, scale)  # type: ignore[no-any-return]


@torch.library.register_fake("torchq::round_with_feedback")
def _(targets: Tensor, weight: Tensor, factor: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    for name, other in (("weight", weight), ("factor", factor), ("scale", scale)):
        check_devices("round_with_feedback", name, other, "targets", targets)
    return targets.new_empty(targets.shape, dtype=torch.int8), targets.new_empty(targets.shape)
