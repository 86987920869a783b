"""The self-attention of a converted model of transformers in a few calls, if that is proven to be its code.

transformers makes views for each head, asks its registry and hands on what it was given by name. Here a call is the
three children, the attention of their outputs as they lie, and the children behind it. The children are called as
they are, so gradients and whatever else count as ever. Wherever anybody could see a difference, or change anything
between the calls, as a hook on a child may, the code of the user runs (`straight_forms.py`).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from torchq import _C
from torchq.modules.attention import NAME, AttentionScheme, attend_directly, attention_forward, is_causal_call
from torchq.modules.attention_code import MASK, SelfAttentionCode, self_attention_of
from torchq.modules.folding import IDLE
from torchq.modules.parts import Part
from torchq.modules.quantized_linear import QuantizedLinear
from torchq.modules.straight_forms import Form, become, may_become
from torchq.modules.writes import modes

_IS_CAUSAL = "is_causal"  # what a call may say to the attention function, past the code


class SelfAttention(Form):
    """`behind(attention(query(x), key(x), value(x)))`, with what transformers' registry has under torchq's name."""

    line: SelfAttentionCode  # type: ignore[assignment]
    reads = staticmethod(self_attention_of)  # type: ignore[assignment]

    @staticmethod
    def adopt(module: nn.Module) -> None:
        """Makes a module a SelfAttention, if this is its code."""
        code = self_attention_of(type(module))
        if code is not None and may_become(SelfAttention, module):
            become(SelfAttention, module, code)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """forward(), past what transformers does between the calls, where that is all that happens."""
        if not is_dynamo_compiling():
            call = self.read_call(args, kwargs)
            if call is not None and self.may_attend() and type(call[0]) is Tensor and call[0].dim() == 3:
                return self.attend(*call), None
        return super().__call__(*args, **kwargs)

    def read_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, bool | None] | None:
        """The input, the mask and `is_causal` of a call whose other arguments are None, as if they were not there."""
        line = self.line
        given = dict(zip(line.names, args, strict=False)) | kwargs
        x, mask = given.pop(line.names[0], None), given.pop(MASK, None)
        is_causal = given.pop(_IS_CAUSAL, None) if line.takes_more else None
        if x is None or not (is_causal is None or type(is_causal) is bool):
            return None
        if len(line.names) < len(args) or not kwargs.keys().isdisjoint(line.names[: len(args)]):
            return None
        for name, value in given.items():
            if value is not None or name in line.refused or not (line.takes_more or name in line.names):
                return None
        return x, mask, is_causal

    def may_attend(self) -> bool:
        """Whether its code is still what was read, of known children and numbers, and nobody else sees a call."""
        if modes() or torch._C._get_tracing_state() or not _C.is_plain(self, type(self)):
            return False
        line, state = self.line, self.__dict__
        names = (*line.projections, *line.behind)
        if not state.keys().isdisjoint(names) or not all(map(_is_known, map(state["_modules"].get, names))):
            return False
        return _are_numbers(state.get(line.size), state.get(line.scale)) and self.is_asked() and self.training is False

    def is_asked(self) -> bool:
        """Whether the config and the registry lead to torchq's attention, and it has a scheme for that."""
        state = self.__dict__
        known = type(state.get("torchq_attention")) is AttentionScheme and _asks_for_torchq(state.get("config"))
        return known and self.line.registry().get(NAME) is attention_forward

    def parts(self) -> tuple[Part, ...]:
        """What it is made of: while that are as known it `may_attend`, if it `is_asked`. Nothing if it may not."""
        line, state = self.line, self.__dict__
        children: dict[str, Any] = {name: state["_modules"].get(name) for name in (*line.projections, *line.behind)}
        numbers = state.get(line.size), state.get(line.scale)
        if not _are_numbers(*numbers) or any(type(each) not in _KNOWN for each in children.values()):
            return ()
        settings = {line.size: numbers[0], line.scale: numbers[1], "training": False}
        leaves = (Part(each, type(each), {}, False, {}) for each in children.values())
        return Part(self, type(self), children, False, settings), *leaves

    def attend(self, x: Tensor, mask: Any, is_causal: bool | None) -> Tensor:
        """Of x (batch, rows, columns), in a call in which it `may_attend`."""
        line, state = self.line, self.__dict__
        children, size, scale = state["_modules"], state[line.size], state[line.scale]
        q, k, v = products = [children[name](x) for name in line.projections]
        y: Any = NotImplemented
        shape = q.shape
        if k.shape == shape == v.shape and shape[-1] % size == 0:
            causal, heads = is_causal_call(self, is_causal, mask, shape[1]), shape[-1] // size
            scheme = state["torchq_attention"].scheme
            y = attend_directly(scheme, q, k, v, heads=heads, mask=mask, is_causal=causal, scale=scale)
        if y is NotImplemented:
            rows = x.shape[:-1]
            q, k, v = (each.view(*rows, -1, size).transpose(1, 2) for each in products)
            y, _ = attention_forward(self, q, k, v, mask, dropout=0.0, scaling=scale, is_causal=is_causal)
            y = y.reshape(*rows, -1).contiguous()
        for name in line.behind:
            y = children[name](y)
        return y  # type: ignore[no-any-return]


_KNOWN = (QuantizedLinear, nn.Linear, *IDLE)


def _is_known(child: Any) -> bool:
    """Whether a call of it gives the rows of its input, and runs nothing that could change the module meanwhile."""
    kind = type(child)
    return kind in _KNOWN and _C.is_plain(child, kind)


def _are_numbers(size: Any, scale: Any) -> bool:
    """Whether these are the columns of a head and the scale of an attention."""
    return type(size) is int and size > 0 and type(scale) is float


def _asks_for_torchq(config: Any) -> bool:
    """Whether a config says "torchq". transformers' own way to read it takes as long as a view."""
    try:
        state = object.__getattribute__(config, "__dict__")
    except AttributeError:
        return False
    return bool(state.get("_attn_implementation_internal") == NAME)
