"""compressed-tensors, the interchange format of vLLM: int8 checkpoints ("int-quantized", W8A8) written and run.

Its activations are int8 codes, torchq's are u8: a zero point there is one less 128 here, and symmetric activations have
zero point 128. Its weights have one scale per output channel, or one for all.
"""

import copy
import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.core_model_loading import WeightRenaming
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from torchq.errors import BadTypeError, BadValueError, door
from torchq.hf.quantizer import Awaiting, TorchqHfQuantizer
from torchq.modules.attention_offer import attention_modules
from torchq.modules.embedding import QuantizedTable
from torchq.modules.packed_weights import PackedWeights
from torchq.modules.quantized_linear import QuantizedLinear
from torchq.modules.registry import find_layers
from torchq.numerics.qparams import QParams
from torchq.planning.attach import attach_plan
from torchq.planning.plan import AttentionPlan, LayerPlan, Plan, attached_plan
from torchq.planning.pretrained import Int8Quantizer, TorchqConfig

FORMAT = "int-quantized"
_MIDDLE = 128  # the code of zero, of symmetric activations

# ---- Writing --------------------------------------------------------------------------------------------------------

_WEIGHTS = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False}
_ACTIVATIONS = {
    "int8 dynamic": {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": False, "dynamic": True},
    "int8 static": {"num_bits": 8, "type": "int", "strategy": "tensor", "symmetric": False, "dynamic": False},
}


@door("torchq.hf.save_compressed_tensors")
def save_compressed_tensors(qmodel: Any, folder: str | os.PathLike[str], **settings: Any) -> None:
    """Writes a converted transformers model as a compressed-tensors checkpoint, which vLLM and transformers read.

    The nn.Linear layers keep their int8 weights, scales and static ranges. Int8 tables, and heads that share one, are
    written in float. How attention is computed is the reader's affair.

    Args:
        qmodel: a converted PreTrainedModel. What the format has no place for: channel scales, a bias that bias
            correction gave to a layer without one, int8 layers that were no nn.Linear. So convert by
            `QConfig(smoothing="none", rounding="nearest", exclude=...)`.
        folder: where to.
        settings: of `save_pretrained`, such as max_shard_size.

    Raises:
        TypeError: `qmodel` is no PreTrainedModel.
        ValueError: it is not converted, or has what the format has no place for.
    """
    if not isinstance(qmodel, PreTrainedModel):
        raise BadTypeError(f"qmodel must be a converted PreTrainedModel, got {type(qmodel).__name__}.")
    plan = attached_plan(qmodel)
    layers = {name: _written(name, qmodel.get_submodule(name), plan) for name in _layers(qmodel, plan)}
    writer = copy.copy(qmodel)
    writer.config = copy.deepcopy(qmodel.config)
    writer.config.quantization_config = _config(qmodel, plan, list(layers))
    writer.hf_quantizer = _Writer(_state(qmodel, layers))
    writer._weight_conversions = []
    writer.save_pretrained(folder, **settings)


class _Writer(Int8Quantizer):
    """Says that this state is what is to be saved."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        self._state = state

    def get_state_dict_and_metadata(self, model: nn.Module, *_: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What `save_pretrained` writes."""
        return self._state, {}


def _layers(qmodel: nn.Module, plan: Plan) -> list[str]:
    """The layers that are written in int8."""
    owners = {row.owner for row in plan.tables.values()}
    return [name for name in plan.int8_layers() if name not in owners]


def _written(name: str, layer: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """The tensors of a layer as compressed-tensors has them."""
    if plan.layers[name].fine:
        raise BadValueError(
            f"{name!r} has two codes for each value of its input, which the format has no place for. Apply its plan "
            "with fine=False."
        )
    if type(layer) is not QuantizedLinear or layer.transposed:
        raise BadValueError(
            f"{name!r} was no nn.Linear, which the format has no place for. Leave it in float, QConfig(exclude=...)."
        )
    if layer.channel_scale is not None:
        raise BadValueError(f"{name!r} has a channel_scale. Convert with QConfig(smoothing='none').")
    if layer.has_bias != layer.had_bias:
        raise BadValueError(f"{name!r} got a bias by bias correction. Convert with QConfig(rounding='nearest').")
    tensors = layer._canonical()
    written = {"weight": tensors["weight_int8"], "weight_scale": tensors["weight_scale"].unsqueeze(1)}
    if layer.has_bias:
        written["bias"] = tensors["bias"].to(layer.dtype)
    if layer.input_qparams is not None:
        written["input_scale"] = tensors["input_scale"].reshape(1)
        written["input_zero_point"] = (tensors["input_zero_point"].reshape(1) - _MIDDLE).to(torch.int8)
    return written


def _state(qmodel: nn.Module, layers: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The whole state: int8 layers as they are written, and all else in float.

    A head that shares a table has the table's values, which are more exact: the two are one tensor to others.
    """
    state: dict[str, Tensor] = {}
    ours = {f"{name}." for name, module in qmodel.named_modules() if isinstance(module, PackedWeights)}
    tables = {id(module.owner): module for module in qmodel.modules() if isinstance(module, QuantizedTable)}
    for name, module in qmodel.named_modules():
        if name in layers:
            state |= {f"{name}.{key}": tensor for key, tensor in layers[name].items()}
        elif isinstance(module, (QuantizedTable, QuantizedLinear)):
            state[f"{name}.weight"] = tables.get(id(module), module).weight + 0
            if module.bias is not None:
                state[f"{name}.bias"] = module.bias + 0
    for key, tensor in qmodel.state_dict().items():
        if f"{key.rpartition('.')[0]}." not in ours:
            state[key] = tensor
    return state


def _config(qmodel: nn.Module, plan: Plan, layers: Sequence[str]) -> dict[str, Any]:
    """What config.json says."""
    kinds: dict[str, list[str]] = {}
    for name in layers:
        kinds.setdefault(plan.layers[name].kind, []).append(name)
    groups = {
        f"group_{number}": {
            "targets": ["Linear"] if len(kinds) == 1 else names,
            "weights": _WEIGHTS,
            "input_activations": _ACTIVATIONS[kind],
            "output_activations": None,
            "format": FORMAT,
        }
        for number, (kind, names) in enumerate(kinds.items())
    }
    linears = (nn.Linear, QuantizedLinear)
    ignore = [name for name, module in qmodel.named_modules() if isinstance(module, linears) and name not in layers]
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignore,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


# ---- Reading --------------------------------------------------------------------------------------------------------

_METHOD = "torchq-compressed-tensors"


def from_compressed_tensors(auto_class: Any, path: str | os.PathLike[str], **settings: Any) -> Any:
    """Loads a compressed-tensors checkpoint of int8 weights and activations, to run in int8.

    transformers itself computes such a checkpoint in float. Dynamic activations have a scale and zero point per token
    here, also where the checkpoint asks for symmetric ones, which have coarser steps.

    Args:
        auto_class: such as `AutoModelForCausalLM`, or a model's class.
        path: a folder, or a name on the hub.
        settings: of `from_pretrained`.

    Raises:
        ValueError: another format, other numbers of bits, or groups of weights.
    """
    config = AutoConfig.from_pretrained(path)
    said = getattr(config, "quantization_config", None)
    if not isinstance(said, dict) or said.get("quant_method") != "compressed-tensors":
        raise ValueError(f"torchq.hf.from_compressed_tensors: {os.fspath(path)} is no compressed-tensors checkpoint.")
    config.quantization_config = {"quant_method": _METHOD, "said": said}
    return auto_class.from_pretrained(path, config=config, **settings)


@register_quantization_config(_METHOD)
class _Said(QuantizationConfigMixin):  # type: ignore[misc]
    def __init__(self, said: dict[str, Any], quant_method: str = _METHOD) -> None:
        self.said, self.quant_method = said, quant_method


class _Scheme(NamedTuple):
    """How a group of layers is quantized."""

    per_channel: bool
    static: bool
    symmetric: bool
    reason: str


@register_quantizer(_METHOD)
class CompressedTensorsQuantizer(TorchqHfQuantizer):
    """What transformers asks while it loads such a checkpoint. Users call `from_compressed_tensors`."""

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._schemes: dict[str, _Scheme] = {}

    def update_weight_conversions(self, weight_conversions: list[Any], *model: nn.Module) -> list[Any]:
        """Renamings as for a float checkpoint; no tensors are merged, since each layer has its own."""
        return [conversion for conversion in weight_conversions if isinstance(conversion, WeightRenaming)]

    def plan_for(self, model: Any) -> Plan:
        """The plan that the checkpoint's groups are."""
        said, layers = self.quantization_config.said, find_layers(model)
        _check(said)
        rows = {}
        for name, layer in layers.items():
            scheme = None if type(layer.module) is not nn.Linear else _scheme_of(name, layer.module, said)
            if scheme is None:
                rows[name] = LayerPlan("float", "the checkpoint has it in float")
                continue
            self._schemes[name] = scheme
            static = QParams(1.0, _MIDDLE) if scheme.static else None
            kind = "int8 static" if scheme.static else "int8 dynamic"
            rows[name] = LayerPlan(kind, scheme.reason, scheme.per_channel, static)  # type: ignore[arg-type]
        reason = "no data to measure a faster scheme with"
        attentions = {name: AttentionPlan("float32", reason) for name in attention_modules(model)}
        return Plan(rows, attentions=attentions)

    def placeholder(self, name: str, layer: PackedWeights) -> Awaiting:
        """What stands for the layer of this name while its tensors are loaded."""
        return _AwaitingCompressed(layer, self._schemes[name])

    def _process_model_after_weight_loading(self, model: Any, **more: Any) -> Any:
        super()._process_model_after_weight_loading(model, **more)
        rows = dict(model.torchq_plan.layers)
        for name, row in rows.items():
            if row.kind == "int8 static":
                rows[name] = dataclasses.replace(row, input_qparams=model.get_submodule(name).input_qparams)
        self.quantization_config = model.config.quantization_config = TorchqConfig()
        attach_plan(model, dataclasses.replace(model.torchq_plan, layers=rows))
        return model


class _AwaitingCompressed(Awaiting):
    """Stands for an int8 layer while the tensors of a compressed-tensors checkpoint are loaded."""

    def __init__(self, layer: PackedWeights, scheme: _Scheme) -> None:
        n, k = layer.out_features, layer.in_features
        expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"weight": (torch.int8, (n, k))}
        expected["weight_scale"] = (torch.float32, (n, 1) if scheme.per_channel else (1,))
        if layer.has_bias:
            expected["bias"] = (torch.float32, (n,))
        if scheme.static:
            expected["input_scale"] = (torch.float32, (1,))
            if not scheme.symmetric:
                expected["input_zero_point"] = (torch.int8, (1,))
        super().__init__(layer, expected)

    def canonical(self) -> dict[str, Tensor]:
        """What the layer takes."""
        given = self.loaded()
        tensors = {"weight_int8": given["weight"].contiguous()}
        tensors["weight_scale"] = given["weight_scale"].reshape(-1).expand(self.layer.out_features).contiguous()
        if "bias" in given:
            tensors["bias"] = given["bias"]
        if "input_scale" in given:
            zero = given.get("input_zero_point", torch.zeros(1, dtype=torch.int8, device="cpu"))
            tensors["input_scale"] = given["input_scale"].reshape(())
            tensors["input_zero_point"] = zero.reshape(()).to(torch.int32) + _MIDDLE
        return tensors


def _check(said: Mapping[str, Any]) -> None:
    if said.get("kv_cache_scheme") is not None:
        raise BadValueError("it quantizes the cache of keys and values, which torchq does not.")
    for name, group in said["config_groups"].items():
        form = group.get("format") or said.get("format")
        if form not in (FORMAT, "naive-quantized"):
            raise BadValueError(f"{name} has format {form!r}, and torchq reads {FORMAT!r}.")
        weights, inputs = group.get("weights") or {}, group.get("input_activations")
        for what, args in (("weights", weights), ("input_activations", inputs)):
            if args is None or args.get("num_bits") != 8 or args.get("type") != "int":
                raise BadValueError(f"{what} of {name} must be 8 bits of int, got {args}.")
        if weights.get("strategy") not in ("channel", "tensor") or not weights.get("symmetric"):
            raise BadValueError(f"weights of {name} must be symmetric, by channel or tensor, got {weights}.")
        if inputs.get("dynamic") not in (True, False) or (inputs["dynamic"], inputs.get("strategy")) not in _STRATEGIES:
            raise BadValueError(f"inputs of {name} must be dynamic by token or static by tensor, got {inputs}.")


_STRATEGIES = ((True, "token"), (False, "tensor"))


def _scheme_of(name: str, module: nn.Module, said: Mapping[str, Any]) -> _Scheme | None:
    """The scheme of a layer; None if it is in float."""
    if any(_names(pattern, name, module) for pattern in said.get("ignore") or ()):
        return None
    for key, group in said["config_groups"].items():
        if any(_names(pattern, name, module) for pattern in group["targets"]):
            inputs = group["input_activations"]
            reason = f"compressed-tensors, {key}"
            per_channel = group["weights"]["strategy"] == "channel"
            return _Scheme(per_channel, not inputs["dynamic"], bool(inputs.get("symmetric")), reason)
    return None


def _names(pattern: str, name: str, module: nn.Module) -> bool:
    """Whether a target names this module: by its full name, by "re:" and a regular expression, or by its class."""
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), name) is not None
    return pattern in (name, *(kind.__name__ for kind in type(module).__mro__))
