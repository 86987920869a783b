"""nn.MultiheadAttention as a module type, plain and in its training form."""

import inspect
from collections.abc import Mapping
from typing import Any, cast

from torch import nn
from torch.nn.functional import linear

from torchq.modules.base import Int8Module, Matrix
from torchq.modules.multihead_attention import (
    INPUTS,
    Attending,
    QuantizedMultiheadAttention,
    attended,
    matrices_of,
)
from torchq.modules.qat_parts import QATParts, TrainableParts, TrainedParts

_MASKS = ("key_padding_mask", "attn_mask", "is_causal")
_FORWARD = inspect.signature(nn.MultiheadAttention.forward)


class QATMultiheadAttention(QATParts, Attending):
    """nn.MultiheadAttention in training: the products of its int8 form, with torch's own attention between them.

    The same call, the same parameters. Weights of the attention, dropout and all masks are as in torch.
    """

    def matrix(self, part: str) -> Matrix:
        """One of the four."""
        return matrices_of(self)[part]


class MultiheadAttentionType(TrainableParts):
    """nn.MultiheadAttention, and subclasses that keep its forward."""

    name = "nn.MultiheadAttention"
    attends = True
    form = QATMultiheadAttention

    def matches(self, module: nn.Module) -> bool:
        if not isinstance(module, nn.MultiheadAttention) or isinstance(module, Int8Module):
            return False
        return type(module).forward is nn.MultiheadAttention.forward and "forward" not in vars(module)

    def matrices(self, module: nn.Module) -> dict[str, Matrix]:
        return matrices_of(cast(nn.MultiheadAttention, module))

    def inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments, and for `out_proj` what the heads give: computed here once more, since no module is called."""
        try:
            call = _FORWARD.bind(module, *args, **kwargs).arguments
            read = (call["query"], call["key"], call["value"])
            projected = [linear(x, *self.matrices(module)[part]) for part, x in zip(INPUTS, read, strict=True)]
            masks: dict[str, Any] = {name: call[name] for name in _MASKS if name in call}
            heads, _ = attended(cast(nn.MultiheadAttention, module), *projected, **masks)
        except (TypeError, ValueError, RuntimeError):
            return {}  # the module's own forward will raise the error
        return {**dict(zip(INPUTS, read, strict=True)), "out_proj": heads}

    def become(self, module: nn.Module, parts: Mapping[str, nn.Module]) -> nn.Module:
        return QuantizedMultiheadAttention(cast(nn.MultiheadAttention, module), parts)


class QATMultiheadAttentionType(TrainedParts, MultiheadAttentionType):
    """What `prepare_qat` made of an nn.MultiheadAttention."""
