"""Layers in graphs of torch.compile, each as one op, which makes the layer's eager call.

Eager, a layer of an encoder is a few calls past torch's dispatcher (`layer_form.py`). In a graph it would be a dozen
ops, with inductor's code between them, and hundreds of guards, which each call has to pass. So a graph for inference
has one op for it, `torchq::layers`, that calls the module as it is then: whoever changes the module later, or hooks
into it, is heard as in eager mode.

**Which module** a call means is said by a tensor: each such module has a number, drawn at random, in a tensor beside
itself. Dynamo makes a tensor of a module an input of the graph. So one graph serves all layers of a kind, and no graph
holds a number, nor do inductor's caches on disk. A copy of a module has another number. Where its `__dict__` was
copied, the tensor still names the other module, so a guard compares both. A number that belongs to no module, such as
one that a frozen graph took along, is an error.
"""

import secrets
import sys
import weakref
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from torchq.modules.made import MadeTensor
from torchq.modules.tracing import exporting

NUMBER, NUMBERED = "_number_in_graphs", "_numbered_in_graphs"
"""The attributes of a module that hold its number, and whose it is: a weak reference to the module itself."""

NONE, FALSE, SOME = range(3)
"""What an argument is: None, False, or anything else."""

_numbered: "weakref.WeakValueDictionary[int, OneOp]" = weakref.WeakValueDictionary()


def _nobody() -> None:
    return None


class Places(NamedTuple):
    """Which argument of a call is what, by number.

    Args:
        x: the input.
        mask: the mask; None without one.
        padding: the mask of padding.
        hinted: whether the mask is said to be causal, which may depend on its values.
        pair: whether the call returns a pair of its values and None.
    """

    x: int
    mask: int | None
    padding: int | None
    hinted: bool
    pair: bool


class OneOp(nn.Module):
    """A module whose call may be one op of a graph."""

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        give_number(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Without its number, which is its own."""
        reduced: Any = super().__reduce_ex__(protocol)
        new, made_of, state, *rest = reduced
        return new, made_of, {name: value for name, value in state.items() if name not in (NUMBER, NUMBERED)}, *rest

    def asked_in_graph(self, count: int, names: tuple[str, ...], kinds: tuple[int, ...]) -> str:
        """What is asked when a graph is made: whether such a call may be one op, and which argument is what.

        Dynamo runs this as it is, on the module itself, and takes what it gives for a constant.

        Args:
            count: of positional arguments.
            names: of the others.
            kinds: of all: `NONE`, `FALSE` or `SOME`.

        Returns:
            `Places` as numbers with spaces between them, -1 for None; empty if it may not.
        """
        if torch._C._are_functorch_transforms_active():
            return ""
        state = self.__dict__
        own = state.get(NUMBERED, _nobody)() is self  # of a copy by its __dict__ it is another one
        if not own or type(state.get(NUMBER)) is not Tensor:
            give_number(self)
        places = self.places(count, names, kinds)
        found = () if places is None else (-1 if each is None else int(each) for each in places)
        return sys.intern(" ".join(map(str, found)))  # Dynamo keeps each object that it is given

    asked_in_graph._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compiler.assume_constant_result

    def places(self, count: int, names: tuple[str, ...], kinds: tuple[int, ...]) -> Places | None:
        """Which argument is what, if such a call may be one op."""
        raise NotImplementedError

    def called_in_graph(self, x: Tensor, mask: Tensor | None, padding: Tensor | None, hinted: bool) -> Any:
        """What the op calls: the module with these arguments. Its values are in memory that nobody else has."""
        raise NotImplementedError


def in_graph(module: OneOp, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What stands in a graph for a call of a module with these arguments; None if that is not one op.

    Whatever is read here of the module becomes a guard of the graph.
    """
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or exporting():
        return None
    values = (*args, *kwargs.values())
    kinds = tuple([NONE if each is None else FALSE if each is False else SOME for each in values])
    found = module.asked_in_graph(len(args), (*kwargs,), kinds)
    if not found:
        return None
    at, *masks, hinted, pair = [int(each) for each in found.split()]
    x = values[at]
    mask, padding = [values[each] if each >= 0 else None for each in masks]
    if type(x) is not Tensor or x.dim() != 3 or x.device.type != "cpu" or not x.is_floating_point():
        return None
    if not (mask is None or type(mask) is Tensor) or not (padding is None or type(padding) is Tensor):
        return None
    state = module.__dict__
    if state[NUMBERED]() is not module:
        return None
    y = LAYERS([state[NUMBER]], x, mask, padding, bool(hinted))
    return (y, None) if pair else y


def give_number(module: OneOp) -> None:
    """Gives a module a number of its own."""
    number = secrets.randbits(62)
    with torch.inference_mode(False):
        module.__dict__[NUMBER] = torch.tensor(number, dtype=torch.int64, device="cpu")
    module.__dict__[NUMBERED] = weakref.ref(module)  # not the module: it would outlive its last reference
    _numbered[number] = module


def alone(y: Any) -> Any:
    """The first of a pair with None, else the value."""
    return y[0] if type(y) is tuple and len(y) == 2 and y[1] is None else y


def apart(y: Any) -> Any:
    """The same, in memory of its own."""
    y = alone(y)
    return y.clone() if isinstance(y, Tensor) else y


def _call(numbers: list[Tensor], x: Tensor, mask: Tensor | None, padding: Tensor | None, hinted: bool) -> Tensor:
    """Calls the modules of these numbers, one after the other."""
    y: Any = x.contiguous()
    for module in [_module_of(number) for number in numbers]:
        y = module.called_in_graph(y, mask, padding, hinted)
    if isinstance(y, MadeTensor):
        y = y.make()
    if not isinstance(y, Tensor) or y.shape != x.shape or y.dtype != x.dtype:
        got = f"{y.dtype} {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise RuntimeError(
            f"torchq::layers: {type(module).__name__} gave {got} where the graph takes {x.dtype} {tuple(x.shape)}. It "
            "was changed after it was compiled: call torch.compiler.reset()."
        )
    return y.contiguous()


def _module_of(number: Tensor) -> OneOp:
    module = _numbered.get(cast(int, number.item()))
    if module is None:
        raise RuntimeError(
            "torchq::layers: this graph names a layer that is not in this process, or no more. Call "
            "torch.compiler.reset(), and compile the model again."
        )
    return module


_library = torch.library.Library("torchq", "FRAGMENT")  # as long as this lives, the op is there
_library.define("layers(Tensor[] numbers, Tensor x, Tensor? mask, Tensor? padding, bool hinted) -> Tensor")
_library.impl("layers", _call, "CompositeExplicitAutograd")
LAYERS = torch.ops.torchq.layers.default


@torch.library.register_fake("torchq::layers")
def _(numbers: list[Tensor], x: Tensor, mask: Tensor | None, padding: Tensor | None, hinted: bool) -> Tensor:
    return x.new_empty(x.shape)
