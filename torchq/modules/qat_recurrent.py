"""The training forms of nn.LSTM, nn.GRU, nn.RNN and their cells: the products of their int8 forms, step by step."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from torchq.modules.base import Matrix
from torchq.modules.qat_parts import QATParts
from torchq.modules.recurrent import ByLayer, Layered, OneStep, by_parts, mode_of_cell
from torchq.modules.sequences import CELLS, Given
from torchq.numerics.recurrent import State


class QATRecurrent(QATParts, ByLayer):
    """What sequences and cells have in common. States and curves are in float32, as in int8."""

    def matrix(self, part: str) -> Matrix:
        """The weight and bias of this name, such as "hh_l0"."""
        return Matrix(getattr(self, f"weight_{part}"), getattr(self, f"bias_{part}", None))

    def run_layer(self, names: Sequence[Sequence[str]], x: Tensor, state: State, given: Given) -> tuple[Tensor, State]:
        """One layer. Each weight is rounded once for all steps."""
        with torch.autocast(x.device.type, enabled=False):
            parts = [[self._multiplier(name) for name in each] for each in names]
            gates = [own[0](x) for own in parts]
            return by_parts(CELLS[self.mode], gates, [own[1:] for own in parts], state, given)

    def _multiplier(self, part: str) -> Callable[[Tensor], Tensor]:
        """The product with this matrix, from float32 to float32."""
        multiply, dtype = self.multiplier(part), self.matrix(part).weight.dtype
        return multiply if self.form(part) is not None else lambda x: multiply(x.to(dtype)).float()


class QATLSTM(QATRecurrent, Layered, nn.LSTM):
    """nn.LSTM in training."""


class QATGRU(QATRecurrent, Layered, nn.GRU):
    """nn.GRU in training."""


class QATRNN(QATRecurrent, Layered, nn.RNN):
    """nn.RNN in training."""


class QATCell(QATRecurrent, OneStep):
    """What the cells have in common."""

    proj_size = 0

    @property
    def mode(self) -> str:
        """The `mode` that nn.RNNBase has for layers of such cells."""
        return mode_of_cell(self)  # type: ignore[arg-type]


class QATLSTMCell(QATCell, nn.LSTMCell):
    """nn.LSTMCell in training."""


class QATGRUCell(QATCell, nn.GRUCell):
    """nn.GRUCell in training."""


class QATRNNCell(QATCell, nn.RNNCell):
    """nn.RNNCell in training."""


QAT_OF_KIND: dict[type[nn.Module], type[QATRecurrent]] = {
    nn.LSTM: QATLSTM,
    nn.GRU: QATGRU,
    nn.RNN: QATRNN,
    nn.LSTMCell: QATLSTMCell,
    nn.GRUCell: QATGRUCell,
    nn.RNNCell: QATRNNCell,
}
