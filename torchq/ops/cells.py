"""The op of recurrent layers: a typed wrapper and a fake. Schema and checks: csrc/recurrent_op.cpp."""

from collections.abc import Sequence

import torch
from torch import Tensor

from torchq.numerics.recurrent import Cell
from torchq.ops.elsewhere import check_devices

_recurrent = torch.ops.torchq.recurrent.default


def recurrent(
    cell: Cell,
    gates: Sequence[Tensor],
    packed_hh: Sequence[Tensor],
    h0: Tensor,
    c0: Tensor | None = None,
    *,
    packed_hr: Sequence[Tensor] = (),
    batch_sizes: Tensor | None = None,
    qparams: Sequence[float] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """A layer of recurrent cells over a sequence, given its input products: the steps of nn.LSTM, nn.GRU or nn.RNN.

    At each step h is quantized row by row and multiplied by `packed_hh`, as `linear_dynamic` does, and the gates follow
    in float32, each operation rounded once: the formulas are those of `torchq.numerics.recurrent.step`, with the curves
    of `activate`. Lists have an entry for each direction; the second goes from the last step to the first.

    Args:
        cell: which cell. It has G gates: 4 in an LSTM, 3 in a GRU, else 1.
        gates: float32 (rows, G · H): `packed_ih` by x with its bias, for all steps, step after step.
        packed_hh: from `pack`, (G · H, P).
        h0: float32 (directions, B, P), P = H without projections.
        c0: of an LSTM, float32 (directions, B, H).
        packed_hr: an LSTM's projections from `pack`, (P, H).
        batch_sizes: int64 (steps,): the first `batch_sizes[t]` rows of the batch take part in step t, as in a
            PackedSequence sorted by length. Not increasing, the sum is `rows`. None: all rows in all steps.
        qparams: of packed_hh and then of packed_hr, the scale and the zero point of the static range of its input,
            flat; 0 and 0 for dynamic. Empty: all are dynamic.

    Returns:
        y float32 (rows, directions · P), the h after each step; h_n (directions, B, P); and c_n (directions, B, H), of
        other cells empty. Each row of the batch has the state after its own last step.

    Raises:
        RuntimeError: wrong dtype, shape or device, or batch sizes that increase.

    >>> from torchq.ops import pack
    >>> packed = pack(torch.zeros(1, 1, dtype=torch.int8), torch.ones(1))
    >>> recurrent(Cell.RNN_RELU, [torch.tensor([[1.0], [-2.0], [3.0]])], [packed], torch.zeros(1, 1, 1))[:2]
    (tensor([[1.],
            [0.],
            [3.]]), tensor([[[3.]]]))
    """
    return _recurrent(  # type: ignore[no-any-return]
        int(cell), list(gates), list(packed_hh), list(packed_hr), h0, c0, batch_sizes, list(qparams)
    )


@torch.library.register_fake("torchq::recurrent")
def _(
    cell: int,
    gates: list[Tensor],
    packed_hh: list[Tensor],
    packed_hr: list[Tensor],
    h0: Tensor,
    c0: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    qparams: Sequence[float] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    for name, others in (
        ("gates", gates),
        ("packed_hh", packed_hh),
        ("packed_hr", packed_hr),
        ("c0", [] if c0 is None else [c0]),
    ):
        for other in others:
            check_devices("recurrent", name, other, "h0", h0)
    y = h0.new_empty((gates[0].shape[0], len(gates) * h0.shape[2]))
    return y, h0.new_empty(h0.shape), h0.new_empty((0,) if c0 is None else c0.shape)
