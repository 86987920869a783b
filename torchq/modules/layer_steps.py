"""The calls of a layer of transformers (`layer_calls.py`) made by one call of C++, one after the other.

Each step is a direct call of a child, or the child itself. A direct call that is not a plain one gives NotImplemented;
then the layer goes on from there in Python.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from torchq import _C, ops
from torchq.modules import simulation
from torchq.modules.attention import is_causal_call, noted_by
from torchq.modules.folding import IDLE
from torchq.modules.layer_calls import Activated, Called, Sums
from torchq.modules.layer_norm import LayerNorm
from torchq.modules.quantized_linear import QuantizedLinear
from torchq.modules.self_attention import SelfAttention
from torchq.modules.straight_forms import Residual, Row


class UnsuitedError(Exception):
    """A layer that Python calls."""


class OneStep(NamedTuple):
    """What `_C.call_steps` calls.

    Args:
        function: a direct call, or any callable.
        arguments: with None for those that are values.
        places: pairs: which argument is which value.
        gives_all: whether it gives a tuple of values instead of one.
        unread: values that nobody reads behind it.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    places: tuple[int, ...]
    gives_all: bool
    unread: tuple[int, ...] = ()


class LayerSteps(NamedTuple):
    """The steps of a layer. The first values are its input, the mask, and two for each attention.

    Args:
        steps: in order.
        places: for each of the layer's calls, which values it gives; -1 for one that nobody reads.
        attentions: which mask and scheme are asked of in each call.
    """

    steps: tuple[OneStep, ...]
    places: tuple[tuple[int, ...], ...]
    attentions: tuple[SelfAttention, ...]

    def run(self, x: Tensor, mask: Tensor | None) -> tuple[list[Any], int]:
        """The layer's input with what its first calls give, and how many these are: all, if they are plain ones."""
        values: list[Any] = [x]
        if simulation.anywhere or noted_by() is not None:
            return values, 0
        found: list[Any] = [x, mask]
        for each in self.attentions:
            scheme = each.__dict__["torchq_attention"].scheme
            found += (is_causal_call(each, None, mask, x.shape[1]), ops.SCHEME_NUMBERS[scheme])
        _C.call_steps(self.steps, found)
        for done, places in enumerate(self.places):
            if max(places) >= len(found):
                return values, done
            values += [None if at < 0 else found[at] for at in places]
        return values, len(self.places)


def steps_in_one(calls: Sequence[Called], attentions: tuple[SelfAttention, ...]) -> LayerSteps | None:
    """The steps of a layer with these calls, if each is known."""
    tape, places, values = _Tape(attentions), [], [0]
    try:
        for call in calls:
            places.append(tape.add(call, tuple(values[i] for i in call.inputs)))
            values += places[-1]
    except UnsuitedError:
        return None
    return LayerSteps(_forgetting(tape.steps, kept={*range(tape.given), *values}), tuple(places), attentions)


def _forgetting(steps: Sequence[OneStep], kept: set[int]) -> tuple[OneStep, ...]:
    """The steps, each of which lets go of what it reads last. Kept is what a call gives, where Python may go on."""
    found: list[OneStep] = []
    for step in reversed(steps):
        unread = {*step.places[1::2]} - kept
        kept = kept | unread
        found.append(step._replace(unread=tuple(sorted(unread))))
    return tuple(reversed(found))


class _Tape:
    """The steps so far, and how many values there are."""

    def __init__(self, attentions: tuple[SelfAttention, ...]) -> None:
        self.steps: list[OneStep] = []
        self.attentions = attentions
        self.count = self.given = 2 + 2 * len(attentions)

    def add(self, call: Called, inputs: tuple[int, ...]) -> tuple[int, ...]:
        """The steps of one call of the layer; the places of its values."""
        owner = getattr(call.run, "__self__", None)
        if isinstance(owner, Activated):
            y = self._then(call.run, (None,), 0, inputs[0], count=2)
            return -1, y + 1
        if isinstance(owner, Sums):
            return self._summed(owner, inputs, alone=getattr(call.run, "__func__", None) is Sums.normed)
        if call.of is None:
            raise UnsuitedError
        if isinstance(call.of, SelfAttention):
            return (self._attended(call.of, call.but_last, inputs[0]),)
        if call.but_last and type(call.of) is QuantizedLinear:  # of which nothing is left
            return (inputs[0],)
        row = getattr(call.of, "__self__", None)
        if isinstance(row, Row):
            return (self._in_order(row, call.but_last, inputs[0]),)
        if call.but_last:
            raise UnsuitedError
        return (self._called(call.of, inputs),)

    def _then(self, function: Any, arguments: tuple[Any, ...], *places: int, count: int | None = None) -> int:
        """One more step, with so many values or, if that is None, one; the index of the first."""
        self.steps.append(OneStep(function, arguments, places, count is not None))
        first, self.count = self.count, self.count + (count or 1)
        return first

    def _summed(self, sums: Sums, inputs: tuple[int, ...], *, alone: bool) -> tuple[int, ...]:
        layer, norm = sums.layer, sums.norm
        if alone:
            of_sum = (layer, QuantizedLinear, norm, LayerNorm, None, None)
            return -1, self._then(_C.call_sum, of_sum, 4, inputs[0], 5, inputs[1])
        if norm is not None and type(norm) is not LayerNorm:
            raise UnsuitedError
        arguments = (layer, QuantizedLinear, norm, None if norm is None else LayerNorm, None, None, None)
        first = self._then(_C.call_sums, arguments, 5, inputs[0], 6, inputs[1], count=1 if norm is None else 2)
        return (first,) if norm is None else (first, first + 1)

    def _called(self, run: Any, inputs: tuple[int, ...]) -> int:
        if isinstance(run, Residual):
            _, _, source, calls, norm = run.line
            arguments = (run, type(run), calls, norm, (QuantizedLinear, LayerNorm, IDLE), None, None)
            return self._then(_C.call_residual, arguments, 5, inputs[source], 6, inputs[1 - source])
        if type(run) is QuantizedLinear:
            return self._then(_C.call_linear, (run, QuantizedLinear, None), 2, *inputs)
        if type(run) is LayerNorm:
            return self._then(_C.call_layer_norm, (run, LayerNorm, None), 2, *inputs)
        places = [number for pair in enumerate(inputs) for number in pair]
        return self._then(run, (None,) * len(inputs), *places)

    def _in_order(self, row: Row, but_last: bool, x: int) -> int:
        steps = row._steps()
        for module, between, settings, activation, reader in steps[:-1] if but_last else steps:
            if reader is not None or (between is not None and type(module) is not QuantizedLinear):
                raise UnsuitedError
            if between is None:
                x = self._called(module, (x,))
            else:
                arguments = (module, QuantizedLinear, None, None, activation, between, settings, None, None)
                x = self._then(_C.call_fused, arguments, 2, x)
        return x

    def _attended(self, attention: SelfAttention, but_last: bool, x: int) -> int:
        line, children, state = attention.line, attention.__dict__["_modules"], attention.__dict__
        layers = [children[name] for name in line.found.projections]
        size, scale = (state[name] for name in line.numbers[:2])
        widths = {layer.out_features for layer in layers if type(layer) is QuantizedLinear}
        suited = line.is_of_products and all(type(layer) is QuantizedLinear for layer in layers)
        if not suited or len(widths) != 1 or min(widths) % size:
            raise UnsuitedError
        together = (tuple(layers), QuantizedLinear, None)
        q = self._then(_C.call_together, together, 2, x, count=len(layers))
        asked = 2 + 2 * self.attentions.index(attention)
        arguments = (None, None, None, None, min(widths) // size, None, scale, None)
        y = self._then(_C.call_attention, arguments, 0, q, 1, q + 1, 2, q + 2, 3, 1, 5, asked, 7, asked + 1)
        behind = line.found.behind
        for name in behind[:-1] if but_last else behind:
            y = self._called(children[name], (y,))
        return y
