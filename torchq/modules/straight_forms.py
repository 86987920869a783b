"""Straight modules of the user (`straight.py`) in fewer products: `norm(layer(x) + residual)`, and `fc2(act(fc1(x)))`.

Such a module keeps its children, its state and its code. Its class becomes a form of the user's class, under the same
name, whose call looks whether it may compute what the code would. Wherever anybody could see a difference (hooks,
gradients, modes, tracing, a child or a forward that was replaced), the code of the user runs.
"""

import functools
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from torchq import _C
from torchq.modules import gradients, simulation
from torchq.modules.classes import know
from torchq.modules.curve import exact_activation_of
from torchq.modules.folding import IDLE, followers
from torchq.modules.int8_sequential import InOrder, is_plain, settings_of, steps_of
from torchq.modules.layer_norm import LayerNorm
from torchq.modules.norms import IncludedNorm
from torchq.modules.one_op import NUMBER, NUMBERED
from torchq.modules.pending import Scope
from torchq.modules.pending_conv import PendingConv
from torchq.modules.quantized_conv import QuantizedConv
from torchq.modules.quantized_linear import QuantizedLinear
from torchq.modules.straight import Line, line_of
from torchq.modules.writes import is_eager
from torchq.ops import Activation


class Form(nn.Module):
    """A form of a class of the user. Instances of that class become instances of the form."""

    form: type["Form"]
    original: type[nn.Module]  # the user's class
    line: Line  # its code
    reads = staticmethod(line_of)  # what reads the code of such a class

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """What the user's class does with each subclass is for theirs: a form is the class itself, in fewer calls."""
        if "original" in vars(cls):
            return
        super().__init_subclass__(**kwargs)
        if hasattr(cls, "original") and "__call__" not in vars(cls):  # of a form: somebody's, with code of its own
            cls.__call__ = _by_code  # type: ignore[method-assign]

    def __setattr__(self, name: str, value: Any) -> None:
        """Whoever takes a name that only the form has gets the user's class back: there it means what they set."""
        form: Any = self.form  # for mypy, a class of torch has no hash
        if name in _names(form):
            give_back(self)
            setattr(self, name, value)
        else:
            super().__setattr__(name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles name the user's class, since no module has the form's."""
        reduced: Any = super().__reduce_ex__(protocol)
        _, _, *rest = reduced
        return _new, (self.form, self.original), *rest


def _by_code(module: Form, *args: Any, **kwargs: Any) -> Any:
    return module.original.__call__(module, *args, **kwargs)


@functools.lru_cache(maxsize=1024)
def form_of(form: Any, original: Any, line: tuple[Any, ...]) -> type[Any]:
    """The class that instances of a straight line become."""
    names = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    kind: Any = type(original.__name__, (form, original), {**names, "form": form, "original": original, "line": line})
    know(kind, cast(Line, line).attributes())
    return kind  # type: ignore[no-any-return]


@functools.cache
def _names(form: Any) -> frozenset[str]:
    """What a form has beside what nn.Module has."""
    return frozenset({*dir(form), *Form.__annotations__, *form.__annotations__}.difference(dir(nn.Module)))


def may_become(form: Any, module: nn.Module) -> bool:
    """Whether it isn't a form yet, and has no child or attribute under a name that the form would hide."""
    return not isinstance(module, Form) and _names(form).isdisjoint(dir(module))


def become(form: Any, module: nn.Module, line: tuple[Any, ...]) -> None:
    """Makes a module an instance of a form, with this as its code."""
    kind: Any = type(module)
    kind = form_of(form, kind, line)
    object.__setattr__(module, "__class__", kind)  # a __setattr__ of the user has no part in it


def give_back(module: Form) -> None:
    """Makes it an instance of the user's class again."""
    object.__setattr__(module, "__class__", module.original)
    for name in ("_known", NUMBER, NUMBERED):
        module.__dict__.pop(name, None)


def _new(form: Any, original: Any) -> Any:
    """An instance without state: of the user's class itself, if it is no straight line where this is read."""
    line = form.reads(original)
    kind: Any = original if line is None else form_of(form, original, line)
    return kind.__new__(kind)


class Residual(Form):
    """`norm(idle(layer(x)) + residual)`: a sum and its LayerNorm, computed on rows of the product while in L2."""

    @staticmethod
    def adopt(module: nn.Module, norm: str) -> None:
        """Makes a module a Residual, if this is its code, with a child of this name as its norm and an int8 layer."""
        line = line_of(type(module))
        if line is None or line.last != norm or not may_become(Residual, module):
            return
        layer, *idle = (module._modules.get(name) for name in line.calls)
        if type(layer) is QuantizedLinear and all(type(each) in IDLE for each in idle):
            become(Residual, module, line)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """forward(), as one product where that is all that happens."""
        if not is_dynamo_compiling() and len(args) == 2 and not kwargs:
            _, _, source, calls, norm = self.line
            kinds = (QuantizedLinear, LayerNorm, IDLE)
            y = _C.call_residual(self, type(self), calls, norm, kinds, args[source], args[1 - source])
            if y is not NotImplemented:
                return y
        return super().__call__(*args, **kwargs)


class Row(Form, InOrder):
    """`fc2(act(fc1(x)))`, or any other row of children: it runs them as an Int8Sequential does."""

    @staticmethod
    def adopt(module: nn.Module) -> None:
        """Makes a module a Row, if this is its code, and it has anything to fuse."""
        line = line_of(type(module))
        if line is None or line.last is not None or isinstance(module, nn.Sequential) or not may_become(Row, module):
            return
        children = [module._modules.get(name) for name in line.calls]
        if None not in children and any(step.between or step.reader for step in steps_of(children)):
            become(Row, module, line)
            cast(Row, module)._learn(children)

    def _in_order(self) -> list[nn.Module | None]:
        modules = self.__dict__["_modules"]
        return [modules.get(name) for name in self.line.calls]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """forward(), skipping nn.Module's part of the call if it has nothing to do."""
        if len(args) == 1 and not kwargs and self._is_straight():
            return self._run(args[0])
        return super().__call__(*args, **kwargs)

    def _is_straight(self) -> bool:
        """Whether its code is still what was read, of children that it has, and nobody else sees the call."""
        line, state = self.line, self.__dict__
        if not is_plain(self) or (is_dynamo_compiling() and type(self).forward is not line.forward):
            return False
        return all(name not in state and state["_modules"].get(name) is not None for name in line.calls)


class ConvRow(Form):
    """`act(norm(conv(x)))` with the norm in the weight: one call, and an activation that waits past the dispatcher."""

    _known: tuple[tuple[type, ...], tuple[dict[str, Any], ...], int, bool]  # its children's types and settings, the
    # activation, and whether that has the bits of an epilogue

    @staticmethod
    def adopt(module: nn.Module) -> None:
        """Makes a module a ConvRow, if this is its code, with an int8 convolution that waits for what follows."""
        line = line_of(type(module))
        if line is None or line.last is not None or not may_become(ConvRow, module):
            return
        conv, *behind = (module._modules.get(name) for name in line.calls)
        if not isinstance(conv, QuantizedConv) or not behind or None in behind:
            return
        others = [each for each in behind if type(each) is not nn.Identity and not _is_nothing(each)]
        found = followers(others, lambda _: False)
        follows = found.kind == conv.fold.activation != Activation.NONE and not conv.fold.adds and len(others) == 1
        if others and not follows:
            return
        become(ConvRow, module, line)
        kinds = tuple(map(type, (conv, *behind)))
        exact = any(exact_activation_of(each) == found.kind for each in others)
        module.__dict__["_known"] = (kinds, tuple(map(settings_of, cast(Any, behind))), found.kind, exact)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """forward(), skipping nn.Module's part of the calls where it has nothing to do."""
        if not is_dynamo_compiling() and len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            y = self._run(args[0])
            if y is not NotImplemented:
                return y
        return super().__call__(*args, **kwargs)

    def _run(self, x: Tensor) -> Any:
        line, state = self.line, self.__dict__
        kinds, settings, activation, exact = self._known
        conv, *others = children = tuple(map(state["_modules"].get, line.calls))
        behind = tuple(others)
        if not state.keys().isdisjoint(line.calls) or tuple(map(type, children)) != kinds:
            return NotImplemented
        if torch._C._get_tracing_state():
            return NotImplemented
        if not _C.is_plain_row(conv, kinds[0], behind, settings):
            return NotImplemented
        if (
            exact
            and _waits_for_nothing_else(conv, activation, x)
            and _C.is_plain(self, type(self), Scope.enter, Scope.leave)
        ):
            return conv.fused(x, activation)
        if not _C.is_plain(self, type(self)):
            return NotImplemented
        y = conv.forward(x)
        if activation == Activation.NONE:
            return y
        followed = y.followed_by(activation) if type(y) is PendingConv else None
        if followed is not None:
            return followed
        for each in behind:
            y = each(y)
        return y


def _is_nothing(module: Any) -> bool:
    """Whether it stands for a norm that goes on with nothing."""
    return type(module) is IncludedNorm and not module._modules


def _waits_for_nothing_else(conv: QuantizedConv, activation: int, x: Tensor) -> bool:
    """Whether this activation is all that the output for x would wait for, in a plain call."""
    fold = conv.fold
    alone = fold.activation == activation and not (fold.codes or fold.adds)
    if not alone or type(x) is not Tensor or x.dim() != conv.dimensions + 2 or gradients.wanted(x):
        return False
    return is_eager(x) and not simulation.is_watched()
