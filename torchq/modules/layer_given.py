"""Where the attentions of a layer of transformers find their arguments among those of the layer's call.

That depends on nothing but the names by which a call gives them, and is found out once for all calls that give the
same ones (`layer_form.py`).
"""

from typing import Any, NamedTuple

from torch import Tensor

from torchq.modules.attention_code import MASK
from torchq.modules.layer_code import LayerCode, Steps
from torchq.modules.self_attention import Call, Given, SelfAttention, given_of

MOST = 64  # ways to call a layer


class Reading(NamedTuple):
    """How a call with some names is read.

    Args:
        given: where each attention's arguments are, among those of the call in order, these constants, and None.
        constants: what arguments are that the call does not give.
    """

    given: tuple[Given, ...]
    constants: tuple[Any, ...]

    def calls(
        self, attentions: tuple[SelfAttention, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[Call] | None:
        """The calls of the attentions, each with the layer's input; None if something else may happen in this call."""
        values, calls = (*args, *kwargs.values(), *self.constants, None), []
        for given, attention in zip(self.given, attentions, strict=True):
            call = given.call(values)
            if call is None or (call.cache is not None and not attention.knows(call.cache)):
                return None
            calls.append(call)
        x = calls[0].x
        return calls if type(x) is Tensor and x.dim() == 3 else None


def reading_of(line: LayerCode, steps: Steps, positions: int, names: tuple[str, ...]) -> Reading | None:
    """How a call is read that gives so many arguments by position and some by name; None if its code must run."""
    own = line.names
    if positions > len(own) or not {*names}.isdisjoint(own[:positions]):
        return None
    places = {name: at for at, name in enumerate((*own[:positions], *names))}
    others = {name for name in names if name not in own}
    if own[0] not in places or not places.keys() >= line.required:
        return None
    if others and (not line.takes_more or not steps.refused.isdisjoint(others)):
        return None
    if not steps.hands_on:
        mask = places.get(MASK, -1) if MASK in own else -1
        absent = tuple(at for at in places.values() if at not in (places[own[0]], mask))
        given = Given(places[own[0]], mask, absent=absent)
        return Reading((given,) * len(steps.attentions), ())
    defaults = [(name, value) for name, value in line.defaults if name not in places]
    places |= {name: len(places) + i for i, (name, _) in enumerate(defaults)}
    found = []
    for step in steps.steps:
        if step.handed is None:
            continue
        code = step.run.line  # type: ignore[attr-defined] # of an attention
        handed = {name: places.get(given, -1) for name, given in step.handed.names}
        handed |= {name: places[name] for name in others} if step.handed.more else {}
        own_given = None if code.names[0] in handed else given_of(code, {code.names[0]: places[own[0]], **handed})
        if own_given is None:
            return None
        found.append(own_given)
    return Reading((*found,), tuple(value for _, value in defaults))
