"""The gradient to the input of an int8 layer, which is frozen: weights and bias get none.

The formula is the float layer's, on the weights the layer really has. With `z = x̂ · ŵᵀ + b` before the activation,

    ∂L/∂x = (∂L/∂y ∘ act'(z)) · ŵ        ŵ = weight · weight_scale, in float32, then rounded to x's dtype

Nothing is kept for it but x and the packed weight: z is computed again, in int8, and ŵ unpacked, in the backward pass.

**Straight through.** Rounding x to codes, and y to the codes of the next layer, counts as the identity, inside the
range and outside. The clamp of a static range has the derivative 0 outside, but who asks for a gradient means that of
the model, and the model has no clamp. Measured (docs/design.md): it is nearer to the float model's gradient.

**Codes carry no gradient**, since they are integers. Where one is wanted, a layer that would hand over u8 codes gives
the values that they stand for, `(code - zero_point) · scale` in float32. The next layer makes the same codes of them:
before it is rounded, `value · (1 / scale)` is off by less than 255 · 2⁻²². So y has the bits it has without gradients.

All is made of differentiable parts, z of this very Function, so gradients of gradients are right, and so is the
forward mode (`jvp`).
"""

import sys
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch._functorch import eager_transforms
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling
from torch.fx import Proxy

from torchq.modules.activations import times_slope
from torchq.modules.tracing import exporting
from torchq.numerics.qparams import QParams
from torchq.ops import Activation

_linear_dynamic = torch.ops.torchq.linear_dynamic.default
_linear_static = torch.ops.torchq.linear_static.default
_linear_fine = torch.ops.torchq.linear_fine.default

FINE: Literal["fine"] = "fine"
"""In the place of qparams: a pair for each row, and two codes for each value (`ops.fine`)."""

InputQParams = QParams | Literal["fine"] | None


def wanted(x: Any) -> bool:
    """Whether y must carry a derivative with respect to x.

    Under torch.func always: inside vmap a tensor does not say whether an outer transform differentiates. In programs of
    torch.export and torch.jit never: they are for inference, and hold the ops and codes themselves.
    """
    if isinstance(x, Proxy):  # of torch.fx, for whom a layer is a leaf
        return False
    backward = getattr(x, "requires_grad", False) and torch.is_grad_enabled()
    if not (backward or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0):
        return False
    if not isinstance(x, Tensor) or exporting() or (not is_dynamo_compiling() and torch._C._get_tracing_state()):
        return False
    return x.is_floating_point() and (backward or is_dynamo_compiling() or not _functionalized_only())


def _functionalized_only() -> bool:
    """Whether torch.func.functionalize is active, which knows no autograd.Function, and nothing is differentiated."""
    kinds = {interpreter.key() for interpreter in torch._C._functorch.get_interpreter_stack() or []}
    return TransformType.Functionalize in kinds and not kinds & {TransformType.Grad, TransformType.Jvp}


def linear(
    x: Tensor, packed: Tensor, activation: int, x_qparams: InputQParams, y_qparams: QParams | None, dtype: torch.dtype
) -> Tensor:
    """`ops.linear_dynamic`, with FINE `ops.fine.linear_fine`, or else `ops.linear_static`: with the gradient to x.

    Args:
        x: float (..., K).
        packed: from `ops.pack`.
        activation: an `Activation`.
        x_qparams: of the input; None is dynamic, and so is FINE.
        y_qparams: None, or those of the codes whose values are to be given, in float32.
        dtype: of y without `y_qparams`; where x_qparams is None, that of x.
    """
    if eager_transforms.JVP_NESTING > 1:
        raise NotImplementedError(
            "QuantizedLinear: a forward-mode gradient of a forward-mode gradient (jvp of jvp, jacfwd of jacfwd) is not "
            "supported: torch would leave out a part of it. Let one of them be of reverse mode, as "
            "torch.func.hessian = jacfwd of jacrev does."
        )
    if is_dynamo_compiling() and torch._C._are_functorch_transforms_active():
        torch._dynamo.graph_break(msg="torchq: torch.compile would trace it without its gradient; leave fullgraph out")
    function = _Linear if is_dynamo_compiling() else _ForwardMode
    return function.apply(x, packed, activation, x_qparams, y_qparams, dtype)  # type: ignore[no-any-return]


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """The values of `rounded` with the gradient of x, made of torch's own operations.

    >>> x = torch.tensor([0.3, float("inf")], requires_grad=True)
    >>> straight_through(x, x.round())
    tensor([0., inf], grad_fn=<AddBackward0>)
    """
    return rounded.detach() + (x - x.detach()).nan_to_num()  # inf - inf


def _product(
    x: Tensor, packed: Tensor, activation: int, x_qparams: InputQParams, y_qparams: QParams | None, dtype: torch.dtype
) -> Tensor:
    if isinstance(x_qparams, str):
        return _linear_fine(x.float(), packed, activation).to(dtype)  # type: ignore[no-any-return]
    if x_qparams is None:
        return _linear_dynamic(x, packed, activation)  # type: ignore[no-any-return]
    if y_qparams is None:
        return _linear_static(x, packed, *x_qparams, dtype, 1.0, 0, activation)  # type: ignore[no-any-return]
    codes = _linear_static(x, packed, *x_qparams, torch.uint8, *y_qparams, activation)
    return (codes.int() - y_qparams.zero_point).float() * y_qparams.scale  # type: ignore[no-any-return]


class _Linear(torch.autograd.Function):
    """`linear`: forward the op's own bits, backward the module's formula. For torch.compile, which takes no `jvp`."""

    @staticmethod
    def forward(
        x: Tensor,
        packed: Tensor,
        activation: int,
        x_qparams: InputQParams,
        y_qparams: QParams | None,
        dtype: torch.dtype,
    ) -> Tensor:
        return _product(x, packed, activation, x_qparams, y_qparams, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, packed, ctx.activation, ctx.x_qparams, _, _ = inputs
        ctx.dtype = output.dtype
        ctx.save_for_backward(x, packed)
        ctx.save_for_forward(x, packed)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        x, packed = ctx.saved_tensors
        with torch.autocast("cpu", enabled=False):
            weight, scale, _, channel_scale = torch.ops.torchq.unpack(packed, x.shape[-1])
            dz = _times_slope_at(dy.float(), x, packed, ctx.activation, ctx.x_qparams)
            dx = _scaled(torch.matmul(dz * scale, weight.float()), channel_scale).to(x.dtype)
        return dx, None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, packed: Tensor, *rest: Any) -> tuple[Tensor, int]:
        x_dim, packed_dim = in_dims[:2]
        if packed_dim is None:  # rows are computed each for itself: one more leading dimension
            return linear(x.movedim(x_dim or 0, 0), packed, *rest), 0
        xs = [x] * info.batch_size if x_dim is None else x.unbind(x_dim)
        return torch.stack([linear(a, b, *rest) for a, b in zip(xs, packed.unbind(packed_dim), strict=True)]), 0


class _ForwardMode(_Linear):
    """The same with a forward mode, for eager calls."""

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return _uncompiled(_Linear.backward, ctx, dy)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Any:
        return _uncompiled(_jvp, ctx, tangent)


def _jvp(ctx: Any, tangent: Tensor) -> Tensor:
    x, packed = ctx.saved_tensors
    with torch.autocast("cpu", enabled=False):
        weight, scale, _, channel_scale = torch.ops.torchq.unpack(packed, x.shape[-1])
        z = torch.matmul(_scaled(tangent.float(), channel_scale), weight.float().t()) * scale
        return _times_slope_at(z, x, packed, ctx.activation, ctx.x_qparams).to(ctx.dtype)


def _scaled(values: Tensor, channel_scale: Tensor) -> Tensor:
    """Values (..., K) of the input's channels, times their scale; an empty one is none."""
    return values * channel_scale if channel_scale.numel() else values


def _uncompiled(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args), hidden from torch.compile.

    A call of torch.func inside torch.compile runs uncompiled (`linear` breaks the graph), but the functions that
    autograd calls there are compiled each for itself. Given the tensors of a transform, such a graph had lost the
    slope of the activation.
    """
    if "torch._dynamo" in sys.modules:  # else nothing is compiled, and to import it would take a second
        function = torch.compiler.disable(function)
    return function(*args)


def _times_slope_at(v: Tensor, x: Tensor, packed: Tensor, activation: int, x_qparams: InputQParams) -> Tensor:
    """`v ∘ act'(z)` in float32."""
    if activation == Activation.NONE:
        return v
    z = linear(x.float(), packed, Activation.NONE, x_qparams, None, torch.float32)
    return times_slope(v, z, activation)


# ---- An activation on its own: ops.activate -----------------------------------------------------------------------


def _keep_for_slope(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.activation = inputs
    ctx.save_for_backward(x)


def _activate_backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
    (x,) = ctx.saved_tensors
    return times_slope(dy.float(), x.float(), ctx.activation).to(x.dtype), None


torch.library.register_autograd("torchq::activate", _activate_backward, setup_context=_keep_for_slope)


@torch.library.register_vmap("torchq::activate")
def _(info: Any, in_dims: tuple[int | None, ...], x: Tensor, activation: int) -> tuple[Tensor, int | None]:
    return torch.ops.torchq.activate(x, activation), in_dims[0]
