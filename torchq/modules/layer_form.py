"""Layers of converted models of transformers as a few calls, if that is proven to be their code (`layer_code.py`).

Between the products of a BERT layer transformers calls modules in modules, through decorators and a function that may
divide the rows into chunks: of 4 rows of 64 that takes half of the time. Here a call of the layer is one look at all
its modules, and then its attention, its sums and its rows, one after the other (`layer_calls.py`). Wherever anybody
could see a difference, or change anything between these calls, the code of the user runs (`straight_forms.py`).
"""

import operator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from torchq import _C
from torchq.modules.attention_code import MASK
from torchq.modules.chunked import Chunked
from torchq.modules.facts import MISSING, Facts
from torchq.modules.layer_calls import Called, calls_of
from torchq.modules.layer_code import LayerCode, Step, Steps, is_leaf, layer_code_of, steps_of
from torchq.modules.layer_given import MOST, Reading, reading_of
from torchq.modules.layer_slices import in_slices
from torchq.modules.layer_steps import LayerSteps, steps_in_one
from torchq.modules.one_op import NONE, OneOp, Places, alone, apart, give_number, in_graph
from torchq.modules.parts import Learned
from torchq.modules.pending import Scope, within_scopes
from torchq.modules.quantized_linear import QuantizedLinear
from torchq.modules.self_attention import Call, Heads, SelfAttention
from torchq.modules.straight_forms import Form, Residual, Row, become, give_back, may_become
from torchq.modules.writes import modes


class Known(NamedTuple):
    """What a layer computes, and how.

    Args:
        steps: what it computes.
        calls: by which calls.
        in_one: these in one, if they can be.
        readings: how calls are read, by the number of arguments without a name and the names of the others.
        asking: what says that its attentions are asked, if they were when it was read.
        lines: where all this lies in memory.
    """

    steps: Steps
    calls: tuple[Called, ...]
    in_one: LayerSteps | None
    readings: dict[tuple[Any, ...], Reading | None]
    asking: Facts | None
    lines: object

    def are_asked(self) -> bool:
        """Whether the config and the registry lead to torchq's attention."""
        if self.asking is not None and self.asking.hold():
            return True
        return all(attention.is_asked() for attention in self.steps.attentions)


class LayerForm(OneOp, Learned, Chunked):
    """A layer of transformers, or what is around its attention: the calls of its parts, one after the other."""

    line: LayerCode  # type: ignore[assignment]
    _known: Known | None
    reads = staticmethod(layer_code_of)  # type: ignore[assignment]

    @staticmethod
    def adopt(module: nn.Module) -> None:
        """Makes a module, which may be a Chunked, a LayerForm, if its code is one."""
        if isinstance(module, Form) and type(module).form is not Chunked:
            return
        code = layer_code_of(module.original if isinstance(module, Form) else type(module))
        if code is None or steps_of(module, code) is None:
            return
        if isinstance(module, Form):
            give_back(module)
        if may_become(LayerForm, module):
            become(LayerForm, module, code)
            give_number(cast(LayerForm, module))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """forward(), past what transformers does between the calls, where that is all that happens."""
        if is_dynamo_compiling():
            y = in_graph(self, args, kwargs)
            if y is not None:
                return y
        else:
            y = self._run(args, kwargs)
            if y is not NotImplemented:
                return y
        return super().__call__(*args, **kwargs)

    def _read_again(self) -> Known | None:
        steps = steps_of(self, self.line)
        if steps is None:
            return None
        calls = calls_of(steps)
        in_one = steps_in_one(calls, steps.attentions)
        return _located(Known(steps, calls, in_one, {}, _asking(steps.attentions), None))

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if modes() or torch._C._get_tracing_state():
            return NotImplemented
        known: Known | None = self._learned()
        if known is None:
            return NotImplemented
        _C.fetch_lines(known.lines)
        steps = known.steps
        if not _are_as_known(steps):
            return NotImplemented
        given = self._given(known, args, kwargs)
        if given is None or not known.are_asked():
            return NotImplemented
        y = within_scopes(self, lambda: _computed(known, given)) if self._forward_hooks else _computed(known, given)
        return (y, None) if steps.pair else y

    def _given(self, known: Known, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Call] | None:
        """The calls of the attentions, each with the layer's input; None if something else may happen in this call."""
        reading = self._reading(known, len(args), (*kwargs,))
        return None if reading is None else reading.calls(known.steps.attentions, args, kwargs)

    def _reading(self, known: Known, count: int, names: tuple[str, ...]) -> Reading | None:
        """How a call is read that gives so many arguments by position and some by name; None if its code must run."""
        readings, key = known.readings, (count, *names)
        reading: Any = readings.get(key, MISSING)
        if reading is MISSING:
            if len(readings) >= MOST:
                readings.clear()
            reading = readings[key] = reading_of(self.line, known.steps, count, names)
            self.__dict__["_known"] = self, _located(known)
        return cast(Reading | None, reading)

    def places(self, count: int, names: tuple[str, ...], kinds: tuple[int, ...]) -> Places | None:
        """As `OneOp` has it."""
        known: Known | None = self._learned()
        if known is None or known.steps.hands_on or not _keep_shape(known.steps):
            return None
        reading = self._reading(known, count, names)
        if reading is None or not _are_as_known(known.steps) or not known.are_asked():
            return None
        given = reading.given[0]
        if kinds[given.x] == NONE or any(kinds[at] != NONE for at in given.absent):
            return None
        mask = None if given.mask < 0 or kinds[given.mask] == NONE else given.mask
        return Places(given.x, mask, None, hinted=False, pair=known.steps.pair)

    def called_in_graph(self, x: Tensor, mask: Tensor | None, padding: Tensor | None, hinted: bool) -> Any:
        """As `OneOp` has it."""
        y = self._run((x,), {MASK: mask})
        if y is not NotImplemented:
            return alone(y)
        others = dict.fromkeys(self.line.required.difference(self.line.names[:1]))
        return apart(LayerForm.__call__(self, x, **{**others, MASK: mask}))


def _located(known: Known) -> Known:
    """The same with where it lies now."""
    asking = () if known.asking is None else known.asking.objects()
    return known._replace(lines=_C.lines_of(known[:-1], (*known.steps.facts.objects(), *asking)))


def _asking(attentions: tuple[SelfAttention, ...]) -> Facts | None:
    if not all(attention.is_asked() for attention in attentions):
        return None
    facts = Facts()
    for attention in attentions:
        facts.join(attention.asking())
    return facts


def _are_as_known(steps: Steps) -> bool:
    """Whether all modules of a layer are what they were, and what else their code has read."""
    return _C.are_as_known(steps.parts, Scope.enter, Scope.leave) and steps.facts.hold()


def _keep_shape(steps: Steps) -> bool:
    """Whether what a layer gives has the shape of its input, to which nothing writes, whatever its parts are."""
    like = {0}
    for index, step in enumerate(steps.steps, 1):
        if 0 in step.inputs and _writes(step.run):
            return False
        if not like.isdisjoint(_like(step)):
            like.add(index)
    return steps.output in like and steps.output > 0


def _like(step: Step) -> tuple[int, ...]:
    """Those of its inputs whose shape a step's output has."""
    run: Any = step.run
    if isinstance(run, Residual):
        return (step.inputs[1 - run.line.source],)
    keeps = run is operator.add or (is_leaf(run) and not isinstance(run, (QuantizedLinear, nn.Linear)))
    return step.inputs if keeps else ()


def _writes(run: Any) -> bool:
    """Whether it works in place, as an activation may."""
    of: Any = getattr(run, "__self__", None)
    first = of._in_order()[0] if isinstance(of, Row) else run
    return bool(getattr(first, "inplace", False))


def _computed(known: Known, given: list[Call]) -> Any:
    y = None if known.in_one is None else in_slices(known.in_one, given, known.steps.output)
    if y is not None:
        return y
    values, done, heads = ([given[0].x], 0, None) if known.in_one is None else known.in_one.run(given)
    if done < len(known.calls):
        _go_on(known, given, values, done, heads)
    return values[known.steps.output]


def _go_on(known: Known, given: list[Call], values: list[Any], done: int, heads: Heads | None) -> None:
    """The calls behind those that are done, one after the other; the first of them may have these heads already."""
    calls = iter(given)
    for i, (run, inputs, handed, gives_all, *_) in enumerate(known.calls):
        call = None if handed is None else next(calls)
        if i < done:
            continue
        if call is not None:
            values.append(run(Call(values[inputs[0]], *call[1:]), heads if i == done else None))
        elif gives_all:
            values += run(*[values[j] for j in inputs])
        else:
            values.append(run(*[values[j] for j in inputs]))
