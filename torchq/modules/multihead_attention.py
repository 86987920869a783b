"""nn.MultiheadAttention in int8, and what lies between its matrices.

Its matrices are four, `q_proj`, `k_proj`, `v_proj` and `out_proj`, also where the float module stores the first three
in one parameter: query, key and value may be three inputs, and so each has a range and a channel scale of its own.
Between them lies the attention itself, by a scheme of `torchq.ops.attention` if the plan gives it one. torch's fused
kernels read weights directly. They are never taken, since the int8 module has a forward of its own.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.nn.functional import dropout, linear, pad, scaled_dot_product_attention

from torchq.modules import gradients
from torchq.modules.attention import SDPA, OwnAttention, attend, attend_directly
from torchq.modules.attention_weights import AttentionWeights, Form, weights_of
from torchq.modules.base import Int8Module, Matrix, float_size
from torchq.modules.float_view import FloatView, read_only
from torchq.modules.quantized_linear import products
from torchq.modules.refusals import refuse_layout
from torchq.modules.tracing import Leaf

INPUTS = ("q_proj", "k_proj", "v_proj")
_FLOAT_NAMES = ("in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class Attending(nn.MultiheadAttention):
    """The forward of an nn.MultiheadAttention whose four products are called one by one."""

    def multiplied(self, part: str, x: Tensor) -> Tensor:
        """The product of x with this matrix."""
        raise NotImplementedError(f"{type(self).__name__} has no products")

    def projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """The products of the three inputs."""
        return tuple([self.multiplied(part, x) for part, x in zip(INPUTS, (query, key, value), strict=True)])

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As that of nn.MultiheadAttention.

        The weights are computed when something reads them, where the plan gives the attention a scheme. Then a row that
        no key is left for gives 0 as without them; its weights are NaN.

        Raises:
            TypeError: a mask that is neither bool nor float, or an input that is nested, sparse or uint8.
            ValueError: shapes that don't go together, or `is_causal` without an `attn_mask`.
        """
        self._check(query, key, value)
        heads, weights = attended(
            self,
            *self.projected(query, key, value),
            key_padding_mask=key_padding_mask,
            attn_mask=attn_mask,
            is_causal=is_causal,
            weights=Form(average_attn_weights, batched=query.dim() == 3) if need_weights else None,
        )
        y = self.multiplied("out_proj", heads)
        if query.dim() == 2:
            return y.squeeze(0), weights
        return y if self.batch_first else y.transpose(0, 1), weights

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        widths = {"query": (query, self.embed_dim), "key": (key, self.kdim), "value": (value, self.vdim)}
        for name, (x, width) in widths.items():
            if x.is_nested or x.layout != torch.strided:
                refuse_layout(x)
            if x.dim() not in (2, 3) or x.dim() != query.dim() or x.shape[-1] != width:
                same = "" if x is query else ", with as many dimensions as query"
                raise _error(
                    f"{name} must be (length, {width}) or have a batch dimension beside the length{same}, got "
                    f"{tuple(x.shape)}"
                )
        batch = (0 if self.batch_first else 1) if query.dim() == 3 else None
        if key.shape[:-1] != value.shape[:-1] or (batch is not None and key.shape[batch] != query.shape[batch]):
            raise _error(
                "key and value must have the same length, and the batch size of query, got query "
                f"{tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}, batch_first="
                f"{self.batch_first}"
            )


class QuantizedMultiheadAttention(Leaf, OwnAttention, Attending):
    """nn.MultiheadAttention in int8: the same call, the same attributes, the same results to the error of int8.

    It is an nn.MultiheadAttention to whoever asks. `in_proj_weight` and the like are read-only float views of what the
    four layers hold. Dropout acts in training mode, as in torch.

    Args:
        attention: the float module.
        parts: a QuantizedLinear, or an nn.Linear that stays in float, for `q_proj`, `k_proj`, `v_proj` and `out_proj`.

    >>> from torchq import convert
    >>> attention = convert(nn.MultiheadAttention(64, 4, batch_first=True).eval())
    >>> x = torch.randn(2, 5, 64)
    >>> y, weights = attention(x, x, x)
    >>> y.shape, weights.shape, attention.in_proj_weight.shape
    (torch.Size([2, 5, 64]), torch.Size([2, 5, 5]), torch.Size([192, 64]))
    """

    def __init__(self, attention: nn.MultiheadAttention, parts: Mapping[str, nn.Module]) -> None:
        nn.Module.__init__(self)
        for name in ("embed_dim", "kdim", "vdim", "_qkv_same_embed_dim", "num_heads", "head_dim"):
            setattr(self, name, getattr(attention, name))
        self.dropout, self.batch_first = attention.dropout, attention.batch_first
        self.add_zero_attn = attention.add_zero_attn
        self.bias_k, self.bias_v = copy.deepcopy(attention.bias_k), copy.deepcopy(attention.bias_v)
        self.q_proj, self.k_proj, self.v_proj = (parts[name] for name in INPUTS)
        self.out_proj = parts["out_proj"]  # type: ignore[assignment]

    def multiplied(self, part: str, x: Tensor) -> Tensor:
        """The product of x with this matrix."""
        return getattr(self, part)(x)  # type: ignore[no-any-return]

    def projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """The products of the three inputs. Of those that are one tensor, the codes are made once."""
        q, k, v = self._projections()
        if query is key is value:
            return products((q, k, v), query)
        return (q(query), *products((k, v), key)) if key is value else (q(query), k(key), v(value))

    # ---- What foreign code reads -------------------------------------------------------------------------------------

    @property
    def in_proj_weight(self) -> Tensor | None:  # type: ignore[override]
        """The weights of q, k and v in one, (3 · embed_dim, embed_dim), read only; None if they differ in size."""
        return self._joined("weight") if self._qkv_same_embed_dim else None

    @property
    def in_proj_bias(self) -> Tensor | None:  # type: ignore[override]
        """The biases of q, k and v in one, (3 · embed_dim,), read only; None without."""
        return None if all(part.bias is None for part in self._projections()) else self._joined("bias")

    @property
    def q_proj_weight(self) -> Any:  # type: ignore[override]
        """The weight of q, read only; None where `in_proj_weight` has it."""
        return self._alone(self.q_proj)

    @property
    def k_proj_weight(self) -> Any:  # type: ignore[override]
        """The weight of k, read only; None where `in_proj_weight` has it."""
        return self._alone(self.k_proj)

    @property
    def v_proj_weight(self) -> Any:  # type: ignore[override]
        """The weight of v, read only; None where `in_proj_weight` has it."""
        return self._alone(self.v_proj)

    def _alone(self, part: nn.Module) -> Any:
        return None if self._qkv_same_embed_dim else part.weight

    def _projections(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        return self.q_proj, self.k_proj, self.v_proj

    def _joined(self, name: str) -> Tensor:
        def make() -> Tensor:
            none = torch.zeros(self.embed_dim, dtype=dtype, device=device)  # rounding may have given some a bias
            found = [getattr(part, name) for part in self._projections()]
            return torch.cat([none if each is None else each for each in found])

        weight = cast(Tensor, self.q_proj.weight)
        dtype, device = weight.dtype, weight.device
        if is_dynamo_compiling():  # which can't trace a tensor subclass
            return make()
        form = (3 * self.embed_dim, self.embed_dim)[: 2 if name == "weight" else 1]
        return FloatView(make, torch.empty(form, dtype=dtype, device="meta"), device)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _FLOAT_NAMES:
            raise read_only(name)
        super().__setattr__(name, value)

    @property
    def float_bytes(self) -> int:
        """The bytes of all weights and biases in the dtype of the float module."""
        parts = (*self._projections(), self.out_proj)
        sizes = [part.float_bytes if isinstance(part, Int8Module) else float_size(part) for part in parts]
        return sum(sizes) + sum(each.nbytes for each in (self.bias_k, self.bias_v) if each is not None)


# ---- Its matrices, and what is between them -------------------------------------------------------------------------


def matrices_of(attention: nn.MultiheadAttention) -> dict[str, Matrix]:
    """Those of a float module, by name."""
    if attention.in_proj_weight is not None:
        weights = attention.in_proj_weight.chunk(3)
    else:
        weights = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
    bias = attention.in_proj_bias
    biases = (None, None, None) if bias is None else bias.chunk(3)
    found = {part: Matrix(*each) for part, *each in zip(INPUTS, weights, biases, strict=True)}
    return {**found, "out_proj": Matrix(attention.out_proj.weight, attention.out_proj.bias)}


def attended(
    attention: nn.MultiheadAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    weights: Form | None = None,
) -> tuple[Tensor, Tensor | None]:
    """What `out_proj` multiplies, (N, L, E), and the weights if they are needed.

    Args:
        attention: says how: heads, extra keys, dropout; float or int8.
        q: the projected query, (L, E), (L, N, E) or, with `batch_first`, (N, L, E).
        k: the projected key, likewise, of length S.
        v: the projected value, likewise, of length S.
        key_padding_mask: (S,) or (N, S), bool, True for keys to leave out, or float, to be added to the scores.
        attn_mask: (L, S) or (N · H, L, S), likewise.
        is_causal: says that `attn_mask` is the causal mask.
        weights: in which form they are needed; None if not.
    """
    if attn_mask is None and key_padding_mask is None and weights is None and not is_causal:
        direct = _attended_directly(attention, q, k, v)
        if direct is not NotImplemented:
            return direct, None
    q, k, v = (_per_head(attention, x) for x in (q, k, v))
    batch, _, rows, _ = q.shape
    if attn_mask is None and is_causal:
        raise _error("is_causal is a hint that attn_mask is the causal mask, but attn_mask is None. Pass the mask")
    if key_padding_mask is not None:
        key_padding_mask = _added("key_padding_mask", key_padding_mask, q, [(batch, k.shape[2])], (batch, 1, 1, -1))
    if attn_mask is not None:
        told = key_padding_mask is None and weights is None and not is_dynamo_compiling()  # where it depends on values
        is_causal = told and is_causal  # the mask itself says more
        attn_mask = None if is_causal else _attn_mask(attn_mask, q, k.shape[2])
    k, v, extra = _with_extra_keys(attention, k, v)
    masks = [pad(mask, (0, extra)) if extra else mask for mask in (attn_mask, key_padding_mask) if mask is not None]
    mask = None if not masks else masks[0] if len(masks) == 1 else masks[0] + masks[1]
    probability = attention.dropout if attention.training else 0.0
    by_torch = probability > 0 or scheme_of(attention) == SDPA or any(map(gradients.wanted, (q, k, v)))
    returned = None
    if weights is not None and (by_torch or not _may_wait(q)):
        found = weights_of(q, k, mask)
        found = dropout(found, probability) if probability > 0 else found
        y, returned = found @ v, weights.of(found)
    elif by_torch:
        y = scaled_dot_product_attention(q, k, v, mask, probability, is_causal)
    else:
        y = attend(attention, scheme_of(attention), {"q": q, "k": k, "v": v, "mask": mask, "is_causal": is_causal})
        if weights is not None:
            returned = AttentionWeights(q, k, None if mask is None else mask.clone(), weights)
    return y.transpose(1, 2).reshape(batch, rows, attention.embed_dim), returned


def _attended_directly(attention: nn.MultiheadAttention, q: Tensor, k: Tensor, v: Tensor) -> Any:
    """The same without masks, in a plain eager call of int8 attention; NotImplemented for any other."""
    scheme = scheme_of(attention)
    extra = attention.bias_k is not None or attention.add_zero_attn
    if scheme == SDPA or extra or not attention.batch_first or (attention.training and attention.dropout > 0):
        return NotImplemented
    return attend_directly(scheme, q, k, v, heads=attention.num_heads)


def of_sequences(attention: nn.MultiheadAttention, x: Tensor, lengths: Sequence[int]) -> Tensor:
    """Self-attention of sequences of these lengths that lie one behind the other: (rows, E) to (rows, E).

    For calls without gradients, in eval mode, of a float module too. Keys that the module adds are left out.
    """
    if isinstance(attention, QuantizedMultiheadAttention):
        projected = attention.projected(x, x, x)
    else:
        matrices = matrices_of(attention)
        projected = tuple([linear(x, *matrices[part]) for part in INPUTS])
    by_head = [y.unflatten(-1, (attention.num_heads, _size(attention))).split(lengths) for y in projected]
    heads = [_of_sequence(attention, *each) for each in zip(*by_head, strict=True)]
    y: Tensor = attention.out_proj(torch.cat(heads).flatten(1))
    return y


def _of_sequence(attention: nn.MultiheadAttention, *projected: Tensor) -> Tensor:
    """One of them, (L, H, D)."""
    if not len(projected[0]):
        return projected[0]
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in projected)
    if scheme_of(attention) == SDPA:
        y = scaled_dot_product_attention(q, k, v)
    else:
        y = attend(attention, scheme_of(attention), {"q": q, "k": k, "v": v})
    return y.squeeze(0).transpose(0, 1)


def _may_wait(q: Tensor) -> bool:
    """Whether the weights may wait for their reader: in an eager call that nobody traces or watches."""
    if is_dynamo_compiling() or type(q) is not Tensor or torch._C._get_tracing_state():
        return False
    return torch._C._len_torch_dispatch_stack() == 0


def _size(attention: nn.MultiheadAttention) -> int:
    """The columns of a head, which torch's functions take from the number of heads in each call."""
    return int(attention.embed_dim // attention.num_heads)


def scheme_of(attention: nn.MultiheadAttention) -> str:
    """By which scheme it attends; the float module by torch's own."""
    return attention.scheme if isinstance(attention, OwnAttention) else SDPA


def _per_head(attention: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """(N, H, rows, E / H), a view."""
    if x.dim() == 2:
        x = x.unsqueeze(0)
    elif not attention.batch_first:
        x = x.transpose(0, 1)
    heads: Tensor = x.unflatten(-1, (attention.num_heads, _size(attention)))
    return heads.transpose(1, 2)


def _with_extra_keys(attention: nn.MultiheadAttention, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
    """Keys and values with `bias_k`, `bias_v` and a zero behind them, as the module has it, and how many these are."""
    extra = 0
    if attention.bias_k is not None and attention.bias_v is not None:
        form = (1, attention.num_heads, 1, _size(attention))
        both = zip((k, v), (attention.bias_k, attention.bias_v), strict=True)
        k, v = (torch.cat([x, bias.to(x.dtype).view(form).expand(len(x), -1, -1, -1)], dim=2) for x, bias in both)
        extra += 1
    if attention.add_zero_attn:
        k, v = (pad(x, (0, 0, 0, 1)) for x in (k, v))
        extra += 1
    return k, v, extra


def _attn_mask(mask: Tensor, q: Tensor, keys: int) -> Tensor:
    batch, heads, rows, _ = q.shape
    form = (1, 1, rows, keys) if mask.dim() == 2 else (batch, heads, rows, keys)
    return _added("attn_mask", mask, q, [(rows, keys), (batch * heads, rows, keys)], form)


def _added(name: str, mask: Tensor, q: Tensor, shapes: list[tuple[int, ...]], form: tuple[int, ...]) -> Tensor:
    """The mask as numbers that are added to the scores, in this form; `shapes` are those it may have."""
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"nn.MultiheadAttention: {name} must be bool or float, got {mask.dtype}.")
    if len(q) == 1 and mask.dim() == 1 and name == "key_padding_mask":
        mask = mask.unsqueeze(0)
    if tuple(mask.shape) not in shapes:
        expected = " or ".join(map(str, shapes))
        raise _error(f"{name} must be of shape {expected}, got {tuple(mask.shape)}")
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, -math.inf)
    return mask.to(q.dtype).view(form)


def _error(problem: str) -> ValueError:
    return ValueError(f"nn.MultiheadAttention: {problem}.")
