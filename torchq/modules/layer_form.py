"""Layers of converted models of transformers as a few calls, if that is proven to be their code (`layer_code.py`).

Between the products of a BERT layer transformers calls modules in modules, through decorators and a function that may
divide the rows into chunks: of 4 rows of 64 that takes half of the time. Here a call of the layer is one look at all
its modules, and then its attention, its sums and its rows, one after the other (`layer_calls.py`). Wherever anybody
could see a difference, or change anything between these calls, the code of the user runs (`straight_forms.py`).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from torchq import _C
from torchq.modules.attention_code import MASK
from torchq.modules.chunked import Chunked
from torchq.modules.layer_calls import Called, calls_of
from torchq.modules.layer_code import LayerCode, Steps, layer_code_of, steps_of
from torchq.modules.layer_steps import LayerSteps, steps_in_one
from torchq.modules.parts import Learned
from torchq.modules.pending import Scope, within_scopes
from torchq.modules.self_attention import Call
from torchq.modules.straight_forms import Form, become, give_back, may_become
from torchq.modules.writes import modes


class Known(NamedTuple):
    """What a layer computes, and by which calls; these in one, if they can be; where it lies in memory."""

    steps: Steps
    calls: tuple[Called, ...]
    in_one: LayerSteps | None
    lines: object


class LayerForm(Learned, Chunked):
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

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """forward(), past what transformers does between the calls, where that is all that happens."""
        if not is_dynamo_compiling():
            y = self._run(args, kwargs)
            if y is not NotImplemented:
                return y
        return super().__call__(*args, **kwargs)

    def _read_again(self) -> Known | None:
        steps = steps_of(self, self.line)
        if steps is None:
            return None
        calls = calls_of(steps)
        in_one = None if steps.hands_on else steps_in_one(calls, steps.attentions)
        return Known(steps, calls, in_one, _C.lines_of((steps, calls, in_one)))

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if modes() or torch._C._get_tracing_state():
            return NotImplemented
        known: Known | None = self._learned()
        if known is None:
            return NotImplemented
        _C.fetch_lines(known.lines)
        steps = known.steps
        if not _C.are_as_known(steps.parts, Scope.enter, Scope.leave) or not steps.facts.hold():
            return NotImplemented
        given = self._given(steps, args, kwargs)
        if given is None or not all(attention.is_asked() for attention in steps.attentions):
            return NotImplemented
        y = within_scopes(self, lambda: _computed(known, given)) if self._forward_hooks else _computed(known, given)
        return (y, None) if steps.pair else y

    def _given(self, steps: Steps, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Call] | None:
        """The calls of the attentions, each with the layer's input; None if something else may happen in this call."""
        line = self.line
        given = dict(zip(line.names, args, strict=False)) | kwargs
        if len(line.names) < len(args) or not kwargs.keys().isdisjoint(line.names[: len(args)]):
            return None
        if not given.keys() >= line.required:
            return None
        x = given.pop(line.names[0], None)
        if type(x) is not Tensor or x.dim() != 3:
            return None
        others = {name: given.pop(name) for name in [*given] if name not in line.names}
        if others and (not line.takes_more or not steps.refused.isdisjoint(others)):
            return None
        if steps.hands_on:
            return self._handed(steps, x, {**dict(line.defaults), **given}, others)
        mask = given.pop(MASK, None)
        plain = all(value is None for value in (*given.values(), *others.values()))
        return [Call(x, mask) for _ in steps.attentions] if plain else None

    def _handed(self, steps: Steps, x: Tensor, given: dict[str, Any], others: dict[str, Any]) -> list[Call] | None:
        calls = []
        for step in steps.steps:
            if step.handed is not None:
                arguments = {name: given.get(own) for name, own in step.handed.names}
                attention: Any = step.run
                call = attention.read_call((x,), arguments | others if step.handed.more else arguments)
                if call is None or (call.cache is not None and not attention.knows(call.cache)):
                    return None
                calls.append(call)
        return calls


def _computed(known: Known, given: list[Call]) -> Any:
    x, mask, *_ = given[0]
    values, done = ([x], 0) if known.in_one is None else known.in_one.run(x, mask)
    if done < len(known.calls):
        _go_on(known, given, values, done)
    return values[known.steps.output]


def _go_on(known: Known, given: list[Call], values: list[Any], done: int) -> None:
    """The calls behind those that are done, one after the other."""
    calls = iter(given)
    for i, (run, inputs, handed, gives_all, *_) in enumerate(known.calls):
        call = None if handed is None else next(calls)
        if i < done:
            continue
        if call is not None:
            values.append(run(Call(values[inputs[0]], *call[1:])))
        elif gives_all:
            values += run(*[values[j] for j in inputs])
        else:
            values.append(run(*[values[j] for j in inputs]))
