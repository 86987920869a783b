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
from torchq.modules.attention_code import MASK, REGISTRY, SelfAttentionCode, self_attention_of
from torchq.modules.attention_symbols import ASKED
from torchq.modules.facts import Facts
from torchq.modules.folding import IDLE
from torchq.modules.layer_norm import LayerNorm
from torchq.modules.parts import Part
from torchq.modules.quantized_linear import QuantizedLinear, products
from torchq.modules.rms_norm import RMSNorm
from torchq.modules.straight_forms import Form, become, may_become
from torchq.modules.writes import modes

_IS_CAUSAL = "is_causal"  # what a call may say to the attention function, past the code


Heads = tuple[Tensor, Tensor, Tensor]
"""Queries, and all keys and values, (batch, heads, rows, columns)."""


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


class Given(NamedTuple):
    """Where the arguments of such a call are among values, the last of which is None, for those that are not given.

    Args:
        x, mask, is_causal, angles, cache: as in the call.
        turns: whether there must be angles.
        absent: where None must be.
        others: what the code only hands on, with the names.
    """

    x: int
    mask: int = -1
    is_causal: int = -1
    angles: int = -1
    cache: int = -1
    turns: bool = False
    absent: tuple[int, ...] = ()
    others: tuple[tuple[str, int], ...] = ()

    def call(self, values: tuple[Any, ...]) -> Call | None:
        """The call, unless the code may make something else of it."""
        x, mask, is_causal, angles, cache, turns, absent, handed = self
        given, causal, pair = values[x], values[is_causal], values[angles]
        if given is None or not (causal is None or type(causal) is bool) or (turns and not _are_pair(pair)):
            return None
        for at in absent:
            if values[at] is not None:
                return None
        return Call(given, values[mask], causal, pair, values[cache], {name: values[at] for name, at in handed})


def given_of(line: SelfAttentionCode, places: dict[str, int]) -> Given | None:
    """Where arguments of these names are, if the code takes them."""
    turn, cached, first = line.found.turn, line.found.cache, line.names[0]
    if first not in places or not places.keys() >= line.required:
        return None
    usual = {first: "x", MASK: "mask"}
    if turn is not None:
        usual[turn.argument] = "angles"
    if cached is not None:
        usual[cached.argument] = "cache"
    elif line.takes_more:
        usual[_IS_CAUSAL] = "is_causal"
    others = {name: at for name, at in places.items() if name not in usual}
    for name in others:
        if name in line.refused or not (name in line.names or line.takes_more):
            return None
    absent = tuple(at for name, at in others.items() if name in line.names or name in ASKED)
    handed = tuple((name, at) for name, at in others.items() if name not in line.names)
    found = {usual[name]: at for name, at in places.items() if name in usual}
    return Given(**found, turns=turn is not None, absent=absent, others=handed)


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
        names = self.line.names
        if len(names) < len(args) or not kwargs.keys().isdisjoint(names[: len(args)]):
            return None
        given = given_of(self.line, {name: i for i, name in enumerate((*names[: len(args)], *kwargs))})
        return None if given is None else given.call((*args, *kwargs.values(), None))

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
        handed = self.line.found.attributes_handed()
        return known and all(type(state.get(each)) is int for each in index) and all(each in state for each in handed)

    def is_asked(self) -> bool:
        """Whether the config and the registry lead to torchq's attention, and it has a scheme for that."""
        state = self.__dict__
        known = type(state.get("torchq_attention")) is AttentionScheme and _asks_for_torchq(state.get("config"))
        return known and self.line.registry().get(NAME) is attention_forward and self.line.turns()

    def asking(self) -> Facts:
        """What says that it is asked: while these facts hold it is, and else it may be."""
        state, line, facts = self.__dict__, self.line, Facts()
        config = state["config"]
        inner: Any = line.inner  # for mypy, a function in a tuple is a method
        facts.add(dict.get, state, "torchq_attention", state["torchq_attention"])
        facts.add(dict.get, state, "config", config)
        known: Any = _state_of(config)
        facts.add(_state_of, config, "__dict__", known)
        facts.add(dict.get, known, _IMPLEMENTATION, known[_IMPLEMENTATION])
        registry = line.registry()
        facts.add(dict.get, inner.__globals__, REGISTRY, registry)
        facts.add(getattr, inner, "__code__", line.inner_code)
        facts.add(type(registry).get, registry, NAME, attention_forward)
        turn, rotary = line.found.turn, line.rotary
        if turn is not None and rotary is not None:
            facts.add(dict.get, inner.__globals__, turn.function, rotary.function)
            facts.join(rotary.facts)
        return facts

    def knows(self, cache: Any) -> bool:
        """Whether what gets keys and values is transformers' own, and so is its part for this layer.

        One of the user might change the model when it is called.
        """
        found = self.line.found.cache
        layers = getattr(cache, "layers", None)
        place = -1 if found is None else self.__dict__[found.place]
        within = layers[place] if type(layers) is list and 0 <= place < len(layers) else None
        if within is None:  # it is made when it is used first, of this class
            made_of = getattr(cache, "layer_class_to_replicate", None)
            if made_of is not None and getattr(made_of, "__module__", None) != _CACHES:
                return False
        for each in (cache,) if within is None else (cache, within):
            if type(each).__module__ != _CACHES or "update" in vars(each):
                return False
        return True

    def parts(self) -> tuple[Part, ...]:
        """What it is made of: while that are as known it `may_attend`, if it `is_asked`. Nothing if it may not."""
        line, state = self.line, self.__dict__
        children: dict[str, Any] = {name: state["_modules"].get(name) for name in line.children}
        if not self._has_numbers() or not all(map(_is_of_known_class, children.values())):
            return ()
        names = (*line.numbers, *line.found.attributes_handed())
        settings = {**{name: state[name] for name in names}, "training": False}
        leaves = (Part(each, type(each), {}, False, {}) for each in children.values())
        return Part(self, type(self), children, False, settings), *leaves

    def attend(self, call: Call, heads: Heads | None = None) -> Tensor:
        """Of x (batch, rows, columns), in a call in which it `may_attend`."""
        y, children = self.attended(call, heads), self.__dict__["_modules"]
        for name in self.line.found.behind:
            y = children[name](y)
        return y

    def attended(self, call: Call, heads: Heads | None = None) -> Tensor:
        """The same before the children behind; of these heads, if they are there already."""
        if heads is None:
            children = self.__dict__["_modules"]
            layers = tuple([children[name] for name in self.line.found.projections])
            found = self._turned_at_once(layers, call)
            if found is NotImplemented:
                projected = products(layers, call.x)
                if self.line.is_of_products:
                    y = self._of_products(projected, call)
                    if y is not NotImplemented:
                        return y  # type: ignore[no-any-return]
                found = self._heads(projected, call)
            q, k, v = found
            heads = (q, *self._cached(k, v, call))
        return self._of_heads(*heads, call).reshape(*call.x.shape[:-1], -1).contiguous()

    def _turned_at_once(self, layers: tuple[nn.Module, ...], call: Call) -> Any:
        """What `_heads` makes of their products, where nothing but these, a turn, happens, in a plain eager call."""
        found = self.line.found
        if self.line.rotary is None or any(found.norms):
            return NotImplemented
        return _C.call_heads(layers, QuantizedLinear, call.x, self.__dict__[found.size], *call.angles)

    def _of_products(self, projected: tuple[Tensor, ...], call: Call) -> Any:
        """The attention of products (batch, rows, heads · columns) as they lie."""
        (q, k, v), state, (size, scale, *_) = projected, self.__dict__, self.line.numbers
        shape, size = q.shape, state[size]
        if not k.shape == shape == v.shape or shape[-1] % size:
            return NotImplemented
        more = {"mask": call.mask, "is_causal": is_causal_call(self, call.is_causal, call.mask, shape[1])}
        scheme = state["torchq_attention"].scheme
        return attend_directly(scheme, q, k, v, heads=shape[-1] // size, scale=state[scale], **more)

    def _heads(self, projected: tuple[Tensor, ...], call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v (batch, heads, rows, columns): normalized and turned."""
        found, state, rows = self.line.found, self.__dict__, call.x.shape[:-1]
        q, k, v = (each.view(*rows, -1, state[found.size]) for each in projected)
        if any(found.norms):
            q, k, v = (self._normalized(x, names) for x, names in zip((q, k, v), found.norms, strict=True))
        if self.line.rotary is None:
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        else:
            q, k = self.line.rotary.of(q, k, *call.angles)
        return q, k, v.transpose(1, 2)

    def _cached(self, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """All keys and values: these are joined to those before."""
        cache, state = self.line.found.cache, self.__dict__
        if cache is None or call.cache is None:
            return k, v
        more = {"kwargs": call.others} if cache.hands_on else {}
        return call.cache.update(k, v, state[cache.place], **more)  # type: ignore[no-any-return]

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


_CACHES = "transformers.cache_utils"


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
    return _is_of_known_class(child) and _C.is_plain(child, type(child))


def _is_of_known_class(child: Any) -> bool:
    return type(child) in _KNOWN or isinstance(child, RMSNorm)


def _asks_for_torchq(config: Any) -> bool:
    """Whether a config says "torchq". transformers' own way to read it takes as long as a view."""
    try:
        state = _state_of(config)
    except AttributeError:
        return False
    return bool(state.get(_IMPLEMENTATION) == NAME)


_IMPLEMENTATION = "_attn_implementation_internal"


def _state_of(config: Any, *_: Any) -> dict[str, Any]:
    return object.__getattribute__(config, "__dict__")  # type: ignore[no-any-return]
