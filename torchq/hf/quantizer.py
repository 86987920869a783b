"""How transformers loads int8 models: it converts a float checkpoint, or fills a skeleton from an int8 one.

transformers fills parameters and buffers by their names, and no `_load_from_state_dict` is asked. So while it loads,
an `Awaiting` stands in the place of each int8 layer of the skeleton: plain buffers with the names and shapes of the
checkpoint's tensors. Then the layers return, and take them.
"""

import dataclasses
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.core_model_loading import WeightRenaming
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from torchq.conversion import convert
from torchq.errors import BadValueError
from torchq.modules.attention import NAME
from torchq.modules.attention_offer import offer_attention
from torchq.modules.base import Int8Module
from torchq.modules.packed_weights import PackedWeights
from torchq.modules.registry import find_layers
from torchq.planning.attach import attach_plan
from torchq.planning.names import Rename, renamed
from torchq.planning.plan import Plan, attached_plan, attention_schemes
from torchq.planning.pretrained import ADVICE, METHOD, Int8Quantizer, TorchqConfig, guards
from torchq.planning.skeleton import complete_plan, from_stored, skeleton
from torchq.planning.tables import find_tables

register_quantization_config(METHOD)(TorchqConfig)


@register_quantizer(METHOD)
class TorchqHfQuantizer(Int8Quantizer):
    """What transformers asks while it loads a model. Users pass a `TorchqConfig`."""

    _moved: Sequence[tuple[str, str]] = ()  # heads that this class lacks, and the tables that take their tensors
    _asked: Sequence[str | None] = ()  # the attn_implementation of each of the model's configs; None is the default

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Raises ValueError for a device other than the CPU."""
        devices = device_map.values() if isinstance(device_map, Mapping) else [device_map]
        other = [device for device in devices if device not in (None, "auto") and torch.device(device).type != "cpu"]
        if other:
            raise ValueError(f"torchq: int8 layers run on the CPU, but device_map says {other[0]!r}. Pass 'cpu'.")

    def update_device_map(self, device_map: Any) -> Any:
        """The CPU, whatever other devices there are."""
        return None if device_map is None else {"": "cpu"}

    def update_attn_implementation(self, config: Any) -> Any:
        """Notes what the user asks for, before transformers puts its default in the place of None."""
        self._asked = [each._attn_implementation for each in _configs(config)]
        return config

    def update_tp_plan(self, config: Any) -> Any:
        """The same: transformers 5.17 lets a quantizer see the config only here."""
        return self.update_attn_implementation(config)

    def update_weight_conversions(self, weight_conversions: list[Any], *model: nn.Module) -> list[Any]:
        """Those of an int8 checkpoint: its tensors have the model's names, but for tables whose head is left out.

        transformers gives the model from version 5.18 on.
        """
        if self.pre_quantized:
            keys = [
                (re.escape(head), table, key) for head, table in self._moved for key in ("weight_", "channel_scale")
            ]
            return [WeightRenaming(rf"^{head}\.{key}", f"{table}.{key}") for head, table, key in keys]
        return cast(list[Any], super().update_weight_conversions(weight_conversions, *model))

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        if not self.pre_quantized:
            return
        try:
            skeleton(model, self._left(model, self.plan_for(model)), inplace=True)
        except Exception as error:  # the plan may say anything
            raise ValueError(f"torchq: this checkpoint does not fit {type(model).__name__}: {error}") from error
        ignored = model._keys_to_ignore_on_load_unexpected or ()
        left_out = [f"{head}.weight" for head, _ in self._moved]
        known = [ADVICE, *left_out, *(key.removeprefix(f"{model.base_model_prefix}.") for key in guards(model))]
        model._keys_to_ignore_on_load_unexpected = {*ignored, *(f"{re.escape(key)}$" for key in known)}
        put_placeholders(model, self.placeholder)
        floats = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        model.all_tied_weights_keys = {
            target: source for target, source in model.all_tied_weights_keys.items() if {target, source} <= floats
        }

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        if self.pre_quantized:
            take_placeholders(model)
            complete_plan(model)
        else:
            convert(model, config=self.quantization_config.qconfig(self._excluded(model)), inplace=True)
            plan = self._left(model, attached_plan(model))
            offer_attention(model, attention_schemes(plan.attentions))
            attach_plan(model, plan)
        return model

    def plan_for(self, model: Any) -> Plan:
        """What the int8 checkpoint holds, under the names of this model."""
        if self.quantization_config.plan is None:
            raise BadValueError("config.json says that it is in int8, but has no plan of it.")
        plan = from_stored(self.quantization_config.plan)
        rename = renaming(plan, model)
        plan, self._moved = without_lost_heads(plan, rename)
        return renamed(plan, rename)

    def _left(self, model: Any, plan: Plan) -> Plan:
        """What is left of the plan: `attn_implementation` may ask for another attention than torchq's."""
        configs = [id(each) for each in _configs(model.config)]
        asked = dict(zip(configs, self._asked, strict=True)) if len(configs) == len(self._asked) else {}
        own = next(iter(self._asked), None)  # of modules whose config is a copy
        rows = {}
        for name, row in plan.attentions.items():
            config = getattr(_at(model, name), "config", None)
            if config is None or asked.get(id(config), own) in (None, NAME):
                rows[name] = row
        return dataclasses.replace(plan, attentions=rows)

    def placeholder(self, name: str, layer: PackedWeights) -> "Awaiting":
        """What stands for the layer of this name while its tensors are loaded."""
        return Awaiting(layer, layer.expected())

    def _excluded(self, model: nn.Module) -> tuple[str, ...]:
        """The layers and tables that `modules_to_not_convert` names."""
        layers = find_layers(model)
        names, patterns = [*layers, *find_tables(model, layers)], self.quantization_config.modules_to_not_convert or []
        for pattern in patterns:
            if all(should_convert_module(name, [pattern]) for name in names):
                warnings.warn(
                    f"torchq: modules_to_not_convert has {pattern!r}, which is no layer of {type(model).__name__}.",
                    stacklevel=2,
                )
        return tuple(name for name in names if not should_convert_module(name, patterns))


def _configs(config: Any) -> Iterator[Any]:
    """A model's config and those in it."""
    yield config
    for key in config.sub_configs:
        if getattr(config, key, None) is not None:
            yield from _configs(getattr(config, key))


def _at(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:  # check_plan names it
        return None


# ---- A plan that was saved with another class's head -----------------------------------------------------------------


def renaming(plan: Plan, model: Any) -> Rename:
    """The names of this model: with the base model's prefix or without, as transformers matches tensors.

    Layers of a head that this class lacks are left out.
    """
    layers = find_layers(model)
    known, start = {*layers, *find_tables(model, layers)}, f"{model.base_model_prefix}."
    ways = (lambda name: name, lambda name: start + name, lambda name: name.removeprefix(start))
    best = max(ways, key=lambda way: sum(way(name) in known for name in plan.layers))
    heads = [name for name in plan.layers if best(name) not in known and not name.startswith(start)]
    whole = best is not ways[1] and any(name.startswith(start) for name in plan.layers)
    return lambda name: None if whole and name in heads else best(name)


def without_lost_heads(plan: Plan, rename: Rename) -> tuple[Plan, list[tuple[str, str]]]:
    """The plan with tables of their own where the head that they share one with is left out.

    And of each such head the first table, by its new name: it takes the head's tensors.
    """
    tables, moved = dict(plan.tables), []
    for name, row in plan.tables.items():
        head, new = row.owner, rename(name)
        if row.kind == "int8" and head in plan.layers and rename(head) is None and new is not None:
            first = next(each for each, other in plan.tables.items() if other.owner == head)
            scaled = first == name and plan.layers[head].channel_scale is not None
            tables[name] = dataclasses.replace(row, owner=None if first == name else first, scaled=scaled)
            moved += [(head, new)] if first == name else []
    return dataclasses.replace(plan, tables=tables), moved


# ---- Placeholders ----------------------------------------------------------------------------------------------------


Expected = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


class Awaiting(nn.Module):
    """Stands for an int8 layer while transformers loads: a buffer for each tensor of its checkpoint.

    All else is the layer's, for code that initializes float weights: `in_features`, and a `weight` without values.
    """

    def __init__(self, layer: PackedWeights, expected: Expected) -> None:
        super().__init__()
        self.__dict__["layer"] = layer  # as no child
        for name, (dtype, shape) in expected.items():
            self._buffers[name] = torch.empty(shape, dtype=dtype, device="meta")
        self._is_hf_initialized = True

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["layer"], name)

    def loaded(self) -> dict[str, Tensor]:
        """The tensors that transformers put here."""
        found = {name: buffer for name, buffer in self._buffers.items() if getattr(buffer, "_is_hf_initialized", False)}
        return cast(dict[str, Tensor], found)

    def canonical(self) -> dict[str, Tensor]:
        """What the layer takes."""
        return self.loaded()


def put_placeholders(model: nn.Module, make: Callable[[str, PackedWeights], Awaiting]) -> None:
    """Puts one in the place of each int8 layer."""
    made: dict[int, Awaiting] = {}
    for path, module in list(model.named_modules()):
        if isinstance(module, Int8Module):
            module._is_hf_initialized = True  # type: ignore[assignment]
        for name, child in module._modules.items():
            if isinstance(child, PackedWeights):
                if id(child) not in made:
                    made[id(child)] = make(f"{path}.{name}" if path else name, child)
                module._modules[name] = made[id(child)]


def take_placeholders(model: nn.Module) -> None:
    """Puts the layers back, with what was loaded.

    Raises:
        ValueError: a tensor is missing, or has values that it can't have.
    """
    problems = []
    for path, module in list(model.named_modules()):
        if isinstance(module, Awaiting):
            prefix = f"{path}." if path else ""
            missing = module._buffers.keys() - module.loaded()
            tensors = {} if missing else module.canonical()
            problems += [f"{prefix}{name}: is missing." for name in sorted(missing)]
            problems += module.layer.problems({prefix + name: tensor for name, tensor in tensors.items()}, prefix)
        elif isinstance(module, nn.Linear) and module.weight.dtype == torch.int8:
            problems.append(f"{path}.weight: is torch.int8, but config.json says that the layer is in float.")
    if problems:
        raise ValueError("torchq: this checkpoint can't be loaded:\n\t" + "\n\t".join(problems))
    for path, module in list(model.named_modules()):
        for name, child in module._modules.items():
            if isinstance(child, Awaiting):
                module._modules[name] = child.layer
                child.layer._adopt(child.canonical())
                _initialize_buffers(model, path, child.layer)


def _initialize_buffers(model: Any, path: str, layer: PackedWeights) -> None:
    """Gives a layer the buffers that no checkpoint holds, such as the scale of Gemma's embedding: as transformers does.

    It asks the innermost of its models that has the module of this name.
    """
    empty = [name for name, buffer in layer._buffers.items() if buffer is not None and buffer.is_meta]
    for name in empty:
        layer._buffers[name] = torch.empty_like(cast(Tensor, layer._buffers[name]), device="cpu")
    if empty:
        parts = path.split(".") if path else []
        owners = [model.get_submodule(".".join(parts[:count])) for count in range(len(parts), -1, -1)]
        next(owner for owner in owners if hasattr(owner, "_init_weights"))._init_weights(layer)
