"""Offers torchq's attention to the modules of a converted model."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from torchq.modules.attention import NAME, SDPA, AttentionScheme, OwnAttention, asks_the_registry, register
from torchq.modules.layer_form import LayerForm
from torchq.modules.sdpa_calls import SdpaCalls, calls_sdpa, release
from torchq.modules.self_attention import SelfAttention


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules whose attention torchq can compute, by name.

    Its own, those that ask transformers' registry for "sdpa", and those whose code calls torch's function.
    """
    return {name: module for name, module in model.named_modules() if _can_attend(module)}


def _can_attend(module: nn.Module) -> bool:
    return isinstance(module, OwnAttention) or asks_the_registry(module) or calls_sdpa(module)


def offer_attention(model: nn.Module, schemes: Mapping[str, str]) -> None:
    """Lets the attention modules of a converted model use torchq, each by its scheme; those not named, torch's sdpa.

    A config is shared by modules. A module whose config says "torchq" and that has no scheme computes by sdpa.
    """
    configs = {}
    for name, module in attention_modules(model).items():
        if isinstance(module, OwnAttention):
            module.scheme = schemes.get(name, SDPA)
        elif not asks_the_registry(module):
            release(module)
            if name in schemes:
                SdpaCalls.adopt(module, schemes[name])
        else:
            config: Any = module.config
            module.__dict__.pop("torchq_attention", None)
            config._attn_implementation_internal = SDPA
            SelfAttention.adopt(module)
            if name in schemes:
                module.torchq_attention = AttentionScheme(schemes[name])  # type: ignore[assignment]
                configs[name] = config
    if configs:
        register()
        for module in reversed(list(model.modules())):  # when all within are what they become
            LayerForm.adopt(module)
    for config in configs.values():
        config._attn_implementation_internal = NAME
