"""A checkpoint on its way into a converted model: it is checked as a whole before anything of it is loaded."""

import sys
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.overrides import is_tensor_like

from torchq.modules.packed_weights import RESIDUAL, PackedWeights


def check_state(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    metadata: dict[str, Any],
    strict: bool,
    *lists: list[str],
) -> None:
    """A `load_state_dict` pre-hook of a converted model: refuses a bad checkpoint before anything of it is loaded.

    Int8 layers are checked, and float modules that load as nn.Module does. What has a way of its own to load may take
    other keys than it seems; it and what is in it are left to torch, but for the values of int8 layers.

    Raises:
        RuntimeError: with every key that is missing or unexpected, if the caller is strict, or whose value, shape or
            dtype the model can't take.
    """
    found, expected, private = [], set(), []
    for name, part in _parts(module, prefix):
        loads_alone = _loads_in_its_own_way(part)
        if loads_alone:
            private.append(name)
        elif not any(name.startswith(outer) for outer in private):
            expected |= {name + key for key in _keys(part)}
        if isinstance(part, PackedWeights):
            found += part.problems(state_dict, name)
        elif not loads_alone:
            found += _misfits(part, state_dict, name, metadata)
    if strict and _caller_is_strict():
        ours = {key for key in state_dict if not any(key.startswith(name) for name in private)}
        named = {text.split(": ")[0] for text in found}
        missing = {key for key in expected - ours if key.rpartition(".")[2] != RESIDUAL}
        found += _listed("Missing", missing) + _listed("Unexpected", ours - expected - named)
    if found:
        raise RuntimeError("torchq: this checkpoint can't be loaded, and nothing of it was:\n\t" + "\n\t".join(found))


def _caller_is_strict() -> bool:
    """What the caller of load_state_dict said. torch tells hooks True in any case, so its frame is looked at."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code is nn.Module.load_state_dict.__code__:
            return bool(frame.f_locals["strict"])
    return True


def _parts(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """The module and all in it, each under every name that it has, with the prefix of its keys."""
    yield prefix, module
    for name, child in module._modules.items():
        if child is not None:
            yield from _parts(child, f"{prefix}{name}.")


def _loads_in_its_own_way(module: nn.Module) -> bool:
    if isinstance(module, PackedWeights):
        return False
    hooks = [
        hook for hook in module._load_state_dict_pre_hooks.values() if getattr(hook, "hook", hook) is not check_state
    ]
    own = [getattr(type(module), name) is not getattr(nn.Module, name) for name in _LOADING]
    return bool(hooks) or any(own)


_LOADING = ("_load_from_state_dict", "set_extra_state", "get_extra_state")


def _tensors(module: nn.Module) -> dict[str, Any]:
    """What a float module loads."""
    buffers = {key: t for key, t in module._buffers.items() if key not in module._non_persistent_buffers_set}
    return {key: tensor for key, tensor in [*module._parameters.items(), *buffers.items()] if tensor is not None}


def _keys(module: nn.Module) -> list[str]:
    return list(module.expected() if isinstance(module, PackedWeights) else _tensors(module))


def _misfits(module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> list[str]:
    """What torch would not take for this float module, each with its key."""
    found = []
    for key, own in _tensors(module).items():
        given, key = state_dict.get(prefix + key, own), prefix + key
        if not is_tensor_like(given):
            found.append(f"{key}: expected a tensor, got {type(given).__name__}.")
        elif given.shape != own.shape and (own.dim(), tuple(given.shape)) != (0, (1,)):  # which torch takes for ()
            found.append(f"{key}: expected shape {tuple(own.shape)}, got {tuple(given.shape)}.")
        elif given.is_meta and not own.is_meta and not metadata.get("assign_to_params_buffers"):
            found.append(f"{key}: is on the meta device and has no values. Load the checkpoint to the CPU.")
    return found


def _listed(which: str, keys: set[str]) -> list[str]:
    names = ", ".join(f'"{key}"' for key in sorted(keys))
    return [f"{which} key(s) in state_dict: {names}."] if keys else []  # torch's own words
