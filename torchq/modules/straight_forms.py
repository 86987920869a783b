"""Straight modules of the user (`straight.py`) as one product: `norm(layer(x) + residual)`, and `act(layer(x))`.

Such a module keeps its children, its state and its code. Its class becomes a form of the user's class, under the same
name, whose call looks whether one product gives what the code would. Wherever anybody could see a difference (hooks,
gradients, modes, tracing, a child or a forward that was replaced), the code of the user runs.
"""

import functools
from typing import Any

from torch import nn
from torch.compiler import is_dynamo_compiling

from torchq import _C
from torchq.modules.folding import IDLE
from torchq.modules.int8_sequential import Step, step_of
from torchq.modules.layer_norm import LayerNorm
from torchq.modules.quantized_linear import QuantizedLinear
from torchq.modules.straight import Line, line_of
from torchq.ops import Activation


class Form(nn.Module):
    """A form of a class of the user. Instances of that class become instances of the form."""

    form: type["Form"]
    original: type[nn.Module]  # the user's class
    line: Line  # its code

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles name the user's class, since no module has the form's."""
        reduced: Any = super().__reduce_ex__(protocol)
        _, _, *rest = reduced
        return _new, (self.form, self.original), *rest


@functools.cache
def form_of(form: Any, original: Any) -> type[Any]:
    """The class that instances of a straight line become."""
    names = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(
        original.__name__, (form, original), {**names, "form": form, "original": original, "line": line_of(original)}
    )


def _become(form: Any, module: nn.Module) -> None:
    kind: Any = type(module)
    module.__class__ = form_of(form, kind)


def _new(form: Any, original: Any) -> Any:
    """An instance without state: of the user's class itself, if it is no straight line where this is read."""
    kind: Any = original if line_of(original) is None else form_of(form, original)
    return kind.__new__(kind)


class Residual(Form):
    """`norm(idle(layer(x)) + residual)`: a sum and its LayerNorm, computed on rows of the product while in L2."""

    @staticmethod
    def adopt(module: nn.Module, norm: str) -> None:
        """Makes a module a Residual, if this is its code, with a child of this name as its norm and an int8 layer."""
        line = line_of(type(module))
        if line is None or line.last != norm or isinstance(module, Form):
            return
        layer, *idle = (module._modules.get(name) for name in line.calls)
        if type(layer) is QuantizedLinear and all(type(each) in IDLE for each in idle):
            _become(Residual, module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """forward(), as one product where that is all that happens."""
        if not is_dynamo_compiling() and len(args) == 2 and not kwargs:
            forward, source, calls, norm = self.line
            kinds = (QuantizedLinear, LayerNorm, IDLE)
            y = _C.call_residual(self, type(self), forward, calls, norm, kinds, args[source], args[1 - source])
            if y is not NotImplemented:
                return y
        return super().__call__(*args, **kwargs)


class Activated(Form):
    """`act(layer(x))`: the activation is computed in the layer's epilogue, as in an Int8Sequential."""

    _known: tuple[nn.Module | None, nn.Module | None, Step]  # the children, and how they run

    @staticmethod
    def adopt(module: nn.Module) -> None:
        """Makes a module an Activated, if this is its code, with an int8 layer that may compute the activation."""
        line = line_of(type(module))
        if line is None or line.last is not None or len(line.calls) != 2 or isinstance(module, Form):
            return
        layer, act = (module._modules.get(name) for name in line.calls)
        step = step_of(layer, [act])
        if step.between and step.activation != Activation.NONE:
            _become(Activated, module)
            vars(module)["_known"] = (layer, act, step)

    def computes(self, layer: nn.Module) -> bool:
        """Whether the activation behind this layer is computed here."""
        return self._known[0] is layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """forward(), as one product where that is all that happens."""
        if not is_dynamo_compiling() and len(args) == 1 and not kwargs:
            state, line = self.__dict__, self.line
            layer, act, step = state["_known"]
            children = state["_modules"]
            first, second = line.calls
            same = children.get(first) is layer and children.get(second) is act
            if same and type(self).forward is line.forward and _C.is_plain(self, type(self)):
                module, between, settings, activation, _ = step
                y = _C.call_fused(module, QuantizedLinear, args[0], None, activation, between, settings, None, None)
                if y is not NotImplemented:
                    return y
        return super().__call__(*args, **kwargs)
