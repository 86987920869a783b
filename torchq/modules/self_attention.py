"""The self-attention of a converted model of transformers in a few calls, if that is proven to be its code.

transformers makes views for each head, asks its registry and hands on what it was given by name. Here a call is the
three children, the attention of their outputs as they lie, and the children behind it; of a decoder, queries and keys
are turned between these by one call each instead of five operations. The children are called as they are, and so is the
cache of the user, so gradients and whatever else count as ever. Wherever anybody could see a difference, or change
anything between the calls, as a hook on a child may, the code of the user runs (`straight_forms.py`).
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from torchq import _C
from torchq.modules.attention import NAME, AttentionScheme, attend_directly, attention_forward, is_causal_call
from torchq.modules.attention_code import MASK, SelfAttentionCode, self_attention_of
from torchq.modules.attention_symbols import ASKED
from torchq.modules.folding import IDLE
from torchq.modules.layer_norm import LayerNorm
from torchq.modules.parts import Part
from torchq.modules.quantized_linear import QuantizedLinear
from torchq.modules.rms_norm import RMSNorm
from torchq.modules.straight_forms import Form, become, may_become
from torchq.modules.writes import modes

_IS_CAUSAL = "is_causal"  # what a call may say to the attention function, past the code


class Call(NamedTuple):
    """The arguments of a call. None is what was not given, or is None.

    Args:
        x: the input.
        mask: of the attention.
        is_causal: whether a row sees no key behind it.
        angles: `(cos, sin)`, by which queries and keys are turned.
        cache: what gets keys and values.
        others: what the code only hands on.
    """

    x: Any
    mask: Any = None
    is_causal: bool | None = None
    angles: Any = None
    cache: Any = None
    others: dict[str, Any] = {}  # noqa: RUF012 - nobody writes to it


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
            if call is not None and self.may_attend() and type(call.x) is Tensor and call.x.dim() == 3:
                return self.attend(call), None
        return super().__call__(*args, **kwargs)

    def read_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """What a call has; None of one of which the code may make something else than was read."""
        line = self.line
        turn, cached = line.found.turn, line.found.cache
        given = dict(zip(line.names, args, strict=False)) | kwargs
        if len(line.names) < len(args) or not kwargs.keys().isdisjoint(line.names[: len(args)]):
            return None
        if not given.keys() >= line.required:
            return None
        x, mask = given.pop(line.names[0], None), given.pop(MASK, None)
        angles = None if turn is None else given.pop(turn.argument, None)
        cache = None if cached is None else given.pop(cached.argument, None)
        is_causal = given.pop(_IS_CAUSAL, None) if line.takes_more and cached is None else None
        if x is None or not (is_causal is None or type(is_causal) is bool) or not (turn is None or _are_pair(angles)):
            return None
        for name, value in given.items():
            own = name in line.names
            if name in line.refused or not (own or line.takes_more) or (value is not None and (own or name in ASKED)):
                return None
        others = {name: value for name, value in given.items() if name not in line.names}
        return Call(x, mask, is_causal, angles, cache, others)

    def may_attend(self) -> bool:
        """Whether its code is still what was read, of known children and numbers, and nobody else sees a call."""
        if modes() or torch._C._get_tracing_state() or not _C.is_plain(self, type(self)):
            return False
        names, state = self.line.children, self.__dict__
        if not state.keys().isdisjoint(names) or not all(map(_is_known, map(state["_modules"].get, names))):
            return False
        return self._has_numbers() and self.is_asked() and self.training is False

    def _has_numbers(self) -> bool:
        """Whether the attributes are what they must be: columns of a head, scale, and the number of the layer."""
        state, (size, scale, *index) = self.__dict__, self.line.numbers
        known = type(state.get(size)) is int and state[size] > 0 and type(state.get(scale)) is float
        handed = (path for _, path in self.line.found.handed if "." not in path)
        return known and all(type(state.get(each)) is int for each in index) and all(each in state for each in handed)

    def is_asked(self) -> bool:
        """Whether the config and the registry lead to torchq's attention, and it has a scheme for that."""
        state = self.__dict__
        known = type(state.get("torchq_attention")) is AttentionScheme and _asks_for_torchq(state.get("config"))
        return known and self.line.registry().get(NAME) is attention_forward and self.line.turns()

    def parts(self) -> tuple[Part, ...]:
        """What it is made of: while that are as known it `may_attend`, if it `is_asked`. Nothing if it may not."""
        line, state = self.line, self.__dict__
        children: dict[str, Any] = {name: state["_modules"].get(name) for name in line.children}
        if not self._has_numbers() or any(type(each) not in _KNOWN for each in children.values()):
            return ()
        settings = {**{name: state[name] for name in line.numbers}, "training": False}
        leaves = (Part(each, type(each), {}, False, {}) for each in children.values())
        return Part(self, type(self), children, False, settings), *leaves

    def attend(self, call: Call) -> Tensor:
        """Of x (batch, rows, columns), in a call in which it `may_attend`."""
        found, children = self.line.found, self.__dict__["_modules"]
        products = [children[name](call.x) for name in found.projections]
        y: Any = NotImplemented
        if self.line.is_of_products:
            y = self._of_products(products, call)
        if y is NotImplemented:
            y = self._of_heads(*self._heads(products, call), call).reshape(*call.x.shape[:-1], -1).contiguous()
        for name in found.behind:
            y = children[name](y)
        return y  # type: ignore[no-any-return]

    def _of_products(self, products: list[Tensor], call: Call) -> Any:
        """The attention of products (batch, rows, heads · columns) as they lie."""
        (q, k, v), state, (size, scale, *_) = products, self.__dict__, self.line.numbers
        shape, size = q.shape, state[size]
        if not k.shape == shape == v.shape or shape[-1] % size:
            return NotImplemented
        more = {"mask": call.mask, "is_causal": is_causal_call(self, call.is_causal, call.mask, shape[1])}
        scheme = state["torchq_attention"].scheme
        return attend_directly(scheme, q, k, v, heads=shape[-1] // size, scale=state[scale], **more)

    def _heads(self, products: list[Tensor], call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """q, and all keys and values (batch, heads, rows, columns): normalized, turned, and joined to those before."""
        found, state, rows = self.line.found, self.__dict__, call.x.shape[:-1]
        q, k, v = (each.view(*rows, -1, state[found.size]) for each in products)
        if any(found.norms):
            q, k, v = (self._normalized(x, names) for x, names in zip((q, k, v), found.norms, strict=True))
        if self.line.rotary is None:
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        else:
            q, k = self.line.rotary.of(q, k, *call.angles)
        v = v.transpose(1, 2)
        if found.cache is not None and call.cache is not None:
            more = {"kwargs": call.others} if found.cache.hands_on else {}
            k, v = call.cache.update(k, v, state[found.cache.place], **more)
        return q, k, v

    def _normalized(self, x: Tensor, names: tuple[str, ...]) -> Tensor:
        children = self.__dict__["_modules"]
        return functools.reduce(lambda y, name: children[name](y), names, x)

    def _of_heads(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """(batch, rows, heads, columns)."""
        found, state, rows = self.line.found, self.__dict__, q.shape[2]
        y: Any = NotImplemented
        causal = is_causal_call(self, call.is_causal, call.mask, rows)
        more = {"mask": call.mask, "is_causal": causal, "scale": state[found.scale]}
        if not causal or k.shape[2] == rows:
            y = attend_directly(state["torchq_attention"].scheme, q, k, v, **more)
        if y is NotImplemented:
            others = {name: value for name, value in call.others.items() if name not in ASKED}
            others |= {name: _read(self, path) for name, path in found.handed}
            scale = state[found.scale]
            y, _ = attention_forward(
                self, q, k, v, call.mask, dropout=0.0, scaling=scale, is_causal=call.is_causal, **others
            )
        return y  # type: ignore[no-any-return]


def _read(module: nn.Module, path: str) -> Any:
    """An attribute of a module, or of one; None for what is not there, as of a config."""
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name, None)
    return value


def _are_pair(angles: Any) -> bool:
    return type(angles) in (tuple, list) and len(angles) == 2


_KNOWN = (QuantizedLinear, nn.Linear, LayerNorm, nn.LayerNorm, *IDLE)


def _is_known(child: Any) -> bool:
    """Whether a call of it gives the rows of its input, and runs nothing that could change the module meanwhile."""
    kind = type(child)
    return (kind in _KNOWN or issubclass(kind, RMSNorm)) and _C.is_plain(child, kind)


def _asks_for_torchq(config: Any) -> bool:
    """Whether a config says "torchq". transformers' own way to read it takes as long as a view."""
    try:
        state = object.__getattribute__(config, "__dict__")
    except AttributeError:
        return False
    return bool(state.get("_attn_implementation_internal") == NAME)
