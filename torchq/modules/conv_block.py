"""Residual blocks of the user as one call: `act(convs(x) + shortcut(x))`, if that is proven to be their code.

The block's convolutions then run one after the other, with nothing of Python between them but this loop: codes go from
one to the next, and the sum and its activation are the last one's epilogue, as the plan has it. The children stay what
they are; wherever anybody could see a difference, the code of the user runs (`straight_forms.py`).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from torchq import _C
from torchq.modules import gradients, simulation, writes
from torchq.modules.coded_sum import Codes
from torchq.modules.curve import exact_activation_of
from torchq.modules.folding import IDLE
from torchq.modules.int8_sequential import Int8Sequential, settings_of
from torchq.modules.norms import IncludedNorm
from torchq.modules.pending import Scope
from torchq.modules.pending_conv import MIN_VALUES, as_it_lies, codes_of
from torchq.modules.quantized_conv import QuantizedConv
from torchq.modules.straight import Block, block_of
from torchq.modules.straight_forms import ConvRow, Form, become, may_become
from torchq.modules.writes import is_eager
from torchq.ops import Activation


class Part(NamedTuple):
    """A module of a block, as it was when the block was read.

    Args:
        module: the module.
        kind: its class.
        children: those that its code calls, by name; none of a module without children of interest.
        in_order: whether it calls all its children, in their order.
        settings: the attributes that it computes with, other than those of a convolution, which each call reads.
    """

    module: nn.Module
    kind: type[nn.Module]
    children: dict[str, Any]
    in_order: bool
    settings: dict[str, Any]


class Link(NamedTuple):
    """A convolution of a chain, and the activation behind it."""

    conv: QuantizedConv
    activation: int


class _Known(NamedTuple):
    """What a block was found to compute.

    Args:
        parts: the block, and all modules in it.
        main: the convolutions whose last one adds.
        side: those of the shortcut; none where it is the input.
    """

    parts: tuple[Part, ...]
    main: tuple[Link, ...]
    side: tuple[Link, ...]


class ConvBlock(Form):
    """`act(convs(x) + shortcut(x))` in one loop over its convolutions."""

    line: Block  # type: ignore[assignment]
    _known: "_Known | None"  # None: its children are no longer what they were
    reads = staticmethod(block_of)  # type: ignore[assignment]

    @staticmethod
    def adopt(module: nn.Module) -> None:
        """Makes a module a ConvBlock, if this is its code, of int8 convolutions and what they fuse."""
        block = block_of(type(module))
        if block is None or not may_become(ConvBlock, module):
            return
        if _known(module, block) is not None:
            become(ConvBlock, module, block)

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
        state = self.__dict__
        known = state["_known"] if "_known" in state else self._learn()
        if known is None or not _C.are_as_known(known.parts, Scope.enter, Scope.leave):
            return NotImplemented
        main, side = known.main, known.side
        first = main[0].conv
        if x.dim() != first.dimensions + 2 or x.numel() == 0 or x.dtype != torch.float32:
            return NotImplemented
        held = codes_of(x)
        values = as_it_lies(x) if held is None else held.codes
        if not is_eager(values):
            return NotImplemented
        try:
            residual = self._chained(side, x, values, held) if side else held or values
            elements = (residual.codes if isinstance(residual, Codes) else residual).numel()
            if main[-1].conv.fold.sum_qparams is not None and elements < MIN_VALUES:
                return NotImplemented  # there is nothing to gain, and its code would add floats
            return self._chained(main, x, values, held, residual)
        except RuntimeError:  # the code of the user will say it of its own line
            return NotImplemented

    def _learn(self) -> "_Known | None":
        known = self.__dict__["_known"] = _known(self, self.line)
        return known

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Without what it was found to compute, which names classes that no pickle has."""
        new, made_of, state, *rest = super().__reduce_ex__(protocol)
        return new, made_of, {name: value for name, value in state.items() if name != "_known"}, *rest

    def _chained(
        self, links: tuple[Link, ...], x: Tensor, values: Tensor, held: Codes | None, residual: Any = None
    ) -> Any:
        """What these make of x, and of what is added: as a convolution gives it, with the channels last for a sum."""
        conv, activation = links[0]
        last, h = conv.gives_last(x), values
        if held is not None and not (held.qparams == conv.input_qparams and conv.takes_codes):
            h = as_it_lies(x)
        for after in links[1:]:
            reads = after.conv.input_qparams if conv.fold.codes and after.conv.takes_codes else None
            h = conv.computed(torch.float32, True, h, activation, None, reads)
            conv, activation = after
            last = conv.gives_last_after(last)
        return conv.computed(torch.float32, last or residual is None, h, activation, residual, None)


def _known(module: nn.Module, block: Block) -> _Known | None:
    children = {name: module._modules.get(name) for name in (*block.one, *block.other, block.last)}
    parts = [Part(module, type(module), children, False, {})]
    one, other, last = (
        _leaves([children[name] for name in names], parts) for names in (block.one, block.other, (block.last,))
    )
    if one is None or other is None or last is None:
        return None
    kinds = [kind for kind in map(exact_activation_of, last) if kind != Activation.NONE]
    left, right = _links(one), _links(other)
    if left is None or right is None or len(kinds) != 1 or (block.in_place and not left):
        return None
    main, side = (left, right) if left and left[-1].conv.fold.adds else (right, left)
    if not main or not main[-1].conv.fold.adds or main[-1].activation != Activation.NONE:
        return None
    main = (*main[:-1], Link(main[-1].conv, kinds[0]))
    if any(link.conv.fold.adds for link in (*main[:-1], *side)) or not all(map(_is_folded, (*main, *side))):
        return None
    return _Known(tuple(parts), main, side)


def _is_folded(link: Link) -> bool:
    """Whether the plan lets the convolution compute the activation behind it."""
    conv = link.conv
    return conv.fold.activation == link.activation and conv.padding_mode == "zeros"


def _leaves(modules: list[Any], parts: list[Part]) -> list[nn.Module] | None:
    """The modules that these call in the end, in order; None if one does anything else. `parts` gets all of them."""
    found: list[nn.Module] = []
    for module in modules:
        kind, children, in_order = type(module), {}, False
        if kind in (nn.Sequential, Int8Sequential):
            children, in_order = dict(module._modules), True
        elif isinstance(module, ConvRow):
            children = {name: module._modules[name] for name in module.line.calls}
        elif not _is_leaf(module):
            return None
        leaf = isinstance(module, QuantizedConv) or bool(children)
        parts.append(Part(module, kind, children, in_order, {} if leaf else settings_of(module)))
        inside = _leaves(list(children.values()), parts) if children or in_order else [module]
        if inside is None:
            return None
        found += inside
    return found


def _is_leaf(module: Any) -> bool:
    known = isinstance(module, QuantizedConv) or type(module) in (*IDLE, IncludedNorm)
    return known or (isinstance(module, nn.Module) and exact_activation_of(module) != Activation.NONE)


def _links(leaves: list[nn.Module]) -> tuple[Link, ...] | None:
    """These as convolutions and the activations behind them; None if they are something else."""
    links: list[Link] = []
    for leaf in leaves:
        if isinstance(leaf, QuantizedConv):
            links.append(Link(leaf, Activation.NONE))
        elif (kind := exact_activation_of(leaf)) != Activation.NONE:
            if not links or links[-1].activation != Activation.NONE:
                return None
            links[-1] = Link(links[-1].conv, kind)
        elif isinstance(leaf, IncludedNorm) and not links:
            return None
    return tuple(links)
