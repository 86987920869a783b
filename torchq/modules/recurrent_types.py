"""nn.LSTM, nn.GRU, nn.RNN and their cells as module types: their matrices, and what calibration sees of each."""

from collections.abc import Mapping
from functools import partial
from operator import itemgetter
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from torchq.modules.base import Matrix
from torchq.modules.qat_parts import TrainableParts, TrainedParts
from torchq.modules.qat_recurrent import QAT_OF_KIND
from torchq.modules.recurrent import QuantizedCell, QuantizedRecurrent, mode_of_cell
from torchq.modules.sequences import CELLS, Given, arrange, arrange_cell, as_input, directions, run_layers
from torchq.numerics.recurrent import State, run_direction


class RecurrentType(TrainableParts):
    """Layers of this class, and subclasses that keep its forward: a matrix for each weight, named without `weight_`."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        self.kind, self.name, self.form = kind, f"nn.{kind.__name__}", QAT_OF_KIND[kind]

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, self.kind)

    def matrices(self, module: nn.Module) -> dict[str, Matrix]:
        names = [name for layer in cast(nn.RNNBase, module)._all_weights for name in layer]
        return _matrices(module, [name for name in names if name.startswith("weight_")])

    def inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The float module's steps are run here, in torch's operations, to see what each weight multiplies."""
        try:
            given = arrange(module, *args, **kwargs)
        except (TypeError, ValueError):  # the module's own forward will raise the error
            return {}
        found: dict[str, Any] = {}

        def run_layer(number: int, x: Tensor, state: State) -> tuple[Tensor, State]:
            runs = [
                _recorded(module, given, f"_l{number}{end}", x, state.each(itemgetter(i)), found)
                for i, end in enumerate(directions(module))
            ]
            h = torch.stack([last.h for _, last in runs])
            return torch.cat([y for y, _ in runs], dim=-1), State(h, None)

        run_layers(module, given, run_layer)
        source = given.source
        found |= {f"ih_l0{end}": source if isinstance(source, Tensor) else source.data for end in directions(module)}
        return found

    def become(self, module: nn.Module, parts: Mapping[str, nn.Module]) -> nn.Module:
        return QuantizedRecurrent(cast(nn.RNNBase, module), parts)

    def is_first_input(self, part: str) -> bool:
        return part.startswith("ih_l0")

    def why_float(self, module: nn.Module, parent: nn.Module) -> str | None:
        if type(module).forward is not self.kind.forward or "forward" in vars(module):
            return f"{type(module).__name__} has a forward of its own"
        layer = cast(nn.RNNBase, module)
        weights = zip(layer._flat_weights_names, layer._flat_weights, strict=True)
        if any(getattr(layer, name) is not weight for name, weight in weights):
            return "its weights are computed by a parametrization, which it does not read"
        return None


class QATRecurrentType(TrainedParts, RecurrentType):
    """What `prepare_qat` made of such a layer."""


class CellType(TrainableParts):
    """Cells of this class, and subclasses that keep its forward: the matrices `ih` and `hh`."""

    def __init__(self, kind: type[nn.RNNCellBase]) -> None:
        self.kind, self.name, self.form = kind, f"nn.{kind.__name__}", QAT_OF_KIND[kind]

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, self.kind)

    def matrices(self, module: nn.Module) -> dict[str, Matrix]:
        return _matrices(module, ["weight_ih", "weight_hh"])

    def inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        try:
            given = arrange_cell(_Described(module), *args, **kwargs)
        except (TypeError, ValueError):  # the module's own forward will raise the error
            return {}
        return {"ih": given.source, "hh": given.state.h[0]}

    def become(self, module: nn.Module, parts: Mapping[str, nn.Module]) -> nn.Module:
        return QuantizedCell(cast(nn.RNNCellBase, module), parts)

    def why_float(self, module: nn.Module, parent: nn.Module) -> str | None:
        if type(module).forward is not self.kind.forward or "forward" in vars(module):
            return f"{type(module).__name__} has a forward of its own"
        return None


class QATCellType(TrainedParts, CellType):
    """What `prepare_qat` made of such a cell."""


class _Described:
    """A float cell with the attributes that sequences.py asks for."""

    proj_size = 0

    def __init__(self, cell: nn.Module) -> None:
        self._get_name, self.mode = cell._get_name, mode_of_cell(cast(nn.RNNCellBase, cell))
        self.input_size, self.hidden_size = cell.input_size, cell.hidden_size


def _matrices(module: nn.Module, weights: list[str]) -> dict[str, Matrix]:
    biases = {name: getattr(module, name.replace("weight", "bias"), None) for name in weights}
    return {name.removeprefix("weight_"): Matrix(getattr(module, name), biases[name]) for name in weights}


def _recorded(
    module: Any, given: Given, end: str, x: Tensor, state: State, found: dict[str, Any]
) -> tuple[Tensor, State]:
    """One direction of a float layer, whose parameters end like this. What each weight multiplies goes into `found`."""
    steps: dict[str, list[Tensor]] = {}
    backwards = end.endswith("_reverse")

    def multiplied(part: str, x: Tensor) -> Tensor:
        steps.setdefault(part, []).append(x)
        weight, bias = getattr(module, f"weight_{part}{end}"), getattr(module, f"bias_{part}{end}", None)
        return linear(x, weight.float(), None if bias is None else bias.float())

    y, last = run_direction(
        CELLS[module.mode],
        multiplied("ih", x),
        partial(multiplied, "hh"),
        partial(multiplied, "hr") if module.proj_size else None,
        state,
        given.sizes,
        backwards=backwards,
    )
    for part, each in steps.items():
        found[part + end] = as_input(module, given, torch.cat(each[::-1] if backwards else each))
    return y, last
