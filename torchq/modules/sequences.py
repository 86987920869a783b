"""What a recurrent module is called with, as rows, step after step; and the way back to what it returns.

The functions take the float module or the int8 one: both have the attributes of nn.RNNBase.
"""

from collections.abc import Callable
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from torchq.numerics.recurrent import Cell, State

CELLS = {"LSTM": Cell.LSTM, "GRU": Cell.GRU, "RNN_TANH": Cell.RNN_TANH, "RNN_RELU": Cell.RNN_RELU}
"""The cells by the `mode` of nn.RNNBase."""


class Given(NamedTuple):
    """A call's arguments.

    Args:
        x: float32 (rows, input_size).
        state: before the first step, float32 (layers · directions, B, features).
        batch_sizes: of a PackedSequence, sorted by length; None: every step has all of the batch.
        source: the input as it came.
        batched: whether the input has a batch dimension.
        steps: how many there are.
    """

    x: Tensor
    state: State
    batch_sizes: Tensor | None
    source: Tensor | PackedSequence
    batched: bool
    steps: int

    @property
    def dtype(self) -> torch.dtype:
        """Of the input, and so of the output."""
        return self.source.data.dtype if isinstance(self.source, PackedSequence) else self.source.dtype

    @property
    def sizes(self) -> list[int]:
        """How many rows of the batch take part in each step."""
        whole = [self.state.h.shape[1]] * self.steps
        return whole if self.batch_sizes is None else self.batch_sizes.tolist()


RunLayer = Callable[[int, Tensor, State], tuple[Tensor, State]]
"""The number of a layer, its input (rows, features) and state (directions, B, features) -> y and state."""


def directions(module: Any) -> list[str]:
    """The ends of the names of a layer's parameters, one for each direction."""
    return ["", "_reverse"] if module.bidirectional else [""]


def arrange(module: Any, input: Any, hx: Any = None) -> Given:
    """The arguments of a call.

    Raises:
        TypeError: the input or the state is no tensor of floats.
        ValueError: it has another shape than the module takes.
    """
    name = module._get_name()
    packed = isinstance(input, PackedSequence)
    data = input.data if packed else input
    _check_floats(name, "input", data)
    dims = (2,) if packed else (2, 3)
    if data.dim() not in dims or data.shape[-1] != module.input_size:
        raise ValueError(
            f"{name}: input must be (steps, batch, features), batch first where the module says so, or (steps, "
            f"features), with {module.input_size} features; got {tuple(data.shape)}."
        )
    batched = packed or data.dim() == 3
    if packed:
        batch, steps, x = int(input.batch_sizes[0]), len(input.batch_sizes), data
    else:
        data = data if batched else data.unsqueeze(1)
        data = data.transpose(0, 1) if batched and module.batch_first else data
        steps, batch = data.shape[:2]
        x = data.reshape(steps * batch, module.input_size)
        if steps == 0:
            raise ValueError(f"{name}: input must have at least one step, got {tuple(input.shape)}.")
    rows = module.num_layers * len(directions(module))
    states = _states(module, hx, (rows, batch) if batched else (rows,), x)
    if packed and hx is not None and input.sorted_indices is not None:
        states = [each.index_select(1, input.sorted_indices) for each in states]
    h, *c = states if batched else [each.unsqueeze(1) for each in states]
    sizes = input.batch_sizes if packed else None
    return Given(x.float(), State(h, c[0] if c else None), sizes, input, batched, steps)


def arrange_cell(module: Any, input: Any, hx: Any = None) -> Given:
    """The arguments of a call of a cell, (batch, features) or (features,), as those of a sequence of one step.

    Raises:
        TypeError: the input or the state is no tensor of floats.
        ValueError: it has another shape than the cell takes.
    """
    name = module._get_name()
    _check_floats(name, "input", input)
    if input.dim() not in (1, 2) or input.shape[-1] != module.input_size:
        raise ValueError(
            f"{name}: input must be (batch, features) or (features,), with {module.input_size} features; "
            f"got {tuple(input.shape)}."
        )
    x = input if input.dim() == 2 else input.unsqueeze(0)
    h, *c = (each.view(1, len(x), each.shape[-1]) for each in _states(module, hx, tuple(input.shape[:-1]), x))
    return Given(x.float(), State(h, c[0] if c else None), None, input, input.dim() == 2, 1)


def run_layers(module: Any, given: Given, run_layer: RunLayer) -> tuple[Tensor, State]:
    """The output (rows, features) of the last layer, and the states of all."""
    if module.num_layers == 1:
        return run_layer(0, given.x, given.state)
    count, x, states = len(directions(module)), given.x, []
    for number in range(module.num_layers):
        own = slice(number * count, (number + 1) * count)
        x, state = run_layer(number, x, given.state.each(itemgetter(own)))
        states.append(state)
        if module.dropout and module.training and number + 1 < module.num_layers:
            x = torch.nn.functional.dropout(x, module.dropout)
    return x, State(torch.cat([each.h for each in states]), joined([each.c for each in states], torch.cat))


def joined(states: list[Tensor | None], function: Callable[[list[Tensor]], Tensor]) -> Tensor | None:
    """The c of several states as one, by torch.cat or torch.stack; None of cells without."""
    found = [each for each in states if each is not None]
    return function(found) if found else None


def as_input(module: Any, given: Given, rows: Tensor) -> Tensor:
    """Rows (rows, features) with the leading dimensions that the input has."""
    if isinstance(given.source, PackedSequence) or not given.batched:
        return rows
    steps: Tensor = rows.unflatten(0, (given.steps, given.state.h.shape[1]))
    return steps.transpose(0, 1) if module.batch_first else steps


def returned(module: Any, given: Given, y: Tensor, state: State) -> Any:
    """What the module returns."""
    state = state.each(lambda t: t.to(given.dtype))
    output: Any = as_input(module, given, y.to(given.dtype))
    if isinstance(given.source, PackedSequence):
        source, order = given.source, given.source.unsorted_indices
        output = PackedSequence(output, source.batch_sizes, source.sorted_indices, order)
        if order is not None:
            state = state.each(lambda t: t.index_select(1, order))
    elif not given.batched:
        state = state.each(lambda t: t.squeeze(1))
    return output, (state.h if state.c is None else tuple(state))


def _states(module: Any, hx: Any, leading: tuple[int, ...], x: Tensor) -> list[Tensor]:
    """h, and of an LSTM c, before the first step: hx, or zeros; float32 (*leading, features)."""
    name, is_lstm = module._get_name(), module.mode == "LSTM"
    shapes = [(*leading, module.proj_size or module.hidden_size), (*leading, module.hidden_size)][: 1 + is_lstm]
    if hx is None:
        return [torch.zeros(shape, dtype=torch.float32, device=x.device) for shape in shapes]
    if is_lstm and not (isinstance(hx, (tuple, list)) and len(hx) == 2):
        raise TypeError(f"{name}: hx must be the tuple (h_0, c_0), got {type(hx).__name__}.")
    states = list(hx) if is_lstm else [hx]
    for label, state, shape in zip(("hx[0]", "hx[1]") if is_lstm else ("hx",), states, shapes, strict=True):
        _check_floats(name, label, state)
        if tuple(state.shape) != shape:
            raise ValueError(f"{name}: {label} must have the shape {shape}, got {tuple(state.shape)}.")
    return [state.float() for state in states]


def _check_floats(name: str, label: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: {label} must be a tensor, got {type(value).__name__}.")
    if value.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"{name}: {label} must be float32, bfloat16 or float16, got {value.dtype}.")
