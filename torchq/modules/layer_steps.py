"""The calls of a layer of transformers (`layer_calls.py`) made by one call of C++, one after the other.

Each step is a direct call of a child, or the child itself. A direct call that is not a plain one gives NotImplemented;
then the layer goes on from there in Python.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torchq import _C, ops
from torchq.modules import simulation
from torchq.modules.attention import is_causal_call, noted_by
from torchq.modules.folding import IDLE
from torchq.modules.gated import Gated
from torchq.modules.layer_calls import Activated, Called, Sums
from torchq.modules.layer_norm import LayerNorm
from torchq.modules.quantized_linear import QuantizedLinear
from torchq.modules.rms_norm import RMSNorm
from torchq.modules.self_attention import Call, Heads, SelfAttention
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


class Asked(NamedTuple):
    """What an attention computes with besides its input: places of values, in this order."""

    mask: int
    is_causal: int
    scheme: int
    cos: int
    sin: int
    cache: int
    others: int

    @staticmethod
    def of(number: int) -> "Asked":
        """Those of a layer's attention; its input is the first value."""
        first = 1 + number * len(Asked._fields)
        return Asked(*range(first, first + len(Asked._fields)))


class LayerSteps(NamedTuple):
    """The steps of a layer. The first values are its input, and what is `Asked` of each attention.

    Args:
        steps: in order.
        places: for each of the layer's calls, which values it gives; -1 for one that nobody reads.
        all_places: these of all calls, in order.
        heads: for each of the calls, the values that are heads an attention has given to a cache; () for others.
        attentions: which scheme is asked of in each call.
        width: columns of the widest value, if each sample is computed by itself; else 0.
        waiting: columns of the values that wait for their activation, if they are many enough (`pending.py`).
    """

    steps: tuple[OneStep, ...]
    places: tuple[tuple[int, ...], ...]
    all_places: tuple[int, ...]
    heads: tuple[tuple[int, ...], ...]
    attentions: tuple[SelfAttention, ...]
    width: int
    waiting: tuple[int, ...]

    def run(self, calls: Sequence[Call]) -> tuple[list[Any], int, Heads | None]:
        """The layer's input with what its first calls give, and how many these are: all, if they are plain ones.

        Where the next one is an attention whose cache has got its keys and values, its heads come last.
        """
        x = calls[0].x
        values: list[Any] = [x]
        if simulation.anywhere or noted_by() is not None:
            return values, 0, None
        found: list[Any] = [x]
        for attention, call in zip(self.attentions, calls, strict=True):
            scheme = attention.__dict__["torchq_attention"].scheme
            is_causal = is_causal_call(attention, call.is_causal, call.mask, x.shape[1])
            if is_causal and call.cache is not None:  # only then how many keys there are says which ones a row sees
                return values, 0, None
            angles = (None, None) if call.angles is None else call.angles
            found += (call.mask, is_causal, ops.SCHEME_NUMBERS[scheme], *angles, call.cache, call.others)
        if _C.call_steps(self.steps, found):
            return [x, *(map(found.__getitem__, self.all_places))], len(self.places), None
        for done, places in enumerate(self.places):
            if max(places) >= len(found):
                heads = self.heads[done]
                return values, done, tuple(found[at] for at in heads) if heads and heads[-1] < len(found) else None
            values += [None if at < 0 else found[at] for at in places]
        return values, len(self.places), None


def steps_in_one(calls: Sequence[Called], attentions: tuple[SelfAttention, ...]) -> LayerSteps | None:
    """The steps of a layer with these calls, if each is known."""
    tape, places, heads, values = _Tape(attentions), [], [], [0]
    held: dict[int, tuple[int, ...]] = {}
    try:
        for call in calls:
            tape.heads = ()
            places.append(tape.add(call, tuple(values[i] for i in call.inputs)))
            heads.append(tape.heads)
            if tape.heads:
                held[len(tape.steps) - 1] = tape.heads  # until the whole call is done
            values += places[-1]
    except UnsuitedError:
        return None
    steps = _forgetting(tape.steps, held, kept={*range(tape.given), *values})
    all_places = tuple(place for each in places for place in each)
    owners = [getattr(step.function, "__self__", None) for step in steps]
    waited: list[Any] = [owner.step.module for owner in owners if isinstance(owner, Activated)]
    waiting = tuple(layer.out_features for layer in waited)
    return LayerSteps(steps, tuple(places), all_places, tuple(heads), attentions, _width(steps), waiting)


def _width(steps: Sequence[OneStep]) -> int:
    """As `LayerSteps` has it. Of the direct calls only a cache's looks at more than a sample, where there is one."""
    read: list[Any] = []
    for step in steps:
        owner = getattr(step.function, "__self__", None)
        if isinstance(owner, Activated):
            read.append(owner.step.module)
        elif owner is not _C and step.function is not operator.add:
            return 0
        for argument in step.arguments:
            read += argument if isinstance(argument, tuple) else (argument,)
    return max((layer.out_features for layer in read if type(layer) is QuantizedLinear), default=0)


def _forgetting(steps: Sequence[OneStep], held: dict[int, tuple[int, ...]], kept: set[int]) -> tuple[OneStep, ...]:
    """The steps, each of which lets go of what it reads or holds last. Kept is what a call gives: Python may go on."""
    found: list[OneStep] = []
    for i, step in reversed([*enumerate(steps)]):
        unread = {*step.places[1::2], *held.get(i, ())} - kept
        kept = kept | unread
        found.append(step._replace(unread=tuple(sorted(unread))))
    return tuple(reversed(found))


class _Tape:
    """The steps so far, and how many values there are."""

    def __init__(self, attentions: tuple[SelfAttention, ...]) -> None:
        self.steps: list[OneStep] = []
        self.heads: tuple[int, ...] = ()  # that the last call has given to a cache
        self.count = self.given = 1 + len(attentions) * len(Asked._fields)
        self._asked = iter([Asked.of(number) for number in range(len(attentions))])

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
        if isinstance(call.of, Gated) and call.but_last:
            return (self._gated(call.of, inputs[0]),)
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
        numbers = norm.numbers() if isinstance(norm, RMSNorm) else None
        arguments = (layer, QuantizedLinear, norm, None if norm is None else type(norm), numbers, None, None)
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
        if isinstance(run, RMSNorm):
            return self._then(_C.call_rms_norm, (run, type(run), run.numbers(), None), 3, *inputs)
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

    def _gated(self, gated: Gated, x: int) -> int:
        gate, act, up, _ = map(gated._modules.get, gated.line.attributes())
        _, settings, activation = gated.__dict__["_known"]
        arguments = (gate, up, QuantizedLinear, None, activation, (act,), (settings,))
        return self._then(_C.call_gated, arguments, 3, x)

    def _attended(self, attention: SelfAttention, but_last: bool, x: int) -> int:
        line, children = attention.line, attention.__dict__["_modules"]
        layers = tuple(children[name] for name in line.found.projections)
        if not all(type(layer) is QuantizedLinear for layer in layers):
            raise UnsuitedError
        asked = next(self._asked)
        y = (self._of_products if line.is_of_products else self._of_heads)(attention, layers, asked, x)
        behind = line.found.behind
        for name in behind[:-1] if but_last else behind:
            y = self._called(children[name], (y,))
        return y

    def _of_products(self, attention: SelfAttention, layers: tuple[QuantizedLinear, ...], asked: Asked, x: int) -> int:
        state, (size, scale, *_) = attention.__dict__, attention.line.numbers
        widths = {layer.out_features for layer in layers}
        if len(widths) != 1 or min(widths) % state[size]:
            raise UnsuitedError
        q = self._then(_C.call_together, (layers, QuantizedLinear, None), 2, x, count=len(layers))
        arguments = (None, None, None, None, min(widths) // state[size], None, state[scale], None)
        return self._then(_C.call_attention, arguments, *_attending(q, q + 1, q + 2, asked))

    def _of_heads(self, attention: SelfAttention, layers: tuple[QuantizedLinear, ...], asked: Asked, x: int) -> int:
        state, found = attention.__dict__, attention.line.found
        if attention.line.rotary is None or any(found.norms):
            raise UnsuitedError
        of_x = (layers, QuantizedLinear, None, state[found.size], None, None)
        q = self._then(_C.call_heads, of_x, 2, x, 4, asked.cos, 5, asked.sin, count=3)
        k, v = q + 1, q + 2
        if found.cache is not None:
            given = (None, None, None, state[found.cache.place], None, found.cache.hands_on)
            k = self._then(_C.call_cache, given, 0, asked.cache, 1, k, 2, v, 4, asked.others, count=2)
            v = k + 1
        self.heads = (q, k, v)
        arguments = (None, None, None, None, JOINED, None, state[found.scale], None)
        return self._then(_C.call_attention, arguments, *_attending(q, k, v, asked))


JOINED = -1
"""For the number of heads: those of q, k and v have a dimension of their own, and those of y have none."""


def _attending(q: int, k: int, v: int, asked: Asked) -> tuple[int, ...]:
    """Which arguments of an attention are which values."""
    return 0, q, 1, k, 2, v, 3, asked.mask, 5, asked.is_causal, 7, asked.scheme
