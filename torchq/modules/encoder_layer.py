"""Int8TransformerEncoderLayer: an nn.TransformerEncoderLayer in a few calls.

torch's own layer asks all its weights and children each time whether a fused float kernel may run, and calls ten
modules with views and sums between them. Here a call is three products, the attention, and two products with what
follows: `norm1(out_proj(heads) + x)` and `norm2(linear2(act(linear1(x))) + x)`, computed while its rows are in L2.
Wherever anybody could see a difference (hooks, training, tracing, a child, a forward or an activation that was
replaced), torch's code runs.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.nn.functional import _canonical_mask, _none_or_dtype
from torch.nn.modules.transformer import _detect_is_causal_mask

from torchq import _C
from torchq.modules.classes import computes_as_known, know
from torchq.modules.folding import IDLE
from torchq.modules.int8_sequential import settings_of
from torchq.modules.layer_norm import LayerNorm
from torchq.modules.multihead_attention import QuantizedMultiheadAttention, attended
from torchq.modules.one_op import FALSE, SOME, OneOp, Places, apart, give_number, in_graph
from torchq.modules.pending import Scope
from torchq.modules.quantized_linear import QuantizedLinear
from torchq.modules.tracing import Leaf
from torchq.ops import Activation

_METHODS = ("forward", "_sa_block", "_ff_block")
_IDLE = ("dropout", "dropout1", "dropout2")
_NAMES = ("src", "src_mask", "src_key_padding_mask", "is_causal")
_MASKS = {*_NAMES[1:]}


class Int8TransformerEncoderLayer(OneOp, Leaf, nn.TransformerEncoderLayer):
    """An nn.TransformerEncoderLayer with int8 layers, with the same results, in less time.

    >>> from torchq import convert
    >>> layer = convert(nn.TransformerEncoderLayer(64, 4, batch_first=True).eval())
    >>> x = torch.randn(2, 5, 64)
    >>> with torch.inference_mode():
    ...     torch.equal(layer(x), nn.TransformerEncoderLayer.forward(layer, x))
    True
    """

    # The activation, which of ours it is, settings of the children, whether sums fuse.
    _known: tuple[Any, int, tuple[dict[str, Any], ...], bool]

    @staticmethod
    def adopt(layer: nn.Module, *, sums: bool) -> None:
        """Makes an nn.TransformerEncoderLayer itself an Int8TransformerEncoderLayer, if its parts are in int8.

        That is where the plan folds its activation into `linear1`. `sums`: whether norms are computed with the layers
        before them.
        """
        if type(layer) is not nn.TransformerEncoderLayer or type(layer.self_attn) is not QuantizedMultiheadAttention:
            return
        first: Any = layer.linear1
        if type(first) is not QuantizedLinear or first.fold.activation == Activation.NONE:
            return
        layer.__class__ = Int8TransformerEncoderLayer
        settings: tuple[dict[str, Any], ...] = ({},) * (1 + len(_IDLE))
        if isinstance(layer.activation, nn.Module):
            settings += (settings_of(layer.activation),)
        layer.__dict__["_known"] = (layer.activation, first.fold.activation, settings, sums)
        give_number(cast(Int8TransformerEncoderLayer, layer))

    def computes(self, layer: nn.Module) -> bool:
        """Whether the activation behind this child is computed with it."""
        return layer is self.linear1

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """forward(), in fewer calls where that is all that happens."""
        if is_dynamo_compiling():
            y = in_graph(self, args, kwargs)
            return super().__call__(*args, **kwargs) if y is None else y
        if len(args) != 1 or not kwargs.keys() <= _MASKS or not self._may_run(args[0]):
            return super().__call__(*args, **kwargs)
        return self._run(args[0], **kwargs)

    def places(self, count: int, names: tuple[str, ...], kinds: tuple[int, ...]) -> Places | None:
        """As `OneOp` has it."""
        places = places_of_masks(_NAMES, count, names, kinds) if count == 1 else None  # as in `__call__`
        return places if places is not None and self._is_known() and nobody_looks(self) else None

    def called_in_graph(self, x: Tensor, mask: Tensor | None, padding: Tensor | None, hinted: bool) -> Any:
        """As `OneOp` has it."""
        is_causal = hinted and _detect_is_causal_mask(mask, None, x.shape[1])
        if self._may_run(x):
            return self._run(x, mask, padding, is_causal)
        masks = {"src_mask": mask, "src_key_padding_mask": padding, "is_causal": is_causal}
        return apart(Int8TransformerEncoderLayer.__call__(self, x, **masks))

    def _may_run(self, src: Any) -> bool:
        """Whether such a call is a plain one, and of torch's code."""
        if type(src) is not Tensor or src.dim() != 3 or src.layout != torch.strided or src.is_nested:
            return False
        return self._is_known() and src.shape[-1] == self.self_attn.embed_dim and not torch._C._get_tracing_state()

    def _is_known(self) -> bool:
        """Whether it has torch's attention in eval mode, and is idle beside that."""
        attention = self.__dict__["_modules"]["self_attn"]
        if type(attention) is not QuantizedMultiheadAttention or attention.training or not attention.batch_first:
            return False
        return self.is_idle()

    def is_idle(self) -> bool:
        """Whether nothing but torch's own arithmetic happens in a call, in eval mode."""
        state = self.__dict__
        children, (activation, _, settings, _) = state["_modules"], state["_known"]
        idle = tuple(map(children.get, _IDLE))
        if not runs_torchs_code(self):
            return False
        if isinstance(activation, nn.Module):
            behind = (children.get("self_attn"), *idle, activation)
            same = children.get("activation") is activation and "activation" not in state
        else:
            behind = (children.get("self_attn"), *idle)
            same = state.get("activation") is activation
        return same and _C.is_plain_row(self, Int8TransformerEncoderLayer, behind, settings)

    def _run(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        masks: dict[str, Any] = {}
        if src_mask is not None or src_key_padding_mask is not None or is_causal:
            masks = _as_torch_has_them(src, src_mask, src_key_padding_mask, is_causal)
        if self.norm_first:
            x = src + self.self_attn.out_proj(self._heads(self.norm1(src), masks))
            return x + self.linear2(self.hidden(self.norm2(x)))  # type: ignore[no-any-return]
        x = self.summed("norm1", self.self_attn.out_proj, self._heads(src, masks), src)
        return self.summed("norm2", self.linear2, self.hidden(x), x)

    def _heads(self, x: Tensor, masks: dict[str, Any]) -> Tensor:
        """What the attention's `out_proj` multiplies."""
        attention = cast(QuantizedMultiheadAttention, self.self_attn)
        return attended(attention, *attention.projected(x, x, x), **masks)[0]

    def hidden(self, x: Tensor) -> Tensor:
        """`act(linear1(x))`, as one product if that may be."""
        first: Any = self.linear1
        kind = self._known[1]
        if type(first) is QuantizedLinear and first.fold.activation == kind:  # another layer may stand there now
            y = _C.call_fused(first, QuantizedLinear, x, None, kind, (), (), None, None)
            if y is not NotImplemented:
                return y
        activated: Tensor = self.activation(first(x))
        return activated

    def summed(self, norm: str, layer: nn.Module, x: Tensor, residual: Tensor) -> Tensor:
        """`norm(layer(x) + residual)`, as one product if that may be."""
        module: Any = getattr(self, norm)
        if self._known[3]:
            y = _C.call_sum(layer, QuantizedLinear, module, LayerNorm, x, residual)
            if y is not NotImplemented:
                return y
        normed: Tensor = module(residual + layer(x))
        return normed


def runs_torchs_code(layer: nn.Module) -> bool:
    """Whether the methods of a layer are those of nn.TransformerEncoderLayer, and its dropouts return their input."""
    state = layer.__dict__
    children = state["_modules"]
    if not all(type(children.get(name)) in IDLE for name in _IDLE) or not state.keys().isdisjoint(_METHODS):
        return False
    return computes_as_known(type(layer))


def nobody_looks(module: nn.Module) -> bool:
    """Whether a call of each module in this one is its forward in eval mode, and nothing else."""
    return all(map(_is_idle, module.modules()))


def _is_idle(module: nn.Module) -> bool:
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    ours = all(isinstance(getattr(hook, "__self__", None), Scope) for hook in hooks)
    own = "forward" not in vars(module) and computes_as_known(type(module))
    return ours and own and not module.training


def places_of_masks(own: tuple[str, ...], count: int, names: tuple[str, ...], kinds: tuple[int, ...]) -> Places | None:
    """Which arguments of a call are what; `own` are the input, its masks, and whether that is causal."""
    given = (*own[:count], *names)
    if len(given) != len(kinds) or len({*given}) != len(given) or not {*given} <= {*own}:
        return None
    kind = dict(zip(given, kinds, strict=True))
    at = {name: given.index(name) for name in given if kind[name] == SOME}
    hinted = own[3] in at
    if own[0] not in at or (hinted and own[1] not in at) or FALSE in (kind.get(name) for name in own[:3]):
        return None
    return Places(at[own[0]], at.get(own[1]), at.get(own[2]), hinted=hinted, pair=False)


for _kind in (nn.TransformerEncoderLayer, Int8TransformerEncoderLayer):
    know(_kind, _METHODS)


def _as_torch_has_them(src: Tensor, mask: Tensor | None, padding: Tensor | None, is_causal: bool) -> dict[str, Any]:
    """Masks as nn.TransformerEncoderLayer.forward hands them on."""
    padding = _canonical_mask(
        mask=padding,
        mask_name="src_key_padding_mask",
        other_type=_none_or_dtype(mask),
        other_name="src_mask",
        target_type=src.dtype,
    )
    mask = _canonical_mask(
        mask=mask, mask_name="src_mask", other_type=None, other_name="", target_type=src.dtype, check_other=False
    )
    return {"attn_mask": mask, "key_padding_mask": padding, "is_causal": is_causal}
