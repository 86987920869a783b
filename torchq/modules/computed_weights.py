"""Weights that a hook or a parametrization computes: weight_norm, spectral_norm, pruning. In eval mode they are fixed.

So a conversion takes the value, and the int8 layer has neither the hook nor what the value was computed of.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

_HOOKS = (WeightNorm, SpectralNorm)
_SOURCES = ("weight_g", "weight_v", "weight_orig", "weight_u", "weight_mask", "parametrizations")


def is_weight_hook(hook: Any) -> bool:
    """Whether a forward pre-hook of a module does nothing but compute its weight."""
    if isinstance(hook, BasePruningMethod):
        return hook._tensor_name == "weight" and type(hook).__call__ is BasePruningMethod.__call__
    return isinstance(hook, _HOOKS) and hook.name == "weight"


def is_computed(module: nn.Module) -> bool:
    """Whether the module's weight is computed of other parameters."""
    return parametrize.is_parametrized(module) or any(map(is_weight_hook, module._forward_pre_hooks.values()))


def sources(module: nn.Module) -> tuple[str, ...]:
    """The names of what the module may hold to compute its weight of."""
    return _SOURCES if is_computed(module) else ()


def without_history(model: nn.Module) -> dict[int, Tensor]:
    """A memo for deepcopy, which refuses tensors that have a history: those that hooks computed where gradients are on.

    The next call computes them anew. In a model that was just made, torch.nn.utils.weight_norm has left such ones.

    >>> model = nn.Sequential(torch.nn.utils.spectral_norm(nn.Linear(8, 4)))
    >>> model(torch.ones(2, 8)).requires_grad, len(without_history(model))
    (True, 1)
    """
    hooks = [(module, hook) for module in model.modules() for hook in module._forward_pre_hooks.values()]
    names = [(module, hook.name) for module, hook in hooks if isinstance(hook, _HOOKS)]
    names += [(module, hook._tensor_name) for module, hook in hooks if isinstance(hook, BasePruningMethod)]
    computed = [vars(module)[name] for module, name in names if isinstance(vars(module).get(name), Tensor)]
    return {id(tensor): tensor.detach().clone() for tensor in computed if not tensor.is_leaf}


def weight_of(module: nn.Module) -> Tensor:
    """The weight that a call of the module in eval mode takes. The module does not change, in training mode either.

    >>> layer = torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 4))
    >>> layer.parametrizations.weight.original0.data.fill_(2.0).shape
    torch.Size([4, 1])
    >>> weight_of(layer).norm(dim=1).round().detach()
    tensor([2., 2., 2., 2.])
    """
    hooks: list[Any] = [hook for hook in module._forward_pre_hooks.values() if is_weight_hook(hook)]
    if hooks and isinstance(hooks[0], BasePruningMethod):
        with torch.no_grad():
            return hooks[0].apply_mask(module)  # type: ignore[no-any-return]
    if hooks:
        no_iteration = [False] * isinstance(hooks[0], SpectralNorm)
        with torch.no_grad():
            return hooks[0].compute_weight(module, *no_iteration)  # type: ignore[no-any-return]
    if not parametrize.is_parametrized(module, "weight"):
        return module.weight  # type: ignore[return-value]
    parts = [part for part in module.parametrizations.modules() if part.training]  # type: ignore[union-attr]
    try:
        for part in parts:
            part.training = False  # in training, spectral_norm goes on with its power iteration
        return module.weight  # type: ignore[return-value]
    finally:
        for part in parts:
            part.training = True
