"""Int8Sequential: an nn.Sequential that runs int8 layers together with the activations between them.

The children stay what they are: real modules with real outputs, each callable by itself. When the whole is called, a
layer computes the activation behind it in its epilogue, and hands u8 codes to a static layer, as far as the plan
permits it (`Fold`). Nobody is there to see the difference: between the children there is only this module's own loop.
It follows the children that it has at the moment, so slices, new heads and replaced children need no care. Where a
child has a hook, or a Dropout is in training, the children concerned run one by one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.fx import Proxy
from torch.nn.modules.module import _has_any_global_hook

from torchq import _C
from torchq.modules import simulation
from torchq.modules.classes import computes_as_known, know
from torchq.modules.fine_linear import FineLinear
from torchq.modules.folding import IDLE, followers
from torchq.modules.quantized_linear import Codes, QuantizedLinear
from torchq.ops import Activation


class Step(NamedTuple):
    """Some children that run at once.

    Args:
        module: the first of them.
        between: if it is a QuantizedLinear, the others: an activation, and modules without effect. Else None.
        settings: of each of these the attributes that it computes with, as they were when the step was made.
        activation: the `Activation` among them.
        reader: the next layer, if it takes the result as u8 codes.
    """

    module: nn.Module
    between: tuple[nn.Module, ...] | None
    settings: tuple[dict[str, Any], ...]
    activation: int
    reader: QuantizedLinear | None

    @staticmethod
    def alone(module: Any) -> "Step":
        """A child that runs by itself."""
        return Step(module, None, (), Activation.NONE, None)

    @staticmethod
    def fused(layer: nn.Module, between: list[nn.Module], activation: int, reader: QuantizedLinear | None) -> "Step":
        """A layer with what follows it."""
        return Step(layer, tuple(between), tuple(map(settings_of, between)), activation, reader)

    def holds(self) -> bool:
        """Whether the modules between still compute what they did."""
        pairs = zip(self.between or (), self.settings, strict=True)
        return all(getattr(module, name, None) is value for module, own in pairs for name, value in own.items())


def settings_of(module: nn.Module) -> dict[str, Any]:
    """The attributes that a module computes with. That its class hides none of them is noted (`classes.know`)."""
    settings = {name: value for name, value in vars(module).items() if name[0] != "_" and name != "training"}
    know(type(module), settings)
    return settings


class Watch:
    """A forward pre-hook of a layer that only looks at its floats. What is watched gives the same bits, fused as ever.

    Args:
        look: is called with the floats.
    """

    def __init__(self, look: Callable[[Tensor], None]) -> None:
        self.look = look

    def __call__(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        """Looks, and changes nothing."""
        self.look(args[0])


class InOrder(nn.Module):
    """A module that calls children one after the other, and nothing else: it runs layers with what follows them."""

    _known: tuple[list[nn.Module | None], list[Step]] = ([], [])  # some children, and their steps

    def _in_order(self) -> list[nn.Module | None]:
        """The children of this moment."""
        return list(self.__dict__["_modules"].values())

    def _run(self, x: Any) -> Any:
        """What the children make of x."""
        return self._run_steps(self._steps(), x)

    def last_alone(self) -> nn.Module | None:
        """The last child, if it runs by itself, on the floats that those before give; else None."""
        *before, last = self._steps()
        alone = last.activation == Activation.NONE and last.reader is None and not last.between
        return last.module if alone and not (before and before[-1].reader) else None

    def before_last(self, x: Any) -> Any:
        """What the children before it make of x."""
        return self._run_steps(self._steps()[:-1], x)

    def _run_steps(self, steps: list[Step], x: Any) -> Any:
        codes = None  # what x stands for where it is u8 codes
        for step in steps:
            module, between, settings, activation, reader = step
            if between is None:
                x = module(x)
                continue
            y: Any = NotImplemented
            if not is_dynamo_compiling():
                pair = None if reader is None else reader.input_qparams
                if codes is None and type(module) is FineLinear:
                    y = _C.call_fine(module, FineLinear, x, activation, between, settings)
                else:
                    y = _C.call_fused(module, QuantizedLinear, x, codes, activation, between, settings, reader, pair)
            if y is NotImplemented:
                if not (is_dynamo_compiling() or step.holds()):
                    self._learn(self._in_order())  # for the next call
                x, codes = _run(step, x, codes)
            else:
                x, codes = y, None if pair is None else Codes(x.dtype if codes is None else codes.dtype, pair)
        return x

    def _steps(self) -> list[Step]:
        """What to run, by the children of this moment."""
        children = self._in_order()
        known, steps = self._known
        if is_dynamo_compiling():
            same = len(known) == len(children) and all(a is b for a, b in zip(known, children, strict=True))
            return steps if same else list(map(Step.alone, children))
        return steps if known == children else self._learn(children)

    def _learn(self, children: list[nn.Module | None]) -> list[Step]:
        steps = steps_of(children)
        self.__dict__["_known"] = (children, steps)  # nn.Module's own setattr would look for parameters in it
        return steps

    def computes(self, layer: nn.Module) -> bool:
        """Whether the activation behind this child is computed with it."""
        return any(step.module is layer and step.activation != Activation.NONE for step in self._steps())


class Int8Sequential(InOrder, nn.Sequential):
    """An nn.Sequential of the same children, with the same results, in less time.

    >>> from torchq import convert
    >>> qmodel = convert(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16)))
    >>> type(qmodel).__name__, type(qmodel[:-1]).__name__, type(qmodel[1]).__name__
    ('Int8Sequential', 'Int8Sequential', 'ReLU')
    >>> x = torch.randn(2, 64)
    >>> torch.equal(qmodel(x), qmodel[2](qmodel[1](qmodel[0](x))))
    True
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._learn(list(self._modules.values()))

    @staticmethod
    def adopt(sequential: nn.Sequential) -> None:
        """Makes an nn.Sequential itself an Int8Sequential, if it has anything to fuse."""
        children: list[nn.Module | None] = list(sequential._modules.values())
        if type(sequential) is nn.Sequential and any(step.between or step.reader for step in steps_of(children)):
            sequential.__class__ = Int8Sequential
            cast(Int8Sequential, sequential)._learn(children)

    def __call__(self, input: Any) -> Any:
        """forward(), skipping nn.Module's part of the call if it has nothing to do."""
        if is_dynamo_compiling() or not _C.is_plain(self, Int8Sequential):
            return super().__call__(input)
        return self._run(input)

    def forward(self, input: Any) -> Any:
        """As nn.Sequential's."""
        if computes_as_known(Int8Sequential):
            return self._run(input)
        return super().forward(input)  # somebody gave nn.Sequential another one


know(Int8Sequential)


def steps_of(children: list[Any]) -> list[Step]:
    """How these children run, where nothing stands against it."""
    steps, i = [], 0
    while i < len(children):
        step = _step(children[i], children[i + 1 :])
        steps.append(step)
        i += 1 + len(step.between or ())
    return steps


def _step(module: Any, behind: list[Any]) -> Step:
    if type(module) not in (QuantizedLinear, FineLinear):
        return Step.alone(module)
    found, fold = followers(behind, lambda child: type(child) is QuantizedLinear), module.fold
    if found.kind != fold.activation:
        return Step.fused(module, [], Activation.NONE, None)
    gives_codes = fold.codes and type(module) is QuantizedLinear
    if gives_codes and found.reader is not None and behind[found.reader].takes_codes:
        return Step.fused(module, behind[: found.reader], fold.activation, behind[found.reader])
    computed = 0 if found.activation is None else found.activation + 1
    return Step.fused(module, behind[:computed], fold.activation, None)


def _run(step: Step, x: Any, codes: Codes | None) -> tuple[Any, Codes | None]:
    """Runs a step by the ops, fused if that may be. Returns y, and what it stands for where it is codes."""
    layer, between, activation, reader = cast(QuantizedLinear, step.module), step.between or (), *step[3:]
    plain = step.holds() and is_plain(layer, but=Watch) and all(map(is_plain, between))
    if isinstance(x, Proxy) or not plain:
        x = layer(x) if codes is None else layer.fused(x, codes=codes)
        for module in between:
            x = module(x)
        return x, None
    for hook in layer._forward_pre_hooks.values():
        hook(layer, (x,))
    pair = None if reader is None else reader.input_qparams
    if reader is None or pair is None or layer.input_qparams is None:
        return layer.fused(x, activation, codes=codes), None
    given = Codes(x.dtype if codes is None else codes.dtype, pair)
    if is_plain(reader) and not (is_dynamo_compiling() and simulation.anywhere):
        return layer.fused(x, activation, pair, codes=codes), given
    if not is_plain(reader, but=Watch):  # somebody sees what it reads
        return layer.fused(x, activation, codes=codes), None
    with torch.autocast("cpu", enabled=False):  # the floats that would become codes
        in_float32 = Codes(torch.float32, layer.input_qparams if codes is None else codes.qparams)
        return layer.fused(x, activation, codes=in_float32), given


def is_plain(module: nn.Module, *, but: type | None = None) -> bool:
    """Whether only its own forward() would see a call of this module, `but` such hooks, and it samples nothing."""
    if type(module) in IDLE and module.training and getattr(module, "p", 0.0) != 0.0:
        return False
    if not computes_as_known(type(module)):
        return False
    if not is_dynamo_compiling() and _C.is_plain(module, type(module)):
        return True
    others = module._forward_hooks or module._backward_hooks or module._backward_pre_hooks or _has_any_global_hook()
    replaced = "forward" in module.__dict__ or module._compiled_call_impl is not None
    return not others and not replaced and all(type(hook) is but for hook in module._forward_pre_hooks.values())
