"""What a layer of transformers computes: calls of its parts one after the other, proven by its code.

    y, _ = self.attention(x, attention_mask=attention_mask, **kwargs)
    y = self.norm(y + x)
    return self.output_norm(self.ffn(y) + y)

The code runs once on stand-ins, as that of a block of convolutions does (`flow.py`), and so does the code of what it
calls: a module in between comes to nothing but the parts that it calls. What was read on the way is compared in each
call. The layer of a decoder hands its other arguments, such as a cache, to its attention, and looks at none of them.
"""

import dis
import functools
import inspect
import operator
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from torchq.modules.activations import activation_of
from torchq.modules.attention_code import MASK
from torchq.modules.chunked import CHUNKING, chunked_code_of
from torchq.modules.classes import know
from torchq.modules.curve import Curve
from torchq.modules.facts import MISSING, Facts, look_up
from torchq.modules.flow import Run, StandIn, may_run, stood_for
from torchq.modules.folding import IDLE
from torchq.modules.gated import Gated
from torchq.modules.int8_sequential import settings_of
from torchq.modules.layer_norm import LayerNorm
from torchq.modules.others import ANY_NAME, Others, takes_others, unknown
from torchq.modules.parts import Part
from torchq.modules.plain_code import forward_of, is_plain_value
from torchq.modules.quantized_linear import QuantizedLinear
from torchq.modules.rms_norm import RMSNorm
from torchq.modules.self_attention import SelfAttention
from torchq.modules.straight import UnknownError
from torchq.modules.straight_forms import Form, Residual, Row
from torchq.modules.wrappers import is_usual_layer, unwrapped
from torchq.ops import Activation


class LayerCode(NamedTuple):
    """The forward of a class of layers.

    Args:
        forward: the function.
        code: its code, which may be replaced.
        names: of its arguments, the first of which is the input.
        required: those that a call must give.
        takes_more: whether it takes arguments by other names, which it hands on.
        methods: those that it gives to transformers' function for chunks.
        defaults: what arguments are that a call does not give, where that is not None.
    """

    forward: types.FunctionType
    code: types.CodeType
    names: tuple[str, ...]
    required: frozenset[str]
    takes_more: bool
    methods: tuple[str, ...]
    defaults: tuple[tuple[str, bool], ...]

    def attributes(self) -> tuple[str, ...]:
        """The names that are known of the class; which others a run looks up depends on the module."""
        return self.methods


def layer_code_of(kind: type[nn.Module]) -> LayerCode | None:
    """The code of a class, if running it on stand-ins is all that happens, and it has a mask for attention."""
    forward = forward_of(kind)
    if "transformers" not in sys.modules or not isinstance(forward, types.FunctionType) or not is_usual_layer(kind):
        return None
    inner: Any = unwrapped(forward).forward
    if not may_run(inner):
        return None
    _, *parameters = inspect.signature(inner).parameters.values()
    named = [each for each in parameters if each.kind is not each.VAR_KEYWORD]
    if any(each.kind is not each.POSITIONAL_OR_KEYWORD for each in named):
        return None
    names = tuple(each.name for each in named)
    usual = (each.default in (None, each.empty) or type(each.default) is bool for each in named)
    if MASK not in names[1:] or not all(usual):
        return None
    defaults = tuple((each.name, each.default) for each in named if type(each.default) is bool)
    required = frozenset(each.name for each in named if each.default is each.empty)
    known: Any = kind  # for mypy, a class of torch has no hash
    chunked = chunked_code_of(known)
    methods = () if chunked is None else chunked.methods
    return LayerCode(forward, forward.__code__, names, required, takes_others(inner.__code__), methods, defaults)


class Handed(NamedTuple):
    """What an attention is given beside its input.

    Args:
        names: pairs of a name and the argument of the layer that it is given under that.
        more: whether it gets those by other names, too.
    """

    names: tuple[tuple[str, str], ...]
    more: bool


class Step(NamedTuple):
    """One call.

    Args:
        run: what is called: a part, or a sum; of a `SelfAttention` it is that.
        inputs: what it is called on, by index: 0 is the input, and each step gives the next one.
        handed: what else an attention is given.
    """

    run: Callable[..., Any]
    inputs: tuple[int, ...]
    handed: Handed | None = None

    def is_like(self, other: "Step") -> bool:
        """Whether it is the same call but for what is handed on."""
        return self[:2] == other[:2]


class Steps(NamedTuple):
    """What a layer computes.

    Args:
        steps: in order.
        output: the index of what it returns.
        pair: whether it returns that with None behind it, as attention does.
        attentions: those among the steps.
        hands_on: whether its other arguments are only handed on, whatever they are; else all but the mask are None.
        parts: all modules whose code was read, and what they call.
        facts: what else their codes have read.
        refused: names that a call may not have: they are deprecated, or those of arguments within that the code gives.
    """

    steps: tuple[Step, ...]
    output: int
    pair: bool
    attentions: tuple[SelfAttention, ...]
    hands_on: bool
    parts: tuple[Part, ...]
    facts: Facts
    refused: frozenset[str]


def steps_of(module: nn.Module, code: LayerCode) -> Steps | None:
    """What a module with this code computes, if that is known, and it has an attention."""
    found = _of_masks(module, code)
    if found is None:
        found = _steps(module, code, {name: _Given(name) for name in code.names[1:]}, hands_on=True)
    return found if found is not None and found.attentions else None


def _of_masks(module: nn.Module, code: LayerCode) -> Steps | None:
    """With a mask and without, if that is the same, and nothing else."""
    if code.defaults:
        return None
    masks = (None, _Given(MASK))
    given = ({name: mask if name == MASK else None for name in code.names[1:]} for mask in masks)
    without, found = (_steps(module, code, each, hands_on=False) for each in given)
    if without is None or found is None or without[1:3] != found[1:3] or len(without.steps) != len(found.steps):
        return None
    return found if all(map(Step.is_like, without.steps, found.steps)) else None


def _steps(module: nn.Module, code: LayerCode, given: dict[str, Any], *, hands_on: bool) -> Steps | None:
    tape = _Tape(hands_on=hands_on, mask=given[MASK])
    others = {ANY_NAME: Others.VALUE} if code.takes_more else {}
    try:
        y = tape.inside(module, (_Value(tape, 0),), given | others)
    except Exception:  # whatever the code meets on stand-ins
        return None
    pair = type(y) is tuple and len(y) == 2 and y[1] is None
    output = y[0] if pair else y
    if type(output) is not _Value:
        return None
    attentions = tuple(step.run for step in tape.steps if isinstance(step.run, SelfAttention))
    read = (hands_on, (*tape.parts,), tape.facts, frozenset(tape.refused))
    return Steps((*tape.steps,), index_of(output), pair, attentions, *read)


# ---- Stand-ins ------------------------------------------------------------------------------------------------------


class _Given:
    """An argument: something that is not None, by its name."""

    def __init__(self, name: str) -> None:
        self.name_ = name

    __bool__ = __call__ = __getattr__ = __getitem__ = __iter__ = __len__ = __eq__ = __ne__ = unknown
    __add__ = __radd__ = __hash__ = unknown


class _Value:
    """A tensor, by its index."""

    def __init__(self, tape: "_Tape", index: int) -> None:
        self.tape_, self.index_ = tape, index

    def __add__(self, other: Any) -> "_Value":
        return self.tape_.then(operator.add, (self, other))

    __iadd__ = __radd__ = unknown
    __bool__ = __call__ = __getattr__ = __getitem__ = __iter__ = __len__ = __eq__ = __ne__ = unknown
    __hash__ = unknown


def index_of(value: _Value) -> int:
    """Which step gives a value."""
    return value.index_


class _Tape:
    """The steps so far, of a call with this mask, or of one whose arguments are only handed on."""

    def __init__(self, *, hands_on: bool, mask: Any) -> None:
        self.hands_on, self.mask = hands_on, mask
        self.steps: list[Step] = []
        self.parts: list[Part] = []
        self.facts = Facts()
        self.refused: set[str] = set()

    def then(self, run: Any, inputs: tuple[Any, ...], handed: Handed | None = None) -> _Value:
        """One more step."""
        if not all(type(each) is _Value for each in inputs):
            raise UnknownError
        self.steps.append(Step(run, tuple(map(index_of, inputs)), handed))
        return _Value(self, len(self.steps))

    def called(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a call of a child gives."""
        if isinstance(module, SelfAttention):
            return self._attended(module, args, kwargs), None
        if is_leaf(module):
            return self._left(module, args, kwargs)
        if isinstance(module, (Residual, Row)):
            return self._fused(module, args, kwargs)
        if isinstance(module, Gated):
            return self._gated(module, args, kwargs)
        before = len(self.steps)
        y = self.inside(module, args, kwargs)
        if not module._forward_hooks or all(map(_computes_floats, self.steps[before:])):
            return y
        if kwargs or type(y) is not _Value or any(isinstance(each.run, SelfAttention) for each in self.steps[before:]):
            raise UnknownError
        del self.steps[before:]  # of a `Scope`: it does them by itself
        return self.then(module, args)

    def _fused(self, module: Residual | Row, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Value:
        children: dict[str, Any] = {name: module._modules.get(name) for name in module.line.attributes()}
        folded = [each for step in module._steps() for each in step.between or ()] if isinstance(module, Row) else []
        if kwargs or any(type(each) not in _LEAVES and each not in folded for each in children.values()):
            raise UnknownError
        self.parts.append(Part(module, type(module), children, False, {}))
        self.parts += [Part(each, type(each), {}, False, {}) for each in children.values()]  # which it looks at itself
        straight = isinstance(module, Row) and not module._forward_hooks and len(args) == 1
        return self.then(module._run if straight else module, args)

    def _gated(self, module: Gated, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Value:
        parts = module.parts()
        if kwargs or not parts:
            raise UnknownError
        self.parts += parts
        return self.then(module, args)

    def _attended(self, module: SelfAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Value:
        line, parts = module.line, module.parts()
        more = kwargs.pop(ANY_NAME, None) is not None
        if more:
            self.refused |= {*line.names[: len(args)], *kwargs, *line.refused, *(() if line.takes_more else unknown())}
        x, handed = self._handed(module, args, kwargs, more) if self.hands_on else self._masked(module, args, kwargs)
        if not parts:
            raise UnknownError
        self.parts += parts
        return self.then(module, (x,), handed)

    def _masked(self, module: SelfAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Handed]:
        call = module.read_call(args, kwargs)
        plain = module.line.is_of_products and call is not None and call.is_causal is None
        if call is None or not plain or call.mask is not self.mask or not _are_none(call.others):
            raise UnknownError
        return call.x, Handed(((MASK, MASK),), more=False)

    def _handed(
        self, module: SelfAttention, args: tuple[Any, ...], kwargs: dict[str, Any], more: bool
    ) -> tuple[Any, Handed]:
        names = module.line.names
        given = dict(zip(names, args, strict=False)) | kwargs
        if len(names) < len(args) or len(given) < len(args) + len(kwargs) or not given.keys() >= module.line.required:
            raise UnknownError
        x = given.pop(names[0])
        if not all(type(each) is _Given for each in given.values()):
            raise UnknownError
        return x, Handed(tuple((name, each.name_) for name, each in given.items()), more)

    def _left(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        known = type(module) in _LEAVES or isinstance(module, RMSNorm)
        if isinstance(module, RMSNorm):
            self.facts.join(module.line.facts)
        self.parts.append(Part(module, type(module), {}, False, {} if known else settings_of(module)))
        if kwargs or len(args) != 1 or type(args[0]) is not _Value:
            raise UnknownError
        return args[0] if type(module) in IDLE else self.then(module, args)

    def inside(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the code of a module of the user gives."""
        original: Any = module.original if isinstance(module, Form) else type(module)
        forward = forward_of(original)
        if not isinstance(forward, types.FunctionType) or not is_usual_layer(original):
            raise UnknownError
        inner: Any
        inner, refused = unwrapped(forward)
        self.refused |= refused
        run = _Run(module, original, self)
        y = run.method(inner)(*args, **kwargs)
        know(type(module), run.names)
        self.parts.append(Part(module, type(module), run.children, False, {**run.settings, "training": False}))
        return y


def _are_none(others: dict[str, Any]) -> bool:
    return all(each is None for each in others.values())


@functools.lru_cache(maxsize=1024)
def _asks_for_none(code: types.CodeType) -> bool:
    return any(step.opname == "IS_OP" or step.opname.endswith("NONE") for step in dis.get_instructions(code))


def _computes_floats(step: Step) -> bool:
    """Whether it is a leaf that hands no codes to another: of such, a `Scope` does nothing but what calls do."""
    run: Any = step.run
    return is_leaf(run) and not (type(run) is QuantizedLinear and run.fold.codes)


_LEAVES = (QuantizedLinear, nn.Linear, LayerNorm, nn.LayerNorm, Curve, *IDLE)


def is_leaf(module: Any) -> bool:
    """Whether a call of a module is one step, and runs nothing of the user's."""
    known = type(module) in _LEAVES or isinstance(module, RMSNorm)
    return known or (isinstance(module, nn.Module) and activation_of(module) != Activation.NONE)


class _Run(Run):
    """A run of one module's code in eval mode. What it calls goes to the tape."""

    def __init__(self, module: nn.Module, kind: type[nn.Module], tape: _Tape) -> None:
        super().__init__(module, kind, tape.facts)
        self._tape = tape
        self.names: list[str] = []

    def read(self, name: str) -> Any:
        """An attribute of the module: besides what a block may read, its class's methods and numbers."""
        self.names.append(name)
        if name == "training":
            return False
        found = inspect.getattr_static(self._kind, name, None)
        if name in vars(self._module) or name in self._module._modules or found is None:
            return super().read(name)
        self.facts.add(look_up, vars(self._module), name, MISSING)
        if is_plain_value(found):
            return found
        return StandIn(unknown, self.method(found), found) if isinstance(found, types.FunctionType) else unknown()

    def apart(self, function: types.FunctionType) -> Callable[..., Any]:
        """Where arguments are stood for whatever they are, no code may ask whether one is None."""
        if self._tape.hands_on and _asks_for_none(function.__code__):
            raise UnknownError
        return super().apart(function)

    def called(self, name: str, child: nn.Module) -> Callable[..., Any]:
        """What stands for the call of a child."""
        return lambda *args, **kwargs: self._tape.called(child, args, kwargs)

    def method(self, function: types.FunctionType) -> Callable[..., Any]:
        """A method of the module."""
        alone, parameters = self.apart(function), inspect.signature(function).parameters.values()
        own = [each for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
        names = [each.name for each in own]
        others = [each.name for each in own if each.default is not None]

        def call(*args: Any, **kwargs: Any) -> Any:
            refused, self._tape.refused = self._tape.refused, set()
            y = alone(self.itself(), *args, **kwargs)
            self._tape.refused = refused | self._tape.refused.difference(names)  # it takes those itself
            if ANY_NAME in kwargs:
                self._tape.refused |= {*names[: len(args) + 1], *kwargs, *others}
            return y

        return call

    def call(self, function: types.FunctionType, *args: Any) -> Any:
        """A function by a global name is called; transformers' way of chunking calls the method on all at once."""
        from transformers import pytorch_utils

        if function is not getattr(pytorch_utils, CHUNKING):
            return super().call(function, *args)
        self.facts.add(getattr, function, "__code__", function.__code__)
        method, size, _, *tensors = args
        taken = inspect.signature(stood_for(method)).parameters
        if type(size) is not int or size != 0 or len(taken) - 1 != len(tensors):
            raise UnknownError
        return method(*tensors)
