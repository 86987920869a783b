"""What a block of convolutions computes: chains of stages, read from the code of the block and of the modules in it.

A stage is a row of convolutions, with the activations behind them and the zeros before, and at its end a module of
another kind perhaps, such as a squeeze-and-excitation. `conv_block.py` runs them.
"""

from typing import Any, NamedTuple

from torch import nn

from torchq.modules.classes import know
from torchq.modules.curve import exact_activation_of
from torchq.modules.facts import Facts
from torchq.modules.flow import Flow, Zeros, flow_of
from torchq.modules.folding import IDLE
from torchq.modules.int8_sequential import Int8Sequential, settings_of
from torchq.modules.parts import Part
from torchq.modules.quantized_conv import QuantizedConv
from torchq.modules.straight import is_usual
from torchq.modules.straight_forms import Form
from torchq.ops import Activation


class Link(NamedTuple):
    """A convolution of a chain, the activation behind it, and the zeros before it, if there are any."""

    conv: QuantizedConv
    activation: int
    zeros: Zeros | None


class Stage(NamedTuple):
    """Convolutions of a chain, and the module of another kind behind them, which is called; None at the chain's end."""

    links: tuple[Link, ...]
    then: nn.Module | None


class Known(NamedTuple):
    """What a block was found to compute.

    Args:
        parts: the block, and all modules in it.
        facts: what else their codes have read.
        main: the chain whose last convolution adds, if any does.
        side: that of the shortcut; without convolutions where it is the input; None where there is no sum.
        steps: of some of a row, as `_C.call_convolutions` takes them, for each kind of input so far.
    """

    parts: tuple[Part, ...]
    facts: Facts
    main: tuple[Stage, ...]
    side: tuple[Stage, ...] | None
    steps: dict[Any, tuple[Any, ...]]


INPUT = (Stage((), None),)
"""The chain that does nothing."""


def known_of(module: nn.Module) -> Known | None:
    """What a module computes, if it is such a block."""
    parts: list[Part] = []
    facts = Facts()
    flow = _flow(module, parts, facts)
    if flow is None:
        return None
    one, other, last = (
        None if steps is None else _leaves(module, steps, parts, facts) for steps in (flow.one, flow.other, flow.last)
    )
    left, right = _stages(one), _stages(other)
    if flow.other is None:
        return None if left is None or not _run_as_one(left) else Known((*parts,), facts, left, None, {})
    if last is None or left is None or right is None or (flow.in_place and left == INPUT):
        return None
    kinds = [kind for kind in map(exact_activation_of, last) if kind != Activation.NONE]
    known = all(type(each) in IDLE or exact_activation_of(each) != Activation.NONE for each in last)
    main, side = (left, right) if _adds(left) else (right, left)
    if not known or len(kinds) > 1 or not _adds(main) or main[-1].links[-1].activation != Activation.NONE:
        return None
    *before, end = main[-1].links
    links = (*before, end._replace(activation=kinds[0] if kinds else Activation.NONE))
    main = (*main[:-1], Stage(links, None))
    others = [*_all_links(main)[:-1], *_all_links(side)]
    if any(link.conv.fold.adds for link in others) or not all(map(_is_folded, (*others, links[-1]))):
        return None
    if not main[0].links or (side != INPUT and not side[0].links):
        return None  # a module that is called first may write over the input, which the other side reads as well
    return Known((*parts,), facts, main, side, {})


def _all_links(stages: tuple[Stage, ...]) -> list[Link]:
    return [link for stage in stages for link in stage.links]


def _adds(stages: tuple[Stage, ...]) -> bool:
    """Whether the last thing of a chain is a convolution that adds."""
    return bool(stages[-1].links) and stages[-1].links[-1].conv.fold.adds


def _run_as_one(stages: tuple[Stage, ...]) -> bool:
    """Whether these may be a chain without a sum."""
    links = _all_links(stages)
    if len(links) < min(len(stages), 2):
        return False  # nothing to gain
    if stages[-1].links:
        *_, last = links
        if last.activation == Activation.NONE:  # what comes later is not the block's
            links[-1] = last._replace(activation=last.conv.fold.activation)
        elif last.conv.fold.adds:
            return False
    before = links[:-1] if stages[-1].links else links
    return not any(link.conv.fold.adds for link in before) and all(map(_is_folded, links))


def _is_folded(link: Link) -> bool:
    """Whether the plan lets the convolution compute the activation behind it."""
    conv = link.conv
    return conv.fold.activation == link.activation and conv.padding_mode == "zeros"


def _flow(module: nn.Module, parts: list[Part], facts: Facts) -> Flow | None:
    """What a module of the user computes, which becomes a part of the block."""
    kind: Any = type(module)
    flow = flow_of(module, kind.original if isinstance(module, Form) else kind, facts)
    if flow is not None:
        know(kind, flow.names)
        parts.append(Part(module, kind, flow.children, False, flow.settings))
    return flow


def _leaves(owner: nn.Module, steps: Any, parts: list[Part], facts: Facts) -> list[Any] | None:
    """The modules that these steps call in the end, and zeros, in order; None if one does anything else.

    `parts` and `facts` get all of them.
    """
    found: list[Any] = []
    for step in steps:
        inside = [step] if isinstance(step, Zeros) else _inside(owner._modules[step], parts, facts)
        if inside is None:
            return None
        found += inside
    return found


def _inside(module: Any, parts: list[Part], facts: Facts) -> list[Any] | None:
    kind = type(module)
    if isinstance(module, Form):
        count = len(parts)
        flow = _flow(module, parts, facts)
        if flow is not None and flow.other is None:
            return _leaves(module, flow.one, parts, facts)
        del parts[count:]
    if is_sequential(kind):
        parts.append(Part(module, kind, dict(module._modules), True, {}))
        know(kind, _OF_SEQUENTIAL)
        return _leaves(module, list(module._modules), parts, facts)
    if not isinstance(module, nn.Module):
        return None
    if not _is_leaf(module):
        return [module]
    is_conv = isinstance(module, QuantizedConv)
    settings = {"padding_mode": module.padding_mode} if is_conv else settings_of(module)
    parts.append(Part(module, kind, {}, False, settings))
    return [Zeros.constant(module.padding)] if kind in _PADS else [module]


_PADS = (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d)
_OF_SEQUENTIAL = ("forward", "__iter__", "__len__")


def is_sequential(kind: Any) -> bool:
    """Whether modules of a class call all their children in order, as an nn.Sequential does."""
    if kind in (nn.Sequential, Int8Sequential):
        return True
    own = issubclass(kind, nn.Sequential) and is_usual(kind)
    return own and all(getattr(kind, name) is getattr(nn.Sequential, name) for name in _OF_SEQUENTIAL)


def _is_leaf(module: Any) -> bool:
    """Whether it is taken apart, and no more called as a module."""
    if type(module) in _PADS:
        return bool(module.value == 0)
    known = isinstance(module, QuantizedConv) or type(module) in IDLE
    return known or (isinstance(module, nn.Module) and exact_activation_of(module) != Activation.NONE)


def _stages(leaves: list[Any] | None) -> tuple[Stage, ...] | None:
    """These as convolutions with the activations behind them and the zeros before, and what is called between.

    None if they are no such chain, as with zeros that no convolution reads.
    """
    stages: list[Stage] = []
    links: list[Link] = []
    zeros: Zeros | None = None
    for leaf in leaves or ():
        if isinstance(leaf, Zeros):
            if zeros is not None:
                return None
            zeros = leaf
        elif isinstance(leaf, QuantizedConv):
            links.append(Link(leaf, Activation.NONE, zeros))
            zeros = None
        elif type(leaf) in IDLE:
            continue
        elif zeros is not None:
            return None
        elif links and links[-1].activation == Activation.NONE != exact_activation_of(leaf):
            links[-1] = links[-1]._replace(activation=exact_activation_of(leaf))
        elif links and links[-1].conv.hands is not None:  # which takes a call of the code
            return None
        else:
            stages.append(Stage((*links,), leaf))
            links = []
    return None if leaves is None or zeros is not None else (*stages, Stage((*links,), None))
