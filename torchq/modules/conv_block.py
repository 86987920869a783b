"""Blocks of the user as one call: `act(convs(x) + shortcut(x))` or `convs(x)`, if that is proven to be their code.

The block's convolutions then run one after the other, with nothing of Python between them but this loop: codes go from
one to the next, zeros that the code adds around a tensor are padding of the convolution that reads it, and a sum with
its activation is the last one's epilogue, as the plan has it. The children stay what they are; wherever anybody could
see a difference, the code of the user runs (`straight_forms.py`).
"""

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from torchq import _C
from torchq.modules import gradients, simulation, writes
from torchq.modules.classes import know
from torchq.modules.coded_sum import Codes
from torchq.modules.convolving import is_channels_last, step_of
from torchq.modules.curve import exact_activation_of
from torchq.modules.flow import Code, Facts, Flow, Zeros, code_of, flow_of
from torchq.modules.folding import IDLE
from torchq.modules.int8_sequential import Int8Sequential, settings_of
from torchq.modules.norms import IncludedNorm
from torchq.modules.parts import Learned, Part
from torchq.modules.pending import Scope
from torchq.modules.pending_conv import MIN_VALUES, PendingConv, as_it_lies, codes_of, handed_on, may_wait
from torchq.modules.quantized_conv import QuantizedConv
from torchq.modules.straight import UnknownError, is_usual
from torchq.modules.straight_forms import ConvRow, Form, become, may_become
from torchq.modules.writes import is_eager
from torchq.numerics.qparams import QParams
from torchq.ops import Activation

MOST_STEPS = 64
"""A block knows the steps of so many kinds of input, images of so many sizes."""


class Link(NamedTuple):
    """A convolution of a chain, the activation behind it, and the zeros before it, if there are any."""

    conv: QuantizedConv
    activation: int
    zeros: Zeros | None


class _Known(NamedTuple):
    """What a block was found to compute.

    Args:
        parts: the block, and all modules in it.
        facts: what else their codes have read.
        main: the convolutions whose last one adds, if any does.
        side: those of the shortcut; none where it is the input; None where there is no sum.
        steps: of some of a chain, as `_C.call_convolutions` takes them, for each kind of input so far.
    """

    parts: tuple[Part, ...]
    facts: Facts
    main: tuple[Link, ...]
    side: tuple[Link, ...] | None
    steps: dict[Any, tuple[Any, ...]]


class _Entered(NamedTuple):
    """What a chain begins with.

    Args:
        given: the tensor that the block was called with.
        values: its values as they lie, or its codes.
        codes: what these codes are; None for values.
        around: zeros that the codes lack.
    """

    given: Tensor
    values: Tensor
    codes: Codes | None
    around: tuple[int, ...] = ()


class ConvBlock(Learned):
    """`act(convs(x) + shortcut(x))`, or `convs(x)`, in one loop over its convolutions."""

    line: Code  # type: ignore[assignment]
    _known: "_Known | None"
    reads = staticmethod(code_of)  # type: ignore[assignment]

    @staticmethod
    def adopt(module: nn.Module) -> None:
        """Makes a module a ConvBlock, if its code is one, of int8 convolutions and what they fuse."""
        if isinstance(module, nn.Sequential) or not may_become(ConvBlock, module):
            return
        code = code_of(type(module))
        if code is not None and _known(module) is not None:
            become(ConvBlock, module, code)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """forward(), as one loop where that is all that happens."""
        if not is_dynamo_compiling() and len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            y = self._run(args[0])
            if y is not NotImplemented:
                return y
        return super().__call__(*args, **kwargs)

    def _run(self, x: Tensor) -> Any:
        if gradients.wanted(x) or writes.modes() or torch._C._get_tracing_state() or simulation.is_watched():
            return NotImplemented
        known = self._learned()
        if known is None or not _C.are_as_known(known.parts, Scope.enter, Scope.leave):
            return NotImplemented
        main, side = known.main, known.side
        first = main[0]
        images = x.dim() == first.conv.dimensions + 2 and x.shape[1] == first.conv.in_channels
        if not images or x.numel() == 0 or x.dtype != torch.float32:
            return NotImplemented
        if side == () and type(x) is Tensor and not _lies_as_usual(x):
            return NotImplemented  # torch would lay the sum out as x
        if not known.facts.hold():
            return NotImplemented
        try:
            entered = _codes_for(first, x) if side is None else None
            if entered is None:
                held = codes_of(x)
                entered = _Entered(x, as_it_lies(x) if held is None else held.codes, held)
            if not is_eager(entered.values):
                return NotImplemented
            if side is None:
                return self._chained(main, entered)
            residual = self._chained(side, entered) if side else entered.codes or entered.values
            elements = (residual.codes if isinstance(residual, Codes) else residual).numel()
            if main[-1].conv.fold.sum_qparams is not None and elements < MIN_VALUES:
                return NotImplemented  # there is nothing to gain, and its code would add floats
            return self._chained(main, entered, residual)
        except (RuntimeError, UnknownError):  # the code of the user will say it of its own line
            return NotImplemented

    def _read_again(self) -> "_Known | None":
        return _known(self)

    def _chained(self, links: tuple[Link, ...], entered: _Entered, residual: Any = None) -> Any:
        """What these make of x, and of what is added: as a convolution gives it, with the channels last for a sum."""
        (conv, _, _), given = links[0], entered.given
        last, h, around = conv.gives_last(given), entered.values, entered.around
        if entered.codes is not None and not (entered.codes.qparams == conv.input_qparams and conv.takes_codes):
            h = as_it_lies(given)
        for after in links[1:]:
            last = after.conv.gives_last_after(last)
        conv, activation, zeros = links[-1]
        adds = self.__dict__["_known"].side is not None
        last = last or (adds and residual is None)
        in_codes = isinstance(residual, Codes) or (residual is not None and conv.fold.sum_qparams is not None)
        if (adds or not may_wait(conv, activation)) and not in_codes:
            over = conv.hands_over(h)
            rows = conv.tiled and conv.input_qparams is None  # which have the channels last
            y = self._computed(links, None, h, around, residual, last or over or rows)
            return y if last else conv.handed(y) if over else y.contiguous()
        if len(links) > 1:
            reads = conv.input_qparams if links[-2].conv.fold.codes and conv.takes_codes else None
            h, around = self._computed(links[:-1], reads, h, around), ()
        h, around = _with_zeros(h, conv, zeros, around)
        if adds:
            return conv.computed(torch.float32, last, h, activation, residual, None, around)
        written = given if h is entered.values and entered.codes is None else None  # by others, while it waits
        if written is not None and around:
            h, written, around = nn.functional.pad(h, around), None, ()
        sizes = [*(h.shape[1:-1] if h.dtype == torch.uint8 else h.shape[2:])]
        for i, count in enumerate(around):
            sizes[-1 - i // 2] += count
        return handed_on(conv, h, last, tuple(sizes), activation, written, around)

    def _computed(
        self,
        links: tuple[Link, ...],
        reads: QParams | None,
        h: Tensor,
        around: tuple[int, ...],
        residual: Tensor | None = None,
        last: bool = True,
    ) -> Tensor:
        """What these make of values or codes, which lack the zeros `around` them: codes by `reads`, or floats.

        That is one call, with the steps that the same kind of input took before, while the convolutions are as they
        were.
        """
        known = self.__dict__["_known"].steps
        key = (links[0].conv, len(links), h.shape, h.dtype, around, reads)
        if key in known:
            y = _C.call_convolutions(writes.own_modes(), h, known[key], residual, last)
            if y is not NotImplemented:
                return y
        steps: list[Any] = []
        for (conv, activation, zeros), after in zip(links, (*links[1:], None), strict=True):
            h, around, alone = *_with_zeros(h, conv, zeros, around), h
            codes = reads
            if after is not None:
                codes = after.conv.input_qparams if conv.fold.codes and after.conv.takes_codes else None
            steps.append(step_of(conv, activation, codes, around) if h is alone else None)
            ends = (residual, last) if after is None else (None, True)
            h, around = conv.computed(torch.float32, ends[1], h, activation, ends[0], codes, around), ()
        if None not in steps:
            if len(known) >= MOST_STEPS:
                known.clear()
            known[key] = (*steps,)
        return h


def _lies_as_usual(x: Tensor) -> bool:
    """Whether its axes are in the order that one of torch's memory formats has, dense or not."""
    strides = x.stride()
    return is_channels_last(x) or (strides[-1] > 0 and all(a >= b for a, b in pairwise(strides)))


def _codes_for(link: Link, x: Tensor) -> _Entered | None:
    """The codes of what waits for this convolution; None if it has none for it."""
    conv = link.conv
    if type(x) is not PendingConv or conv.input_qparams is None or not (conv.takes_codes and x.layer.fold.codes):
        return None
    if x.padding and link.zeros is not None:
        return None
    codes = x.codes(conv.input_qparams)
    return None if codes is None else _Entered(x, codes, Codes(codes, conv.input_qparams, x.dtype), x.padding)


def _with_zeros(
    h: Tensor, conv: QuantizedConv, zeros: Zeros | None, around: tuple[int, ...]
) -> tuple[Tensor, tuple[int, ...]]:
    """The input of a convolution, and the zeros around it that it lacks."""
    if zeros is None:
        return h, around
    shape = tuple(h.shape)
    around = zeros.around((shape[0], shape[-1], *shape[1:-1]) if h.dtype == torch.uint8 else shape)
    if around and conv.tiled and conv.input_qparams is None:  # each place has a scale of its own
        return nn.functional.pad(h, around), ()
    return h, around


# ---- What a block is ------------------------------------------------------------------------------------------------


def _known(module: nn.Module) -> _Known | None:
    parts: list[Part] = []
    facts = Facts()
    flow = _flow(module, parts, facts)
    if flow is None:
        return None
    one, other, last = (
        None if steps is None else _leaves(module, steps, parts, facts) for steps in (flow.one, flow.other, flow.last)
    )
    left, right = _links(one), _links(other)
    if flow.other is None:
        return (
            None if not left or not _run_as_one((*left[:-1],), left[-1]) else _Known((*parts,), facts, left, None, {})
        )
    if last is None or left is None or right is None or (flow.in_place and not left):
        return None
    kinds = [kind for kind in map(exact_activation_of, last) if kind != Activation.NONE]
    main, side = (left, right) if left and left[-1].conv.fold.adds else (right, left)
    if len(kinds) > 1 or not main or not main[-1].conv.fold.adds or main[-1].activation != Activation.NONE:
        return None
    main = (*main[:-1], main[-1]._replace(activation=kinds[0] if kinds else Activation.NONE))
    if any(link.conv.fold.adds for link in (*main[:-1], *side)) or not all(map(_is_folded, (*main, *side))):
        return None
    return _Known((*parts,), facts, main, side, {})


def _run_as_one(before: tuple[Link, ...], last: Link) -> bool:
    """Whether these may be a chain without a sum."""
    if last.activation == Activation.NONE:  # what comes later is not the block's
        last = last._replace(activation=last.conv.fold.activation)
    elif last.conv.fold.adds:
        return False
    return not any(link.conv.fold.adds for link in before) and all(map(_is_folded, (*before, last)))


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
    if isinstance(module, (ConvRow, ConvBlock)):
        flow = _flow(module, parts, facts)
        return None if flow is None or flow.other is not None else _leaves(module, flow.one, parts, facts)
    if is_sequential(kind):
        parts.append(Part(module, kind, dict(module._modules), True, {}))
        know(kind, _OF_SEQUENTIAL)
        return _leaves(module, list(module._modules), parts, facts)
    if not _is_leaf(module):
        return None
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
    if type(module) in _PADS:
        return bool(module.value == 0)
    known = isinstance(module, QuantizedConv) or type(module) in (*IDLE, IncludedNorm)
    return known or (isinstance(module, nn.Module) and exact_activation_of(module) != Activation.NONE)


def _links(leaves: list[Any] | None) -> tuple[Link, ...] | None:
    """These as convolutions, the activations behind them, and the zeros before; None if they are something else."""
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
        elif isinstance(leaf, IncludedNorm):
            if not links:
                return None
        elif (kind := exact_activation_of(leaf)) != Activation.NONE:
            if not links or links[-1].activation != Activation.NONE or zeros is not None:
                return None
            links[-1] = links[-1]._replace(activation=kind)
    return None if leaves is None or zeros is not None else tuple(links)
