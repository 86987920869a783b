"""The steps of a layer of transformers (`layer_code.py`) in fewer calls: products with what lies around them.

    act(layer(x))
    norm(layer(x) + residual)            and where the norm comes first, the sum, too
    down(act(gate(x)) * up(x)) + residual

Each call is one of C++ where nobody could see a difference, else the calls of the children as they are.
"""

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from torchq import _C
from torchq.modules import int8_sequential, simulation
from torchq.modules.gated import Gated
from torchq.modules.layer_code import Handed, Step, Steps
from torchq.modules.layer_norm import LayerNorm
from torchq.modules.pending import MIN_VALUES
from torchq.modules.quantized_linear import QuantizedLinear
from torchq.modules.rms_norm import RMSNorm
from torchq.modules.self_attention import SelfAttention
from torchq.modules.straight_forms import Row
from torchq.ops import Activation

Values = tuple[Tensor | None, ...]
"""What the steps of one call give; None where only the call itself reads it."""


class Activated(NamedTuple):
    """`act(layer(x))`."""

    step: int8_sequential.Step

    def of(self, x: Tensor) -> Values:
        """The values: at once where the layer's output would wait for its activation (`pending.py`)."""
        layer: Any = self.step.module
        between, settings, activation = self.step.between or (), self.step.settings, self.step.activation
        y: Any = NotImplemented
        if x.numel() * layer.out_features >= MIN_VALUES * layer.in_features:
            y = _C.call_fused(layer, QuantizedLinear, x, None, activation, between, settings, None, None)
        if y is NotImplemented:
            y = layer(x)
            for module in between:
                y = module(y)
        return None, y


class Sums(NamedTuple):
    """`layer(x) + residual`, and behind it what a norm makes of that, if there is one: both are values.

    The layer may be on the right of the sum, which has the strides of its left side if they differ.
    """

    layer: QuantizedLinear
    norm: RMSNorm | LayerNorm | None
    on_the_right: bool

    def of(self, x: Tensor, residual: Tensor) -> Values:
        """The values."""
        norm = self.norm
        kind, numbers = (None if norm is None else type(norm)), (norm.numbers() if isinstance(norm, RMSNorm) else None)
        if not isinstance(norm, RMSNorm) or not simulation.anywhere:
            found = _C.call_sums(self.layer, QuantizedLinear, norm, kind, numbers, x, residual)
            if found is not NotImplemented:
                return found
        total = self.total(x, residual)
        return (total,) if norm is None else (total, norm(total))

    def total(self, x: Tensor, residual: Tensor) -> Tensor:
        """The sum by the calls as they are."""
        return residual + self.layer(x) if self.on_the_right else self.layer(x) + residual

    def normed(self, x: Tensor, residual: Tensor) -> Values:
        """The values of a sum that only its norm reads, a LayerNorm."""
        norm: Any = self.norm
        y = _C.call_sum(self.layer, QuantizedLinear, norm, LayerNorm, x, residual)
        return None, norm(self.total(x, residual)) if y is NotImplemented else y


class Called(NamedTuple):
    """One call of a layer.

    Args:
        run: what is called. That of an attention gets a `Call`, and heads, if there are any already.
        inputs: the values that it is called on, by index.
        handed: what else an attention is given.
        gives_all: whether it gives a tuple of values instead of one.
        of: what a step calls, where that is all, or all `but_last`, the last layer in it.
    """

    run: Callable[..., Any]
    inputs: tuple[int, ...]
    handed: Handed | None
    gives_all: bool
    of: Any = None
    but_last: bool = False


def calls_of(found: Steps) -> tuple[Called, ...]:
    """The calls that give the values of a layer's steps, by the same indices; but for those that only a call reads."""
    uses = Counter(index for step in found.steps for index in step.inputs) + Counter([found.output])
    calls: list[Called] = []
    steps = list(found.steps)
    while steps:
        step, at = steps.pop(0), len(found.steps) - len(steps)
        fused = _fused(step, steps[0]) if steps and uses[at] == 1 and steps[0].inputs == (at,) else None
        before, last = _halves(step.run)
        if fused is not None:
            del steps[0]
            calls.append(Called(Activated(fused).of, step.inputs, None, gives_all=True))
        elif last is None or not steps or uses[at] != 1 or not _is_sum_with(steps[0], at):
            calls.append(Called(_whole(step.run), step.inputs, step.handed, gives_all=False, of=step.run))
        else:
            one, other = steps.pop(0).inputs
            residual, on_the_right = (one, True) if other == at else (other, False)
            norm = _norm_of(steps, at + 1)
            sums = Sums(last, norm, on_the_right)
            alone = type(norm) is LayerNorm and uses[at + 1] == 1
            calls.append(Called(before, step.inputs, step.handed, gives_all=False, of=step.run, but_last=True))
            calls.append(Called(sums.normed if alone else sums.of, (at, residual), None, gives_all=True))
            del steps[: 0 if norm is None else 1]
    return tuple(calls)


def _fused(step: Step, behind: Step) -> int8_sequential.Step | None:
    """A layer with what the plan lets it compute of the step behind it, if that is an activation."""
    if type(step.run) is not QuantizedLinear:
        return None
    (fused, *rest) = int8_sequential.steps_of([step.run, behind.run])
    return fused if fused.activation != Activation.NONE and not rest and not step.run.fold.codes else None


def _itself(x: Tensor) -> Tensor:
    return x


def _whole(run: Any) -> Callable[..., Any]:
    """What a step calls; the method of an attention is looked up when it is called."""
    return (lambda call, heads: run.attend(call, heads)) if isinstance(run, SelfAttention) else run


def _halves(run: Any) -> tuple[Callable[..., Any], QuantizedLinear | None]:
    """What a step computes before its last layer, and this, if it is an int8 one."""
    if type(run) is QuantizedLinear:
        return _itself, run
    if isinstance(getattr(run, "__self__", None), Row):
        last = run.__self__.last_alone()
        return run.__self__.before_last, last if type(last) is QuantizedLinear else None
    if isinstance(run, SelfAttention):
        names = run.line.found.behind
        last = run._modules.get(names[0]) if len(names) == 1 else None
        return lambda call, heads: run.attended(call, heads), last if type(last) is QuantizedLinear else None
    if isinstance(run, Gated):
        last = run._modules.get(run.line.down)
        return lambda x: run.product(x), last if type(last) is QuantizedLinear else None
    return run, None


def _is_sum_with(step: Step, index: int) -> bool:
    """Whether it adds this value to another one."""
    return step.run is operator.add and step.inputs.count(index) == 1


def _norm_of(steps: Sequence[Step], index: int) -> RMSNorm | LayerNorm | None:
    """The norm that the next step is, if it is that of this value."""
    norm: Any = steps[0].run if steps and steps[0].inputs == (index,) else None
    return norm if isinstance(norm, RMSNorm) or type(norm) is LayerNorm else None
