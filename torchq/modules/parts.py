"""Forms whose code was run on stand-ins: what it read of the module and of all modules in it, and when it is read."""

from typing import Any, NamedTuple

from torch import nn

from torchq.modules.straight_forms import Form


class Part(NamedTuple):
    """A module that is a part of a form, as it was when that was read.

    Args:
        module: the module.
        kind: its class.
        children: those that its code calls, by name; none of a module without children of interest.
        in_order: whether it calls all its children, in their order.
        settings: the attributes that it computes with; of a convolution the mode of its padding, since each call reads
            the others.
    """

    module: nn.Module
    kind: type[nn.Module]
    children: dict[str, Any]
    in_order: bool
    settings: dict[str, Any]


class Learned(Form):
    """A form that is read when it is called first: what it was found to compute names classes that no pickle has."""

    _known: Any  # the module and what it computes: None if its children are no longer what they were

    def _read_again(self) -> Any:
        """What it computes now; None if that is not known."""
        raise NotImplementedError

    def _learned(self) -> Any:
        """What it was found to compute; None if that is not known."""
        state = self.__dict__
        of, known = state.get("_known", (None, None))
        if of is not self:  # not read yet, or this is a copy by its __dict__, with parts of its own
            known = self._read_again()
            state["_known"] = self, known
        return known

    def _unlearn(self) -> None:
        """What it computes is not known, and won't be."""
        self.__dict__["_known"] = self, None

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Without what it was found to compute."""
        new, made_of, state, *rest = super().__reduce_ex__(protocol)
        return new, made_of, {name: value for name, value in state.items() if name != "_known"}, *rest
