"""Layers of a converted encoder of transformers as a few calls, if that is proven to be their code (`encoder_code.py`).

Between the products of a BERT layer transformers calls modules in modules, through decorators and a function that may
divide the rows into chunks: of 4 rows of 64 that takes half of the time. Here a call of the layer is one look at all
its modules, and then its attention, its sums and its rows, one after the other. Wherever anybody could see a
difference, or change anything between these calls, the code of the user runs (`straight_forms.py`).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from torchq import _C
from torchq.modules.attention_code import MASK
from torchq.modules.chunked import Chunked
from torchq.modules.encoder_code import EncoderCode, Steps, encoder_code_of, steps_of
from torchq.modules.parts import Learned
from torchq.modules.pending import Scope, within_scopes
from torchq.modules.self_attention import Call, SelfAttention
from torchq.modules.straight_forms import Form, become, give_back, may_become
from torchq.modules.writes import modes


class EncoderForm(Learned, Chunked):
    """A layer of an encoder, or what is around its attention: the calls of its parts, one after the other."""

    line: EncoderCode  # type: ignore[assignment]
    _known: Steps | None
    reads = staticmethod(encoder_code_of)  # type: ignore[assignment]

    @staticmethod
    def adopt(module: nn.Module) -> None:
        """Makes a module, which may be a Chunked, an EncoderForm, if its code is one."""
        if isinstance(module, Form) and type(module).form is not Chunked:
            return
        code = encoder_code_of(module.original if isinstance(module, Form) else type(module))
        if code is None or steps_of(module, code) is None:
            return
        if isinstance(module, Form):
            give_back(module)
        if may_become(EncoderForm, module):
            become(EncoderForm, module, code)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """forward(), past what transformers does between the calls, where that is all that happens."""
        if not is_dynamo_compiling():
            y = self._run(args, kwargs)
            if y is not NotImplemented:
                return y
        return super().__call__(*args, **kwargs)

    def _read_again(self) -> Steps | None:
        return steps_of(self, self.line)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if modes() or torch._C._get_tracing_state():
            return NotImplemented
        known: Steps | None = self._learned()
        if known is None or not _C.are_as_known(known.parts, Scope.enter, Scope.leave) or not known.facts.hold():
            return NotImplemented
        call = self._given(known, args, kwargs)
        if call is None or not all(attention.is_asked() for attention in known.attentions):
            return NotImplemented
        y = within_scopes(self, lambda: _computed(known, *call)) if self._forward_hooks else _computed(known, *call)
        return (y, None) if known.pair else y

    def _given(self, known: Steps, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Any] | None:
        """The input and the mask of a call whose other arguments are None; None for other calls."""
        line = self.line
        given = dict(zip(line.names, args, strict=False)) | kwargs
        if len(line.names) < len(args) or not kwargs.keys().isdisjoint(line.names[: len(args)]):
            return None
        if not given.keys() >= line.required:
            return None
        x, mask = given.pop(line.names[0]), given.pop(MASK, None)
        for name, value in given.items():
            known_name = name in line.names or (line.takes_more and name not in known.refused)
            if value is not None or not known_name:
                return None
        return (x, mask) if type(x) is Tensor and x.dim() == 3 else None


def _computed(known: Steps, x: Tensor, mask: Any) -> Any:
    values: list[Any] = [x]
    for run, inputs in known.steps:
        if isinstance(run, SelfAttention):
            values.append(run.attend(Call(values[inputs[0]], mask)))
        else:
            values.append(run(*[values[i] for i in inputs]))
    return values[known.output]
