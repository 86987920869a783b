"""Int8TransformerEncoder: an nn.TransformerEncoder that computes no padding.

In eval mode torch's own encoder skips the rows that `src_key_padding_mask` hides, by nested tensors and fused kernels
that read float weights. Here the real rows lie one behind the other, (rows, E). Every layer runs on these; only its
attention knows which rows belong together. As in torch, a hidden row of the last layer's output is 0.

This happens where the float encoder skips padding, with the same results. All other calls take torch's way.
"""

from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.nn.modules.module import _has_any_global_hook

from torchq.modules import gradients
from torchq.modules.base import Int8Module
from torchq.modules.encoder_layer import Int8TransformerEncoderLayer, nobody_looks, places_of_masks, runs_torchs_code
from torchq.modules.multihead_attention import QuantizedMultiheadAttention, of_sequences
from torchq.modules.one_op import OneOp, Places, apart, give_number, in_graph
from torchq.modules.tracing import Leaf

_NAMES = ("src", "mask", "src_key_padding_mask", "is_causal")

SKIPPED = "skipped_padding"
"""The attribute of an nn.TransformerEncoder that says what its `use_nested_tensor` was."""


class Int8TransformerEncoder(OneOp, Leaf, nn.TransformerEncoder):
    """An nn.TransformerEncoder with int8 layers, with the same results, in less time where there is padding.

    >>> from torchq import convert
    >>> encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, batch_first=True), 2)
    >>> qencoder, x = convert(encoder.eval()), torch.randn(2, 5, 64)
    >>> padding = torch.tensor([[False] * 5, [False, False, True, True, True]])
    >>> with torch.inference_mode():
    ...     y = qencoder(x, src_key_padding_mask=padding)
    >>> type(qencoder).__name__, y[1, 2:].abs().sum()
    ('Int8TransformerEncoder', tensor(0.))
    """

    @staticmethod
    def adopt(encoder: nn.Module) -> None:
        """Makes an nn.TransformerEncoder itself an Int8TransformerEncoder, if torch would skip padding in it.

        That is what its `use_nested_tensor` says, or said before `prepare_qat` turned torch's own way off. Some layers,
        or parts of them, may be float.
        """
        if type(encoder) is not nn.TransformerEncoder:
            return
        if not vars(encoder).pop(SKIPPED, encoder.use_nested_tensor):
            return
        if all(map(_is_torchs, encoder.layers)) and any(isinstance(part, Int8Module) for part in encoder.modules()):
            encoder.__class__ = Int8TransformerEncoder
            give_number(cast(Int8TransformerEncoder, encoder))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """forward(), in a graph one op where there is padding to skip."""
        y = in_graph(self, args, kwargs) if is_dynamo_compiling() else None
        return super().__call__(*args, **kwargs) if y is None else y

    def places(self, count: int, names: tuple[str, ...], kinds: tuple[int, ...]) -> Places | None:
        """As `OneOp` has it."""
        places = places_of_masks(_NAMES, count, names, kinds)
        if places is None or places.padding is None or places.mask is not None:
            return None
        return places if nobody_looks(self) and self._is_known() else None

    def called_in_graph(self, x: Tensor, mask: Tensor | None, padding: Tensor | None, hinted: bool) -> Any:
        """As `OneOp` has it."""
        y = Int8TransformerEncoder.__call__(self, x, src_key_padding_mask=padding)
        return y if self._may_skip(x) else apart(y)

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """As nn.TransformerEncoder's."""
        if src_key_padding_mask is not None and mask is None and not is_dynamo_compiling() and self._may_skip(src):
            real = _real(src_key_padding_mask, src)
            if real is not None:
                return super().forward(src) if bool(real.all()) else self._without_padding(src, real)
        return super().forward(src, mask, src_key_padding_mask, is_causal)

    def _may_skip(self, src: Tensor) -> bool:
        """Whether the float encoder skips padding in such a call, and nobody looks into the layers."""
        if type(src) is not Tensor or src.dim() != 3 or src.layout != torch.strided or src.is_nested:
            return False
        if gradients.wanted(src):
            return False
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.layers.parameters()):
            return False
        if torch.is_autocast_enabled("cpu") or torch._C._get_tracing_state():
            return False
        return self._is_known()

    def _is_known(self) -> bool:
        """Whether the layers are torch's, which may skip padding, and nobody looks into them."""
        if not torch.backends.mha.get_fastpath_enabled() or _has_any_global_hook():
            return False
        layers = list(self.layers)
        return all(map(_is_torchs, layers)) and nobody_looks(self.layers) and all(map(_as_written, layers))

    def _without_padding(self, src: Tensor, real: Tensor) -> Tensor:
        """Of real rows only; `real` (N, T) says which these are, the first of each sequence."""
        lengths, places = real.sum(dim=1).tolist(), real.flatten().nonzero().squeeze(1)
        rows = src.flatten(0, 1).index_select(0, places)
        for layer in self.layers:
            rows = _run(layer, rows, lengths)
        y = rows.new_zeros(real.numel(), rows.shape[1]).index_copy_(0, places, rows).view(src.shape)
        return y if self.norm is None else self.norm(y)


def _run(layer: nn.TransformerEncoderLayer, rows: Tensor, lengths: list[int]) -> Tensor:
    """nn.TransformerEncoderLayer.forward in eval mode, on the rows of several sequences."""
    if layer.norm_first:
        rows = rows + of_sequences(layer.self_attn, layer.norm1(rows), lengths)
        return rows + _feed_forward(layer, layer.norm2(rows))
    rows = layer.norm1(rows + of_sequences(layer.self_attn, rows, lengths))
    if isinstance(layer, Int8TransformerEncoderLayer):
        return layer.summed("norm2", layer.linear2, layer.hidden(rows), rows)
    return layer.norm2(rows + _feed_forward(layer, rows))  # type: ignore[no-any-return]


def _feed_forward(layer: nn.TransformerEncoderLayer, rows: Tensor) -> Tensor:
    """In the scope that the layer's own call would open: `linear1` may wait for its activation there."""
    if isinstance(layer, Int8TransformerEncoderLayer):
        return cast(Tensor, layer.linear2(layer.hidden(rows)))
    scope = getattr(layer.linear1, "scope", None)
    with nullcontext() if scope is None else scope.entered(layer):
        return layer._ff_block(rows)


def _is_torchs(layer: nn.Module) -> bool:
    """Whether this is torch's own layer, int8 or not, whose attention sees its keys alone."""
    if type(layer) not in (nn.TransformerEncoderLayer, Int8TransformerEncoderLayer):
        return False
    attention: Any = layer.self_attn
    known = type(attention) in (QuantizedMultiheadAttention, nn.MultiheadAttention)
    return known and attention.bias_k is None and not attention.add_zero_attn


def _as_written(layer: nn.Module) -> bool:
    """Whether `_run` repeats what a call of the layer would do in eval mode."""
    return layer.is_idle() if isinstance(layer, Int8TransformerEncoderLayer) else runs_torchs_code(layer)


def _real(mask: Tensor, src: Tensor) -> Tensor | None:
    """Which rows of src (N, T, E) are real, bool (N, T): the first of each sequence; None where it is not so."""
    if mask.shape != src.shape[:2]:
        return None  # torch's way raises the error
    if mask.dtype == torch.bool:
        real = ~mask
    elif mask.is_floating_point():
        real = mask == 0
        if not bool((real | (mask == -torch.inf)).all()):
            return None  # it does more than to hide keys
    else:
        return None
    return None if bool((real[:, 1:] & ~real[:, :-1]).any()) else real
