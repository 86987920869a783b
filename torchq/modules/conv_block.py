"""Blocks of the user as one call: `act(convs(x) + shortcut(x))` or `convs(x)`, if that is proven to be their code.

The block's convolutions then run one after the other, with nothing of Python between them but this loop: codes go from
one to the next, zeros that the code adds around a tensor are padding of the convolution that reads it, and a sum with
its activation is the last one's epilogue, as the plan has it. The children stay what they are; wherever anybody could
see a difference, the code of the user runs (`straight_forms.py`).
"""

from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from torchq import _C
from torchq.modules import gradients, simulation, writes
from torchq.modules.coded_sum import Codes
from torchq.modules.conv_stages import INPUT, Known, Link, Stage, known_of
from torchq.modules.convolving import in_format, is_channels_last, step_of
from torchq.modules.flow import Code, Zeros, code_of
from torchq.modules.parts import Learned
from torchq.modules.pending import Scope
from torchq.modules.pending_conv import MIN_VALUES, PendingConv, as_it_lies, codes_of, handed_on, may_wait
from torchq.modules.quantized_conv import QuantizedConv
from torchq.modules.straight import UnknownError
from torchq.modules.straight_forms import become, may_become
from torchq.modules.writes import is_eager
from torchq.numerics.qparams import QParams

MOST_STEPS = 64
"""A block knows the steps of so many kinds of input, images of so many sizes."""


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
    _known: "Known | None"
    reads = staticmethod(code_of)  # type: ignore[assignment]

    @staticmethod
    def adopt(module: nn.Module) -> None:
        """Makes a module a ConvBlock, if its code is one, of int8 convolutions and what they fuse."""
        if isinstance(module, nn.Sequential) or not may_become(ConvBlock, module):
            return
        code = code_of(type(module))
        if code is not None and known_of(module) is not None:
            become(ConvBlock, module, code)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """forward(), as one loop where that is all that happens."""
        if not is_dynamo_compiling() and len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            y = self._run(args[0])
            if y is not NotImplemented:
                return y
        return super().__call__(*args, **kwargs)

    def _run(self, x: Tensor) -> Any:
        writes.go_on()
        if gradients.wanted(x) or writes.modes() or torch._C._get_tracing_state() or simulation.is_watched():
            return NotImplemented
        known = self._learned()
        if known is None or not _C.are_as_known(known.parts, Scope.enter, Scope.leave):
            return NotImplemented
        main, side = known.main, known.side
        images = not main[0].links or _may_take(main[0].links[0].conv, x)
        if not images or x.numel() == 0 or x.dtype != torch.float32:
            return NotImplemented
        if side == INPUT and type(x) is Tensor and not _lies_as_usual(x):
            return NotImplemented  # torch would lay the sum out as x
        if not known.facts.hold():
            return NotImplemented
        try:
            entered = _codes_for(main[0].links[0], x) if side is None and main[0].links else None
            entered = _entered(x) if entered is None else entered
            if not is_eager(entered.values):
                return NotImplemented
            if side is None:
                end = self._to_end(main, entered)
                links = main[-1].links
                return end if end is NotImplemented else self._handed_on(links, end) if links else end.given
            residual = self._residual(side, entered)
            if residual is NotImplemented:
                return residual
            elements = (residual.codes if isinstance(residual, Codes) else residual).numel()
            if main[-1].links[-1].conv.fold.sum_qparams is not None and elements < MIN_VALUES:
                return NotImplemented  # there is nothing to gain, and its code would add floats
            end = self._to_end(main, entered)
            return end if end is NotImplemented else self._summed(main[-1].links, end, residual)
        except (RuntimeError, UnknownError):  # the code of the user will say it of its own line
            return NotImplemented

    def _read_again(self) -> "Known | None":
        return known_of(self)

    def _residual(self, side: tuple[Stage, ...], entered: _Entered) -> Any:
        """What the shortcut makes of x: values as they lie, or codes."""
        end = self._to_end(side, entered)
        if end is NotImplemented:
            return end
        return self._summed(side[-1].links, end, None) if side[-1].links else end.codes or end.values

    def _to_end(self, stages: tuple[Stage, ...], entered: _Entered) -> Any:
        """What reaches the last convolutions of a chain, or its end; NotImplemented if they can't take it."""
        for (links, then), after in pairwise(stages):
            y = cast(nn.Module, then)(self._handed_on(links, entered) if links else entered.given)
            plain = isinstance(y, Tensor) and y.dtype == torch.float32 and y.numel() > 0
            if not plain or (after.links and not _may_take(after.links[0].conv, y)):
                self._unlearn()  # the code of the user runs from now on, and calls all modules once
                return NotImplemented
            entered = _entered(y)
            if not is_eager(entered.values):
                return NotImplemented
        return entered

    def _summed(self, links: tuple[Link, ...], entered: _Entered, residual: Any) -> Tensor:
        """What these make of x, and of what is added; without that, a summand, with the channels last."""
        h, around, last = self._begun(links, entered)
        last, conv = last or residual is None, links[-1].conv
        if not (isinstance(residual, Codes) or (residual is not None and conv.fold.sum_qparams is not None)):
            return self._at_once(links, h, around, residual, last)
        h, around = self._up_to_last(links, h, around)
        return conv.computed(torch.float32, last, h, links[-1].activation, residual, None, around)

    def _handed_on(self, links: tuple[Link, ...], entered: _Entered) -> Tensor:
        """What these make of x; it may wait for what comes behind."""
        h, around, last = self._begun(links, entered)
        conv, activation, _ = links[-1]
        if not may_wait(conv, activation):
            return self._at_once(links, h, around, None, last)
        h, around = self._up_to_last(links, h, around)
        written = entered.given if h is entered.values and entered.codes is None else None  # by others, while it waits
        if written is not None and around:
            h, written, around = nn.functional.pad(h, around), None, ()
        sizes = [*(h.shape[1:-1] if h.dtype == torch.uint8 else h.shape[2:])]
        for i, count in enumerate(around):
            sizes[-1 - i // 2] += count
        return handed_on(conv, h, last, tuple(sizes), activation, written, around)

    def _begun(self, links: tuple[Link, ...], entered: _Entered) -> tuple[Tensor, tuple[int, ...], bool]:
        """What the first of these reads, the zeros that this lacks, and whether the last gives the channels last."""
        conv, given = links[0].conv, entered.given
        last, h = conv.gives_last(given), entered.values
        if entered.codes is not None and not (entered.codes.qparams == conv.input_qparams and conv.takes_codes):
            h = as_it_lies(given)
        for after in links[1:]:
            last = after.conv.gives_last_after(last)
        return h, entered.around, last

    def _at_once(
        self, links: tuple[Link, ...], h: Tensor, around: tuple[int, ...], residual: Tensor | None, last: bool
    ) -> Tensor:
        conv: Any = links[-1].conv
        over = conv.hands_over(h)
        rows = conv.tiled and conv.input_qparams is None  # which have the channels last
        y = self._computed(links, None, h, around, residual, last or over or rows)
        given: Tensor = y if last else conv.handed(y) if over else in_format(y, False)
        return given

    def _up_to_last(
        self, links: tuple[Link, ...], h: Tensor, around: tuple[int, ...]
    ) -> tuple[Tensor, tuple[int, ...]]:
        """What the last of these reads, and the zeros that this lacks."""
        conv, _, zeros = links[-1]
        if len(links) > 1:
            reads = conv.input_qparams if links[-2].conv.fold.codes and conv.takes_codes else None
            h, around = self._computed(links[:-1], reads, h, around), ()
        return _with_zeros(h, conv, zeros, around)

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
        known = self._learned().steps
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


def _may_take(conv: QuantizedConv, x: Tensor) -> bool:
    """Whether x is a batch of images for this convolution."""
    return x.dim() == conv.dimensions + 2 and x.shape[1] == conv.in_channels


def _entered(x: Tensor) -> _Entered:
    """A tensor as a chain takes it."""
    held = codes_of(x)
    return _Entered(x, as_it_lies(x) if held is None else held.codes, held)


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
