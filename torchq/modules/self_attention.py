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
        if not is_dynamo_compiling() and self._is_plain():
            call = self._read(args, kwargs)
            y = NotImplemented if call is None else self._run(*call)
            if y is not NotImplemented:
                return y
        return super().__call__(*args, **kwargs)

    def _is_plain(self) -> bool:
        """Whether its code is still what was read, in eval mode, and nobody else sees the call."""
        if modes() or not _C.is_plain(self, type(self)):
            return False
        return not torch._C._get_tracing_state() and self.training is False

    def _read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Any, bool | None] | None:
        """The input, the mask and `is_causal` of a call whose other arguments are None, as if they were not there."""
        line = self.line
        given = dict(zip(line.names, args, strict=False)) | kwargs
        x, mask = given.pop(line.names[0], None), given.pop(MASK, None)
        is_causal = given.pop(_IS_CAUSAL, None) if line.takes_more else None
        if type(x) is not Tensor or not (is_causal is None or type(is_causal) is bool):
            return None
        if len(line.names) < len(args) or not kwargs.keys().isdisjoint(line.names[: len(args)]):
            return None
        for name, value in given.items():
            if value is not None or name in line.refused or not (line.takes_more or name in line.names):
                return None
        return x, mask, is_causal

    def _run(self, x: Tensor, mask: Any, is_causal: bool | None) -> Any:
        line, state = self.line, self.__dict__
        names = (*line.projections, *line.behind)
        children = tuple(map(state["_modules"].get, names))
        size, scale, scheme = state.get(line.size), state.get(line.scale), state.get("torchq_attention")
        if x.dim() != 3 or not all(map(_is_known, children)) or not state.keys().isdisjoint(names):
            return NotImplemented
        if type(size) is not int or size <= 0 or type(scale) is not float or type(scheme) is not AttentionScheme:
            return NotImplemented
        if not _asks_for_torchq(state.get("config")) or line.registry().get(NAME) is not attention_forward:
            return NotImplemented
        q, k, v = products = [child(x) for child in children[:3]]
        y = NotImplemented
        if q.shape == k.shape == v.shape and q.shape[-1] % size == 0:
            causal = is_causal_call(self, is_causal, mask, q.shape[1])
            more = {"heads": q.shape[-1] // size, "mask": mask, "is_causal": causal, "scale": scale}
            y = attend_directly(scheme.scheme, q, k, v, **more)
        if y is NotImplemented:
            rows = x.shape[:-1]
            q, k, v = (each.view(*rows, -1, size).transpose(1, 2) for each in products)
            y, _ = attention_forward(self, q, k, v, mask, dropout=0.0, scaling=scale, is_causal=is_causal)
            y = y.reshape(*rows, -1).contiguous()
        for child in children[3:]:
            y = child(y)
        return y, None


_KNOWN = (QuantizedLinear, nn.Linear, *IDLE)


def _is_known(child: Any) -> bool:
    """Whether a call of it gives the rows of its input, and runs nothing that could change the module meanwhile."""
    kind = type(child)
    return kind in _KNOWN and _C.is_plain(child, kind)


def _asks_for_torchq(config: Any) -> bool:
    """Whether a config says "torchq". transformers' own way to read it takes as long as a view."""
    try:
        state = object.__getattribute__(config, "__dict__")
    except AttributeError:
        return False
    return bool(state.get("_attn_implementation_internal") == NAME)
