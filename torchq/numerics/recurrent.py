"""Recurrent layers in torch's own operations: the formulas of `torchq.ops.recurrent`, step by step.

Who calls says how products and curves are computed, so this is the reference of the op, the simulated path, the path
with gradients, and what calibration runs.
"""

from collections.abc import Callable, Sequence
from enum import IntEnum
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["FLOAT_CURVES", "Cell", "Curves", "State", "run_direction", "step"]

Function = Callable[[Tensor], Tensor]


class Cell(IntEnum):
    """Kinds of recurrent cells, by the number that the op takes."""

    LSTM = 0
    GRU = 1
    RNN_TANH = 2
    RNN_RELU = 3

    @property
    def gates(self) -> int:
        """The products of x, and of h, that a hidden value is made of."""
        return {Cell.LSTM: 4, Cell.GRU: 3}.get(self, 1)


class Curves(NamedTuple):
    """The functions of the gates."""

    sigmoid: Function
    tanh: Function


FLOAT_CURVES = Curves(torch.sigmoid, torch.tanh)


class State(NamedTuple):
    """h (B, P), and of an LSTM c (B, H)."""

    h: Tensor
    c: Tensor | None

    def each(self, function: Function) -> "State":
        """`function` of h, and of c if there is one."""
        return State(function(self.h), None if self.c is None else function(self.c))


def step(cell: Cell, x: Tensor, p: Tensor, state: State, curves: Curves = FLOAT_CURVES) -> State:
    """The state after one step. x and p (B, gates · H) are the products with the input and with h, with their biases.

    * LSTM: `c' = σ(f) · c + σ(i) · tanh(g)`, `h' = σ(o) · tanh(c')`, gates in the order i, f, g, o.
    * GRU: `n = tanh(x_n + σ(r) · p_n)`, `h' = n + σ(z) · (h - n)`, gates in the order r, z, n.
    * RNN: `h' = tanh(x + p)` or `relu(x + p)`.

    >>> step(Cell.RNN_RELU, torch.tensor([[1.0, -3.0]]), torch.tensor([[1.0, 1.0]]), State(torch.zeros(1, 2), None)).h
    tensor([[2., 0.]])
    """
    sigmoid, tanh = curves
    if cell == Cell.LSTM:
        assert state.c is not None
        i, f, g, o = (x + p).chunk(4, dim=-1)
        c = sigmoid(f) * state.c + sigmoid(i) * tanh(g)
        return State(sigmoid(o) * tanh(c), c)
    if cell == Cell.GRU:
        (x_r, x_z, x_n), (p_r, p_z, p_n) = x.chunk(3, dim=-1), p.chunk(3, dim=-1)
        n = tanh(x_n + sigmoid(x_r + p_r) * p_n)
        return State(n + sigmoid(x_z + p_z) * (state.h - n), None)
    total = x + p
    return State(tanh(total) if cell == Cell.RNN_TANH else total.relu(), None)


def run_direction(
    cell: Cell,
    gates: Tensor,
    multiply: Function,
    project: Function | None,
    state: State,
    sizes: Sequence[int],
    *,
    backwards: bool = False,
    curves: Curves = FLOAT_CURVES,
) -> tuple[Tensor, State]:
    """One direction of a layer: y (rows, P), the h after each step, and the last state of each row of the batch.

    Args:
        cell: which cell.
        gates: (rows, gates · H): the input products of all steps, step after step.
        multiply: h (b, P) to its products (b, gates · H).
        project: the hidden values (b, H) to h (b, P); None: they are h.
        state: before the first step.
        sizes: how many rows of the batch, the first ones, take part in each step; not increasing.
        backwards: from the last step to the first.
        curves: how sigmoid and tanh are computed.
    """
    inputs, outputs = list(gates.split(list(sizes))), []
    for x in reversed(inputs) if backwards else inputs:
        old = state.each(itemgetter(slice(len(x))))
        new = step(cell, x, multiply(old.h), old, curves)
        if project is not None:
            new = new._replace(h=project(new.h))
        outputs.append(new.h)
        if len(x) < len(state.h):  # the others keep their state
            kept = state.each(itemgetter(slice(len(x), None)))
            new = State(torch.cat([new.h, kept.h]), None if new.c is None else torch.cat([new.c, kept.c]))  # type: ignore[list-item]
        state = new
    if not outputs:
        return state.h[:0], state
    return torch.cat(outputs[::-1] if backwards else outputs), state
