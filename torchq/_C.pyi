from collections.abc import Callable
from typing import Any

from torch import Tensor, dtype, nn

MAX_DEPTH: int

class Kernel:
    @property
    def name(self) -> str: ...
    @property
    def needs(self) -> list[str]: ...
    @property
    def tile(self) -> tuple[int, int, int]: ...
    @property
    def runnable(self) -> bool: ...

def table() -> list[Kernel]: ...
def cpu_features() -> list[str]: ...
def is_kernel_name(name: str) -> bool: ...
def known_names() -> list[str]: ...
def active() -> str: ...
def active_attention() -> str: ...
def codes_pay_from() -> int: ...
def forced() -> str | None: ...
def force(name: str | None) -> None: ...
def set_kernel_of_context(function: Callable[[], str | None]) -> None: ...
def ask_for_kernel(yes: bool) -> None: ...
def last_used() -> str | None: ...
def gather_into_huge_pages(data: int, bytes: int) -> None: ...
def call_linear(module: nn.Module, cls: type[nn.Module], x: Tensor, /) -> Tensor: ...
def call_layer_norm(module: nn.Module, cls: type[nn.Module], x: Tensor, /) -> Tensor: ...
def call_rms_norm(
    module: nn.Module,
    cls: type[nn.Module],
    numbers: tuple[str, float | None, float],
    x: Tensor,
    /,
) -> Tensor: ...
def call_residual(
    module: nn.Module,
    cls: type[nn.Module],
    calls: tuple[str, ...],
    norm: str | None,
    kinds: tuple[type[nn.Module], type[nn.Module], tuple[type[nn.Module], ...]],
    x: Tensor,
    residual: Tensor,
    /,
) -> Tensor: ...
def call_sum(
    layer: nn.Module,
    layer_class: type[nn.Module],
    norm: nn.Module,
    norm_class: type[nn.Module],
    x: Tensor,
    residual: Tensor,
    /,
) -> Tensor: ...
def call_sums(
    layer: nn.Module,
    layer_class: type[nn.Module],
    norm: nn.Module | None,
    norm_class: type[nn.Module] | None,
    numbers: tuple[str, float | None, float] | None,
    x: Tensor,
    residual: Tensor,
    /,
) -> tuple[Tensor, ...]: ...
def call_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    heads: int,
    is_causal: bool,
    scale: float | None,
    scheme: int,
    /,
) -> Tensor: ...
def call_rotary(x: Tensor, cos: Tensor, sin: Tensor, /) -> Tensor: ...
def call_heads(
    layers: tuple[nn.Module, ...],
    cls: type[nn.Module],
    x: Tensor,
    size: int,
    cos: Tensor,
    sin: Tensor,
    /,
) -> tuple[Tensor, Tensor, Tensor]: ...
def call_together(layers: tuple[nn.Module, ...], cls: type[nn.Module], x: Tensor, /) -> tuple[Tensor, ...]: ...
def call_convolution(
    own_modes: int,
    x: Tensor,
    packed: Tensor,
    geometry: list[int],
    qparams: list[float] | None,
    out_dtype: dtype,
    channels_last: bool,
    activation: int,
    residual: Tensor | None,
    /,
) -> Tensor: ...
def call_convolutions(
    own_modes: int,
    x: Tensor,
    steps: tuple[tuple[object, ...], ...],
    residual: Tensor | None,
    channels_last: bool,
    /,
) -> Tensor: ...
def call_fused(
    module: nn.Module,
    cls: type[nn.Module],
    x: Tensor,
    codes: tuple[dtype, tuple[float, int]] | None,
    activation: int,
    between: tuple[nn.Module, ...],
    settings: tuple[dict[str, Any], ...],
    reader: nn.Module | None,
    y_qparams: tuple[float, int] | None,
    /,
) -> Tensor: ...
def call_gated(
    gate: nn.Module,
    up: nn.Module,
    cls: type[nn.Module],
    x: Tensor,
    activation: int,
    between: tuple[nn.Module, ...],
    settings: tuple[dict[str, Any], ...],
    /,
) -> Tensor: ...
def call_embedding_sum(
    terms: tuple[tuple[Any, ...], ...],
    norm: nn.Module | None,
    sizes: tuple[int, ...],
    kinds: tuple[type[nn.Module], type[nn.Module], type[nn.Module]],
    /,
) -> Tensor: ...
def call_fine(
    module: nn.Module,
    cls: type[nn.Module],
    x: Tensor,
    activation: int,
    between: tuple[nn.Module, ...],
    settings: tuple[dict[str, Any], ...],
    /,
) -> Tensor: ...
def call_op(module: nn.Module, x: Tensor, linear_dynamic: object, linear_static: object, /) -> Tensor: ...
def begin_linear(module: nn.Module, cls: type[nn.Module], x: Tensor, /) -> object: ...
def end_linear(begun: object, activation: int, /) -> Tensor: ...
def set_simulating(yes: bool, /) -> None: ...
def function_modes() -> int: ...
def is_autocast_enabled() -> bool: ...
def are_as_known(
    parts: tuple[tuple[nn.Module, type[nn.Module], dict[str, Any], bool, dict[str, Any]], ...],
    enter: Callable[..., Any],
    leave: Callable[..., Any],
    /,
) -> bool: ...
def call_cache(cache: Any, k: Tensor, v: Tensor, place: int, others: Any, hands_on: bool, /) -> tuple[Any, Any]: ...
def call_steps(steps: tuple[tuple[Any, ...], ...], values: list[Any], /) -> bool: ...
def lines_of(root: object, others: tuple[object, ...], /) -> object: ...
def fetch_lines(lines: object, /) -> None: ...
def facts_hold(facts: tuple[tuple[object, object, str, object], ...], missing: object, /) -> bool: ...
def computes_as_known(cls: type[nn.Module], /) -> bool: ...
def set_comparison(function: Callable[[type[nn.Module]], tuple[Any, ...] | None], /) -> None: ...
def is_plain(module: nn.Module, cls: type[nn.Module], /, *scopes: Callable[..., Any]) -> bool: ...
def is_plain_eager() -> bool: ...
def is_plain_row(
    module: nn.Module,
    cls: type[nn.Module],
    behind: tuple[nn.Module, ...],
    settings: tuple[dict[str, Any], ...],
    /,
) -> bool: ...
