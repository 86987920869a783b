"""Attention by `torchq.ops.attention`: of int8 modules that attend themselves, and of Hugging Face models.

(Of modules that call torch's function: `sdpa_calls.py`.)

An `OwnAttention`, such as torchq's nn.MultiheadAttention, has a scheme, which says how precisely it is computed.

transformers lets a library register an attention function under a name, and a model choose it by its config
(`AttentionInterface`, `AttentionMaskInterface`). A converted model's config says "torchq". Each of its modules that
asks the registry has an `AttentionScheme`, which says how precisely it is computed. The original model keeps "sdpa".
"""

import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from torchq import _C, kernels, ops
from torchq.modules import gradients
from torchq.modules.attention_code import REGISTRY
from torchq.modules.base import Int8Module
from torchq.modules.plain_code import forward_of
from torchq.numerics.metrics import decibels, energies
from torchq.scopes import Scoped

NAME = "torchq"
"""What the config of a converted model says."""

SDPA = "sdpa"
"""The attention that torchq takes the place of: what it computes is the same. "eager" may be asked for its weights."""


class OwnAttention(Int8Module):
    """An int8 module that computes attention itself, by the scheme that the plan gives it."""

    scheme: str = SDPA
    """Of `torchq.ops.attention`; "sdpa" leaves it to torch."""


class AttentionScheme:
    """What an attention module of a converted model computes with: its attribute `torchq_attention`.

    A process that unpickles one can run the model: that registers torchq's function with transformers.

    >>> AttentionScheme("float32")
    AttentionScheme('float32')
    """

    def __init__(self, scheme: str) -> None:
        self.scheme = scheme

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        register()

    def __repr__(self) -> str:
        return f"AttentionScheme({self.scheme!r})"


def register() -> None:
    """Gives transformers the function and its masks. Nothing changes for models that do not ask for them."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def asks_the_registry(module: nn.Module) -> bool:
    """Whether a module asks transformers' registry for its "sdpa": that is read from the names that its forward uses.

    A modeling file that has an "sdpa" of its own is left alone.
    """
    if "transformers" not in sys.modules:
        return False
    if getattr(getattr(module, "config", None), "_attn_implementation_internal", None) not in (SDPA, NAME):
        return False
    forward: Any = inspect.unwrap(forward_of(type(module)))
    if REGISTRY not in getattr(getattr(forward, "__code__", None), "co_names", ()):
        return False
    try:
        return forward.__globals__[REGISTRY][SDPA] is _sdpa()
    except (ImportError, KeyError, TypeError):  # another version of transformers, or a registry of another kind
        return False


def attends(module: nn.Module) -> bool:
    """Whether a module of transformers has a scheme: its attention is torchq's."""
    return "torchq_attention" in vars(module)


# ---- The function ---------------------------------------------------------------------------------------------------


class AttentionErrors:
    """Compares schemes with float32 on the calls of some runs: signal and noise of each, by module and scheme.

    The schemes are those that pay for a module's keys, the most of its calls so far.
    """

    def __init__(self) -> None:
        self._keys: dict[int, int] = {}  # by module
        self._sums: dict[tuple[int, str], Tensor] = {}
        self._caller: nn.Module | None = None

    @contextmanager
    def called_by(self, module: nn.Module) -> Iterator[None]:
        """Inside, this module's code is what calls an attention that doesn't know its module."""
        outer, self._caller = self._caller, module
        try:
            yield
        finally:
            self._caller = outer

    def note(self, module: nn.Module | None, exact: Tensor, arguments: Mapping[str, Any]) -> None:
        """Computes one call by each scheme: of this module, or of the one whose code runs."""
        module = self._caller if module is None else module
        keys = self._keys[id(module)] = max(arguments["k"].shape[-2], self._keys.get(id(module), 0))
        for scheme in kernels.attention_schemes(keys):
            found = energies(exact, ops.attention(**arguments, scheme=scheme))
            key = (id(module), scheme)
            self._sums[key] = found if key not in self._sums else self._sums[key] + found

    def was_called(self, module: nn.Module) -> bool:
        """Whether any call was noted."""
        return id(module) in self._keys

    def sqnr_db(self, module: nn.Module) -> dict[str, float]:
        """SQNR of the module's output under each scheme that pays, the fastest first; empty where it was never called.

        A scheme that only the longest calls were computed by is judged by these.
        """
        schemes = kernels.attention_schemes(self._keys[id(module)]) if self.was_called(module) else ()
        return {scheme: decibels(self._sums[id(module), scheme]) for scheme in schemes}


_measured_anywhere = False  # in any thread


def _set_measured_anywhere(yes: bool) -> None:
    global _measured_anywhere
    _measured_anywhere = yes


_measuring: Scoped[AttentionErrors] = Scoped("measuring attention", _set_measured_anywhere)


@contextmanager
def measuring(errors: AttentionErrors) -> Iterator[None]:
    """Inside, in this thread, attention is computed in float32, and every call's error under each scheme noted."""
    with _measuring.of(errors):
        yield


def noted_by() -> AttentionErrors | None:
    """What this thread's calls are noted by, while it measures."""
    return None if is_dynamo_compiling() or not _measured_anywhere else _measuring.get()


def attend(module: nn.Module | None, scheme: str, arguments: dict[str, Any]) -> Tensor:
    """`ops.attention` with these arguments, for this module; the one place that sees them while they are measured.

    None is the module whose code runs (`AttentionErrors.called_by`).
    """
    errors = noted_by()
    y = ops.attention(**arguments, scheme=scheme if errors is None else "float32")
    if errors is not None:
        errors.note(module, y, arguments)
    return y


def attend_directly(
    scheme: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    heads: int = 0,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Any:
    """The same in a plain eager call, past the dispatcher; NotImplemented where it takes more than that.

    Of q, k and v (B, H, L, D) it is (B, L, H, D), and of (B, L, H · D), with `heads` of them, the same.
    """
    if is_dynamo_compiling() or _measured_anywhere:
        return NotImplemented
    return _C.call_attention(q, k, v, mask, heads, is_causal, scale, ops.SCHEME_NUMBERS[scheme])


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: query (B, H, L, D), key and value (B, G, S, D), to (B, L, H, D).

    Dropout, gradients, position biases and whatever else is not plain inference go to transformers' own sdpa. So do
    several dtypes: under autocast, angles in float32 give such queries and keys beside values in bfloat16.
    """
    state = getattr(module, "torchq_attention", None)
    special = dropout > 0 or any(kwargs.get(each) is not None for each in ("softcap", "position_bias"))
    wanted = any(map(gradients.wanted, (query, key, value)))
    mixed = not query.dtype == key.dtype == value.dtype
    if state is None or special or wanted or mixed or kwargs.get("output_attentions"):
        more = {**kwargs, "dropout": dropout, "scaling": scaling, "is_causal": is_causal}
        return _sdpa()(module, query, key, value, attention_mask, **more)  # type: ignore[no-any-return]
    rows, keys = query.shape[2], key.shape[2]
    causal = is_causal_call(module, is_causal, attention_mask, rows)
    if causal and keys > rows:  # an empty cache of fixed length: what is not filled yet lies behind
        key, value = key[:, :, :rows], value[:, :, :rows]
    more = {"mask": attention_mask, "is_causal": causal, "scale": scaling}
    direct = attend_directly(state.scheme, query, key, value, **more)
    if direct is not NotImplemented:
        return direct, None
    arguments: dict[str, Any] = {
        "q": query,
        "k": key,
        "v": value,
        **more,
    }
    y = attend(module, state.scheme, arguments)
    return y.transpose(1, 2).contiguous(), None


def is_causal_call(module: nn.Module, is_causal: bool | None, mask: Tensor | None, rows: int) -> bool:
    """Whether a row of such a call sees no key behind it."""
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    return bool(is_causal) and mask is None and rows > 1


def _sdpa() -> Any:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward
