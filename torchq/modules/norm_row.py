"""Batch norms whose own code goes on with children: `self.act(self.drop(batch_norm(x)))`, as timm's BatchNormAct2d has.

A layer may include such a norm like any other, if what stands in its place goes on calling the children. That this is
all that its code does in eval mode is found as for modules of convolutions (`flow.py`): the code runs once on
stand-ins, which know the arithmetic of a batch norm only as a call of torch's with the module's own tensors.
"""

import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from torchq.modules.facts import Facts
from torchq.modules.flow import Run, StandIn, Step, code_of, stood_for
from torchq.modules.others import unknown
from torchq.modules.plain_code import forward_of
from torchq.modules.straight import UnknownError

RANKS: Mapping[type[nn.Module], int] = {nn.BatchNorm1d: 3, nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}
"""Torch's batch norms, and the rank of the inputs (N, C, *spatial) of each."""

_TENSORS = ("running_mean", "running_var", "weight", "bias")


def row_of(norm: nn.Module) -> tuple[str, ...] | None:
    """The children that a batch norm calls one after the other on what torch's gives; None if its code is another.

    >>> class NormAct(nn.BatchNorm2d):
    ...     def __init__(self, channels):
    ...         super().__init__(channels)
    ...         self.act = nn.ReLU()
    ...     def forward(self, x):
    ...         return self.act(super().forward(x))
    >>> row_of(NormAct(8)), row_of(nn.BatchNorm2d(8)), row_of(nn.LayerNorm(8))
    (('act',), (), None)
    """
    base = next((kind for kind in RANKS if isinstance(norm, kind)), None)
    if base is None:
        return None
    if forward_of(type(norm)) is base.forward:
        return () if not norm._modules else None
    code = code_of(type(norm))
    if code is None:
        return None
    run = _Run(norm, base)
    try:
        y = run.apart(code[0])(run.itself(), run.given)
    except Exception:  # whatever the code meets on stand-ins
        return None
    children = [name for name, child in norm._modules.items() if child is not None]
    called = tuple(map(str, run.seen[1:]))
    alike = y is run.given and run.seen[:1] == [_NORM] and sorted(called) == sorted(children)
    return called if alike else None


_BATCH_NORM = nn.functional.batch_norm
_NORM = "batch_norm()"  # the step that is the norm itself: no child has this name


class _Value:
    """What the code computes with: the argument, and then what the steps up to now have made of it."""

    def __init__(self, rank: int) -> None:
        self.ndim = rank

    def dim(self) -> int:
        """As a tensor's."""
        return self.ndim

    def __bool__(self) -> bool:
        raise UnknownError


class _Run(Run):
    """One run of a batch norm's code, as if it were in eval mode. Each step must take what the one before gave."""

    def __init__(self, norm: nn.Module, base: Any) -> None:
        super().__init__(norm, type(norm), Facts())
        self._norm: Any = norm
        self._base = base
        self.given = _Value(RANKS[base])

    def read(self, name: str) -> Any:
        """Its tensors are known by name, and the others not at all."""
        held = {**self._norm._parameters, **self._norm._buffers}
        if name in held:
            return None if held[name] is None else StandIn(unknown, of=name)
        return False if name == "training" else super().read(name)

    def then(self, x: Any, step: Step) -> _Value:
        """What a step makes of the last value."""
        if x is not self.given:
            raise UnknownError
        self.seen.append(step)
        self.given = _Value(self.given.ndim)
        return self.given

    def named(self, scope: dict[str, Any], name: str) -> Any:
        """`super` leads to torch's batch norm and nowhere else, if that is what comes next."""
        if name == "super" and name not in scope:
            return lambda *_: StandIn(self._inherited)
        return self._batch_norm if scope.get(name) is _BATCH_NORM else super().named(scope, name)

    def _inherited(self, name: str) -> Any:
        if name != "forward" or self._next_forward() is not self._base.forward:
            raise UnknownError
        return lambda x: self.then(x, _NORM)

    def _next_forward(self) -> Any:
        """The forward of the first base of the class that has the code which runs."""
        own = forward_of(type(self._norm))
        forwards = [vars(kind)["forward"] for kind in type(self._norm).__mro__ if "forward" in vars(kind)]
        return forwards[forwards.index(own) + 1]

    def library(self, library: Any) -> StandIn:
        """Torch, of which the code may know batch_norm and how to assert."""

        def read(name: str) -> Any:
            value = getattr(library, name)
            if value is nn or value is nn.functional:
                return self.library(value)
            return self._batch_norm if value is _BATCH_NORM else unknown()

        return StandIn(read)

    def call(self, function: types.FunctionType, *args: Any) -> None:
        """Of the user's functions none may be called, and of torch's only this one."""
        if function is not torch._assert or args[0] is not True:
            raise UnknownError

    def _batch_norm(
        self,
        x: Any,
        running_mean: Any,
        running_var: Any,
        weight: Any = None,
        bias: Any = None,
        training: Any = False,
        momentum: Any = 0.1,
        eps: Any = 1e-5,
    ) -> _Value:
        given = [None if each is None else stood_for(each) for each in (running_mean, running_var, weight, bias)]
        own = [None if getattr(self._norm, name) is None else name for name in _TENSORS]
        if given != own or training is not False or eps != self._norm.eps:
            raise UnknownError
        return self.then(x, _NORM)
