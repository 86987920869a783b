"""The activations that a QuantizedLinear can compute in its epilogue: functions, slopes, and which modules they are."""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torchq.modules.classes import know
from torchq.modules.plain_code import forward_of, is_plain, is_plain_value
from torchq.ops import Activation

FUNCTIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.NONE: lambda y: y,
    Activation.RELU: nn.functional.relu,
    Activation.GELU: nn.functional.gelu,
    Activation.GELU_TANH: partial(nn.functional.gelu, approximate="tanh"),
    Activation.SILU: nn.functional.silu,
    Activation.QUICK_GELU: lambda y: y * torch.sigmoid(1.702 * y),
    Activation.HARDSWISH: nn.functional.hardswish,
    Activation.RELU2: lambda y: nn.functional.relu(y).square(),
    Activation.TANH: torch.tanh,
    Activation.SIGMOID: torch.sigmoid,
    Activation.RELU6: nn.functional.relu6,
}
"""The functions that the simulated path calls instead of the epilogue."""


def times_slope(v: Tensor, z: Tensor, activation: int) -> Tensor:
    """`v ∘ act'(z)`, made of operations that have derivatives themselves. Where act has a kink, what torch takes there.

    >>> times_slope(torch.ones(3), torch.tensor([-1.0, 0.5, 7.0]), Activation.RELU6)
    tensor([0., 1., 0.])
    """
    if activation == Activation.NONE:
        return v
    if activation == Activation.RELU:
        return torch.where(z > 0, v, 0.0)
    if activation == Activation.RELU6:
        return torch.where((z > 0) & (z < 6), v, 0.0)
    if activation in (Activation.GELU, Activation.GELU_TANH):
        approximate = "none" if activation == Activation.GELU else "tanh"
        return torch.ops.aten.gelu_backward(v, z, approximate=approximate)  # type: ignore[no-any-return]
    return v * _SLOPES[activation](z)


def _logistic_slope(rate: float, z: Tensor) -> Tensor:
    """Of `z · sigmoid(rate · z)`. Torch's own silu_backward has no derivative."""
    s = (rate * z).sigmoid()
    return s * (1 + rate * z * (1 - s))


_SLOPES: dict[int, Callable[[Tensor], Tensor]] = {
    Activation.SILU: partial(_logistic_slope, 1.0),
    Activation.QUICK_GELU: partial(_logistic_slope, 1.702),
    Activation.HARDSWISH: lambda z: torch.where(z < 3, (z / 3 + 0.5) * (z > -3), 1.0),
    Activation.RELU2: lambda z: 2 * z.relu(),
    Activation.TANH: lambda z: 1 - z.tanh().square(),
    Activation.SIGMOID: lambda z: z.sigmoid() * (1 - z.sigmoid()),
}

# ---- Recognition --------------------------------------------------------------------------------------------------

_OF_TORCH = (nn.ReLU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Tanh, nn.Sigmoid, nn.ReLU6, nn.Hardtanh)
_FORWARDS = {kind.forward for kind in _OF_TORCH}

for _kind in _OF_TORCH:
    know(_kind)

# Those that are one operation, which a layer can wait for (`pending`).
_FUNCTIONS_OF_TORCH = (
    (nn.functional.relu, Activation.RELU),
    (torch.relu, Activation.RELU),
    (nn.functional.gelu, Activation.GELU),
    (nn.functional.silu, Activation.SILU),
)

# 0 and both signs of small and large values: what is clipped somewhere, or differs in its tail, is another function.
_SIZES = [1e-3, 0.01, 0.1, 0.3, 0.7, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 7.0, 8.0, 9.9, 11.0, 20.0, 100.0, 1e4]
_PROBE = [0.0, *_SIZES, *(-size for size in _SIZES), 0.5]


def activation_of(module: nn.Module | None) -> Activation:
    """The activation that can replace this module in a layer's epilogue; NONE if none can, and for None.

    A module is known by what it computes: on fixed float32 values it gives what the function of `FUNCTIONS` gives,
    within 1e-6. It does so for two shapes and orders, in which an elementwise function gives the same, and both in eval
    and in training mode. So transformers' GELUActivation counts as well as nn.GELU.

    To run a module is to run foreign code, so only these are run: modules of torch.nn that are activations, and those
    whose code is proven to be arithmetic on one tensor (`is_plain`). They have no parameters, buffers, children or
    hooks. Their `forward` runs without gradients, on a stand-in with the same attributes, so nothing of the module or
    of the random state changes. A module that raises an error is NONE.

    A module that works in place, as nn.ReLU(inplace=True) does, counts: that nothing else reads its input is for the
    caller to prove, as for any module.

    >>> activation_of(nn.GELU(approximate="tanh")), activation_of(nn.Softplus())
    (<Activation.GELU_TANH: 3>, <Activation.NONE: 0>)
    """
    if module is None or not _may_run(module):
        return Activation.NONE
    settings = {name: value for name, value in vars(module).items() if name not in _OF_MODULES}
    if type(module) in _OF_TORCH and all(map(is_plain_value, settings.values())):
        kind: Any = type(module)  # for mypy, a class of torch has no hash
        return _of_torch(kind, forward_of(kind), tuple(settings.items()))
    return _computed(module)


_OF_MODULES = frozenset(vars(nn.Module()))


@functools.lru_cache(maxsize=256)
def _of_torch(kind: Any, forward: Any, settings: tuple[tuple[str, Any], ...]) -> Activation:
    """That of torch's modules of this class with these settings: networks have hundreds that are alike."""
    module = kind()
    vars(module).update(settings)
    return _computed(module)


def _computed(module: nn.Module) -> Activation:
    kinds = {activation_computed(partial(_forward, module, training)) for training in (False, True)}
    return kinds.pop() if len(kinds) == 1 else Activation.NONE


def activation_named(model: nn.Module, name: str) -> Activation:
    """The activation that has this full name in the model: a module, or a function of torch as a module's attribute.

    NONE if there is none of this name.

    >>> activation_named(nn.TransformerEncoderLayer(8, 2), "activation")
    <Activation.RELU: 1>
    """
    owner, _, key = name.rpartition(".")
    try:
        value = getattr(model.get_submodule(owner), key, None)
    except AttributeError:
        return Activation.NONE
    if value is None or isinstance(value, nn.Module):
        return activation_of(value)
    return next((kind for function, kind in _FUNCTIONS_OF_TORCH if function is value), Activation.NONE)


def activation_computed(function: Callable[[Tensor], Tensor]) -> Activation:
    """The activation that gives what `function` gives, for the probe's values in two shapes and orders; or NONE.

    >>> activation_computed(lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)))
    <Activation.GELU: 2>
    """
    probe = torch.tensor(_PROBE, device="cpu", dtype=torch.float32)
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            given = [(x, function(x.clone())) for x in (probe, probe.flip(0).reshape(4, -1))]
            kinds = (kind for kind in Activation if kind != Activation.NONE)
            return next((kind for kind in kinds if all(_is(kind, x, y) for x, y in given)), Activation.NONE)
    except Exception:
        return Activation.NONE


def _may_run(module: nn.Module) -> bool:
    held = (module._parameters, module._buffers, module._modules)
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    kind = type(module)
    overridden = kind.__call__ is not nn.Module.__call__ or kind.__getattr__ is not nn.Module.__getattr__
    if any(held) or any(hooks) or overridden:
        return False
    return ("forward" not in vars(module) and forward_of(kind) in _FORWARDS) or is_plain(module)


def _is(kind: Activation, x: Tensor, y: object) -> bool:
    same_form = isinstance(y, Tensor) and (y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device)
    # The values up to 1e4 are rounded, by each function in its own way.
    return same_form and torch.allclose(y, FUNCTIONS[kind](x), rtol=2**-21, atol=1e-6)  # type: ignore[arg-type]


def _forward(module: nn.Module, training: bool, x: Tensor) -> Tensor:
    stand_in = object.__new__(type(module))
    vars(stand_in).update(vars(module), training=training)
    return type(module).forward(stand_in, x)  # type: ignore[no-any-return]
