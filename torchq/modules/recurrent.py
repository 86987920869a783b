"""nn.LSTM, nn.GRU, nn.RNN and their cells in int8.

A layer has a QuantizedLinear for each of its weights: `ih_l0` multiplies the input of all steps in one call, `hh_l0`
multiplies h at each step, `hr_l0` projects it. The steps themselves are one op, `ops.recurrent`. Where a part must be
seen being called, the parts are called one by one instead, which gives the same bits: with hooks on them, inside
simulate(), for a part that stayed in float, and where a gradient is wanted, which each part hands to its input.

Foreign code finds what it knows of the float module: `weight_ih_l0` and the like as read-only floats, `all_weights`,
`flatten_parameters()`, sizes and options.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from operator import itemgetter
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from torchq import ops
from torchq.modules import gradients, simulation
from torchq.modules.base import Int8Module, float_size
from torchq.modules.float_view import read_only
from torchq.modules.quantized_linear import QuantizedLinear
from torchq.modules.sequences import CELLS, Given, arrange, arrange_cell, directions, joined, returned, run_layers
from torchq.modules.tracing import Leaf
from torchq.numerics.recurrent import FLOAT_CURVES, Cell, Curves, Function, State, run_direction
from torchq.ops import Activation

CURVES = Curves(
    partial(ops.activate, activation=Activation.SIGMOID),
    partial(ops.activate, activation=Activation.TANH),
)
"""Those of the op, bit for bit, and differentiable."""

_OPTIONS = ("mode", "input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional")


class ByLayer(nn.Module):
    """A recurrent module whose layers are run one by one."""

    mode: Any
    proj_size: int

    def run_layer(self, names: Sequence[Sequence[str]], x: Tensor, state: State, given: Given) -> tuple[Tensor, State]:
        """One layer: the input product of each direction, and the steps.

        Args:
            names: of each direction, its parts: ih, hh and, with projections, hr.
            x: float32 (rows, features).
            state: h (directions, B, P), and of an LSTM c.
            given: the call, for the rows of each step.
        """
        raise NotImplementedError(f"{type(self).__name__} has no layers")


class Layered(ByLayer):
    """The forward of nn.LSTM, nn.GRU and nn.RNN."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        """As the float module's: output, and (h_n, c_n) or h_n.

        Args:
            input: (steps, batch, input_size), or (batch, steps, input_size) with batch_first; (steps, input_size);
                or a PackedSequence.
            hx: (h_0, c_0) or h_0; zeros without.

        Raises:
            TypeError: the input or the state is no tensor of floats.
            ValueError: it has another shape.
        """
        given = arrange(self, input, hx)
        kinds = ("ih", "hh", "hr") if self.proj_size else ("ih", "hh")

        def run_layer(number: int, x: Tensor, state: State) -> tuple[Tensor, State]:
            names = [[f"{kind}_l{number}{end}" for kind in kinds] for end in directions(self)]
            return self.run_layer(names, x, state, given)

        return returned(self, given, *run_layers(self, given, run_layer))


class OneStep(ByLayer):
    """The forward of their cells."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        """As the float cell's: (h, c) or h, for an input (batch, input_size) or (input_size,).

        Raises:
            TypeError: the input or the state is no tensor of floats.
            ValueError: it has another shape.
        """
        given = arrange_cell(self, input, hx)
        _, state = self.run_layer([("ih", "hh")], given.x, given.state, given)
        shape = (*input.shape[:-1], self.hidden_size)
        state = state.each(lambda t: t.to(given.dtype).view(shape))
        return state.h if state.c is None else tuple(state)


class _Recurrent(Leaf, Int8Module, ByLayer):
    """What sequences and cells have in common: the parts, and what foreign code reads."""

    _names: list[list[str]]  # of the float parameters, by layer

    def __init__(self, parts: Mapping[str, nn.Module], names: Sequence[Sequence[str]]) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self._names = [list(each) for each in names]

    @property
    def float_bytes(self) -> int:
        """The bytes of all weights and biases in the float module's dtype."""
        parts = self._modules.values()
        return sum(part.float_bytes if isinstance(part, Int8Module) else float_size(part) for part in parts if part)

    @property
    def all_weights(self) -> list[list[Tensor]]:
        """The weights and biases by layer, as floats, read only."""
        return [[getattr(self, name) for name in names] for names in self._names]

    @property
    def _flat_weights(self) -> list[Tensor]:
        return [weight for layer in self.all_weights for weight in layer]

    def flatten_parameters(self) -> None:
        """Does nothing: packed weights lie in one piece."""

    def __getattr__(self, name: str) -> Any:
        if any(name in names for names in self.__dict__.get("_names", ())):
            kind, _, part = name.partition("_")  # weight_hh_l0: the weight of hh_l0
            return getattr(self._modules[part], kind)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if any(name in names for names in self.__dict__.get("_names", ())):
            raise read_only(name)
        super().__setattr__(name, value)

    def run_layer(self, names: Sequence[Sequence[str]], x: Tensor, state: State, given: Given) -> tuple[Tensor, State]:
        """One layer: its steps by the op, if nobody can tell."""
        cell, children = CELLS[self.mode], cast(dict[str, nn.Module], self._modules)
        parts = [[children[name] for name in each] for each in names]
        with torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else nullcontext():
            gates = [_multiplied(ih, x) for ih, *_ in parts]
            stepped = [own[i] for i in range(1, len(parts[0])) for own in parts]  # hh of each direction, and hr
            if _are_plain(stepped) and not any(map(gradients.wanted, (*gates, *state))):
                return _by_op(cell, gates, stepped, state, given)
            return by_parts(
                cell, gates, [[partial(_multiplied, part) for part in own[1:]] for own in parts], state, given
            )


def by_parts(
    cell: Cell, gates: Sequence[Tensor], stepped: Sequence[Sequence[Function]], state: State, given: Given
) -> tuple[Tensor, State]:
    """A layer step by step. `stepped`: of each direction, the products with hh and, with projections, hr."""
    curves = CURVES if state.h.device.type == "cpu" else FLOAT_CURVES
    runs = [
        run_direction(
            cell,
            gates[i],
            hh,
            hr[0] if hr else None,
            state.each(itemgetter(i)),
            given.sizes,
            backwards=i == 1,
            curves=curves,
        )
        for i, (hh, *hr) in enumerate(stepped)
    ]
    h, c = torch.stack([last.h for _, last in runs]), joined([last.c for _, last in runs], torch.stack)
    return torch.cat([y for y, _ in runs], dim=-1), State(h, c)


def _by_op(
    cell: Cell, gates: list[Tensor], stepped: Sequence[nn.Module], state: State, given: Given
) -> tuple[Tensor, State]:
    """A layer whose steps are those of the op. `stepped`: the layers it multiplies by, hh of each direction, and hr."""
    moments = [cast(QuantizedLinear, part)._moment() for part in stepped]
    packed = [packed for packed, _ in moments]
    qparams = [float(each) for _, pair in moments for each in pair or (0.0, 0.0)]
    y, h, c = ops.recurrent(
        cell,
        gates,
        packed[: len(gates)],
        state.h,
        state.c,
        packed_hr=packed[len(gates) :],
        batch_sizes=given.batch_sizes,
        qparams=qparams if any(qparams) else (),
    )
    return y, State(h, None if state.c is None else c)


def _multiplied(part: nn.Module, x: Tensor) -> Tensor:
    """part(x) in float32, whatever the dtype of a part that stayed in float."""
    if isinstance(part, QuantizedLinear):
        return part(x)
    y: Tensor = part(x.to(next(part.parameters()).dtype))
    return y.float()


def _are_plain(parts: Sequence[nn.Module]) -> bool:
    """Whether nobody can tell if these parts are called: the op then multiplies by their weights itself."""
    if simulation.anywhere and (is_dynamo_compiling() or simulation.simulating.get()):
        return False
    return all(
        type(part) is QuantizedLinear
        and not (part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks)
        for part in parts
    )


class QuantizedRecurrent(_Recurrent, Layered):
    """nn.LSTM, nn.GRU or nn.RNN in int8: takes and returns what the float module does, with the same options.

    Products are those of the layers it has; all else is computed in float32, by the formulas of `ops.recurrent`. The
    input may be float32, bfloat16 or float16, and the output has its dtype. Dropout between layers acts in training
    mode. A gradient reaches the input and the first state; the weights are frozen.

    Args:
        module: the float module, whose options are taken over.
        parts: an int8 or float layer for each of its weights: `ih_l0`, `hh_l0`, `hr_l0`, `ih_l0_reverse` and so on.

    >>> from torchq import convert
    >>> lstm = convert(nn.Sequential(nn.LSTM(64, 128, batch_first=True)))[0]
    >>> y, (h, c) = lstm(torch.ones(2, 5, 64))
    >>> y.shape, h.shape, lstm.weight_hh_l0.shape
    (torch.Size([2, 5, 128]), torch.Size([1, 2, 128]), torch.Size([512, 128]))
    """

    def __init__(self, module: nn.RNNBase, parts: Mapping[str, nn.Module]) -> None:
        super().__init__(parts, module._all_weights)
        for option in _OPTIONS:
            setattr(self, option, getattr(module, option))
        self.proj_size = module.proj_size
        if isinstance(module, nn.RNN):
            self.nonlinearity = module.nonlinearity

    def _get_name(self) -> str:
        return f"Quantized{self.mode.partition('_')[0]}"

    def extra_repr(self) -> str:
        """The float module's."""
        return nn.RNNBase.extra_repr(self)  # type: ignore[arg-type]


class QuantizedCell(_Recurrent, OneStep):
    """nn.LSTMCell, nn.GRUCell or nn.RNNCell in int8: one step, with the parts `ih` and `hh`.

    >>> from torchq import convert
    >>> cell = convert(nn.Sequential(nn.GRUCell(64, 128)))[0]
    >>> cell(torch.ones(2, 64)).shape
    torch.Size([2, 128])
    """

    def __init__(self, module: nn.RNNCellBase, parts: Mapping[str, nn.Module]) -> None:
        bias = ["bias_ih", "bias_hh"] if module.bias else []
        super().__init__(parts, [["weight_ih", "weight_hh", *bias]])
        self.input_size, self.hidden_size, self.bias = module.input_size, module.hidden_size, module.bias
        self.mode = mode_of_cell(module)
        if isinstance(module, nn.RNNCell):
            self.nonlinearity = module.nonlinearity
        self.proj_size = 0

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "nonlinearity" and self.mode.startswith("RNN"):  # which nn.RNNCell reads in each call
            self.mode = _mode_of(value)

    def _get_name(self) -> str:
        return f"Quantized{self.mode.partition('_')[0]}Cell"

    def extra_repr(self) -> str:
        """The float cell's."""
        return nn.RNNCellBase.extra_repr(self)  # type: ignore[arg-type]


def mode_of_cell(module: nn.RNNCellBase) -> str:
    """The `mode` that nn.RNNBase has for layers of such cells."""
    if isinstance(module, nn.RNNCell):
        return _mode_of(module.nonlinearity)
    return "LSTM" if isinstance(module, nn.LSTMCell) else "GRU"


def _mode_of(nonlinearity: str) -> str:
    return f"RNN_{nonlinearity.upper()}"
