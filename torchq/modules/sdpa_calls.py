"""Modules that call torch's `scaled_dot_product_attention` in their own code, with torchq's attention in its place.

timm's and nanoGPT's attention are such modules, and many more. In a converted model they become instances of a form
(`straight_forms.py`), whose methods run the user's code with other globals (`sdpa_code.py`), or, where torch.compile
traces, the user's code in a mode that takes the call. What torchq's attention does not compute as torch's does, torch's
own computes: gradients, dropout, autocast, other devices and dtypes, operands that don't fit.
"""

import functools
import inspect
import types
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.overrides import TorchFunctionMode, has_torch_function

from torchq import _C
from torchq.modules import gradients
from torchq.modules.attention import attend, attend_directly, noted_by
from torchq.modules.sdpa_code import SDPA, names_of_sdpa, with_other_sdpa
from torchq.modules.straight import is_usual
from torchq.modules.straight_forms import Form, become, may_become
from torchq.modules.tracing import exporting
from torchq.ops import ATTENTION_SCHEMES, MAX_DEPTH


class SdpaCode(NamedTuple):
    """The methods of a class that call torch's attention."""

    methods: tuple[str, ...]

    def attributes(self) -> tuple[str, ...]:
        """The names that its code looks up in the module."""
        return self.methods


@functools.lru_cache(maxsize=1024)
def sdpa_code_of(kind: Any) -> SdpaCode | None:
    """Which methods of a class call torch's attention; None if none does, or the class would notice a form."""
    if kind.__module__.split(".")[0] in ("torch", "torchq") or not is_usual(kind):
        return None
    found = {name: inspect.getattr_static(kind, name) for each in _of_the_user(kind) for name in vars(each)}
    methods = tuple(
        name
        for name, value in found.items()
        if isinstance(value, types.FunctionType) and not name.startswith("__") and names_of_sdpa(value)
    )
    return SdpaCode(methods) if methods else None


def _of_the_user(kind: type[nn.Module]) -> list[type]:
    return [each for each in kind.__mro__ if each not in nn.Module.__mro__]


class SdpaCalls(Form):
    """A module whose methods call torchq's attention, by a scheme of `torchq.ops.attention`."""

    line: SdpaCode  # type: ignore[assignment]
    reads = staticmethod(sdpa_code_of)  # type: ignore[assignment]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """The form of a class has a method for each that calls torch's."""
        super().__init_subclass__(**kwargs)
        for name in cls.line.methods if "original" in vars(cls) else ():
            setattr(cls, name, _attending(name, cls))

    @staticmethod
    def adopt(module: nn.Module, scheme: str) -> None:
        """Makes a module that `calls_sdpa` compute by this scheme."""
        kind: Any = type(module)  # for mypy, a class of torch has no hash
        code = sdpa_code_of(kind)
        if not _is_form(module) and code is not None:
            become(SdpaCalls, module, code)
        module.__dict__[_SCHEME] = scheme


_SCHEME = "_torchq_scheme"


def calls_sdpa(module: nn.Module) -> bool:
    """Whether a module calls torch's attention in its code, or is a form of one that does."""
    kind: Any = type(module)
    code = sdpa_code_of(kind)
    if _is_form(module) or code is None:
        return _is_form(module)
    return vars(module).keys().isdisjoint(code.methods) and may_become(SdpaCalls, module)


def release(module: nn.Module) -> None:
    """Gives an SdpaCalls its own class back."""
    if _is_form(module):
        kind: Any = type(module)
        object.__setattr__(module, "__class__", kind.original)
        del module.__dict__[_SCHEME]


def _is_form(module: nn.Module) -> bool:
    """Whether its class is the form itself, and none that somebody has derived from it."""
    return isinstance(module, SdpaCalls) and "original" in vars(type(module))


def _attending(name: str, form: type[SdpaCalls]) -> Callable[..., Any]:
    """The method that the user's class has now under this name, with torchq's attention."""

    @functools.wraps(getattr(form.original, name))
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        scheme = self.__dict__.get(_SCHEME)
        if scheme is None:  # of a class that somebody has derived from the form
            return getattr(form.original, name)(self, *args, **kwargs)
        if is_dynamo_compiling():  # it knows no method of super()
            with _TAKING_CALLS[scheme]:
                return getattr(self.original, name)(self, *args, **kwargs)
        bound = getattr(super(form, self), name)
        function = getattr(bound, "__func__", None)
        if type(function) is not types.FunctionType:
            return bound(*args, **kwargs)
        function = with_other_sdpa(function, _attention_by(scheme))
        errors = noted_by()
        with nullcontext() if errors is None else errors.called_by(self):
            return function(self, *args, **kwargs)

    return method


class _TakingCalls(TorchFunctionMode):
    """Inside, in what Dynamo traces, torch's attention is torchq's. The graph has the op and no mode."""

    def __init__(self, scheme: str) -> None:
        super().__init__()
        self.scheme = scheme

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the function, or torchq's attention."""
        if func is SDPA:
            return _attend(self.scheme, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


_TAKING_CALLS = {scheme: _TakingCalls(scheme) for scheme in ATTENTION_SCHEMES}  # to make one would be a side effect


# ---- The function ---------------------------------------------------------------------------------------------------


@functools.cache
def _attention_by(scheme: str) -> Callable[..., Tensor]:
    return functools.partial(_attend, scheme)


def _attend(
    scheme: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What torch's function of these arguments gives, as it lies in memory: code may make views of it."""
    tensors = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
    plain = dropout_p == 0 and type(is_causal) is bool and not (is_causal and attn_mask is not None)
    plain = plain and (scale is None or type(scale) in (int, float)) and _are_plain(tensors)
    if not plain or not _fit(tensors, scheme, grouped=enable_gqa):
        return SDPA(  # type: ignore[no-any-return]
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    q, k, v = (x.unsqueeze(0) if x.dim() == 3 else x for x in (query, key, value))
    mask = attn_mask
    while mask is not None and mask.dim() < 4:
        mask = mask.unsqueeze(0)
    more: dict[str, Any] = {"mask": mask, "is_causal": is_causal, "scale": None if scale is None else float(scale)}
    fused = _is_fused(tensors) and (enable_gqa or query.shape[1] == key.shape[1])
    y: Any = NotImplemented
    if not fused or _has_rows_of_heads(q):
        y = attend_directly(scheme, q, k, v, **more)
    y = attend(None, scheme, {"q": q, "k": k, "v": v, **more}) if y is NotImplemented else y.transpose(1, 2)
    if not fused:
        y = y.contiguous()
    elif q.stride(0) < max(q.stride(1), q.stride(2)) and q.shape[0] > 1:
        y = torch.empty_like(q).copy_(y)
    return y.squeeze(0) if query.dim() == 3 else y  # type: ignore[no-any-return]


def _are_plain(tensors: tuple[Any, ...]) -> bool:
    """Whether these are dense tensors of the CPU, in a call that nothing else has a part in."""
    if not (is_dynamo_compiling() or exporting()) and _is_seen(tensors):
        return False
    if not all(isinstance(x, Tensor) for x in tensors):
        return False
    if any(x.device.type != "cpu" or x.layout != torch.strided or x.is_nested for x in tensors):
        return False
    return not torch.is_autocast_enabled("cpu") and not any(map(gradients.wanted, tensors))


def _is_seen(tensors: tuple[Any, ...]) -> bool:
    """Whether a class or a mode of somebody else has a part in what is done with the tensors."""
    if not has_torch_function(tensors):
        return False
    return _C.function_modes() != 0 or any(type(x) not in (Tensor, nn.Parameter) for x in tensors)


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _fit(tensors: tuple[Tensor, ...], scheme: str, *, grouped: bool) -> bool:
    """Whether shapes and dtypes are those of `ops.attention`, and mean the same there: (..., H, L, D) each."""
    q, k, v, *masks = tensors
    same = q.dtype == k.dtype == v.dtype and q.dim() == k.dim() == v.dim() in (3, 4)
    if not same or q.dtype not in _DTYPES or 0 in (*q.shape, *k.shape, *v.shape):
        return False
    *batch, rows, depth = q.shape
    keys = k.shape[-2]
    if k.shape[:-1] != v.shape[:-1] or k.shape[-1] != depth or (scheme == "int8" and keys > MAX_DEPTH):
        return False
    if batch != list(k.shape[:-2]) and not (q.dim() == 4 and batch[0] == k.shape[0] and _shares(q, k, grouped=grouped)):
        return False
    sizes = (*batch, rows, keys)
    return all(_is_mask(each, q.dtype, sizes) for each in masks)


def _shares(q: Tensor, k: Tensor, *, grouped: bool) -> bool:
    """Whether heads of k serve several of q each: where that is asked for, or one serves all: torch broadcasts it."""
    return q.shape[1] % k.shape[1] == 0 if grouped else k.shape[1] == 1


def _is_mask(mask: Tensor, dtype: torch.dtype, sizes: tuple[int, ...]) -> bool:
    if mask.dtype not in (torch.bool, torch.float32, dtype) or mask.dim() > len(sizes):
        return False
    return all(own in (1, size) for own, size in zip(reversed(mask.shape), reversed(sizes), strict=False))


def _is_fused(tensors: tuple[Tensor, ...]) -> bool:
    """Whether torch has a fused kernel for these, which gives a tensor that lies as q does. Else it is contiguous."""
    q, _, v, *masks = tensors
    last = all(x.stride(-1) == 1 for x in tensors[:3]) and all(mask.dim() != 3 for mask in masks)
    return q.dim() == 4 and q.shape[-1] == v.shape[-1] and last


def _has_rows_of_heads(q: Tensor) -> bool:
    """Whether q (B, H, L, D) lies as (B, L, H, D) in memory, but for the batch."""
    return 1 in q.shape[1:3] or q.stride(1) < q.stride(2)
